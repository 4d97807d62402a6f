"""Stage 2: the frozen base model. `tiny` is trained on the base users, others are as given.

`base.task_adapt` adapts it to the LaMP task by one LoRA trained on base users, as in OPPU (arXiv
2402.04401) and Per-Pcs (2406.10471). MTA's published code does not, nor does preset `paper`. Later
stages run the adapted model: the LoRA is added to the weights in
memory when the model is loaded, never written as a whole model.
"""

import json
import random
from collections import defaultdict
from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import Annotated

from tasks.config.options import ComputeOptions, TaskAdaptOptions, TinyModelOptions, TrainingOptions
from tasks.config.task import TaskConfig
from tasks.errors import InputError
from tasks.lamp.prompts import Sample
from tasks.log import log
from tasks.methods import METHODS
from tasks.model import bare_model, checkpoint, loaded_model
from tasks.prepare import naming_dropped
from tasks.record import OUTSIDE_KEY, File, Record, derive_seed, library_versions
from tasks.results.models import Base, Prepared, Questions, Setting, Training
from tasks.results.stage import stage
from tasks.results.store import remembered, store
from tasks.running.progress import Progress
from tasks.running.slots import gpu_slot
from tasks.stand_in import plannable
from tasks.text import loading
from tasks.text.loading import LIBRARIES, find_model
from tasks.text.questions import User, profile_questions, questions_of, user_queries
from tasks.text.tokens import Kind
from tasks.users import each_user

# What the model is adapted on, all users' of one kind before the next.
KINDS: dict[str, tuple[Kind, ...]] = {
    "queries": ("golds",),
    "profile": ("profile",),
    "both": ("golds", "profile"),
}


class GivenModel(Record):
    """A model of the user's: a folder or hub id, and the hash of its files."""

    model: Annotated[str, OUTSIDE_KEY]
    content: str
    revision: str | None


def base_model(config: TaskConfig, users: Prepared) -> Base:
    """The base model of a cell, adapted to the LaMP task where `base.task_adapt` says so."""
    if config.base.quantisation == "nf4":
        from tasks.lora.base import nf4, pick_device

        nf4(pick_device(config.compute.device))  # to fail now, not at the answers
    questions = questions_of(config.prompt, users, config.base.model)
    if config.base.model == "tiny":
        longer = None
        if share := config.base.tiny.history_share:
            # Not of `questions`: without history these have neither index nor version.
            prompt = config.prompt.model_copy(update={"history_items": config.rag.history_items})
            longer = questions_of(prompt, users, "tiny")
        lessons = Lessons(questions=questions, share=share, longer=longer)
        with naming_dropped(users.dropped, config.task):
            base = tiny_model(
                config.base.tiny, config.base.max_tokens, lessons, users.base, config.seed,
                config.compute,
            )  # fmt: skip
    else:
        base = given_model(identified(config.base.model), config.compute)
    dtype = loading.dtype_of(config.base, config.compute)
    base = base.model_copy(
        update={
            "model": config.base.model,
            "max_tokens": config.base.max_tokens,
            "dtype": dtype,
            "adapter_dtype": loading.adapter_dtype_of(dtype, config.compute),
            "chat": questions.prompt.chat,
            "engine": config.base.engine,
            "gradient_checkpointing": config.base.gradient_checkpointing,
        }
    )
    if not config.base.task_adapt.enabled:
        return base
    adapted = task_adapt(
        config.base.task_adapt, questions, users.base, base, config.seed, config.compute
    )
    # These are no part of the key, so the cached result may hold those of an earlier run.
    fields = ("model", "weights", "gradient_checkpointing")
    return adapted.model_copy(update={name: getattr(base, name) for name in fields})


class Lessons(Record):
    """What the tiny model learns: questions, a `share` of them with history (`longer`)."""

    questions: Questions
    share: float
    longer: Questions | None

    def of(self, user: User, seed: int) -> list[Sample]:
        """A user's items, some with history in front. Queries, too, if items ask nothing."""
        plain = profile_questions(self.questions, user["profile"])
        if self.questions.task.items == "completed":
            return plain + user_queries(self.questions, user)
        if self.longer is None:
            return plain
        with_items = profile_questions(self.longer, user["profile"])
        generator = random.Random(derive_seed(seed, "lessons", str(user["user_id"])))
        return [
            long if generator.random() < self.share else short
            for short, long in zip(plain, with_items, strict=True)
        ]


