"""The stages one after another on a tiny given base model, called without a flow or a server."""

from __future__ import annotations

import contextlib
import pkgutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import polars as pl
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from flows.lamp_task import Common, bank_and_recipes, lamp_task
from tasks.base_model import base_model
from tasks.config.run import RunConfig, resolve
from tasks.config.task import TaskConfig
from tasks.prepare import prepared_users
from tasks.results.run import Cell, Merging
from tasks.results.stage import Stage
from tasks.results.store import store
from tests.unit.lora.helpers import tiny_base
from tests.unit.stages.users import user, write_users

T = TypeVar("T")
ROLES = {
    "base": [user("base-1", 3), user("base-2", 3)],
    "anchor": [user(f"anchor-{n}", 3 + n) for n in range(4)],
    "few_shot": [user(f"few-{n}", 4, queries=2) for n in range(3)],
}
# The first few-shot user has an item more.
ONE_MORE_ITEM = ROLES | {"few_shot": [user("few-0", 5, queries=2), *ROLES["few_shot"][1:]]}
# 256 numbers a user: to whiten the preset's 2,048 takes longer than all else of a run.
SIGNATURE = {"signature_vocabulary": 16, "signature_hidden": 16}
LORA = {"learning_rate": 0.03, "epochs": 2, "batch_size": 2, "accumulation": 1}
OPTIONS: dict[str, Any] = {
    "split": {"base_candidates": False},
    "anchors": {"count": 3, "min_items": 4, "min_cluster_size": 2, "train_on": "user"},
    "meta_lora": {"rank": 3, "alpha": 3.0, **LORA},
    "fusion": {"top_m": 2, "weights": "cosine"},
    "stacking": {"rank": 2, "alpha": 4.0, **LORA},
}


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
    """`folder` with the base model, and one store."""
    base = tiny_base()
    base.model.save_pretrained(folder / "model")
    base.tokenizer.save_pretrained(folder / "model")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MTA_STORE", str(folder / "mta" / "store"))
        yield folder


def run_config(place: Path, roles: dict[str, Any], **given: Any) -> RunConfig:
    """The configuration of a run on these users, who are written to `place`."""
    data = write_users(place / "data", **roles)
    base_options = {"model": str(place / "model"), "max_tokens": 64} | given.pop("base", {})
    methods = given.pop("methods", ["base", "merge_only", "mta"])
    settings = {"data": str(data), "base": base_options, "methods": methods, **(OPTIONS | given)}
    return resolve(settings | {"anchors": SIGNATURE | settings["anchors"]})


def config_of(place: Path, roles: dict[str, Any], **given: Any) -> TaskConfig:
    """The configuration of LaMP-2M on these users."""
    config = run_config(place, roles, **given)
    return config.for_task("LaMP-2M", config.seed)


def run(place: Path, roles: dict[str, Any], **given: Any) -> Cell:
    """All stages of one LaMP task, without a flow or a server."""
    return lamp_task(config_of(place, roles, **given))


def merging(place: Path, roles: dict[str, Any], **given: Any) -> Merging:
    """The stages up to the recipes."""
    config = config_of(place, roles, **({"methods": ["merge_only"]} | given))
    users = prepared_users(config)
    (names,) = config.sharing_a_bank()
    common = Common(config, users, base_model(config, users))
    found = bank_and_recipes(common, names)
    assert common.missing == []
    return found


@contextlib.contextmanager
def stage_keys() -> Iterator[dict[str, list[str]]]:
    """Stage -> the cache keys of its calls inside the block, in order.

    Equal keys are one piece of work: in a flow the second is found.
    """
    keys: dict[str, list[str]] = {}
    real = Stage.made

    def made(self: Stage[..., Any], arguments: dict[str, Any]) -> Any:
        keys.setdefault(self.name, []).append(self.key(**arguments))
        return real(self, arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Stage, "made", made)
        yield keys


def noted(patch: pytest.MonkeyPatch, target: str, about: Callable[..., T]) -> list[T]:
    """What each call of the function named `target` is about, from here on."""
    real = pkgutil.resolve_name(target)
    calls: list[T] = []

    def call(*args: Any, **kwargs: Any) -> Any:
        calls.append(about(*args, **kwargs))
        return real(*args, **kwargs)

    patch.setattr(target, call)
    return calls


def embedded_for(_method: Any, users: Iterable[dict[str, Any]], *_: Any) -> list[str]:
    """Whom a call of `embed._vectors` is for."""
    return [user["user_id"] for user in users]


def predictions(cell: Cell, method: str) -> dict[str, str]:
    """query id -> answer of a method."""
    scored = cell.scored(method)
    assert scored is not None
    table = pl.read_parquet(store().path(scored.predictions))
    assert table.columns == ["user_id", "query_id", "gold", "prediction"]
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
