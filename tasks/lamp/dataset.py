"""From all users of a LaMP task, as they were read, to the tables of three sides.

Base users may be anchor candidates as well (`split.base_candidates`). Nobody of either is scored.

Development users may stand in the few-shot users' place: anchor candidates, who are nobody's anchor
then. What is chosen on them has not seen a few-shot user.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polars as pl

from tasks.errors import InputError
from tasks.lamp.audit import audit
from tasks.lamp.citations import NO_RELATED, ask_related, has_unasked
from tasks.lamp.content import keyed
from tasks.lamp.definitions import LampTask
from tasks.lamp.folders import ROLES
from tasks.lamp.kept import EMPTY_QUERY, EMPTY_USER, UNKNOWN_GOLD
from tasks.lamp.options import SplitOptions
from tasks.lamp.prompts import instruction_of
from tasks.lamp.splits import counted, rank, split_users
from tasks.lamp.tables import (
    SIDE,
    append,
    pooled,
    read_table,
    row_groups,
    write_side,
    write_sides,
)

# A development user's last items are asked: a third of all, and no more than so many.
QUERIES = 5
# So many items before them are the user's profile.
ITEMS = 10


@dataclass(frozen=True)
class Dataset:
    """What is known of written tables; longest_candidate: items of an anchor candidate."""

    few_shot_ids: tuple[str, ...]
    longest_candidate: int
    instruction: str
    counts: dict[str, int]
    audit: dict[str, Any]


def write_dataset(
    everyone: Path, dropped: Counter[str], options: SplitOptions, task: LampTask, seed: int
) -> Dataset:
    """Write `<side>.parquet` and `pooled.parquet` (`tables.pooled`) in place of `everyone`.

    everyone: the file of `formats.copy_users`. dropped: counts by reason, which grow with papers
    that cannot be asked about. Raises InputError where a side, or every query, is empty.
    """
    out = everyone.parent
    users = keyed(everyone, task)
    _check_left(users, dropped)
    split = split_users(users, task, options, seed)
    audited = audit(split.users, dropped, task)
    frames = {"base": split.base, "anchor": split.anchor, "few_shot": split.few_shot}
    counts = dict(split.counts)
    if options.few_shot_items is not None:
        shown = pl.col("profile").list.head(options.few_shot_items)
        frames["few_shot"] = split.few_shot.with_columns(shown)
        counts["unseen_few_shot_items"] += _items(split.few_shot) - _items(frames["few_shot"])
    write_sides(everyone, frames, out)
    everyone.unlink()
    rows = {side: frames[side] for side in ("base", "anchor")}
    pooled(split.users, rows).write_parquet(out / "pooled.parquet")
    if task.items == "built" and any(map(has_unasked, frames.values())):
        frames = _ask_papers(out, dropped, task.name, seed)
        counts["papers_asked_by_their_author"] = sum(map(_items, frames.values()))
    parts = (part for side in ROLES for part in row_groups(out / f"{side}.parquet", ["query"]))
    asked = (query for part in parts for own in part["query"].to_pylist() for query in own)
    instruction = instruction_of((query["input"] for query in asked), task)
    if options.development:
        frames = _development(out, task, instruction, options, seed)
        table = pl.concat(one.with_columns(role=pl.lit(side)) for side, one in frames.items())
        audited = audit(table, dropped, task)
        counts |= counted(table, frames, task)
    candidates = frames["anchor"]
    if options.base_candidates:
        append(out / "base.parquet", out / "anchor.parquet")
        candidates = pl.concat([candidates, frames["base"]])
        counts["base_users_as_candidates"] = frames["base"].height
    return Dataset(
        few_shot_ids=tuple(frames["few_shot"]["user_id"]),
        longest_candidate=max(candidates["profile"].list.len().to_list()),
        instruction=instruction,
        counts=counts,
        audit=audited,
    )


def _items(users: pl.DataFrame) -> int:
    return int(users["profile"].list.len().sum())


def _check_left(users: pl.DataFrame, dropped: Mapping[str, int]) -> None:
    """More users of the same kind would not help where all were dropped."""
    if users.is_empty():
        raise InputError("no user is left; mend what was dropped")
    if not users["query"].list.len().sum() and {EMPTY_QUERY, UNKNOWN_GOLD} & dropped.keys():
        raise InputError("no query is left to be scored on; mend what was dropped")


def _ask_papers(
    folder: Path, dropped: Counter[str], lamp_task: str, seed: int
) -> dict[str, pl.DataFrame]:
    """The sides written again, and given back, with a question for every paper.

    No few-shot user's paper is shown to others.
    """
    # LaMP-1 is small: its texts may be in memory.
    frames = {side: read_table(folder / f"{side}.parquet") for side in ROLES}
    others = pl.concat([frames["base"], frames["anchor"]])
    for side, frame in frames.items():
        asked, lost = ask_related(frame, others, seed)
        frames[side] = asked.filter(pl.col("profile").list.len() > 0)
        dropped[NO_RELATED] += lost
        dropped[EMPTY_USER] += frame.height - frames[side].height
    for side in ("anchor", "few_shot"):
        if frames[side].is_empty():
            raise InputError(
                f"{lamp_task}: the papers name no citation, and no {side.replace('_', '-')} user "
                "has two papers to ask against another author's; give more users, or papers with "
                "their citation"
            )
    for side, frame in frames.items():
        write_side(frame, folder / f"{side}.parquet")
    return frames


def _development(
    folder: Path, task: LampTask, instruction: str, options: SplitOptions, seed: int
) -> dict[str, pl.DataFrame]:
    """The sides written again, and given back, with development users in the few-shot users' place.

    Texts are in memory: settings are chosen on small data.
    """
    frames = {side: read_table(folder / f"{side}.parquet") for side in ("base", "anchor")}
    frames["anchor"], users = split_off(frames["anchor"], task, instruction, seed)
    if options.few_shot_items is not None:
        users = users.with_columns(pl.col("profile").list.head(options.few_shot_items))
    frames["few_shot"] = users
    for side in ("anchor", "few_shot"):
        write_side(frames[side], folder / f"{side}.parquet")
    return frames


def split_off(
    candidates: pl.DataFrame, task: LampTask, instruction: str, seed: int
) -> tuple[pl.DataFrame, pl.DataFrame]:
    """(the anchor candidates left, the development users), columns as `tables.SIDE`.

    Half of the candidates with three items or more, drawn by the seed. instruction: what stands
    before a query's text. Raises InputError where items are no questions, or nobody is left.
    """
    if task.items == "completed":
        raise InputError(f"split.development: items of {task.name} are no questions to be asked")
    able = candidates.filter(pl.col("profile").list.len() >= 3)
    order = sorted(able["user_id"], key=lambda name: rank(seed, name))
    drawn = pl.col("user_id").is_in(order[: len(order) // 2])
    left = candidates.filter(~drawn)
    if left.is_empty() or len(order) < 2:
        raise InputError(
            f"split.development: {candidates.height} anchor candidates are too few to divide; give "
            "two or more with three items each"
        )
    profile, item = pl.col("profile").list, pl.element().struct.field
    count = (profile.len() // 3).clip(upper_bound=QUERIES)
    query = pl.struct(id=item("id"), input=pl.lit(instruction) + item("text"), gold=item("answer"))
    asked = profile.tail(count).list.eval(query)
    before = profile.head(profile.len() - count).list.tail(ITEMS)
    users = able.filter(drawn).with_columns(profile=before, query=asked)
    return left, users.select(SIDE.names)
