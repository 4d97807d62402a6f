"""What decides the key of every stage: all but what is named here."""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel

import tasks
from tasks.answer import HowAnswered
from tasks.bank import GivenAdapter
from tasks.base_model import GivenModel, Lessons
from tasks.config.options import (
    AnchorOptions,
    ComputeOptions,
    EmbeddingOptions,
    FusionOptions,
    LearnedOptions,
    PriorOptions,
    TaskAdaptOptions,
    TinyModelOptions,
    TrainingOptions,
)
from tasks.embed import Embedding
from tasks.lamp.definitions import TASKS
from tasks.lamp.options import PromptOptions, SplitOptions, SyntheticOptions
from tasks.methods.hypernetwork import Network, NetworkOptions
from tasks.methods.per_pcs import GateOptions
from tasks.record import File, Result
from tasks.results.models import (
    Anchor,
    Anchors,
    Answers,
    Bank,
    Base,
    Clusters,
    Compared,
    Difference,
    Embedded,
    Estimate,
    Evidence,
    Merged,
    MetaLora,
    Prepared,
    Questions,
    Recipes,
    Scored,
    Setting,
    SourceFiles,
    Training,
)
from tasks.results.stage import Stage
from tasks.text.encoder import Encoder

# Where files lie and models are, what a run is like, what is only told: no number depends on it.
OUTSIDE = {
    "File.uri",
    "Result.seconds", "Result.made_of", "Result.cached",
    "SourceFiles.path", "GivenAdapter.path", "GivenModel.model", "Encoder.model",
    "Prepared.longest_candidate", "Prepared.counts", "Prepared.dropped", "Prepared.audit",
    "Base.model", "Base.weights", "Base.gradient_checkpointing", "Base.kind", "Base.parameters",
    "Base.training",
    "Embedded.users", "Embedded.dimensions",
    "MetaLora.training", "Bank.map", "Answers.work", "Answers.failed",
    "Compared.golds_without_token",
    "AnchorOptions.per_job",
    "ComputeOptions.device", "ComputeOptions.threads", "ComputeOptions.runner",
    "ComputeOptions.workers", "ComputeOptions.max_workers", "ComputeOptions.side_by_side",
    "ComputeOptions.ray_address", "ComputeOptions.gpus_per_job", "ComputeOptions.cpus_per_job",
    "ComputeOptions.checkpoint_seconds", "ComputeOptions.adapter_dtype",
}  # fmt: skip


def file(name: str) -> File:
    return File(uri=f"{name}/ab/abc/file", sha256=name)


