"""Stage 2b, optional: the base model adapted to the LaMP task, by one LoRA trained on base users.

As in OPPU (arXiv 2402.04401) and Per-Pcs (2406.10471). The published MTA code trains on
Llama-3-8B-Instruct as it comes, so no preset has it. All later stages run the adapted model: the
LoRA is added to the weights in memory when the model is loaded (`base_model.load`), never written
as a whole model.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tasks.artifacts import Piece, digest
from tasks.base_model import load, model_name, model_parts, prompt_parts
from tasks.config import RunConfig, derive_seed
from tasks.errors import InputError
from tasks.meta_lora import train_users
from tasks.prepare import users_of
from tasks.questions import encode_all, profile_questions, user_queries
from tasks.stage import Progress, gpu_slot, stage, store

if TYPE_CHECKING:
    from tasks.lamp.prompts import Sample

VERSION = 1


@stage(name="task-adapt", tags=["gpu"])
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

        asked = questions(options, lamp_task, instruction, users_of(where, prepared, "base"))
        title = f"{lamp_task}: adapting the base model to the task"
        with gpu_slot():
            loaded = load(options, where, base)
            samples = encode_all(loaded, asked, answers=True)
            progress = Progress("task-adapt", title, 1)
            seed = derive_seed(options.seed, "task_adapt")
            loras, outcome = train_users(loaded, how, [samples], [seed], progress=progress.update)
        if outcome.failed:
            raise InputError(
                f"base.task_adapt: the loss was not finite at step {len(outcome.losses[0])}; "
                "lower base.task_adapt.learning_rate"
            )
        write_peft(out / "adapter", loras[0], model_name(options))
        return {
            "items": len(asked),
            "steps": len(outcome.losses[0]),
            "losses": outcome.losses[0],
            "tokens": outcome.tokens[0],
            "truncated": sum(sample.truncated for sample in samples),
        }

    return where.get("task_adapt", key, make)


def questions(
    options: RunConfig, lamp_task: str, instruction: str, users: list[dict[str, Any]]
) -> list[Sample]:
    """The base users' questions that the model is adapted on, at most `max_items`, in order.

    Raises InputError when there are none.
    """
    how = options.base.task_adapt
    found: list[Sample] = []
    for user in users:
        if how.train_on != "profile":
            found += user_queries(options, lamp_task, instruction, user)
        if how.train_on != "queries":
            found += profile_questions(options, lamp_task, instruction, user["profile"])
    if not found:
        what = "users" if how.train_on == "profile" or not users else "users with queries"
        raise InputError(
            f"base.task_adapt: the data has no base {what} to adapt the model on; raise "
            "split.base_share, add user_base_LLM.json, or set base.task_adapt.train_on=profile"
        )
    if how.max_items is not None and len(found) > how.max_items:
        generator = random.Random(derive_seed(options.seed, "task_adapt", "items"))
        chosen = sorted(generator.sample(range(len(found)), how.max_items))
        found = [found[index] for index in chosen]
    return found
