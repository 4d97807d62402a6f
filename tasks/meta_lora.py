"""Stage 5: the bank. One task run per anchor trains its meta-LoRA; then the LoRAs are stacked."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from tasks.artifacts import NOTES, Piece, digest
from tasks.base_model import load, model_parts
from tasks.config import RunConfig, TrainingOptions, derive_seed
from tasks.prepare import users_of
from tasks.questions import content, encode_all, profile_questions
from tasks.stage import gpu_slot, stage, store

VERSION = 1


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
            "instruction": instruction,
            "training": options.meta_lora.model_dump(),
            **model_parts(options, base["ref"]),
        }
    )

    def make(out: Path) -> dict[str, Any]:
        from tasks.lora import adapters, train

        samples = profile_questions(options, lamp_task, instruction, user["profile"])
        with gpu_slot():
            started = time.perf_counter()
            loaded = load(options, where, base["ref"])
            chosen = options.meta_lora
            model = adapters.attach(
                loaded.model, "meta", chosen.rank, chosen.alpha / chosen.rank, chosen.target_modules
            )
            seed = derive_seed(options.seed, "meta_lora", anchor)
            lora, trained = train.train_lora(
                loaded,
                model,
                "meta",
                encode_all(loaded, samples, answers=True),
                training_recipe(chosen, seed),
            )
            seconds = round(time.perf_counter() - started, 3)
        adapters.write_peft(out / "adapter", lora, options.base.model)
        return {
            "anchor": anchor,
            "items": len(samples),
            "steps": len(trained.losses),
            "losses": trained.losses,
            "tokens": trained.tokens,
            "truncated": trained.truncated,
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


def training_recipe(options: TrainingOptions, seed: int) -> Any:
    """The engine's `Recipe` of a training section of the configuration."""
    from tasks.lora.train import Recipe

    return Recipe(
        learning_rate=options.learning_rate,
        epochs=options.epochs,
        batch_size=options.batch_size,
        accumulation=options.accumulation,
        schedule=options.schedule,
        warmup_share=options.warmup_share,
        max_grad_norm=options.max_grad_norm,
        weight_decay=options.weight_decay,
        seed=seed,
    )
