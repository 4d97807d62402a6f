"""Baselines that train nothing: by hand, and found again."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from tasks.config.run import resolve
from tasks.lamp.definitions import MOVIE_TAGS
from tasks.method.prior import log_prior
from tasks.methods import METHODS
from tasks.results.store import store
from tests.unit.stages.pipeline import ROLES, noted, predictions, run
from tests.unit.stages.users import user


def tagged(name: str, *tags: str) -> dict[str, Any]:
    """A user with two queries, whose items have these tags."""
    one = user(name, len(tags), queries=2)
    for item, tag in zip(one["profile"], tags, strict=True):
        item["tag"] = tag
    return one


# Their commonest tags by hand; of equals the one that was given first.
USERS = {
    "few-0": (tagged("few-0", "comedy", "action", "action", "classic"), "action"),
    "few-1": (tagged("few-1", "romance", "action", "action", "romance"), "romance"),
    "few-2": (tagged("few-2", "sci-fi", "fantasy", "classic", "violence"), "sci-fi"),
}


def test_it_is_what_the_user_answered_most(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = noted(monkeypatch, "tasks.model.load", lambda base, *_: base.model)
    few_shot = [one for one, _ in USERS.values()]
    cell = run(place, ROLES | {"few_shot": few_shot}, methods=["commonest"])
    wanted = {f"{name}-q{n}": tag for name, (_, tag) in USERS.items() for n in range(2)}
    assert predictions(cell, "commonest") == wanted
    assert "accuracy" in cell.compared.intervals["commonest"]
    assert loaded == []

    asked = noted(monkeypatch, "tasks.answer.answered", lambda batch, *_: batch.names)
    run(place, ROLES | {"few_shot": few_shot}, methods=["commonest"])
    assert asked == []
    few_shot[0]["profile"][0]["tag"] = "action"
    run(place, ROLES | {"few_shot": few_shot}, methods=["commonest"])
    assert len(asked) == 1


def test_everybodys_commonest_is_that_of_base_users_and_candidates(place: Path) -> None:
    """By hand: 'classic' stands three times there, all else once; few-shot users count nothing."""
    roles = {
        "base": [tagged("base-1", "classic", "action"), tagged("base-2", "classic")],
        "anchor": [
            tagged(f"anchor-{n}", *tags) for n, tags in enumerate((["classic"], ["comedy"]))
        ],
        "few_shot": [one for one, _ in USERS.values()],
    }
    cell = run(place, roles, methods=["commonest_of_all"])
    assert set(predictions(cell, "commonest_of_all").values()) == {"classic"}


def test_nearest_items_by_the_base_models_states(place: Path) -> None:
    """By transformers alone: mean last states, centred, three by cosine, the commonest tag."""
    few_shot = [one for one, _ in USERS.values()]
    cell = run(place, ROLES | {"few_shot": few_shot}, methods=["knn"])
    model = AutoModelForCausalLM.from_pretrained(place / "model").eval()
    tokenizer = AutoTokenizer.from_pretrained(place / "model")

    def state(text: str) -> Tensor:
        ids = torch.tensor([tokenizer(f"description: {text} tag:")["input_ids"]])
        with torch.no_grad():
            return model.model(input_ids=ids).last_hidden_state[0].mean(0)

    wanted = {}
    for one in few_shot:
        items = torch.stack([state(item["description"]) for item in one["profile"]])
        for query in one["query"]:
            text = query["input"].partition(" description: ")[2]
            cosines = torch.cosine_similarity(
                state(text) - items.mean(0), items - items.mean(0), dim=1
            )
            near = cosines.argsort(descending=True)[:3].tolist()
            tags = [one["profile"][n]["tag"] for n in near]
            wanted[query["id"]] = max(tags, key=tags.count)
    assert predictions(cell, "knn") == wanted
    assert len(set(wanted.values())) > 1


def test_label_prior_by_hand() -> None:
    """Two of four items 'a', smoothing 1, three labels: (2 + 1) / (4 + 3)."""
    got = log_prior(["a", "b", "a", "other", "b"], ["a", "b", "c"], 1.0)
    assert got == pytest.approx([math.log(3 / 7), math.log(3 / 7), math.log(1 / 7)])


def test_a_label_prior_weighs_the_likelihoods(place: Path, work: dict[str, list[Any]]) -> None:
    """log p of `base` plus the strength times the log prior; the model answers once for both."""
    few_shot = [one for one, _ in USERS.values()]
    options = {"scoring": {"answer": "likelihood"}, "label_prior": {"strength": 30.0}}
    cell = run(place, ROLES | {"few_shot": few_shot}, methods=["base", "base_prior"], **options)
    assert work["answers"] == [[one["user_id"] for one in few_shot]]
    (plain,) = cell.answers["base"]
    rows = pl.read_parquet(store().path(plain.predictions)).to_dicts()
    wanted = {}
    for row in rows:
        prior = log_prior(
            [item["tag"] for item in USERS[row["user_id"]][0]["profile"]], MOVIE_TAGS, 1
        )
        for query_id, log_p, chosen in zip(
            row["query_id"], row["log_p"], row["prediction"], strict=True
        ):
            assert MOVIE_TAGS[log_p.index(max(log_p))] == chosen
            both = [one + 30.0 * more for one, more in zip(log_p, prior, strict=True)]
            wanted[query_id] = MOVIE_TAGS[both.index(max(both))]
    assert predictions(cell, "base_prior") == wanted
    assert wanted != predictions(cell, "base")


def test_a_label_prior_compares_likelihoods_whatever_others_do(place: Path) -> None:
    """With scoring.answer=generate, too: the method's own settings say so."""
    cell = run(place, ROLES, methods=["base", "base_prior"])
    assert set(predictions(cell, "base_prior").values()) <= set(MOVIE_TAGS)


def test_a_run_has_them_only_where_they_are_named() -> None:
    more = ["base_prior", "rag_4", "mta_prior", "commonest_of_all", "commonest", "knn"]
    assert not set(more) & set(resolve({}).methods)
    assert resolve({"methods": ["base", *more]}).methods == ["base", *more]
    assert all(METHODS[name].uses_items for name in more)
