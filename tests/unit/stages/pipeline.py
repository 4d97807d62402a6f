"""The stages one after another on a tiny given base model, called without a flow or a server."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from tasks import base_model as base_model_stage
from tasks import embedding, evidence, meta_lora, refit, scoring, stacking, task_adapt
from tasks.anchors import anchors
from tasks.base_model import base_model
from tasks.config import resolve
from tasks.fusion import fusion
from tasks.prepare import prepare
from tasks.store.artifacts import Store
from tests.unit.lora.helpers import tiny_base
from tests.unit.stages.users import result, user, write_users

ROLES = {
    "base": [user("base-1", 3), user("base-2", 3)],
    "anchor": [user(f"anchor-{n}", 3 + n) for n in range(4)],
    "few_shot": [user(f"few-{n}", 4, queries=2) for n in range(3)],
}
# The first few-shot user has an item more.
ONE_MORE_ITEM = ROLES | {"few_shot": [user("few-0", 5, queries=2), *ROLES["few_shot"][1:]]}
LORA = {"learning_rate": 0.03, "epochs": 2, "batch_size": 2, "accumulation": 1}
OPTIONS: dict[str, Any] = {
    "anchors": {"count": 3, "min_items": 4, "min_cluster_size": 2, "train_on": "user"},
    "meta_lora": {"rank": 3, "alpha": 3.0, **LORA},
    "fusion": {"top_m": 2, "weights": "cosine"},
    "stacking": {"rank": 2, "alpha": 4.0, **LORA},
}


class Quiet:
    """Stands in for the progress bar, which wants a server."""

    def __init__(self, *_about: Any) -> None: ...

    def update(self, done: int, total: int | None = None) -> None: ...


class Killed(BaseException):
    """Not an Exception: nothing on the way may take it for an error that it can handle."""


def until_done(call: Callable[[], Any]) -> Any:
    while True:
        try:
            return call()
        except Killed:
            continue


@contextlib.contextmanager
def prepared_place(folder: Path) -> Iterator[Path]:
    """`folder` with the base model; one store, no slots and no progress bars."""
    base = tiny_base()
    base.model.save_pretrained(folder / "model")
    base.tokenizer.save_pretrained(folder / "model")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MTA_STORE", str(folder / "mta" / "store"))
        stages = (base_model_stage, task_adapt, embedding, refit, evidence, meta_lora, stacking)
        for module in (*stages, scoring):
            patch.setattr(module, "gpu_slot", contextlib.nullcontext)
        for module in (task_adapt, embedding, refit):
            patch.setattr(module, "Progress", Quiet)
        yield folder


def run(
    place: Path, roles: dict[str, Any], recipes_only: bool = False, **given: Any
) -> dict[str, Any]:
    """All stages of one LaMP task; `states` maps a stage to the names of its runs' states.

    `recipes_only`: those up to the recipes.
    """
    data = write_users(place / "data", **roles)
    base_options = {"model": str(place / "model"), "max_tokens": 64} | given.pop("base", {})
    settings = {"data": str(data), "base": base_options, **(OPTIONS | given)}
    config = resolve(settings).model_dump(mode="json")
    task, states = "LaMP-2M", {}

    def take(name: str, state: Any) -> dict[str, Any]:
        states.setdefault(name, []).append(state.name)
        return result(state)

    prepared = take("prepare", prepare.fn(config, task))
    base = take("base", base_model.fn(config, task, prepared))
    if config["base"]["task_adapt"]["enabled"]:
        adapter = take("task_adapt", task_adapt.task_adapt.fn(config, task, prepared, base))
        base = base | {"adapter": adapter}
    embedded = take("embed", embedding.embed.fn(config, task, prepared, base))
    refitted = None
    if config["anchors"]["refits"] and config["anchors"]["train_on"] != "user":
        refitted = take("refit", refit.refit.fn(config, task, prepared, base, embedded))
    chosen = take("anchors", anchors.fn(config, task, prepared, embedded, refitted))
    trained = [
        take("meta_lora", meta_lora.meta_lora.fn(config, task, prepared, base, [item]))[0]
        for item in chosen["value"]["anchors"]
    ]
    users_of = {item["user_id"]: item["members"] for item in chosen["value"]["anchors"]}
    banked = take("bank", meta_lora.bank.fn(trained, users_of))
    weighed = None
    if config["fusion"]["weights"] == "evidence":
        weighed = take(
            "evidence", evidence.evidence.fn(config, task, prepared, base, embedded, banked)
        )
    fused = take("fusion", fusion.fn(config, task, embedded, banked, weighed))
    done: dict[str, Any] = {
        "lamp_task": task,
        "seed": config["seed"],
        "config": config,
        "prepared": prepared,
        "base": base,
        "embedded": embedded,
        "anchors": chosen,
        "bank": banked,
        "evidence": weighed,
        "fusion": fused,
        "states": states,
    }
    if recipes_only:
        return done
    bare = {"prepared": prepared, "base": base, "banked": None, "fused": None}
    inputs = bare | {"banked": banked, "fused": fused}
    users = prepared["value"]["few_shot"]
    stacked = take("stacking", stacking.stacking.fn(config, task, inputs, "mta", 0, users))

    def answers(method: str) -> dict[str, Any]:
        given = bare if method == "base" else inputs
        own = stacked if method == "mta" else None
        state = scoring.predict.fn(config, task, given, method, 0, users, own)
        return take(f"predict {method}", state)

    answered = {method: answers(method) for method in ("base", "merge_only", "mta")}
    scores = {
        method: take(f"score {method}", scoring.score.fn(task, method, [part]))
        for method, part in answered.items()
    }
    return done | {
        "banks": {"merge_only": {"bank": banked, "fusion": fused}},
        "bank_of": {"merge_only": "merge_only", "mta": "merge_only"},
        "stacking": {"mta": [stacked]},
        "answered": answered,
        "scores": scores,
    }


def predictions(where: Store, done: dict[str, Any], method: str) -> dict[str, str]:
    folder = where.open(done["answered"][method]["ref"]).folder
    table = pl.read_parquet(folder / "predictions.parquet")
    assert table.columns == ["row", "user_id", "query_id", "gold", "prediction"]
    return dict(zip(table["query_id"], table["prediction"], strict=True))


def stock_answers(
    place: Path, folder: Path | None, prompts: list[str], max_new_tokens: int = 8
) -> list[str]:
    """One prompt at a time through stock PEFT and transformers."""
    tokenizer = AutoTokenizer.from_pretrained(place / "model")
    model = AutoModelForCausalLM.from_pretrained(place / "model", dtype=torch.float32)
    if folder is not None:
        model = PeftModel.from_pretrained(model, folder)
    answers = []
    for prompt in prompts:
        ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            output = model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=max_new_tokens,
                do_sample=False,
            )
        text = tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True)
        answers.append(text.strip())
    return answers
