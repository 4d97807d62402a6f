"""Stage 7: per user a LoRA of tiny rank, trained on top of the frozen base and merged LoRA."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tasks.artifacts import NOTES, Piece, Store, digest
from tasks.base_model import load, model_parts
from tasks.config import RunConfig, derive_seed
from tasks.fusion import read_recipes
from tasks.meta_lora import training_recipe
from tasks.prepare import users_of
from tasks.questions import content, encode_all, profile_questions
from tasks.stage import gpu_slot, log, stage, store

if TYPE_CHECKING:
    from tasks.lora.adapters import Lora
    from tasks.lora.bank import Bank

VERSION = 1
MERGED, STACKED = "merged", "stacked"


@dataclass(frozen=True)
class Inputs:
    """Results of the earlier stages that per-user work depends on."""

    prepared: dict[str, Any]
    base: dict[str, Any]
    banked: dict[str, Any]
    fused: dict[str, Any]


@stage(name="stacking", tags=["gpu"], task_run_name="stacking-{batch}")
def stacking(
    config: dict[str, Any], lamp_task: str, inputs: dict[str, Any], batch: int, user_ids: list[str]
) -> Piece:
    """Train the stacked LoRAs of one batch of users; one shard, `stacked.safetensors` [U, r, ...].

    A user whose history and recipe did not change is taken from an earlier shard.
    """
    options = RunConfig.model_validate(config)
    where = store()
    given = Inputs(**inputs)
    users = few_shot_users(where, given, user_ids)
    recipes = read_recipes(where, given.fused)
    rows = [stacked_key(options, lamp_task, given, user, recipes) for user in users]

    def make(out: Path) -> dict[str, Any]:
        from tasks.lora.bank import read_bank, stack, write_bank

        known = where.find_rows("stacking", rows)
        shards = {
            piece.folder: read_bank(piece.folder / "stacked.safetensors")
            for piece, _ in known.values()
        }
        made: dict[str, tuple[Lora, dict[str, int], float]] = {}
        for row, (piece, number) in known.items():
            shard = shards[piece.folder]
            lora = shard.lora(shard.ids[number])
            made[row] = (lora, piece.value["work"][number], piece.notes["per_user"][number])
        todo = [(user, row) for user, row in zip(users, rows, strict=True) if row not in made]
        log(f"{lamp_task}: stacking {len(todo)} users, {len(users) - len(todo)} known from before")
        if todo:
            with gpu_slot():
                trained = _train(options, lamp_task, where, given, [user for user, _ in todo])
            made |= dict(zip((row for _, row in todo), trained, strict=True))
        loras, work, seconds = zip(*(made[row] for row in rows), strict=True)
        write_bank(out / "stacked.safetensors", stack(user_ids, loras))
        bytes_per_user = sum(4 * (a.numel() + b.numel()) for a, b in loras[0].layers.values())
        return {
            "rows": rows,
            "users": user_ids,
            "work": list(work),
            "bytes_per_user": bytes_per_user,
            NOTES: {"per_user": list(seconds)},
        }

    return where.get("stacking", digest(rows), make)


def few_shot_users(where: Store, given: Inputs, user_ids: list[str]) -> list[dict[str, Any]]:
    """The named few-shot users, in the order named."""
    by_id = {user["user_id"]: user for user in users_of(where, given.prepared, "few_shot")}
    return [by_id[user_id] for user_id in user_ids]


def merged_parts(options: RunConfig, given: Inputs, recipe: dict[str, Any]) -> list[Any]:
    """What a user's merged LoRA is made of, for cache keys."""
    members = given.banked["value"]["members"]
    return [
        options.fusion.merge,
        [
            [anchor, members[anchor], weight]
            for anchor, weight in zip(recipe["anchors"], recipe["weights"], strict=True)
        ],
    ]


def stacked_key(
    options: RunConfig,
    lamp_task: str,
    given: Inputs,
    user: dict[str, Any],
    recipes: dict[str, dict[str, Any]],
) -> str:
    """What one user's stacked LoRA depends on: this user's history and recipe, nobody else's."""
    return digest(
        {
            "version": VERSION,
            "lamp_task": lamp_task,
            "user": user["user_id"],
            "history": content(user["profile"]),
            "instruction": given.prepared["value"]["instruction"],
            "merged": merged_parts(options, given, recipes[user["user_id"]]),
            "training": options.stacking.model_dump(exclude={"users_per_job"}),
            "target_modules": options.meta_lora.target_modules,
            **model_parts(options, given.base["ref"]),
        }
    )


def merged_lora(options: RunConfig, members: Bank, recipe: dict[str, Any]) -> Lora:
    """A user's merged LoRA, computed from the recipe."""
    from tasks.lora.merge import merge

    loras = [members.lora(anchor) for anchor in recipe["anchors"]]
    return merge(loras, recipe["weights"], options.fusion.merge)


def personal_model(options: RunConfig, where: Store, given: Inputs) -> tuple[Any, Any, Bank]:
    """(base, model, bank): the base with an empty merged and an empty stacked LoRA attached.

    Users come and go by filling the two; the base is loaded once.
    """
    from tasks.lora.adapters import attach
    from tasks.lora.bank import read_bank
    from tasks.lora.merge import merged_rank

    base = load(options, where, given.base["ref"])
    members = read_bank(where.open(given.banked["ref"]).folder / "bank.safetensors")
    rank = merged_rank(members.rank, given.fused["value"]["anchors_per_user"], options.fusion.merge)
    model = attach(base.model, MERGED, rank, members.scale, options.meta_lora.target_modules)
    chosen = options.stacking
    model = attach(model, STACKED, chosen.rank, chosen.alpha / chosen.rank, chosen.target_modules)
    return base, model, members


def _train(
    options: RunConfig, lamp_task: str, where: Store, given: Inputs, users: list[dict[str, Any]]
) -> list[tuple[Lora, dict[str, int], float]]:
    """Per user: the stacked LoRA, the work it took, and the seconds."""
    from tasks.lora.adapters import fill
    from tasks.lora.train import train_lora

    base, model, members = personal_model(options, where, given)
    recipes = read_recipes(where, given.fused)
    instruction = given.prepared["value"]["instruction"]
    # PEFT: only the inner model takes several active adapters at once.
    model.base_model.set_adapter([MERGED, STACKED])
    results = []
    for user in users:
        started = time.perf_counter()
        fill(model, MERGED, merged_lora(options, members, recipes[user["user_id"]]))
        samples = profile_questions(options, lamp_task, instruction, user["profile"])
        seed = derive_seed(options.seed, "stacking", user["user_id"])
        lora, trained = train_lora(
            base,
            model,
            STACKED,
            encode_all(base, samples, answers=True),
            training_recipe(options.stacking, seed),
        )
        work = {
            "steps": len(trained.losses),
            "tokens": trained.tokens,
            "truncated": trained.truncated,
        }
        results.append((lora, work, round(time.perf_counter() - started, 4)))
    return results
