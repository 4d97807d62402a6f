"""What each method changes in the configuration."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from tasks.config.options import TrainingOptions
from tasks.config.run import resolve
from tasks.config.task import TaskConfig
from tasks.errors import InputError
from tasks.methods import METHODS, MethodName
from tasks.methods.method import Method


def task_config(given: dict[str, Any]) -> TaskConfig:
    return resolve(given).for_task("LaMP-2M", 3)


GIVEN = task_config(
    {
        "rag": {"history_items": 3},
        "anchors": {"count": 7, "train_on": "cluster", "min_items": 13},
        "fusion": {
            "top_m": 8,
            "weights": "evidence",
            "shortlist": 5,
            "merge": "svd",
            "temperature": 0.7,
        },
        "stacking": {"users_per_job": 9, "target_modules": ["q_proj"]},
    }
)


def changes(name: MethodName, config: TaskConfig = GIVEN) -> dict[str, Any]:
    """section.field -> value, of what the method sees otherwise."""
    before = config.model_dump()
    after = config.method(name).model_dump(exclude={"method"})
    found = {}
    for section, value in after.items():
        if isinstance(value, dict):
            for field, one in value.items():
                if one != before[section][field]:
                    found[f"{section}.{field}"] = one
        elif value != before[section]:
            found[section] = value
    return found


def test_a_method_is_known_by_its_entry(monkeypatch: pytest.MonkeyPatch) -> None:
    """The preset runs those that are compared by default; what has no entry is refused."""
    assert resolve({}).methods == [name for name in METHODS if METHODS[name].default]
    with pytest.raises(InputError) as caught:
        resolve({"methods": ["base", "per_prompt"]})
    assert str(caught.value) == (
        "configuration: methods.1: there is no method per_prompt; there are "
        f"{', '.join(METHODS)} (got 'per_prompt')"
    )
    assert resolve({"methods": "all"}).methods == [*METHODS]
    monkeypatch.setitem(METHODS, "per_prompt", Method("per_prompt", merged=True))
    assert resolve({"methods": ["base", "per_prompt"]}).methods == ["base", "per_prompt"]


@pytest.mark.parametrize("name", ["base", "oppu", "merge_only", "stack_only", "mta"])
def test_most_methods_change_nothing(name: MethodName) -> None:
    assert changes(name) == {}
    seen = GIVEN.method(name)
    assert (seen.method, seen.seed, seen.lamp_task) == (name, 3, "LaMP-2M")


def test_rag_has_history_in_the_prompt() -> None:
    """And no other method has it, unless the prompt has it anyway."""
    before = GIVEN.model_dump()
    assert changes("rag") == {"prompt.history_items": 3}
    assert GIVEN.method("base").prompt.history_items == 0
    assert before == GIVEN.model_dump()
    shown = task_config({"prompt": {"history_items": 1, "style": "published"}})
    assert shown.method("base").prompt.history_items == 1
    assert shown.method("rag").prompt.style == "published"
    assert changes("rag_4") == {"prompt.history_items": 4, "rag.history_items": 4}


def test_published_is_what_was_published() -> None:
    """docs/method.md, stages 1 to 3: text embeddings, k-means, one anchor per cluster; m = 2,
    w = s / sum the wrong way round, factor by factor; rank 4, learning rate 5e-5, 1 epoch, 2 x 4.

    `alpha` is PEFT's twice the rank, as of the anchors (rank 8, alpha 16).
    """
    config = GIVEN.method("mta_published")
    assert config.anchors.embedding == "text"
    assert (config.anchors.clustering, config.anchors.train_on) == ("kmeans", "user")
    fusion = config.fusion
    assert (fusion.top_m, fusion.weights, fusion.order, fusion.merge) == (
        2,
        "cosine",
        "published",
        "factors",
    )
    own = config.stacking
    assert (own.rank, own.alpha, own.learning_rate, own.epochs) == (4, 8.0, 5e-5, 1)
    assert (own.batch_size, own.accumulation) == (2, 4)
    # What was not published, or is the machine's, is as given.
    assert (config.anchors.count, config.anchors.min_items) == (7, 13)
    assert (own.users_per_job, own.target_modules) == (9, ["q_proj"])
    assert {field.partition(".")[0] for field in changes("mta_published")} == {
        "anchors",
        "fusion",
        "stacking",
    }


def test_published_does_so_in_either_preset() -> None:
    """`embedded` trains its LoRA on top far harder."""
    for preset in ("embedded", "paper"):
        config = task_config({"preset": preset}).method("mta_published")
        assert config.stacking.learning_rate == 5e-5
        assert (config.fusion.top_m, config.fusion.order) == (2, "published")
        # Anchors and base are those of the run: they are no part of the merging.
        given = task_config({"preset": preset})
        assert (config.meta_lora, config.base) == (given.meta_lora, given.base)


def test_what_methods_are_made_of() -> None:
    """docs/method.md, Baselines."""
    made = {name: (m.history, m.merged, m.trained) for name, m in METHODS.items()}
    assert made == {
        "base": (False, False, None),
        "base_prior": (False, False, None),
        "rag": (True, False, None),
        "rag_4": (True, False, None),
        "oppu": (False, False, "oppu"),
        "merge_only": (False, True, None),
        "profile_summary": (False, False, None),
        "factors": (False, True, None),
        "hypernetwork": (False, True, None),
        "per_pcs": (False, True, None),
        "mixture_of_answers": (False, True, None),
        "stack_only": (False, False, "stacking"),
        "mta": (False, True, "stacking"),
        "mta_prior": (False, True, "stacking"),
        "group_experts": (False, True, "stacking"),
        "mta_published": (False, True, "stacking"),
        "commonest_of_all": (False, False, None),
        "commonest": (False, False, None),
        "knn": (False, False, None),
    }
    for method in METHODS.values():
        if method.trained:
            assert isinstance(getattr(GIVEN, method.trained), TrainingOptions)
            own = GIVEN.method(method.name)
            # What trains the LoRA, and nothing else of its section, is in the keys of users.
            assert own.training == TrainingOptions.of(getattr(own, method.trained))
            assert type(own.training) is TrainingOptions
        else:
            assert GIVEN.method(method.name).training is None


def test_whose_loras_new_users_can_have() -> None:
    """Those of bank, recipe and training alone; each other way keeps a method from them."""
    able = [name for name, method in METHODS.items() if method.for_new_users]
    assert able == ["merge_only", "factors", "mta", "group_experts", "mta_prior", "mta_published"]
    for own in ("adapt", "answer", "recipes", "about", "fit"):
        assert not replace(METHODS["mta"], **{own: print}).for_new_users


def test_oppu_as_published() -> None:
    """docs/method.md, Baselines: one rank-8 LoRA per user from scratch."""
    for preset in ("embedded", "paper"):
        assert resolve({"preset": preset}).oppu.rank == 8
