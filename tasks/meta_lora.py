"""Stage 5: the bank. One task run per anchor trains its meta-LoRA; then the LoRAs are stacked."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tasks.artifacts import NOTES, Piece, digest
from tasks.base_model import load, model_name, model_parts, prompt_parts
from tasks.config import RunConfig, TrainingOptions, derive_seed
from tasks.errors import InputError
from tasks.prepare import users_of
from tasks.questions import content, encode_all, profile_questions
from tasks.stage import gpu_slot, stage, store

if TYPE_CHECKING:
    from tasks.lora.adapters import Lora
    from tasks.lora.base import Base
    from tasks.lora.batches import Encoded
    from tasks.lora.group_train import Outcome
    from tasks.lora.merge import MergedUsers

VERSION = 3


@stage(name="meta-lora", tags=["gpu"], task_run_name="meta-lora-{anchor}")
def meta_lora(
    config: dict[str, Any],
    lamp_task: str,
    prepared: dict[str, Any],
    base: dict[str, Any],
    anchor: str,
) -> Piece:
    """Train the LoRA of one anchor user on the frozen base; an ordinary PEFT folder `adapter`.

    Depends on this anchor's history, not on which other anchors there are.
    """
    options = RunConfig.model_validate(config)
    where = store()
    instruction = prepared["value"]["instruction"]
    user = next(item for item in users_of(where, prepared, "anchor") if item["user_id"] == anchor)
    key = digest(
        {
            "version": VERSION,
            "lamp_task": lamp_task,
            "anchor": anchor,
            "history": content(user["profile"]),
            "training": options.meta_lora.model_dump(),
            "seed": options.seed,
            **prompt_parts(options, instruction),
            **model_parts(options, base),
        }
    )

    def make(out: Path) -> dict[str, Any]:
        from tasks.lora.adapters import write_peft

        samples = profile_questions(options, lamp_task, instruction, user["profile"])
        with gpu_slot():
            started = time.perf_counter()
            loaded = load(options, where, base)
            encoded = encode_all(loaded, samples, answers=True)
            seed = derive_seed(options.seed, "meta_lora", anchor)
            (lora,), outcome = train_users(loaded, options.meta_lora, [encoded], [seed])
            seconds = round(time.perf_counter() - started, 3)
        if outcome.failed:
            step = len(outcome.losses[0])
            raise InputError(
                f"anchor {anchor}: the loss was not finite at step {step}; "
                "lower meta_lora.learning_rate"
            )
        write_peft(out / "adapter", lora, model_name(options))
        return {
            "anchor": anchor,
            "items": len(samples),
            "steps": len(outcome.losses[0]),
            "losses": outcome.losses[0],
            "tokens": outcome.tokens[0],
            "truncated": sum(sample.truncated for sample in encoded),
            # Of the work itself: waiting for the slot is not a cost of the method.
            NOTES: {"seconds": seconds},
        }

    return where.get("meta_lora", key, make)


@stage(name="bank")
def bank(trained: list[dict[str, Any]]) -> Piece:
    """`bank.safetensors` of the anchors that were trained (results of `meta_lora`), in order."""
    where = store()
    ids = [item["value"]["anchor"] for item in trained]
    key = digest({"version": VERSION, "members": [item["ref"]["sha256"] for item in trained]})

    def make(out: Path) -> dict[str, Any]:
        from tasks.lora.adapters import read_peft
        from tasks.lora.bank import stack, write_bank

        loras = [read_peft(where.open(item["ref"]).folder / "adapter") for item in trained]
        write_bank(out / "bank.safetensors", stack(ids, loras))
        return {
            "ids": ids,
            # What a member is made of: recipes and their users are keyed by it.
            "members": {
                anchor: item["ref"]["sha256"] for anchor, item in zip(ids, trained, strict=True)
            },
            "rank": loras[0].rank,
            "scale": loras[0].scale,
        }

    return where.get("bank", key, make)


def train_users(
    base: Base,
    options: TrainingOptions,
    samples: Sequence[Sequence[Encoded]],
    seeds: Sequence[int],
    frozen: MergedUsers | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[list[Lora], Outcome]:
    """One LoRA per user, trained at once on the users' samples, over their merged LoRAs if any."""
    from tasks.lora.adapters import Lora
    from tasks.lora.group_train import train_group
    from tasks.lora.grouped import grouped, shapes_of
    from tasks.lora.train import Recipe

    recipe = Recipe(
        learning_rate=options.learning_rate,
        epochs=options.epochs,
        batch_size=options.batch_size,
        accumulation=options.accumulation,
        schedule=options.schedule,
        warmup_share=options.warmup_share,
        max_grad_norm=options.max_grad_norm,
        weight_decay=options.weight_decay,
    )
    shapes = shapes_of(base.model, options.target_modules, options.rank)
    scale = options.alpha / options.rank
    names = sorted({*shapes.sizes, *(frozen.layers if frozen else ())})
    with grouped(base.model, names) as layers:
        outcome = train_group(
            base,
            layers,
            shapes,
            samples,
            recipe,
            seeds,
            scale=scale,
            frozen=frozen.parts if frozen else None,
            progress=progress,
        )
    split = shapes.split(outcome.flat.cpu())
    loras = [
        Lora({name: (a[u].clone(), b[u].clone()) for name, (a, b) in split.items()}, scale)
        for u in range(len(samples))
    ]
    return loras, outcome
