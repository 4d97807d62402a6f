"""What changed since the last run of the same configuration: scores, users, anchors.

The last run is the newest in `.mta/runs` of this machine whose configuration differs at most in
where it ran. Such are scheduled runs, week after week, on data under one path.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tasks.errors import InputError, label
from tasks.methods import METHODS
from tasks.record import File, digest
from tasks.report.files import all_runs, shown_run
from tasks.results.models import Estimate
from tasks.results.run import Cell, Merging, Run
from tasks.text.questions import asked, content
from tasks.users import each_user

ROLES = {"base": "base users", "anchor": "anchor candidates", "few_shot": "few-shot users"}
# The sections that decide no result.
ELSEWHERE = {"compute", "plan", "dry_run"}
SHOWN_IDS = 10


@dataclass(frozen=True)
class ScoreChange:
    """A method's `score` in a cell, in the last run (empty: it was not there) and in this one."""

    cell: str
    method: str
    then: Estimate
    now: Estimate


@dataclass(frozen=True)
class Since:
    """What differs from the last run. changes: lines on users and anchors."""

    last: str
    scores: list[ScoreChange]
    changes: list[str]

    def lines(self) -> list[str]:
        """The lines for the table: changes, and the scores that moved."""
        moved = [
            f"{one.cell}, {one.method}: score {one.then.text()} -> {one.now.text()}"
            for one in self.scores
            if one.then != one.now
        ]
        lines = [*self.changes, *(moved or ["no score moved"])]
        return [f"since {self.last}: {line}" for line in lines]


def last_run(run: Run) -> Run | None:
    """The last run of this configuration but for `run` itself; None if there is none."""

    def deciding(config: Mapping[str, Any]) -> dict[str, Any]:
        return {name: value for name, value in config.items() if name not in ELSEWHERE}

    wanted = deciding(run.config)
    return next((r for r in all_runs(but=run.id) if deciding(r.config) == wanted), None)


def since(run: Run) -> Since | None:
    """What differs from the last run of this configuration; None if there is none."""
    last = last_run(run)
    if last is None:
        return None
    scores: list[ScoreChange] = []
    changes: list[str] = []
    for cell in run.cells:
        then = last.cell(cell.config.lamp_task, cell.config.seed)
        for name in METHODS:
            if name in cell.compared.intervals:
                was = then.compared.estimate(name) if then else Estimate()
                scores.append(ScoreChange(cell.name, name, was, cell.compared.estimate(name)))
        changes += [f"{cell.name}{line}" for line in _changes(cell, then)]
    return Since(shown_run(last), scores, changes or ["users and anchors are the same"])


def _changes(cell: Cell, then: Cell | None) -> list[str]:
    """How a cell's users and anchors differ from the last run's, in lines."""
    unknown = ": the last run's users are not known"
    if then is None:
        return [unknown]
    lines = []
    try:
        for role, name in ROLES.items():
            was, now = then.users.side(role), cell.users.side(role)
            if was.sha256 != now.sha256:
                before, after = _users(was), _users(now)
                if role == "anchor":  # base users among them have a line of their own
                    before, after = (
                        {one: own[one] for one in own.keys() - _users(users.base).keys()}
                        for own, users in ((before, then.users), (after, cell.users))
                    )
                lines += _counts(f", {name}", before, after)
    except (InputError, OSError):
        lines.append(unknown)
    words = ("new", "replaced", "trained again")
    for merging in cell.mergings:
        method = merging.methods[0]
        banks = _anchors(then.merging(method)), _anchors(merging)
        lines += _counts(f", {method}, anchors", *banks, words)
    return lines


def _counts(
    what: str,
    then: Mapping[str, str],
    now: Mapping[str, str],
    words: Sequence[str] = ("added", "removed", "changed"),
) -> list[str]:
    """A line of how many ids were added, removed and changed, with the first of them; or none."""
    changed = {name for name in now.keys() & then.keys() if now[name] != then[name]}
    parts = []
    for ids, word in zip((now.keys() - then, then.keys() - now, changed), words, strict=True):
        if ids:
            shown = ", ".join(map(label, sorted(ids)[:SHOWN_IDS]))
            more = f" and {len(ids) - SHOWN_IDS} more" if len(ids) > SHOWN_IDS else ""
            parts.append(f"{len(ids)} {word} ({shown}{more})")
    return [f"{what}: {'; '.join(parts)}"] if parts else []


def _anchors(merging: Merging | None) -> dict[str, str]:
    """Anchor -> the hash of its LoRA."""
    members = merging.merged.bank.members if merging else ()
    return {one.anchor: one.adapter.sha256 for one in members}


def _users(table: File) -> dict[str, str]:
    """user_id -> hash of the user's history and queries."""
    return {
        user["user_id"]: digest([content(user["profile"]), *asked(user)])
        for user in each_user(table)
    }