NOTED: dict[str, Any] = {"seconds": 1.0, "made_of": ("prepare/ab/abc",), "cached": True}
COMPUTE = ComputeOptions(
    threads=1, workers="threads", max_workers=1, side_by_side=1, ray_address="auto"
)
TRAINING = Training(items=1, steps=1, tokens=1, truncated=1, losses=(1.0,))
PROMPT = PromptOptions(style="published", history_items=1)
QUESTIONS = Questions(
    task=TASKS["LaMP-2M"], prompt=PROMPT, instruction="Which?", layout=1, retrieval=2
)
PREPARED = Prepared(
    task=TASKS["LaMP-2M"], base=file("base"), anchor=file("anchor"), few_shot=file("few_shot"),
    pooled=file("pooled"), optimum=file("optimum"), population=file("population"),
    few_shot_ids=("u1", "u2"), instruction="Which?", longest_candidate=3, counts={"users": 1},
    dropped={"empty": 1}, audit={"groups": 1}, **NOTED,
)  # fmt: skip
BASE = Base(
    model="/models/a", content="hash", revision="main", weights=file("weights"),
    adapter=file("adapter"), dtype="float32", max_tokens=64, kind="llama", parameters=9,
    training=TRAINING, **NOTED,
)  # fmt: skip
SETTING = Setting(base=BASE, questions=QUESTIONS, seed=3, compute=COMPUTE)
EMBEDDED = Embedded(
    table=file("vectors"), whitening=file("whitening"), centred=True, users=3, dimensions=4, **NOTED
)
CLUSTERS = Clusters(clusters=(0, 1), **NOTED)
ANCHOR = Anchor(name="u1", items=3, cluster=0, members=("u1",))
ANCHORS = Anchors(
    table=file("anchors"), anchors=(ANCHOR,), whole_clusters=0, asked=1, candidates=2, eligible=1,
    clusters=1, noise=0, **NOTED,
)  # fmt: skip
LORA = MetaLora(anchor="u1", members=("u1",), adapter=file("lora"), training=TRAINING)
BANK = Bank(file=file("bank"), members=(LORA,), map=file("map"), **NOTED)
RECIPES = Recipes(
    table=file("recipes"), users=2, anchors_per_user=1, without_similar_anchor=0, **NOTED
)
MERGED = Merged(bank=BANK, recipes=RECIPES, how="exact")
ANSWERS = Answers(
    users=("u1",), predictions=file("answers"), work=file("work"), merged=True,
    stacked=file("stacked"), bytes_per_user=4, failed=("u1",), **NOTED,
)  # fmt: skip
COMPARED = Compared(
    task=TASKS["LaMP-2M"], groups=1, queries=2, methods=("base", "mta"), sample="given",
    intervals={"base": {"accuracy": Estimate(point=0.5, lo=0.4, hi=0.6)}},
    differences={"mta": {"base": {"accuracy": Difference(point=0.1, lo=0.0, hi=0.2, holds=True)}}},
    scored=(
        Scored(method="base", users=1, queries=2,
               predictions=file("predictions"), golds=file("golds")),
    ),
    draws=file("draws"), golds_without_token=1, **NOTED,
)  # fmt: skip
EMBEDDING = Embedding(
    options=EmbeddingOptions(), seed=3, task=TASKS["LaMP-2M"], base=BASE, questions=QUESTIONS,
    encoder=Encoder(model="/models/e", content="hash", libraries={"torch": "1"}),
)  # fmt: skip
TRAINED = TrainingOptions(target_modules=["q_proj"], target_parameters=["experts"])
HOW = HowAnswered(
    method="mta", version=1, training=TRAINED, answer="generate", quantisation="nf4",
    prior=PriorOptions(), libraries={"bitsandbytes": "1"},
)  # fmt: skip
ARGUMENTS: dict[str, tuple[Any, ...]] = {
    "prepare": (SourceFiles(path="/data", files={"a.json": "hash"}), SplitOptions(few_shot_items=3),
                TASKS["LaMP-2M"], 3),
    "tiny_model": (TinyModelOptions(), 64, Lessons(questions=QUESTIONS, share=0.5,
                   longer=QUESTIONS), file("base"), 3, COMPUTE),
    "given_model": (GivenModel(model="/models/a", content="hash", revision="main"), COMPUTE),
    "task_adapt": (TaskAdaptOptions(max_items=3), QUESTIONS, file("base"), BASE, 3, COMPUTE),
    "embed": (EMBEDDING, {"anchor": file("anchor")}, COMPUTE),
    "clusters": (AnchorOptions(), EMBEDDED, 3),
    "anchors": (AnchorOptions(), EMBEDDED, file("anchor"), CLUSTERS),
    "meta_lora": (TRAINED, (ANCHOR,), file("anchor"), SETTING),
    "bank": ((LORA,), ANCHORS, "LaMP-2M, mta"),
    "own_bank": ((GivenAdapter(name="a", path="/adapters/a", content="hash"),), BASE),
    "learned_weights": (LearnedOptions(), MERGED, file("few_shot"), SETTING),
    "common_answer": ((file("base"), file("anchor")),),
    "experts": (TRAINED, 3, BANK, file("base"), file("anchor"), SETTING),
    "network": (NetworkOptions(), EMBEDDED, BANK, file("anchor"), SETTING),
    "predicted": (3, Network(file=file("network"), **NOTED), EMBEDDED, BANK, RECIPES),
    "gates": (GateOptions(), BANK, file("anchor"), SETTING),
    "evidence": (3, EMBEDDED, BANK, file("few_shot"), SETTING),
    "fusion": (FusionOptions(shortlist=3), EMBEDDED, BANK,
               Evidence(table=file("evidence"), **NOTED), 3),
    "answers": (HOW, file("few_shot"), ("u1",), MERGED, Result(**NOTED), SETTING),
    "compare": (PREPARED, {"mta": (ANSWERS,)}, "lamp", "given"),
    "overall": ((COMPARED,),),
}  # fmt: skip
WORLD = (SyntheticOptions(), SplitOptions(few_shot_items=3), TASKS["LaMP-2M"], 3)


