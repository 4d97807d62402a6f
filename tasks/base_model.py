"""Stage 2: the frozen base model. `tiny` is trained on the base users, others are as given."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Annotated

from tasks.config.options import ComputeOptions, TinyModelOptions, TrainingOptions
from tasks.config.task import TaskConfig, derive_seed
from tasks.errors import InputError
from tasks.lamp.prompts import Sample
from tasks.log import log
from tasks.methods import METHODS
from tasks.prepare import each_user, naming_dropped
from tasks.record import OUTSIDE_KEY, File, Record, library_versions
from tasks.results.models import Base, Prepared, Questions, Training
from tasks.results.stage import stage
from tasks.results.store import remembered, store
from tasks.running.progress import Progress
from tasks.running.slots import gpu_slot
from tasks.stand_in import plannable
from tasks.task_adapt import adapted_to_task
from tasks.text.loading import (
    HUB_FILES,
    LIBRARIES,
    adapter_dtype_of,
    dtype_of,
    find_model,
    folder_hash,
    model_folder,
    use_threads,
)
from tasks.text.questions import User, profile_questions, questions_of, user_queries
from tasks.training import checkpoint


class GivenModel(Record):
    """A model of the user's: a folder or hub id, and the hash of its files."""

    model: Annotated[str, OUTSIDE_KEY]
    content: str
    revision: str | None


def base_model(config: TaskConfig, users: Prepared) -> Base:
    """The base model of a cell, adapted to the LaMP task where `base.task_adapt` says so."""
    if config.base.quantisation == "nf4":
        from tasks.lora.base import nf4, pick_device

        nf4(pick_device(config.compute.device))  # without the library nothing could be answered
    questions = questions_of(config.prompt, users, config.base.model)
    if config.base.model == "tiny":
        longer = None
        if share := config.base.tiny.history_share:
            # Of the configuration: without a history `questions` have neither index nor version.
            prompt = config.prompt.model_copy(update={"history_items": config.rag.history_items})
            longer = questions_of(prompt, users, "tiny")
        lessons = Lessons(questions=questions, share=share, longer=longer)
        with naming_dropped(users.dropped, config.task):
            base = tiny_model(
                config.base.tiny, config.base.max_tokens, lessons, users.base, config.seed,
                config.compute,
            )  # fmt: skip
    else:
        base = given_model(given(config.base.model), config.compute)
    dtype = dtype_of(config.base, config.compute)
    base = base.model_copy(
        update={
            "model": config.base.model,
            "max_tokens": config.base.max_tokens,
            "dtype": dtype,
            "adapter_dtype": adapter_dtype_of(dtype, config.compute),
            "chat": questions.prompt.chat,
            "engine": config.base.engine,
            "gradient_checkpointing": config.base.gradient_checkpointing,
        }
    )
    return adapted_to_task(config, users, questions, base)


class Lessons(Record):
    """What the tiny model learns: questions, a `share` of them with history before (`longer`)."""

    questions: Questions
    share: float
    longer: Questions | None

    def of(self, user: User, seed: int) -> list[Sample]:
        """What it learns from one user: each item once, some with history before it.

        Where items are no questions (LaMP-7), it learns from the queries what a question is.
        """
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

    use_threads("tiny", compute)
    names, questions = [], []
    for user in each_user(users):
        names.append(user["user_id"])
        questions += [(sample.prompt, sample.answer) for sample in lessons.of(user, seed)]
    if not questions:
        raise InputError(
            "base.model: tiny is trained on base users and the data has none; raise "
            "split.base_share, add user_base_LLM.json, or give base.model"
        )
    title = f"{lessons.questions.task.name}: training the tiny base model"
    progress = Progress("base-model", title, tiny.steps)
    key = tiny_model.key(tiny, max_tokens, lessons, users, seed, compute)
    with (
        checkpoint(compute, "tiny_model", key, names) as kept,
        store().new("tiny_model") as folder,
        gpu_slot(),
    ):
        trained = train_tiny(
            folder.path / "model", questions, hidden=tiny.hidden, layers=tiny.layers,
            heads=tiny.heads, steps=tiny.steps, batch_size=tiny.batch_size,
            learning_rate=tiny.learning_rate, vocabulary=tiny.max_vocabulary,
            max_tokens=max_tokens, seed=seed, device=pick_device(compute.device),
            progress=progress.update, checkpoint=kept,
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
    """Load a given model once, to see that it is a whole causal language model.

    Raises InputError where it is not.
    """
    from tasks.lora.base import check_causal, load_base

    use_threads(given.model, compute)
    with gpu_slot():
        folder = find_model(given.model, given.revision)
        loaded = load_base(folder, max_tokens=8, device=compute.device)
        check_causal(loaded)
    return Base(
        model=given.model, content=given.content, revision=given.revision, dtype="float32",
        max_tokens=8, kind=loaded.model.config.model_type,
        parameters=loaded.model.num_parameters(),
    )  # fmt: skip


@plannable
def given(model: str) -> GivenModel:
    """The model that a run is given, by its content.

    Raises InputError where there is none, or a folder without config.json or safetensors weights.
    """
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
    return GivenModel(model=model, content=folder_hash(folder, HUB_FILES), revision=revision)


@plannable
def coverage_lines(config: TaskConfig, base: Base) -> tuple[str, ...]:
    """What of the model the run's LoRAs are on: a line for each choice of layers.

    Logged, and counted once per model. Raises InputError where no layer is so named.
    """
    used: dict[str, TrainingOptions] = {}
    if config.base.task_adapt.enabled:
        used["base.task_adapt"] = config.base.task_adapt
    for name in config.methods:
        own, method = config.method(name), METHODS[name]
        if method.merged and not own.bank.adapters:
            used["meta_lora"] = own.meta_lora
        if method.trained and own.training:
            used[method.trained] = own.training
    sections: dict[str, list[str]] = {}
    for section, how in used.items():
        sections.setdefault(json.dumps(how.target_modules), []).append(section)
    lines = tuple(f"{', '.join(own)}: {_coverage(base, names)}" for names, own in sections.items())
    for line in lines:
        log(line)
    return lines


def _coverage(base: Base, modules: str) -> str:
    """modules: `target_modules` as JSON."""

    def count() -> str:
        from transformers import AutoConfig

        from tasks.lora.base import without_weights
        from tasks.lora.targets import coverage

        shape = AutoConfig.from_pretrained(model_folder(base), trust_remote_code=False)
        return coverage(without_weights(shape), json.loads(modules)).text()

    about = [library_versions(("transformers", "peft")), base.content, modules]
    return str(remembered("coverage", about, count))
