"""Stage 1: read and check users, split them by author, and write them as parquet."""

from __future__ import annotations

import tempfile
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tasks.config.task import TaskConfig
from tasks.errors import InputError
from tasks.lamp.definitions import LampTask
from tasks.lamp.options import SplitOptions, SyntheticOptions
from tasks.log import log
from tasks.methods import METHODS
from tasks.prepare_files import hashes, source
from tasks.prepare_lines import describe, naming_dropped, readable
from tasks.record import File
from tasks.results.models import Given, Prepared
from tasks.results.stage import stage
from tasks.results.store import Folder, store

if TYPE_CHECKING:
    import polars as pl

    from tasks.lamp.synthetic.population import Taste

OPTIMUM_FILE = "optimum.parquet"
POPULATION_FILE = "population.parquet"
POOLED_FILE = "pooled.parquet"
ROLES = ("base", "anchor", "few_shot")


def prepared_users(config: TaskConfig) -> Prepared:
    """The users of a cell, and in the log what was read, dropped and split.

    Raises InputError where a method would have no anchor: before anything is trained.
    """
    users = prepare(source(config), config.split, config.task, config.seed)
    for line in describe(users):
        log(line)
    with naming_dropped(users.dropped, config.task):
        _long_enough(config, users.longest_candidate)
    return users


@stage(version=9, libraries=("polars", "pyarrow", "numpy"))
def prepare(
    users: Given | SyntheticOptions, split: SplitOptions, task: LampTask, seed: int
) -> Prepared:
    """Users of one LaMP task on three sides; `users`: files, or the world to generate.

    Raises InputError where the files change while they are read, or nobody is left.
    """
    with store().new("prepare") as folder, tempfile.TemporaryDirectory() as scratch:
        if isinstance(users, SyntheticOptions):
            from tasks.lamp.synthetic import World
            from tasks.lamp.synthetic.optimum import optimal_answers

            world = World(task.name, users, seed)
            place = Path(scratch) / "users"
            world.write(place)
            found = _write(folder.path, place, split, task, seed)
            best = optimal_answers(world, split.few_shot_items)
            best.write_parquet(folder.path / OPTIMUM_FILE)
            _population(world.tastes()).write_parquet(folder.path / POPULATION_FILE)
        else:
            place = Path(users.path)
            found = _write(folder.path, place, split, task, seed)
            # The key says which files it is made of; these may have changed since.
            if hashes(place) != users.files:
                raise InputError(
                    f"data: {place} changed while it was read, so nothing is made of it; start "
                    "the run again when it stays"
                )
    return Prepared(task=task, **_tables(folder), **found)


def _tables(folder: Folder) -> dict[str, File | None]:
    """The stored tables by the names that `Prepared` has for them."""
    names = (*ROLES, "pooled", "optimum", "population")
    return {
        name: folder.file(f"{name}.parquet") if (folder.path / f"{name}.parquet").exists() else None
        for name in names
    }


def _long_enough(config: TaskConfig, longest: int) -> None:
    """Raises InputError where anchors are single users and nobody has enough items.

    Whether a whole cluster has enough items shows when there are clusters (tasks/anchors.py).
    """
    least = config.anchors.min_items
    single = [
        method
        for method in config.methods
        if METHODS[method].merged and config.method(method).anchors.train_on == "user"
    ]
    if single and longest < least:
        raise InputError(
            f"{config.data}: no anchor candidate has anchors.min_items {least} items or more, the "
            f"longest history has {longest}, and anchors of {', '.join(single)} are single users; "
            "lower it, give longer histories, or leave such methods out"
        )


def users_of(table: File, ids: Collection[str] | None = None) -> list[dict[str, Any]]:
    """The users of one side as records, in the order of their ids.

    ids: these users alone; of the file their row groups are read.
    """
    from tasks.lamp.tables import read_table

    return read_table(store().path(table), ids).to_dicts()


def users_in_order(table: File, ids: Collection[str]) -> list[dict[str, Any]]:
    """The named users of one side, in the order named."""
    by_id = {user["user_id"]: user for user in users_of(table, ids)}
    return [by_id[user_id] for user_id in ids]


def each_user(table: File) -> Iterable[dict[str, Any]]:
    """As `users_of`, one after another whenever they are gone through.

    A few row groups are in memory.
    """
    return _Users(store().path(table))


@dataclass(frozen=True)
class _Users:
    file: Path

    def __iter__(self) -> Iterator[dict[str, Any]]:
        from tasks.lamp.tables import row_groups

        for table in row_groups(self.file):
            yield from table.to_pylist()


def _population(tastes: dict[str, Taste]) -> pl.DataFrame:
    """user_id, first, second, mixture of every user of a generated world."""
    import polars as pl

    return pl.DataFrame(
        {
            "user_id": list(tastes),
            "first": [taste.first for taste in tastes.values()],
            "second": [taste.second for taste in tastes.values()],
            "mixture": [taste.mixture for taste in tastes.values()],
        }
    )


