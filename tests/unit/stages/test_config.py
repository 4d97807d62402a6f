"""Configuration: presets, what is laid over them, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import ValidationError

from tasks.config.presets import PRESETS
from tasks.config.run import RunConfig, resolve
from tasks.config.task import TaskConfig, flat
from tasks.errors import InputError
from tasks.record import Options, derive_seed


def test_preset_paper_is_what_was_published() -> None:
    """Every number of docs/method.md, stages 1 to 3, for which there is an option."""
    config = resolve({"preset": "paper"})
    assert config.base.model == "meta-llama/Meta-Llama-3-8B-Instruct"
    assert config.base.max_tokens == 8192
    # bf16: what `auto` is on a GPU (tests/unit/lora/test_tiny.py).
    assert config.base.dtype == "auto"
    assert (config.prompt.style, config.prompt.history_items) == ("published", 1)
    # What the scripts of the MTA code index (tests/unit/lamp/test_published_history.py).
    assert config.prompt.history_index == "published"
    assert (config.split.kind, config.split.few_shot_users) == ("published", 100)
    # "bf16 by default", and LaMP's own rules.
    assert (config.base.quantisation, config.scoring.metrics) == ("none", "lamp")
    anchors = config.anchors
    assert (anchors.clustering, anchors.count, anchors.embedding) == ("kmeans", 50, "text")
    # "only if it has more than 10 items"
    assert anchors.min_items == 11
    assert config.meta_lora.model_dump() == {
        "rank": 8,
        "alpha": 16.0,
        "target_modules": "all-linear",
        "target_parameters": [],
        "learning_rate": 1e-4,
        "epochs": 3,
        "batch_size": 1,
        "accumulation": 2,
        "schedule": "cosine",
        "warmup_share": 0.1,
        # Not published: transformers' Trainer clips at 1.0 and does not decay by default.
        "max_grad_norm": 1.0,
        "weight_decay": 0.0,
    }
    assert config.fusion.top_m == 2
    assert (config.fusion.weights, config.fusion.merge) == ("cosine", "factors")
    # "Right way by default; the published way as an option"
    assert config.fusion.order == "right"
    stacking = config.stacking
    assert (stacking.rank, stacking.target_modules) == (4, "all-linear")
    assert (stacking.learning_rate, stacking.epochs) == (5e-5, 1)
    assert (stacking.batch_size, stacking.accumulation) == (2, 4)


@pytest.mark.parametrize("preset", PRESETS)
def test_what_is_given_replaces_only_itself(preset: str) -> None:
    plain = flat(resolve({"preset": preset}).model_dump())
    changed = flat(
        resolve(
            {"preset": preset, "stacking": {"rank": 5}, "base": {"tiny": {"steps": 7}}, "seed": 3}
        ).model_dump()
    )
    assert {key for key in plain if plain[key] != changed[key]} == {
        "stacking.rank",
        "base.tiny.steps",
        "seed",
    }
    assert (changed["stacking.rank"], changed["base.tiny.steps"], changed["seed"]) == (5, 7, 3)


def test_presets_are_not_changed_by_use() -> None:
    before = repr(PRESETS)
    resolve({"preset": "paper", "stacking": {"rank": 5}})
    assert repr(PRESETS) == before


def test_default_preset_is_embedded() -> None:
    assert resolve({}) == resolve({"preset": "embedded"})
    assert resolve({}).base.model == "tiny"


def test_the_resolved_configuration_comes_back_from_json() -> None:
    """It travels to tasks, and is saved with the run, as JSON."""
    for preset in PRESETS:
        config = resolve({"preset": preset, "anchors": {"count": 3}})
        assert RunConfig.model_validate_json(config.model_dump_json()) == config
        assert RunConfig.model_validate(config.model_dump(mode="json")) == config
        assert resolve(config.model_dump(mode="json")) == config


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"stackin": {}}, "stackin: there is no such option"),
        ({"stacking": {"rnk": 4}}, r"stacking\.rnk: there is no such option"),
        ({"base": {"tiny": {"x": 1}}}, r"base\.tiny\.x: there is no such option"),
        ({"stacking": {"rank": 0}}, r"stacking\.rank: .*greater than or equal to 1 \(got 0\)"),
        ({"stacking": {"rank": "4"}}, r"stacking\.rank: .*integer \(got '4'\)"),
        ({"stacking": {"rank": 4.5}}, r"stacking\.rank: .*integer"),
        ({"stacking": 4}, r"stacking: give a JSON object of .* \(got 4\)"),
        ({"meta_lora": {"learning_rate": 0.0}}, r"meta_lora\.learning_rate: .*greater than 0"),
        ({"meta_lora": {"learning_rate": float("nan")}}, r"meta_lora\.learning_rate"),
        ({"meta_lora": {"warmup_share": 1.1}}, r"meta_lora\.warmup_share: .*less than or equal"),
        ({"meta_lora": {"schedule": "sine"}}, r"meta_lora\.schedule: .*'cosine'"),
        ({"fusion": {"merge": "linear"}}, r"fusion\.merge: .*'exact', 'factors' or 'svd'"),
        ({"fusion": {"temperature": 0.0}}, r"fusion\.temperature"),
        ({"anchors": {"count": 0}}, r"anchors\.count"),
        ({"anchors": {"min_cluster_size": 1}}, r"anchors\.min_cluster_size"),
        ({"base": {"max_tokens": 7}}, r"base\.max_tokens"),
        ({"base": {"tiny": {"hidden": 30, "heads": 4}}}, "even size per head"),
        ({"split": {"base_share": 0.5, "anchor_share": 0.5}}, "must stay below 1"),
        ({"synthetic": {"items_min": 9, "items_max": 8}}, "items_max 8 must be >= items_min 9"),
        ({"lamp_tasks": []}, "lamp_tasks"),
        (
            {"lamp_tasks": ["LaMP-8"], "data": "some/folder"},
            "there is no LaMP task LaMP-8; there are LaMP-1, ",
        ),
        ({"split": "by_hand"}, r"split\.kind: .*'grouped' or 'published' \(got 'by_hand'\)"),
        ({"split": {"few_shot_users": 0}}, r"split\.few_shot_users"),
        ({"items_curve": [3], "split": "published"}, "items_curve needs split.kind grouped"),
        ({"base": {"quantisation": "int8"}}, r"base\.quantisation: .*'none' or 'nf4'"),
        ({"prompt": {"chat": True}}, r"prompt\.chat: .*'auto' or 'never'"),
        ({"scoring": {"metrics": "mta"}}, r"scoring\.metrics: .*'lamp' or 'mta_published'"),
        ({"scoring": {"tokens": "utf"}}, r"scoring\.tokens: .*'lamp' or 'unicode'"),
        (
            {"scoring": {"tokens": "unicode", "metrics": "mta_published"}},
            "scoring: .*tokens=unicode is for metrics=lamp",
        ),
        ({"prompt": {"history_index": "answer"}}, r"prompt\.history_index: .*'published'"),
        ({"preset": "tiny"}, "preset: .*'embedded', 'paper' or 'real'"),
        ({"preset": ["paper"]}, "preset"),
        ({"seed": -1}, "seed"),
        ({"seed": True}, "seed"),
        ({"data": ""}, "data"),
        ({"compute": {"device": "gpu"}}, r"compute\.device"),
        ({"lamp": {"url": "file:///data"}}, r"lamp\.url"),
        ({"lamp": {"split": "test"}}, r"lamp\.split: .*'user' or 'time'"),
        ({"lamp": {"part": "test"}}, r"lamp\.part: .*'dev' or 'train'"),
        ({"methods": ["opu"]}, r"methods\.0"),
        ({"seeds": [0, -1]}, r"seeds\.1"),
    ],
    ids=repr,
)
def test_refused_in_one_line_that_names_the_key(given: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=f"^configuration: .*{words}") as caught:
        resolve(given)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("tasks", [["LaMP-2N"], ["LaMP-2M", "LaMP-2N"], ["LaMP-6"]], ids=repr)
def test_synthetic_data_have_five_tasks(tasks: list[str]) -> None:
    with pytest.raises(InputError, match=r"^lamp_tasks .*holds LaMP-1, .*LaMP-5 only") as caught:
        resolve({"lamp_tasks": tasks})
    assert "\n" not in str(caught.value)
    five = ["LaMP-1", "LaMP-2M", "LaMP-3", "LaMP-4", "LaMP-5"]
    assert resolve({"lamp_tasks": five}).lamp_tasks == five


def test_an_option_for_one_lamp_task() -> None:
    """It is laid over the rest for that task only; what is given for all wins over the preset."""
    config = resolve({"per_task": {"LaMP-5": {"fusion": {"top_m": 3}}}})
    rates = {task: config.for_task(task, 0).stacking.learning_rate for task in ("LaMP-3", "LaMP-5")}
    assert rates == {"LaMP-3": 5e-4, "LaMP-5": 2e-3}
    assert config.for_task("LaMP-5", 0).fusion.top_m == 3
    assert config.for_task("LaMP-5", 0).fusion.weights == "evidence"
    assert config.for_task("LaMP-3", 0).fusion.top_m == config.fusion.top_m == 16
    assert "per_task" not in TaskConfig.model_fields
    both = resolve({"stacking": {"learning_rate": 1e-3}}).for_task("LaMP-3", 7)
    assert (both.stacking.learning_rate, both.oppu.learning_rate) == (1e-3, 2e-3)
    assert both.seed == 7


@pytest.mark.parametrize("given", [{"model": "/my"}, {"base": {"model": "/my"}}], ids=str)
def test_a_given_model_has_rates_of_its_own(given: dict[str, Any]) -> None:
    """As published, 1e-4 and 3 epochs, for every LaMP task, and weights of the posterior itself.

    What is given still wins.
    """
    tiny, config = resolve({}), resolve(given)
    for task in ("LaMP-1", "LaMP-2M", "LaMP-3"):
        own = config.for_task(task, 0)
        rates = (own.meta_lora.learning_rate, own.stacking.learning_rate, own.oppu.learning_rate)
        assert rates == (1e-4, 1e-4, 1e-4)
        assert (own.meta_lora.epochs, own.fusion.evidence_temperature) == (3, 1.0)
    assert config.fusion == tiny.fusion.model_copy(update={"evidence_temperature": 1.0})
    assert config.stacking.rank == tiny.stacking.rank
    chosen = resolve(given | {"stacking": {"learning_rate": 3e-4}})
    assert chosen.stacking.learning_rate == 3e-4
    assert chosen.oppu.learning_rate == 1e-4
    assert resolve({"base": {"model": "tiny"}}) == tiny


@pytest.mark.parametrize(
    ("name", "listed", "twice"),
    [
        ("seeds", [0, 1, 0], "0"),
        ("lamp_tasks", ["LaMP-3", "LaMP-3"], "LaMP-3"),
        ("methods", ["mta", "base", "mta"], "mta"),
        ("items_curve", [2, 5, 2], "2"),
    ],
)
def test_what_is_listed_twice_is_refused(name: str, listed: list[Any], twice: str) -> None:
    with pytest.raises(InputError) as caught:
        resolve({name: listed})
    assert str(caught.value) == (
        f"configuration: {name}: {twice} is listed twice; name each once (got {listed!r})"
    )


@pytest.mark.parametrize(
    ("own", "words"),
    [
        (
            {"LaMP-3": {"stacking": {"rnk": 3}}},
            r"per_task\.LaMP-3\.stacking\.rnk: there is no such",
        ),
        (
            {"LaMP-3": {"base": {"model": "x"}}},
            r"per_task\.LaMP-3\.base\.\[key\]: .* match pattern '\^\(anchors\|bank\|meta_lora\|",
        ),
        ({"LaMP-9": {}}, "there is no LaMP task LaMP-9; there are LaMP-1, "),
    ],
)
def test_an_option_for_one_lamp_task_is_checked(own: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        resolve({"per_task": own})


def test_short_forms() -> None:
    """`-p split=published -p model=folder`: the other fields stay as the preset has them. But the
    published split has base users apart."""
    short = resolve({"split": "published", "model": "/my/llama", "items_curve": [], "seed": 1})
    assert short.split == resolve({}).split.model_copy(
        update={"kind": "published", "base_candidates": False}
    )
    with pytest.raises(InputError, match=r"base_candidates needs split\.kind grouped"):
        resolve({"split": {"kind": "published", "base_candidates": True}, "items_curve": []})
    assert short.base == resolve({"base": {"model": "/my/llama"}}).base
    both = {"model": "a", "base": {"model": "a", "max_tokens": 9}}
    assert resolve(both).base.max_tokens == 9
    for other in ({"model": "b"}, 3):
        with pytest.raises(InputError, match=r"^model a: base .* disagrees"):
            resolve({"model": "a", "base": other})
    assert both == {"model": "a", "base": {"model": "a", "max_tokens": 9}}


def test_without_base_users_the_anchors_have_more_epochs() -> None:
    """As they were chosen for a cluster of a third of the items (docs/defaults.md)."""
    for given, epochs in (
        ({}, [8, 2, 4]),
        ({"split": {"base_candidates": False}}, [24, 5, 12]),
        ({"split": "published", "items_curve": []}, [24, 5, 12]),
        ({"split": {"base_candidates": False}, "meta_lora": {"epochs": 7}}, [7, 7, 7]),
        ({"split": {"base_candidates": False}, "model": "/my"}, [3, 3, 3]),
    ):
        config = resolve(given)
        tasks = ("LaMP-1", "LaMP-2M", "LaMP-3")
        assert [config.for_task(task, 0).meta_lora.epochs for task in tasks] == epochs


OWN: dict[str, Any] = {
    "name": "News",
    "text": "body",
    "answer": "topic",
    "instruction": "Which topic has this article:",
    "labels": ["sports", "travel"],
    "metric": "classification",
}


@pytest.mark.parametrize("how", ["mapping", "yaml", "json"])
def test_a_task_of_ones_own(how: str, tmp_path: Path) -> None:
    """It is the run's only one unless `lamp_tasks` says otherwise, and beside LaMP's after that."""
    file = tmp_path / "news"
    file.write_text(json.dumps(OWN) if how == "json" else yaml.safe_dump(OWN))
    config = resolve({"task": OWN if how == "mapping" else str(file), "data": "/users"})
    assert config.lamp_tasks == ["News"]
    task = config.for_task("News", 0).task
    assert (task.name, task.text_field, task.answer_field) == ("News", "body", "topic")
    assert (task.kind, task.labels) == ("classification", ("sports", "travel"))
    assert (task.instruction, task.marker) == ("Which topic has this article: ", " article: ")
    assert task.max_new_tokens == 32
    both = resolve({"task": OWN, "data": "/users", "lamp_tasks": ["LaMP-3", "News"],
                    "per_task": {"News": {"stacking": {"rank": 2}}}})  # fmt: skip
    ranks = [both.for_task(name, 0).stacking.rank for name in both.lamp_tasks]
    assert ranks == [4, 2]
    assert both.for_task("LaMP-3", 0).task.name == "LaMP-3"
    assert RunConfig.model_validate_json(both.model_dump_json()) == both


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"metric": "text"}, "metric text takes no labels"),
        ({"labels": ["sports"]}, "needs two different labels or more"),
        ({"labels": ["sports", "sports"]}, "needs two different labels or more"),
        ({"metric": "rating"}, "rating is LaMP's, from 1 to 5"),
        ({"name": "../x"}, r"task\.name: "),
        ({"instruction": ""}, r"task\.instruction: "),
        ({"fields": 1}, r"task\.fields: there is no such option"),
    ],
)
def test_a_task_of_ones_own_is_checked(changed: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=f"^configuration: .*{words}") as caught:
        resolve({"task": OWN | changed, "data": "/users"})
    assert "\n" not in str(caught.value)


def test_a_task_of_ones_own_needs_its_data_and_its_file(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"^task: .* give data=<folder>"):
        resolve({"task": OWN})
    with pytest.raises(InputError, match=r"^task .*/absent\.yaml: cannot be read as YAML or JSON"):
        resolve({"task": str(tmp_path / "absent.yaml"), "data": "/users"})
    for text, words in (("- a", "holds no fields"), ("a: [", "cannot be read as YAML")):
        (tmp_path / "bad.yaml").write_text(text)
        with pytest.raises(InputError, match=f"^task .*{words}") as caught:
            resolve({"task": str(tmp_path / "bad.yaml"), "data": "/users"})
        assert "\n" not in str(caught.value)


def test_all_faults_are_named_at_once() -> None:
    with pytest.raises(InputError) as caught:
        resolve({"seed": -1, "stacking": {"rank": 0, "rnk": 1}})
    for name in ("seed: ", "stacking.rank: ", "stacking.rnk: "):
        assert name in str(caught.value)


def test_bounds_are_inside() -> None:
    config = resolve({"stacking": {"rank": 1, "warmup_share": 1}, "base": {"max_tokens": 8}})
    assert config.stacking.warmup_share == 1.0


def test_options_cannot_be_changed_afterwards() -> None:
    config = resolve({})
    with pytest.raises(ValidationError, match="frozen"):
        config.seed = 3
    assert all(
        isinstance(value, Options | str | int | list | dict | None)
        for value in dict(config).values()
    )


def test_derived_seeds_are_stable() -> None:
    """The first 8 digits of `printf '0\\x1fmeta_lora\\x1fanchor-1' | sha256sum`, and of '7'."""
    assert derive_seed(0, "meta_lora", "anchor-1") == 0xE32E1F3D
    assert derive_seed(7) == 0x7902699B
    parts = [("a", "bc"), ("ab", "c"), ("abc",), ("a", "b", "c")]
    assert len({derive_seed(0, *about) for about in parts}) == 4
    assert derive_seed(1, "a") != derive_seed(0, "a")


def test_flat() -> None:
    assert flat({"a": 1, "b": {"c": [1, 2], "d": {"e": None}}}) == {
        "a": 1,
        "b.c": [1, 2],
        "b.d.e": None,
    }
    assert flat({}) == {}