@stage(version=3, libraries=LIBRARIES, uses_model=True)
def tiny_model(
    tiny: TinyModelOptions,
    max_tokens: int,
    lessons: Lessons,
    users: File,
    seed: int,
    compute: ComputeOptions,
) -> Base:
    """A tiny Llama trained from random weights on the base users' items.

    Raises InputError where there are no base users.
    """
    from tasks.lora.base import pick_device
    from tasks.lora.tiny import train_tiny

    loading.use_threads("tiny", compute)
    names = [user["user_id"] for user in each_user(users)]
    samples = chain(*(lessons.of(user, seed) for user in each_user(users)))
    questions = [(sample.prompt, sample.answer) for sample in samples]
    if not questions:
        raise InputError(
            "base.model: tiny is trained on base users and the data has none; raise "
            "split.base_share, add user_base_LLM.json, or give base.model"
        )
    title = f"{lessons.questions.task.name}: training the tiny base model"
    key = tiny_model.key(tiny, max_tokens, lessons, users, seed, compute)
    with (
        checkpoint(compute, "tiny_model", key, names) as kept,
        store().new("tiny_model") as folder,
        gpu_slot(),
    ):
        trained = train_tiny(
            folder.path / "model", questions, vocabulary=tiny.max_vocabulary,
            **tiny.model_dump(exclude={"max_vocabulary", "history_share"}),
            max_tokens=max_tokens, seed=seed, device=pick_device(compute.device),
            progress=Progress("base-model", title, tiny.steps).update, checkpoint=kept,
        )  # fmt: skip
    weights = folder.file("model")
    training = Training(
        items=len(questions), steps=tiny.steps, tokens=trained.tokens,
        truncated=trained.truncated, losses=tuple(trained.losses),
    )  # fmt: skip
    return Base(model="tiny", content=weights.sha256, weights=weights, dtype="float32",
                max_tokens=max_tokens, training=training)  # fmt: skip


@stage(version=3, libraries=LIBRARIES, uses_model=True)
def given_model(given: GivenModel, compute: ComputeOptions) -> Base:
    """Load a given model once. Raises InputError where it is no causal language model."""
    from tasks.lora.base import check_causal, load_base

    loading.use_threads(given.model, compute)
    with gpu_slot():
        folder = find_model(given.model, given.revision)
        loaded = load_base(folder, max_tokens=8, device=compute.device)
        check_causal(loaded)
    return Base(
        model=given.model, content=given.content, revision=given.revision, dtype="float32",
        max_tokens=8, kind=loaded.model.config.model_type,
        parameters=loaded.model.num_parameters(),
    )  # fmt: skip


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
    setting = Setting(base=base, questions=questions, seed=seed, compute=compute)
    with (
        checkpoint(compute, "task_adapt", key, names) as kept,
        store().new("task_adapt") as folder,
        loaded_model(setting) as model,
    ):
        tokens = [model.tokens(kind, each_user(users)) for kind in KINDS[options.train_on]]
        everything = joined(chain(*tokens))
        samples = everything.chosen(chosen_items(options, len(everything), seed))
        ((lora, training),) = model.train(
            options,
            [samples],
            [derive_seed(seed, "task_adapt")],
            progress=Progress("task-adapt", title, 1).update,
            checkpoint=kept,
        )
        if training.failed:
            raise InputError(
                f"base.task_adapt: the loss was not finite at step {training.steps}; "
                "lower base.task_adapt.learning_rate"
            )
        write_peft(folder.path / "adapter", lora, loading.model_name(base.model))
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


@plannable
def identified(model: str) -> GivenModel:
    """A given model and the hash of its files. Raises InputError where files are missing."""
    from tasks.lora.base import whole_model

    folder = find_model(model)
    if not (folder / "config.json").exists():
        raise InputError(
            f"base.model {model}: {folder} has no config.json; give a folder with config.json, a "
            "tokenizer and safetensors weights"
        )
    whole_model(folder)
    # A snapshot's folder is named by its commit.
    revision = None if Path(model).expanduser().is_dir() else folder.name
    content = loading.folder_hash(folder, loading.HUB_FILES)
    return GivenModel(model=model, content=content, revision=revision)


@plannable
def coverage_lines(config: TaskConfig, base: Base) -> tuple[str, ...]:
    """Which layers of the model get LoRAs: a line per choice of layers. Logs them, too.

    Raises InputError where no layer has such a name.
    """
    used: dict[str, TrainingOptions] = {}
    if config.base.task_adapt.enabled:
        used["base.task_adapt"] = config.base.task_adapt
    for name in config.methods:
        of_method, method = config.method(name), METHODS[name]
        if method.merged and not of_method.bank.adapters:
            used["meta_lora"] = of_method.meta_lora
        if method.trained and of_method.training:
            used[method.trained] = of_method.training
    sections = defaultdict[str, list[str]](list)
    for section, how in used.items():
        sections[json.dumps(how.target_modules)].append(section)
    lines = tuple(
        f"{', '.join(names)}: {_coverage(base, modules)}" for modules, names in sections.items()
    )
    for line in lines:
        log(line)
    return lines


def _coverage(base: Base, modules: str) -> str:
    """modules: `target_modules` as JSON."""

    def count() -> str:
        from tasks.lora.targets import coverage

        return coverage(bare_model(base), json.loads(modules)).text()

    about = [library_versions(("transformers", "peft")), base.content, modules]
    return str(remembered("coverage", about, count))
