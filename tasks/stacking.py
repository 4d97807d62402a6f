"""Stage 7: per user a LoRA of the user's own, trained over the frozen base and the merged LoRA.

With MTA it is of tiny rank, on top of a merged LoRA; other methods train theirs on the bare base
(`tasks.methods`). Either way it is the same work."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tasks.base_model import load, model_parts, prompt_parts
from tasks.config import RunConfig, derive_seed
from tasks.fusion import read_recipes
from tasks.meta_lora import train_users
from tasks.methods import METHODS, MethodName
from tasks.options import TrainingOptions
from tasks.prepare import users_of
from tasks.questions import content
from tasks.stage import gpu_slot, log, stage, store
from tasks.store.artifacts import Store
from tasks.store.checkpoints import checkpoint_of, remove
from tasks.store.pieces import NOTES, Piece, digest
from tasks.tokens import tokens_of

if TYPE_CHECKING:
    from tasks.lora.adapters import Lora
    from tasks.lora.checkpoint import Checkpoint
    from tasks.lora.group_train import Outcome
    from tasks.lora.merge import MergedUsers

VERSION = 5


@dataclass(frozen=True)
class Inputs:
    """Results of the earlier stages that a method's per-user work depends on.

    banked and fused are None for a method without a merged LoRA.
    """

    prepared: dict[str, Any]
    base: dict[str, Any]
    banked: dict[str, Any] | None = None
    fused: dict[str, Any] | None = None


@stage(name="stacking", uses_model=True, task_run_name="stacking-{method}-{batch}")
def stacking(
    config: dict[str, Any],
    lamp_task: str,
    inputs: dict[str, Any],
    method: MethodName,
    batch: int,
    user_ids: list[str],
) -> Piece:
    """Train a method's own LoRAs of one batch of users; one shard, `stacked.safetensors`.

    `config` is the method's (`RunConfig.for_method`). All users of the batch are trained at once,
    each as if alone. A user whose history and recipe did not change is taken from an earlier shard.
    A user whose loss stops being finite keeps the weights of the step before, as `failed`.
    """
    options = RunConfig.model_validate(config)
    where = store()
    given = Inputs(**inputs)
    users = few_shot_users(where, given, user_ids)
    recipes = recipes_of(where, given)
    rows = [stacked_key(options, lamp_task, method, given, user, recipes) for user in users]
    key = digest(rows)

    def make(out: Path) -> dict[str, Any]:
        from tasks.lora.bank import read_bank, stack, write_bank

        known = where.find_rows("stacking", rows)
        shards = {
            piece.folder: read_bank(piece.folder / "stacked.safetensors")
            for piece, _ in known.values()
        }
        made: dict[str, tuple[Lora, dict[str, Any], float]] = {}
        for row, (piece, number) in known.items():
            shard = shards[piece.folder]
            lora = shard.lora(shard.ids[number])
            made[row] = (lora, piece.value["work"][number], piece.notes["per_user"][number])
        todo = [(user, row) for user, row in zip(users, rows, strict=True) if row not in made]
        log(
            f"{lamp_task}, {method}: training {len(todo)} users, "
            f"{len(users) - len(todo)} known from before"
        )
        if todo:
            checkpoint = checkpoint_of(
                options, where, "stacking", key,
                [user["user_id"] for user, _ in todo], rows=[row for _, row in todo],
            )  # fmt: skip
            with gpu_slot():
                started = time.perf_counter()
                new, outcome, cut = _train(
                    options, lamp_task, method, where, given, [user for user, _ in todo], checkpoint
                )
                each = round((time.perf_counter() - started) / len(todo), 4)
            for number, (_, row) in enumerate(todo):
                work = {
                    "steps": len(outcome.losses[number]),
                    "tokens": outcome.tokens[number],
                    "truncated": cut[number],
                    "failed": number in outcome.failed,
                }
                made[row] = (new[number], work, each)
        loras, work_done, seconds = zip(*(made[row] for row in rows), strict=True)
        write_bank(out / "stacked.safetensors", stack(user_ids, loras))
        bytes_per_user = sum(4 * (a.numel() + b.numel()) for a, b in loras[0].layers.values())
        return {
            "rows": rows,
            "users": user_ids,
            "work": list(work_done),
            "bytes_per_user": bytes_per_user,
            NOTES: {"per_user": list(seconds)},
        }

    piece = where.get("stacking", key, make, rows)
    remove(where, "stacking", key)
    return piece


def few_shot_users(where: Store, given: Inputs, user_ids: list[str]) -> list[dict[str, Any]]:
    """The named few-shot users, in the order named."""
    found = users_of(where, given.prepared, "few_shot", user_ids)
    by_id = {user["user_id"]: user for user in found}
    return [by_id[user_id] for user_id in user_ids]


def recipes_of(where: Store, given: Inputs) -> dict[str, dict[str, Any]]:
    """user_id -> recipe; empty for a method without a merged LoRA."""
    return read_recipes(where, given.fused) if given.fused else {}


def merged_parts(
    options: RunConfig, given: Inputs, recipe: dict[str, Any] | None
) -> list[Any] | None:
    """What a user's merged LoRA is made of, for cache keys."""
    if recipe is None or given.banked is None:
        return None
    members = given.banked["value"]["members"]
    lacking = given.banked["value"].get("lacking")
    return [
        *([lacking] if lacking else []),  # kept apart: tasks.meta_lora.bank
        options.fusion.merge,
        [
            [anchor, members[anchor], weight]
            for anchor, weight in zip(recipe["anchors"], recipe["weights"], strict=True)
        ],
    ]