def changes(value: Any, named: str) -> Iterator[tuple[str, Any]]:
    """`value` with one thing in it changed, for every thing; and the class and field it is in."""
    if isinstance(value, BaseModel):
        for name in type(value).model_fields:
            own = "Result" if name in Result.model_fields and isinstance(value, Result) else (
                type(value).__name__
            )  # fmt: skip
            field = named if named in OUTSIDE else f"{own}.{name}"
            for label, other in changes(getattr(value, name), field):
                yield label, value.model_copy(update={name: other})
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        for one in dataclasses.fields(value):
            field = f"{type(value).__name__}.{one.name}"
            for label, other in changes(getattr(value, one.name), field):
                yield label, dataclasses.replace(value, **{one.name: other})
    elif isinstance(value, Mapping):
        yield named, {**value, "another": 1}
        for key, one in value.items():
            for label, other in changes(one, named):
                yield label, {**value, key: other}
    elif isinstance(value, tuple | list):
        yield named, [*value, "another"]
        for number, one in enumerate(value):
            for label, other in changes(one, named):
                yield label, [*value[:number], other, *value[number + 1 :]]
    elif isinstance(value, bool):
        yield named, not value
    elif isinstance(value, int | float):
        yield named, value + 1
    else:
        assert value is None or isinstance(value, str), named
        yield named, f"{value}x"


def stages() -> dict[str, Stage[..., Any]]:
    """All there are, by the modules that have one."""
    found: dict[str, Stage[..., Any]] = {}
    root = Path(tasks.__path__[0])
    for path in root.rglob("*.py"):
        if "\n@stage(" in path.read_text():
            name = ".".join(path.relative_to(root.parent).with_suffix("").parts)
            module = importlib.import_module(name)
            found |= {
                one.name: one
                for one in vars(module).values()
                if isinstance(one, Stage) and one.__module__ == name
            }
    return found


def test_every_stage_is_looked_at() -> None:
    assert stages().keys() == ARGUMENTS.keys()


@pytest.mark.parametrize("name", ARGUMENTS)
def test_a_key_follows_all_that_decides_and_nothing_else(name: str) -> None:
    one = stages()[name]
    for arguments in [ARGUMENTS[name]] + ([WORLD] if name == "prepare" else []):
        key = one.key(*arguments)
        counts: dict[str, set[bool]] = {}
        for number, argument in enumerate(arguments):
            for label, other in changes(argument, f"argument {number}"):
                changed = one.key(*arguments[:number], other, *arguments[number + 1 :])
                counts.setdefault(label, set()).add(changed != key)
        outside = {label for label, found in counts.items() if found == {False}}
        assert outside == counts.keys() & OUTSIDE
        assert all(len(found) == 1 for found in counts.values())


def test_nothing_is_named_here_in_vain() -> None:
    seen = {
        label
        for arguments in ARGUMENTS.values()
        for argument in arguments
        for label, _ in changes(argument, "argument")
    }
    assert seen >= OUTSIDE
