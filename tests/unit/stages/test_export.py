"""`tasks.export` of any method and seed of a run."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from tasks import stacking
from tasks.config import resolve
from tasks.errors import InputError
from tasks.export import export, main
from tasks.fusion import read_recipes
from tasks.lora.adapters import Lora, read_peft
from tasks.lora.bank import read_bank
from tasks.lora.merge import concatenate, merge
from tasks.report.files import write_run
from tasks.stage import store
from tests.unit.lora.helpers import delta
from tests.unit.lora.peft_reference import largest_difference, merged_by_hand
from tests.unit.stages.pipeline import LORA, ROLES, run
from tests.unit.stages.users import result

FUSION = {"top_m": 2, "weights": "cosine", "merge": "exact"}
OPPU = {"rank": 3, "alpha": 6.0, **LORA}


def bare(done: dict[str, Any], method: str) -> dict[str, Any]:
    """The shard of a method without a merged LoRA."""
    config = resolve(done["config"]).model_dump(mode="json")
    inputs = {"prepared": done["prepared"], "base": done["base"], "banked": None, "fused": None}
    users = done["prepared"]["value"]["few_shot"]
    return result(stacking.stacking.fn(config, "LaMP-2M", inputs, method, 0, users))


@pytest.fixture(scope="module")
def saved(place: Path) -> dict[str, Any]:
    """A run of two seeds and six methods, as `write_run` leaves it; with the bank's two uses."""
    seeds = {}
    for seed in (7, 8):
        done = run(place, ROLES, oppu=OPPU, seed=seed, fusion=FUSION)
        own = done["banks"]["merge_only"]
        done["banks"]["mta_published"] = own
        done["bank_of"]["mta_published"] = "mta_published"
        for method in ("oppu", "stack_only"):
            done["stacking"][method] = [bare(done, method)]
        done["stacking"]["mta_published"] = done["stacking"]["mta"]
        seeds[str(seed)] = {"LaMP-2M": done}
    config = seeds["7"]["LaMP-2M"]["config"] | {"seeds": [7, 8], "lamp_tasks": ["LaMP-2M"]}
    about = {"name": "brave-owl", "date": "2026-11-28 07:00", "report": "brave-owl"}
    write_run("both", config, [own["LaMP-2M"] for own in seeds.values()], about)
    text = (store().root.parent / "runs" / "both.json").read_text()
    return json.loads(text)


def shard(saved: dict[str, Any], seed: str, method: str, user: str) -> Lora:
    (one,) = saved["seeds"][seed]["LaMP-2M"]["stacking"][method]
    return read_bank(store().open(one["ref"]).folder / "stacked.safetensors").lora(user)


def members(saved: dict[str, Any], seed: str, user: str) -> tuple[list[Lora], list[float]]:
    own = saved["seeds"][seed]["LaMP-2M"]["banks"]["merge_only"]
    bank = read_bank(store().open(own["bank"]["ref"]).folder / "bank.safetensors")
    recipe = read_recipes(store(), own["fusion"])[user]
    return [bank.lora(anchor) for anchor in recipe["anchors"]], recipe["weights"]


def same_update(left: Lora, right: Lora) -> bool:
    return left.layers.keys() == right.layers.keys() and all(
        (delta(left, layer) - delta(right, layer)).abs().max() < 1e-6 for layer in left.layers
    )


@pytest.mark.parametrize("seed", [7, 8, None])
def test_every_method_by_hand(saved: dict[str, Any], tmp_path: Path, seed: int | None) -> None:
    """What is exported is the update that the method's parts add up to; no seed is the first."""
    key = "7" if seed is None else str(seed)
    loras, weights = members(saved, key, "few-1")
    exact = merged_by_hand(loras, weights, "exact")
    factors = merged_by_hand(loras, weights, "factors")
    wanted = {
        "merge_only": exact,
        "mta": concatenate(exact, shard(saved, key, "mta", "few-1")),
        # The configuration of the run merges `exact`, the method by factors.
        "mta_published": concatenate(factors, shard(saved, key, "mta", "few-1")),
        "oppu": shard(saved, key, "oppu", "few-1"),
        "stack_only": shard(saved, key, "stack_only", "few-1"),
    }
    found = {}
    for method, lora in wanted.items():
        export(store(), saved, "LaMP-2M", method, "few-1", tmp_path / method, seed)  # type: ignore[arg-type]
        found[method] = read_peft(tmp_path / method)
        assert same_update(found[method], lora), method
        about = json.loads((tmp_path / method / "mta.json").read_text())
        assert (about["method"], about["user"], about["lamp_task"]) == (method, "few-1", "LaMP-2M")
        assert about["prompt"] == "description: <text> tag:"
    assert found["oppu"].rank == 3
    names = list(found)
    for n, one in enumerate(names):
        assert not any(same_update(found[one], found[other]) for other in names[n + 1 :])


