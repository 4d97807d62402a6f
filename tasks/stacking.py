"""Stage 7: each user's own LoRA, trained over the frozen base and the merged LoRA.

MTA trains it at a tiny rank, on top of a merged LoRA. Other methods train it on the bare base.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import polars as pl

from tasks.config.options import PriorOptions, TrainingOptions
from tasks.log import log
from tasks.model import Made, checkpoint, loaded_model
from tasks.recipes import Merger
from tasks.record import File, Record, Result, derive_seed, digest, key_of, library_versions
from tasks.results.models import Setting, Training
from tasks.results.rows import Rows
from tasks.results.store import LOCKS, file_lock, store
from tasks.text.loading import LIBRARIES
from tasks.text.questions import User, content

if TYPE_CHECKING:
    from tasks.lora.bank import Bank
    from tasks.lora.checkpoint import Checkpoint

# Raise it when the trained LoRAs change.
VERSION = 7
SHARD = "stacked.safetensors"
WORK = "work.parquet"
# Makes the LoRAs of a batch's users of these numbers; the checkpoint keeps their training's state.
Make = Callable[[Sequence[int], "Checkpoint | None"], Iterable[Made]]


@dataclass(frozen=True)
class Adapted:
    """The LoRAs of a batch's users, in their order, that the engine applies when it answers.

    keys: what each user's LoRAs depend on. works: what making each user's took. merger: of the
    merged LoRAs below, if there are any. loras: the users' own; file: where they are stored. kept:
    the bytes that one user's own is made from, where its numbers are more.
    """

    keys: list[Any]
    works: list[Training]
    merger: Merger | None = None
    loras: Bank | None = None
    file: File | None = None
    kept: int | None = None

    @property
    def bytes_per_user(self) -> int:
        """Bytes of one user's own LoRA in float32, or of what it is made from (`kept`)."""
        if self.kept is not None:
            return self.kept
        layers = self.loras.layers.values() if self.loras else ()
        return sum(4 * (a[0].numel() + b[0].numel()) for a, b in layers)


class HowAnswered(Record):
    """How a method adapts its users and answers for them.

    version: of the method. training: of users' own LoRAs, if it trains any. answer: as
    `scoring.answer`. prior: of the labels, if the method has one. quantisation: of the base model.
    libraries: those that quantisation needs.
    """

    method: str
    version: int
    training: TrainingOptions | None
    answer: str
    prior: PriorOptions | None
    quantisation: str
    libraries: dict[str, str]


@dataclass(frozen=True)
class Batch:
    """A batch of few-shot users, how they are answered, and what their method made for all.

    merger: of their LoRAs, if they are merged. fitted: what `Method.fit` gave.
    """

    users: Sequence[User]
    how: HowAnswered
    merger: Merger | None
    fitted: Result | None
    setting: Setting

    @property
    def names(self) -> list[str]:
        return [str(user["user_id"]) for user in self.users]

    @contextmanager
    def stacking(self, keys: Sequence[str]) -> Iterator[tuple[Rows[Made], Checkpoint | None]]:
        """The users' own LoRAs as rows by `keys`; those that earlier batches trained are in them.

        Methods that train the same LoRAs share them: one trains, the others wait and read.
        """
        with file_lock(store().root / LOCKS / f"stacking-{digest([*keys])}.lock"):
            rows: Rows[Made] = Rows("stacking", keys, _read)
            job, who = [keys[n] for n in rows.missing], [self.names[n] for n in rows.missing]
            with checkpoint(self.setting.compute, "stacking", digest(job), who) as kept:
                if rows.missing:
                    log(f"training {rows.counted()}")
                yield rows, kept

    def stored(self, rows: Rows[Made], kept: int | None = None) -> Adapted:
        """The users' own LoRAs, all made, in the store; kept: as of `Adapted`."""
        from tasks.lora.bank import stack, write_bank

        loras, works = zip(*rows.all(), strict=True)
        bank = stack(self.names, loras)
        with rows.folder() as folder:
            write_bank(folder.path / SHARD, bank)
            write_work(folder.path / WORK, self.names, works)
        return Adapted(
            keys=[*rows.keys], works=[*works], loras=bank, file=folder.file(SHARD), kept=kept
        )

    def stacked(self, keys: Sequence[str], make: Make, kept: int | None = None) -> Adapted:
        """The users' own LoRAs; `make` gives those that no earlier batch made."""
        with self.stacking(keys) as (rows, state):
            if rows.missing:
                rows.add(make(rows.missing, state))
            return self.stored(rows, kept)


def merged_and_trained(batch: Batch) -> Adapted:
    """The merged LoRAs, if any, and over them the users' own, if the method trains any.

    They are trained at once, each as if alone. A user whose loss stops being finite keeps the
    weights of the step before, as `failed`.
    """
    from tasks.lora.merge import MergedUsers

    setting, merger = batch.setting, batch.merger
    under = [merger.made_of(name) if merger else None for name in batch.names]
    if batch.how.training is None:
        return Adapted(under, [Training()] * len(under), merger)
    # The method's name is not in the key: methods that train the same LoRAs share them.
    shared = key_of("stacking", VERSION, library_versions(LIBRARIES), batch.how.training, setting)
    keys = [
        key_of(shared, user["user_id"], content(user["profile"]), merged)
        for user, merged in zip(batch.users, under, strict=True)
    ]
    with batch.stacking(keys) as (rows, kept):
        if rows.missing:
            names = [batch.names[number] for number in rows.missing]
            with loaded_model(setting) as model:
                users = [batch.users[number] for number in rows.missing]
                samples, seeds = model.tokens("profile", users), seeds_of(setting, names)
                below = MergedUsers(*merger.chosen(names), model.base.device) if merger else None
                rows.add(model.train(batch.how.training, samples, seeds, below, checkpoint=kept))
        return replace(batch.stored(rows), merger=merger)


def seeds_of(setting: Setting, users: Sequence[str]) -> list[int]:
    """The seed of each user's own LoRA: of its first weights and the order of its samples."""
    return [derive_seed(setting.seed, "stacking", name) for name in users]


def write_work(path: Path, users: Sequence[str], works: Sequence[Training]) -> None:
    """Write a table of user_id and the work done for each; losses are not kept."""
    names = [name for name in Training.model_fields if name != "losses"]
    columns: dict[str, list[Any]] = {name: [getattr(one, name) for one in works] for name in names}
    pl.DataFrame({"user_id": list(users), **columns}).write_parquet(path)


def read_work(path: Path) -> list[Training]:
    """The work done for each user, in the order of the table."""
    rows = pl.read_parquet(path).drop("user_id").to_dicts()
    return [Training.model_validate(row) for row in rows]


def _read(folder: File) -> list[Made]:
    from tasks.lora.bank import read_bank

    place = store().path(folder)
    shard = read_bank(place / SHARD)
    return list(zip(map(shard.lora, shard.ids), read_work(place / WORK), strict=True))