def _write(
    out: Path, folder: Path, split: SplitOptions, task: LampTask, seed: int
) -> dict[str, Any]:
    """The tables of three sides; the counts and texts of `Prepared`."""
    from tasks.lamp.formats import copy_users

    # All texts go through the disk: they may be gigabytes, and who stands where needs their keys.
    everyone = out / "everyone.arrow"
    found = copy_users(folder, task, everyone, seed)
    dropped = dict(found.dropped)
    with naming_dropped(dropped, task):
        value = _write_sides(everyone, dropped, split, task, seed)
    if found.drawn:
        value["counts"]["papers_asked_by_a_drawn_citation"] = found.drawn
    return value


def _write_sides(
    everyone: Path, dropped: dict[str, int], options: SplitOptions, task: LampTask, seed: int
) -> dict[str, Any]:
    """Tables of the three sides in place of the one of all users; the stage's value.

    dropped: counts by reason, which grow with what cannot be asked about.
    """
    import polars as pl

    from tasks.lamp.audit import audit
    from tasks.lamp.content import keyed
    from tasks.lamp.prompts import instruction_of
    from tasks.lamp.related import has_unasked
    from tasks.lamp.splits import split_users
    from tasks.lamp.tables import pooled, write_sides

    out = everyone.parent
    users = keyed(everyone, task)
    _check_left(users, dropped)
    split = split_users(users, task, options, seed)
    audited = audit(split.users, dropped, task)
    frames = {"base": split.base, "anchor": split.anchor, "few_shot": split.few_shot}
    counts = dict(split.counts)
    if (most := options.few_shot_items) is not None:
        # Lengths are unsigned: one below `most` would wrap around.
        lengths = split.few_shot["profile"].list.len().cast(pl.Int64)
        counts["unseen_few_shot_items"] += int((lengths - most).clip(lower_bound=0).sum())
        frames["few_shot"] = split.few_shot.with_columns(pl.col("profile").list.head(most))
    write_sides(everyone, frames, out)
    everyone.unlink()
    rows = {role: frames[role] for role in ("base", "anchor")}
    pooled(split.users, rows).write_parquet(out / POOLED_FILE)
    if task.items == "built" and any(has_unasked(frame) for frame in frames.values()):
        frames = _asked(out, counts, dropped, task.name, seed)
    return {
        "counts": counts,
        "dropped": dropped,
        "split": options.model_dump() | {"seed": seed},
        "audit": audited,
        "authors": {role: readable(frame["group"].to_list()) for role, frame in frames.items()},
        "few_shot_ids": frames["few_shot"]["user_id"].to_list(),
        "longest_candidate": int(frames["anchor"]["profile"].list.len().max()),  # type: ignore[arg-type]
        "instruction": instruction_of(_inputs(out), task),
    }


def _check_left(users: pl.DataFrame, dropped: Mapping[str, int]) -> None:
    """More users of the same kind would not help where all were dropped."""
    from tasks.lamp.kept import EMPTY_QUERY, UNKNOWN_GOLD

    if users.is_empty():
        raise InputError("no user is left; mend what was dropped")
    if not users["query"].list.len().sum() and {EMPTY_QUERY, UNKNOWN_GOLD} & {*dropped}:
        raise InputError("no query is left to be scored on; mend what was dropped")


def _asked(
    folder: Path, counts: dict[str, int], dropped: dict[str, int], lamp_task: str, seed: int
) -> dict[str, pl.DataFrame]:
    """The sides' files written again, and given back, with a question for every paper.

    Counts what was done in `counts` and `dropped`. No few-shot user's paper is shown to others.
    """
    import polars as pl

    from tasks.lamp.kept import EMPTY_USER
    from tasks.lamp.related import NO_RELATED, ask_related
    from tasks.lamp.tables import read_table, write_side

    # LaMP-1 is small: its texts may be in memory.
    frames = {role: read_table(folder / f"{role}.parquet") for role in ROLES}
    others = pl.concat([frames["base"], frames["anchor"]])
    found = {}
    for role, frame in frames.items():
        asked, lost = ask_related(frame, others, seed)
        found[role] = asked.filter(pl.col("profile").list.len() > 0)
        for what, count in ((NO_RELATED, lost), (EMPTY_USER, frame.height - found[role].height)):
            if count:
                dropped[what] = dropped.get(what, 0) + count
    counts["papers_asked_by_their_author"] = sum(
        int(frame["profile"].list.len().sum()) for frame in found.values()
    )
    for role in ("anchor", "few_shot"):
        if found[role].is_empty():
            raise InputError(
                f"{lamp_task}: the papers name no citation, and no {role.replace('_', '-')} user "
                "has two papers to ask against another author's; give more users, or papers with "
                "their citation"
            )
    for role, frame in found.items():
        write_side(frame, folder / f"{role}.parquet")
    return found


def _inputs(folder: Path) -> Iterator[str]:
    """The inputs of all queries, side by side."""
    from tasks.lamp.tables import row_groups

    for role in ROLES:
        for table in row_groups(folder / f"{role}.parquet", columns=["query"]):
            for queries in table["query"].to_pylist():
                yield from (query["input"] for query in queries)