def test_seeds_differ(saved: dict[str, Any]) -> None:
    one, other = (shard(saved, seed, "oppu", "few-1") for seed in ("7", "8"))
    assert largest_difference(one, other) > 1e-2
    assert merge([one], [1.0], "exact").rank == 3


def test_the_command(
    saved: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "lora"
    given = ["--user", "few-2", "--to", str(target), "--method", "oppu", "--seed", "8"]
    assert main(given) == 0
    out = capsys.readouterr().out
    told = f"{target}: the LoRA of few-2 by oppu for LaMP-2M, from the run brave-owl of 2026-11-28"
    assert told in out
    assert largest_difference(read_peft(target), shard(saved, "8", "oppu", "few-2")) == 0.0
    # By default mta of the first seed.
    assert main(["--user", "few-2", "--to", str(tmp_path / "default")]) == 0
    export(store(), saved, "LaMP-2M", "mta", "few-2", tmp_path / "by name", 7)
    assert same_update(read_peft(tmp_path / "default"), read_peft(tmp_path / "by name"))
    for more, words in (
        (["--seed", "9"], "mta: --seed 9: not in this run; it has 7, 8"),
        (["--method", "rag"], "mta: --method rag: not in this run; it has oppu, merge_only, "),
        (["--run", "absent"], "--run absent: neither a run nor a file of one; the last are brave"),
        (["--user", "nobody"], "--user nobody: no few-shot user of the run brave-owl of 2026-11"),
    ):
        again = ["--user", "few-2", "--to", str(tmp_path / "none"), *more]
        assert main(again) == 2
        error = capsys.readouterr().err
        assert words in error
        assert error.count("\n") == 1
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("how", ["factors", "exact"])
def test_what_differs_for_the_lamp_task_is_exported(
    saved: dict[str, Any], tmp_path: Path, how: str
) -> None:
    """The LaMP task's own `fusion.merge` wins over the run's, by hand; another task's does not."""
    own = {"factors": {"LaMP-2M": {"fusion": {"merge": "factors"}}},
           "exact": {"LaMP-3": {"fusion": {"merge": "factors"}}}}  # fmt: skip
    config = saved["config"] | {"per_task": own[how]}
    export(store(), saved | {"config": config}, "LaMP-2M", "mta", "few-1", tmp_path / "lora")
    loras, weights = members(saved, "7", "few-1")
    merged = merged_by_hand(loras, weights, how)
    wanted = concatenate(merged, shard(saved, "7", "mta", "few-1"))
    found = read_peft(tmp_path / "lora")
    assert found.rank == wanted.rank == {"factors": 5, "exact": 8}[how]
    assert same_update(found, wanted)


@pytest.mark.parametrize("method", ["mta", "oppu"])
def test_a_user_whose_batch_failed_is_not_half_exported(
    saved: dict[str, Any], tmp_path: Path, method: Any
) -> None:
    """A run that is incomplete lists the batches that are there; the merged LoRA alone is not
    what the method gives."""
    broken = copy.deepcopy({name: saved[name] for name in ("config", "seeds")})
    broken["seeds"]["7"]["LaMP-2M"]["stacking"][method] = []
    with pytest.raises(InputError, match=r"--user few-1: the run trained no LoRA of this user"):
        export(store(), broken, "LaMP-2M", method, "few-1", tmp_path / "new")
    assert list(tmp_path.iterdir()) == []
