"""What the `prepare` stage found, in lines for a log; and what it dropped, where it refuses."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from tasks.errors import InputError, label
from tasks.lamp.definitions import LampTask
from tasks.results.models import Prepared

SHOWN_AUTHORS = 40
SPLITS = {"grouped": "split by author", "published": "split by user, as published"}


def describe(users: Prepared) -> list[str]:
    """What was read, how it was split and what was left out, in lines for a log."""
    lamp_task, counts, authors = users.task.name, users.counts, users.authors
    lines = [
        f"{lamp_task}: {counts['users']} users by {counts['groups']} authors; "
        f"{SPLITS[users.split['kind']]}: {counts['base_users']} base users, "
        f"{counts['anchor_candidates']} anchor candidates, "
        f"{counts['few_shot_users']} few-shot users by {counts['few_shot_groups']} authors "
        f"with {counts['queries']} queries"
    ]
    for role, names in authors.items():
        if names:
            lines.append(f"{lamp_task}: {role} authors: {', '.join(map(label, names))}")
    for name in ("queries_in_other_profiles", "pooled_users", "removed_shared_group",
                 "removed_few_shot_without_query", "unseen_few_shot_items", "shared_author",
                 "papers_asked_by_their_author", "papers_asked_by_a_drawn_citation"):  # fmt: skip
        if counts.get(name):
            lines.append(f"{lamp_task}: {name.replace('_', ' ')}: {counts[name]}")
    lines += [f"{lamp_task}: {line}" for line in _findings(users.audit)]
    lines.append(f"{lamp_task}: dropped: {_counted(users.dropped) or 'nothing'}")
    return lines


def readable(authors: list[str]) -> list[str]:
    """Author ids of one side where they are few enough to be read; the tables hold all."""
    names = sorted(set(authors))
    return names if len(names) <= SHOWN_AUTHORS else []


@contextmanager
def naming_dropped(dropped: Mapping[str, int], task: LampTask) -> Iterator[None]:
    """A refusal within says first what was dropped: that may be why.

    dropped: counts by reason. Where labels were that the task does not have, the line ends with
    those that it has; not with what was there instead, which may be a user's text.
    """
    try:
        yield
    except InputError as error:
        from tasks.lamp.kept import UNKNOWN_GOLD, UNKNOWN_LABEL

        if not dropped:
            raise
        hint = ""
        if UNKNOWN_LABEL in dropped or UNKNOWN_GOLD in dropped:
            hint = (
                f"; {task.name} takes the labels {', '.join(task.labels)}: "
                "a task with labels of its own cannot run under this name"
            )
        raise InputError(f"dropped {_counted(dropped)}: {error}{hint}") from None


def _counted(dropped: Mapping[str, int]) -> str:
    return "; ".join(f"{count} x {reason}" for reason, count in dropped.items())


def _findings(audit: dict[str, Any]) -> list[str]:
    """What of the audit a reader of the scores must know; the value has all of it."""
    lines = []
    groups = audit["groups"]["few_shot"]
    if set(groups) - {"1"}:
        sizes = ", ".join(f"{count} of {size}" for size, count in groups.items())
        lines.append(f"few-shot authors by their number of users: {sizes}")
    asked = audit["queries"]["few_shot"]
    if asked["text"]["any"]:
        known = asked["text_and_answer"]["any"]
        where = ", ".join(
            f"{asked['text'][place]} {name}"
            for place, name in (
                ("own", "in the user's own"),
                ("sibling", "in another of the author's"),
                ("other", "in another author's"),
            )
        )
        lines.append(
            f"queries whose text stands in a profile: {asked['text']['any']} of {asked['asked']} "
            f"({where}), with the gold answer: {known}"
        )
    repeated = audit["duplicates"]
    if repeated["repeated_texts"]:
        lines.append(
            f"texts that stand in several profiles: {repeated['repeated_texts']} of "
            f"{repeated['texts']}; texts with several answers: "
            f"{repeated['texts_with_several_answers']}"
        )
    if golds := audit["labels"]["golds"]:
        lines.append(
            f"always answering {golds['majority']!r} is right for {golds['majority_share']:.1%} "
            f"of the queries (entropy of the golds: {golds['entropy_bits']:.2f} bits)"
        )
    return lines