def stacked_key(
    options: RunConfig,
    lamp_task: str,
    method: MethodName,
    given: Inputs,
    user: dict[str, Any],
    recipes: dict[str, dict[str, Any]],
) -> str:
    """What one user's own LoRA depends on: this user's history and recipe, nobody else's.

    Not on the method's name: methods that train the same thing share it.
    """
    return digest(
        {
            "version": VERSION,
            "lamp_task": lamp_task,
            "user": user["user_id"],
            "history": content(user["profile"]),
            "merged": merged_parts(options, given, recipes.get(user["user_id"])),
            "training": training_of(options, method).model_dump(exclude={"users_per_job"}),
            "seed": options.seed,
            **prompt_parts(options, given.prepared["value"]["instruction"]),
            **model_parts(options, given.base),
        }
    )


def training_of(options: RunConfig, method: MethodName) -> TrainingOptions:
    """How the method trains a user's own LoRA. Raises ValueError when it trains none."""
    section = METHODS[method].trained
    if section is None:
        raise ValueError(f"the method {method} trains nothing per user")
    chosen: TrainingOptions = getattr(options, section)
    return chosen


def merged_users(
    options: RunConfig, where: Store, given: Inputs, user_ids: list[str], device: Any
) -> MergedUsers | None:
    """The merged LoRAs of the users, in the order given, computed from their recipes."""
    from tasks.lora.bank import read_bank
    from tasks.lora.merge import MergedUsers

    if given.banked is None or given.fused is None:
        return None
    members = read_bank(where.open(given.banked["ref"]).folder / "bank.safetensors")
    recipes = read_recipes(where, given.fused)
    chosen = [(recipes[user]["anchors"], recipes[user]["weights"]) for user in user_ids]
    return MergedUsers(members, chosen, options.fusion.merge, device)


def _train(
    options: RunConfig,
    lamp_task: str,
    method: MethodName,
    where: Store,
    given: Inputs,
    users: list[dict[str, Any]],
    checkpoint: Checkpoint | None,
) -> tuple[list[Lora], Outcome, list[int]]:
    """The users' own LoRAs, how training went, and how many samples were cut, per user."""
    base = load(options, where, given.base)
    ids = [user["user_id"] for user in users]
    instruction = given.prepared["value"]["instruction"]
    samples = tokens_of(options, where, lamp_task, instruction, given.base, base, "profile", users)
    loras, outcome = train_users(
        base,
        training_of(options, method),
        samples,
        [derive_seed(options.seed, "stacking", user_id) for user_id in ids],
        merged_users(options, where, given, ids, base.device),
        checkpoint=checkpoint,
    )
    return loras, outcome, [own.truncated for own in samples]
