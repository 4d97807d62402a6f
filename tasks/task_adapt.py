"""Stage 2b, optional: the base model adapted to the LaMP task, by one LoRA trained on base users.

As in OPPU (arXiv 2402.04401) and Per-Pcs (2406.10471). The published MTA code trains on
Llama-3-8B-Instruct as it comes, so no preset has it. All later stages run the adapted model: the
LoRA is added to the weights in memory when the model is loaded, never written as a whole model.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from itertools import chain

from tasks.config.options import ComputeOptions, TaskAdaptOptions
from tasks.config.task import TaskConfig, derive_seed
from tasks.errors import InputError
from tasks.prepare import each_user
from tasks.record import File
from tasks.results.models import Base, Prepared, Questions
from tasks.results.stage import stage
from tasks.results.store import store
from tasks.running.progress import Progress
from tasks.running.slots import gpu_slot
from tasks.text.loading import load, model_name
from tasks.text.tokens import Kind, tokens_of
from tasks.training import checkpoint, train_loras, trainings

# What is asked, all users' of one kind before the next.
KINDS: dict[str, tuple[Kind, ...]] = {
    "queries": ("golds",),
    "profile": ("profile",),
    "both": ("golds", "profile"),
}


def adapted_to_task(config: TaskConfig, users: Prepared, questions: Questions, base: Base) -> Base:
    """The base model with its adapter, where `base.task_adapt` is enabled; else as it is."""
    if not config.base.task_adapt.enabled:
        return base
    adapted = task_adapt(
        config.base.task_adapt, questions, users.base, base, config.seed, config.compute
    )
    # Where it is found, the model may lie elsewhere by now: that is no part of its key.
    own = ("model", "weights", "gradient_checkpointing")
    return adapted.model_copy(update={name: getattr(base, name) for name in own})


@stage(version=2, libraries=("torch", "transformers"), uses_model=True)
def task_adapt(
    options: TaskAdaptOptions,
    questions: Questions,
    users: File,
    base: Base,
    seed: int,
    compute: ComputeOptions,
) -> Base:
    """The base model with one LoRA, a PEFT folder, trained on the base users' questions.

    Raises InputError where there are none, or the loss stops being finite.
    """
    from tasks.lora.adapters import write_peft
    from tasks.lora.tokens import joined

    names = [user["user_id"] for user in each_user(users)]
    title = f"{questions.task.name}: adapting the base model to the task"
    key = task_adapt.key(options, questions, users, base, seed, compute)
    with (
        checkpoint(compute, "task_adapt", key, names) as kept,
        store().new("task_adapt") as folder,
        gpu_slot(),
    ):
        loaded = load(base, compute)
        found = [
            tokens_of(questions, base, loaded, kind, each_user(users))
            for kind in KINDS[options.train_on]
        ]
        everything = joined(chain(*found))
        samples = everything.chosen(chosen_items(options, len(everything), seed))
        progress = Progress("task-adapt", title, 1)
        loras, outcome = train_loras(
            loaded, options, [samples], [derive_seed(seed, "task_adapt")],
            progress=progress.update, checkpoint=kept, engine=base.engine,
        )  # fmt: skip
        if outcome.failed:
            raise InputError(
                f"base.task_adapt: the loss was not finite at step {len(outcome.losses[0])}; "
                "lower base.task_adapt.learning_rate"
            )
        write_peft(folder.path / "adapter", loras[0], model_name(base.model))
    (training,) = trainings(outcome, [samples])
    return base.model_copy(update={"adapter": folder.file("adapter"), "training": training})


def chosen_items(options: TaskAdaptOptions, count: int, seed: int) -> Sequence[int]:
    """Which of the base users' `count` questions the model is adapted on: `max_items` by seed.

    Raises InputError when there are none.
    """
    if not count:
        what = "items" if options.train_on == "profile" else "queries"
        raise InputError(
            f"base.task_adapt: the data's base users have no {what} to adapt the model on; raise "
            "split.base_share, add user_base_LLM.json, or set base.task_adapt.train_on=profile"
        )
    if options.max_items is None or options.max_items >= count:
        return range(count)
    generator = random.Random(derive_seed(seed, "task_adapt", "items"))
    return sorted(generator.sample(range(count), options.max_items))
