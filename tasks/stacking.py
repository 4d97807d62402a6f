"""Stage 7: per user a LoRA of the user's own, trained over the frozen base and the merged LoRA.

With MTA it is of tiny rank, on top of a merged LoRA; other methods train theirs on the bare base.
Either way it is the same work."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tasks.config.options import ComputeOptions, TrainingOptions
from tasks.config.task import derive_seed
from tasks.fusion import Recipe, read_recipes
from tasks.log import log
from tasks.record import File, Record, Result, digest, key_of, library_versions
from tasks.results.models import Base, Merged, Questions
from tasks.results.rows import Rows
from tasks.results.store import store
from tasks.running.slots import gpu_slot
from tasks.text.loading import LIBRARIES, load
from tasks.text.questions import User, content
from tasks.text.tokens import tokens_of
from tasks.training import checkpoint, train_loras

if TYPE_CHECKING:
    from tasks.lora.adapters import Lora
    from tasks.lora.bank import Bank as LoadedBank
    from tasks.lora.tokens import Samples
    from tasks.lora.train import Outcome

# Each user's anchors and their weights.
MergeRecipes = list[tuple[list[str], list[float]]]
SHARD = "stacked.safetensors"
WORK = "work.parquet"


class Work(Record):
    """What one user's training took. failed: the loss stopped being finite at the last step."""

    steps: int = 0
    tokens: int = 0
    truncated: int = 0
    failed: bool = False
    seconds: float = 0.0


@dataclass(frozen=True)
class Adapted:
    """The LoRAs of a batch's users that the engine applies when it answers.

    merged: what is merged below, if anything. own: a bank of the users' own LoRAs, in their order.
    keys: what each user's LoRAs depend on. works: what making each user's took.
    """

    merged: Merged | None
    own: File | None
    keys: list[Any]
    works: list[Work]


@dataclass(frozen=True)
class Batch:
    """A batch of few-shot users, and what their method made for all: `merged`, `fitted`."""

    users: Sequence[User]
    training: TrainingOptions | None
    questions: Questions
    base: Base
    merged: Merged | None
    fitted: Result | None
    seed: int
    compute: ComputeOptions

    @property
    def names(self) -> list[str]:
        return [str(user["user_id"]) for user in self.users]

    def merged_keys(self) -> list[Any]:
        """Per user what the merged LoRA is made of; None for a method that merges nothing."""
        recipes = read_recipes(self.merged.recipes) if self.merged else {}
        return [merged_key(self.merged, recipes.get(name)) for name in self.names]

    def rows(self, keys: Sequence[str]) -> Rows[tuple[Lora, Work]]:
        """The users' own LoRAs, known or missing, by keys of what each depends on."""
        return Rows("stacking", keys, _read)

    def keep(self, rows: Rows[tuple[Lora, Work]]) -> tuple[File, list[Work]]:
        """Store the users' own LoRAs, in their order; what making each took."""
        from tasks.lora.bank import stack, write_bank

        loras = [lora for lora, _ in rows.all()]
        works = [work for _, work in rows.all()]
        with rows.folder() as folder:
            write_bank(folder.path / SHARD, stack(self.names, loras))
            write_work(folder.path / WORK, self.names, works)
        return folder.file(SHARD), works


def merged_and_trained(batch: Batch) -> Adapted:
    """The merged LoRAs, if any, and over them the users' own, if the method trains these.

    They are trained at once, each as if alone. A user whose loss stops being finite keeps the
    weights of the step before, as `failed`.
    """
    from tasks.lora.merge import MergedUsers

    below = batch.merged_keys()
    if batch.training is None:
        return Adapted(batch.merged, None, below, [Work()] * len(below))
    shared = key_of(
        "stacking", 6, library_versions(LIBRARIES), batch.training, batch.questions, batch.base,
        batch.seed,
    )  # fmt: skip
    # Not by the method's name: methods that train the same thing share it.
    keys = [
        key_of(shared, user["user_id"], content(user["profile"]), own)
        for user, own in zip(batch.users, below, strict=True)
    ]
    rows = batch.rows(keys)
    if rows.missing:
        log(f"training {rows.counted()}")
        users = [batch.users[number] for number in rows.missing]
        names = [str(user["user_id"]) for user in users]
        job = digest([keys[number] for number in rows.missing])
        with checkpoint(batch.compute, "stacking", job, names) as kept, gpu_slot():
            started = time.perf_counter()
            loaded = load(batch.base, batch.compute)
            samples = tokens_of(batch.questions, batch.base, loaded, "profile", users)
            seeds = [derive_seed(batch.seed, "stacking", name) for name in names]
            merged = None
            if batch.merged:
                merged = MergedUsers(*merged_of(batch.merged, names), loaded.device)
            loras, outcome = train_loras(
                loaded,
                batch.training,
                samples,
                seeds,
                merged,
                checkpoint=kept,
                engine=batch.base.engine,
            )
            seconds = round((time.perf_counter() - started) / len(users), 4)
        rows.add(zip(loras, works_of(outcome, samples, seconds), strict=True))
    shard, works = batch.keep(rows)
    return Adapted(batch.merged, shard, [*zip(below, keys, strict=True)], works)


def works_of(outcome: Outcome, samples: Sequence[Samples], seconds: float) -> list[Work]:
    """What training took of each user; `seconds` each."""
    return [
        Work(
            steps=len(outcome.losses[number]),
            tokens=outcome.tokens[number],
            truncated=own.truncated,
            failed=number in outcome.failed,
            seconds=seconds,
        )
        for number, own in enumerate(samples)
    ]


def merged_key(merged: Merged | None, recipe: Recipe | None) -> list[Any] | None:
    """What a user's merged LoRA is made of: each anchor's LoRA and its weight."""
    if merged is None or recipe is None:
        return None
    adapters = {member.anchor: member.adapter.sha256 for member in merged.bank.members}
    pairs = zip(recipe.anchors, recipe.weights, strict=True)
    return [merged.how, [[anchor, adapters[anchor], weight] for anchor, weight in pairs]]


def merged_of(merged: Merged, user_ids: Sequence[str]) -> tuple[LoadedBank, MergeRecipes, str]:
    """What `MergedUsers` takes: the bank, each user's anchors and weights, and how to merge."""
    from tasks.lora.bank import read_bank

    recipes = read_recipes(merged.recipes)
    chosen = [(list(recipes[u].anchors), list(recipes[u].weights)) for u in user_ids]
    return read_bank(store().path(merged.bank.file)), chosen, merged.how


def write_work(path: Path, users: Sequence[str], works: Sequence[Work]) -> None:
    """A table of user_id and the fields of `Work`."""
    import polars as pl

    columns: Mapping[str, Any] = {
        name: [getattr(work, name) for work in works] for name in Work.model_fields
    }
    pl.DataFrame({"user_id": list(users), **columns}).write_parquet(path)


def read_work(file: File) -> list[Work]:
    """The users' work, in the order of the table."""
    return _works(store().path(file))


def _works(path: Path) -> list[Work]:
    import polars as pl

    return [Work.model_validate(row) for row in pl.read_parquet(path).drop("user_id").to_dicts()]


def _read(folder: File) -> list[tuple[Lora, Work]]:
    from tasks.lora.bank import read_bank

    place = store().path(folder)
    shard = read_bank(place / SHARD)
    return list(zip(map(shard.lora, shard.ids), _works(place / WORK), strict=True))
