"""Stage 1: read and check users, split them by author, and write them as parquet."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tasks.config import RunConfig
from tasks.errors import InputError
from tasks.methods import METHODS
from tasks.prepare_files import VERSION, hashes, ratings, source
from tasks.prepare_lines import describe, naming_dropped, readable
from tasks.stage import log, stage, store
from tasks.store.artifacts import Store
from tasks.store.files import file_sha256
from tasks.store.pieces import Piece, digest, library_versions

if TYPE_CHECKING:
    import polars as pl

    from tasks.lamp.definitions import LampTask
    from tasks.lamp.groups import Split

OPTIMUM_FILE = "optimum.parquet"
POPULATION_FILE = "population.parquet"
POOLED_FILE = "pooled.parquet"
ROLES = ("base", "anchor", "few_shot")
# What the other kind of split reads alone.
UNREAD = {"grouped": "few_shot_users", "published": "allow_shared_groups"}


@stage(name="prepare")
def prepare(config: dict[str, Any], lamp_task: str) -> Piece:
    """Users of one LaMP task as `base.parquet`, `anchor.parquet`, `few_shot.parquet`.

    Columns user_id, group (author), profile, query. `pooled.parquet`: user_id, row of base users
    and candidates that stand in their author's row. Of a generated world also `optimum.parquet`:
    the best answers to the few-shot users' queries (tasks/lamp/synthetic/optimum.py), and
    `population.parquet`: user_id, first, second (archetypes), mixture of every user. The value
    holds the counts, what was dropped and why, the audit of the data (tasks/lamp/audit.py), the
    instruction of the prompts, and the hash of each table.
    """
    options = RunConfig.model_validate(config)
    where = store()
    folder = source(options, lamp_task, where)
    files = hashes(folder)
    key = digest(
        {
            "version": VERSION,
            "libraries": library_versions(("polars", "pyarrow")),
            "lamp_task": lamp_task,
            "files": files,
            "split": options.split.model_dump(exclude={UNREAD[options.split.kind]}),
            "known": options.data == "synthetic",
            "seed": options.seed,
        }
        | ratings(options, lamp_task)
    )

    def make(out: Path) -> dict[str, Any]:
        value = _write(out, folder, options, lamp_task)
        # The key says which files it was made of; unlike the store's these may have changed since.
        if hashes(folder) != files:
            raise InputError(
                f"{options.data}: {folder} changed while it was read, so nothing is made of it; "
                "start the run again when it stays"
            )
        return value

    piece = where.get("prepare", key, make)
    for line in describe(piece.value, lamp_task):
        log(line)
    with naming_dropped(piece.value["dropped"], lamp_task):
        _long_enough(options, piece.value["longest_candidate"])
    return piece


def _long_enough(options: RunConfig, longest: int) -> None:
    """Raises InputError, before anything is trained, where a method would have no anchor.

    Whether a whole cluster has enough items shows when there are clusters (tasks/anchors.py).
    """
    least = options.anchors.min_items
    single = [
        method
        for method in options.methods
        if METHODS[method].merged and options.for_method(method).anchors.train_on == "user"
    ]
    if single and longest < least:
        raise InputError(
            f"{options.data}: no anchor candidate has anchors.min_items {least} items or more, the "
            f"longest history has {longest}, and anchors of {', '.join(single)} are single users; "
            "lower it, give longer histories, or leave such methods out"
        )


def users_of(
    where: Store, prepared: dict[str, Any], role: str, ids: Collection[str] | None = None
) -> list[dict[str, Any]]:
    """The users of one role as records, in the order of their ids, by the `prepare` stage's result.

    ids: these users alone; of the file their row groups are read.
    """
    from tasks.lamp.tables import read_table

    return read_table(where.open(prepared["ref"]).folder / f"{role}.parquet", ids).to_dicts()


def each_user(where: Store, prepared: dict[str, Any], role: str) -> Iterable[dict[str, Any]]:
    """As `users_of`, one after another whenever they are gone through.

    A few row groups are in memory.
    """
    return _Users(where.open(prepared["ref"]).folder / f"{role}.parquet")


@dataclass(frozen=True)
class _Users:
    file: Path

    def __iter__(self) -> Iterator[dict[str, Any]]:
        from tasks.lamp.tables import row_groups

        for table in row_groups(self.file):
            yield from table.to_pylist()


def _population(told: dict[str, dict[str, Any]]) -> pl.DataFrame:
    """user_id, first, second, mixture of every user of truth.json."""
    import polars as pl

    return pl.DataFrame(
        {
            "user_id": list(told),
            "first": [user["archetypes"][0] for user in told.values()],
            "second": [user["archetypes"][1] for user in told.values()],
            "mixture": [user["mixture"] for user in told.values()],
        }
    )


def _write(out: Path, folder: Path, options: RunConfig, lamp_task: str) -> dict[str, Any]:
    from tasks.lamp.definitions import get_task
    from tasks.lamp.formats import copy_users

    task = get_task(lamp_task)
    # All texts go through the disk: they may be gigabytes, and who stands where needs their keys.
    everyone = out / "everyone.parquet"
    found = copy_users(folder, task, everyone, options.seed)
    dropped = dict(found.dropped)
    with naming_dropped(dropped, lamp_task):
        value = _write_sides(everyone, dropped, options, task)
    if found.drawn:
        value["counts"]["papers_asked_by_a_drawn_citation"] = found.drawn
    if options.data == "synthetic":
        from tasks.lamp.synthetic.optimum import optimal_answers, read_truth

        optimal_answers(folder, options.split.few_shot_items).write_parquet(out / OPTIMUM_FILE)
        _population(read_truth(folder)["users"]).write_parquet(out / POPULATION_FILE)
    return value


def _write_sides(
    everyone: Path, dropped: dict[str, int], options: RunConfig, task: LampTask
) -> dict[str, Any]:
    """Tables of the three sides in place of the one of all users; the stage's value.

    dropped: counts by reason, which grow with what cannot be asked about.
    """
    import polars as pl

    from tasks.lamp.audit import audit
    from tasks.lamp.content import keyed
    from tasks.lamp.prompts import instruction_of
    from tasks.lamp.related import has_unasked
    from tasks.lamp.sides import pooled, write_sides

    out = everyone.parent
    users = keyed(everyone, task)
    _check_left(users, dropped)
    split = _divide(users, task, options)
    audited = audit(split.users, dropped, task)
    frames = {"base": split.base, "anchor": split.anchor, "few_shot": split.few_shot}
    counts = {"unseen_few_shot_items": 0} | split.counts
    if (most := options.split.few_shot_items) is not None:
        # Lengths are unsigned: one below `most` would wrap around.
        lengths = split.few_shot["profile"].list.len().cast(pl.Int64)
        counts["unseen_few_shot_items"] += int((lengths - most).clip(lower_bound=0).sum())
        frames["few_shot"] = split.few_shot.with_columns(pl.col("profile").list.head(most))
    write_sides(everyone, frames, out)
    everyone.unlink()
    rows = {role: frames[role] for role in ("base", "anchor")}
    pooled(split.users, rows).write_parquet(out / POOLED_FILE)
    if task.items == "built" and any(has_unasked(frame) for frame in frames.values()):
        frames = _asked(out, counts, dropped, task.name, options.seed)
    return {
        "counts": counts,
        "dropped": dropped,
        "split": options.split.model_dump() | {"seed": options.seed},
        "audit": audited,
        "authors": {role: readable(frame["group"].to_list()) for role, frame in frames.items()},
        "few_shot": frames["few_shot"]["user_id"].to_list(),
        "longest_candidate": int(frames["anchor"]["profile"].list.len().max()),  # type: ignore[arg-type]
        "instruction": instruction_of(_inputs(out), task),
        "sha256": {role: file_sha256(out / f"{role}.parquet") for role in ROLES},
    }


def _check_left(users: pl.DataFrame, dropped: Mapping[str, int]) -> None:
    """More users of the same kind would not help where all were dropped."""
    from tasks.lamp.kept import EMPTY_QUERY, UNKNOWN_GOLD

    if users.is_empty():
        raise InputError("no user is left; mend what was dropped")
    if not users["query"].list.len().sum() and {EMPTY_QUERY, UNKNOWN_GOLD} & {*dropped}:
        raise InputError("no query is left to be scored on; mend what was dropped")


def _divide(users: pl.DataFrame, task: LampTask, options: RunConfig) -> Split:
    """The users on three sides, by `split.kind`."""
    from tasks.lamp.groups import split_users
    from tasks.lamp.splits import published_split

    chosen = options.split
    if chosen.kind == "published":
        return published_split(
            users,
            task,
            seed=options.seed,
            base_share=chosen.base_share,
            anchor_share=chosen.anchor_share,
            share=chosen.same_author_share,
            few_shot_users=chosen.few_shot_users,
            few_shot_items=chosen.few_shot_items,
        )
    return split_users(
        users,
        task=task,
        seed=options.seed,
        base_share=chosen.base_share,
        anchor_share=chosen.anchor_share,
        share=chosen.same_author_share,
        allow_shared_groups=chosen.allow_shared_groups,
    )


def _asked(
    folder: Path, counts: dict[str, int], dropped: dict[str, int], lamp_task: str, seed: int
) -> dict[str, pl.DataFrame]:
    """The sides' files written again, and given back, with a question for every paper.

    Counts what was done in `counts` and `dropped`. No few-shot user's paper is shown to others.
    """
    import polars as pl

    from tasks.lamp.kept import EMPTY_USER
    from tasks.lamp.related import NO_RELATED, ask_related
    from tasks.lamp.sides import write_side
    from tasks.lamp.tables import read_table

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
