"""Stage 2b, optional: the base model adapted to the LaMP task, by one LoRA trained on base users.

As in OPPU (arXiv 2402.04401) and Per-Pcs (2406.10471). The published MTA code trains on
Llama-3-8B-Instruct as it comes, so no preset has it. All later stages run the adapted model: the
LoRA is added to the weights in memory when the model is loaded (`base_model.load`), never written
as a whole model.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import Any

from tasks.base_model import load, model_name, model_parts, prompt_parts
from tasks.config import RunConfig, derive_seed
from tasks.errors import InputError
from tasks.meta_lora import train_users
from tasks.prepare import each_user
from tasks.running.progress import Progress
from tasks.stage import gpu_slot, stage, store
from tasks.store.checkpoints import checkpoint_of, remove
from tasks.store.pieces import Piece, digest
from tasks.tokens import Kind, tokens_of

VERSION = 1
# What is asked, all users' of one kind before the next.
KINDS: dict[str, tuple[Kind, ...]] = {
    "queries": ("golds",),
    "profile": ("profile",),
    "both": ("golds", "profile"),
}


@stage(name="task-adapt", uses_model=True)
def task_adapt(
    config: dict[str, Any], lamp_task: str, prepared: dict[str, Any], base: dict[str, Any]
) -> Piece:
    """One LoRA, a PEFT folder `adapter`, trained on the base users' questions.

    `base` is the result of `base_model`. What the stages after it are given is that result with
    this one's under the key `adapter`.
    """
    options = RunConfig.model_validate(config)
    where = store()
    how = options.base.task_adapt
    instruction = prepared["value"]["instruction"]
    key = digest(
        {
            "version": VERSION,
            "lamp_task": lamp_task,
            "users": prepared["value"]["sha256"]["base"],
            "training": how.model_dump(exclude={"enabled"}),
            "seed": options.seed,
            **prompt_parts(options, instruction),
            **model_parts(options, base),
        }
    )

    def make(out: Path) -> dict[str, Any]:
        from tasks.lora.adapters import write_peft
        from tasks.lora.tokens import joined

        users = each_user(where, prepared, "base")
        named = [user["user_id"] for user in each_user(where, prepared, "base")]
        checkpoint = checkpoint_of(options, where, "task_adapt", key, named)
        title = f"{lamp_task}: adapting the base model to the task"
        with gpu_slot():
            loaded = load(options, where, base)
            found = [
                tokens_of(options, where, lamp_task, instruction, base, loaded, kind, users)
                for kind in KINDS[how.train_on]
            ]
            everything = joined(chain(*found))
            samples = everything.chosen(chosen_items(options, len(everything)))
            progress = Progress("task-adapt", title, 1)
            seed = derive_seed(options.seed, "task_adapt")
            loras, outcome = train_users(
                loaded, how, [samples], [seed], progress=progress.update, checkpoint=checkpoint
            )
        if outcome.failed:
            raise InputError(
                f"base.task_adapt: the loss was not finite at step {len(outcome.losses[0])}; "
                "lower base.task_adapt.learning_rate"
            )
        write_peft(out / "adapter", loras[0], model_name(options))
        return {
            "items": len(samples),
            "steps": len(outcome.losses[0]),
            "losses": outcome.losses[0],
            "tokens": outcome.tokens[0],
            "truncated": samples.truncated,
        }

    piece = where.get("task_adapt", key, make)
    remove(where, "task_adapt", key)
    return piece


def chosen_items(options: RunConfig, count: int) -> Sequence[int]:
    """Which of the base users' `count` questions the model is adapted on: `max_items` by seed.

    Raises InputError when there are none.
    """
    how = options.base.task_adapt
    if not count:
        what = "items" if how.train_on == "profile" else "queries"
        raise InputError(
            f"base.task_adapt: the data's base users have no {what} to adapt the model on; raise "
            "split.base_share, add user_base_LLM.json, or set base.task_adapt.train_on=profile"
        )
    if how.max_items is None or how.max_items >= count:
        return range(count)
    generator = random.Random(derive_seed(options.seed, "task_adapt", "items"))
    return sorted(generator.sample(range(count), how.max_items))
