"""Several anchors in one training job, and the flow's half of it."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from prefect.states import Completed, Failed

import flows.lamp_task as lamp_task_flow
from tasks import meta_lora as meta_lora_stage
from tasks.config import resolve
from tasks.lora.adapters import Lora, read_peft
from tasks.meta_lora import bank, meta_lora
from tasks.stacking import Inputs, merged_parts
from tasks.stage import StageFailed, stage, store
from tasks.store.pieces import Piece
from tests.unit.lora.peft_reference import largest_difference
from tests.unit.stages.pipeline import LORA, ROLES, run
from tests.unit.stages.users import result


@pytest.fixture(scope="module")
def done(place: Path) -> dict[str, Any]:
    """Three anchors of 4, 5 and 6 items, each trained in a job of its own."""
    return run(place, ROLES, recipes_only=True)


def job(done: dict[str, Any], *names: str, **changes: Any) -> Any:
    """The state of one job's run."""
    config = resolve(done["config"] | changes).model_dump(mode="json")
    anchors = [{"user_id": name, "members": [name]} for name in names]
    return meta_lora.fn(config, "LaMP-2M", done["prepared"], done["base"], anchors)


def adapter(found: dict[str, Any]) -> Lora:
    return read_peft(store().open(found["ref"]).folder / "adapter")


NAMES = ("anchor-1", "anchor-2", "anchor-3")


def test_each_is_the_one_it_gets_alone(
    done: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two stores, so that the job finds nothing."""
    gentle = {"meta_lora": {"rank": 3, "alpha": 3.0, **LORA, "learning_rate": 1e-3}}
    alone = [result(job(done, name, seed=1, **gentle))[0] for name in NAMES]
    apart = [adapter(one) for one in alone]
    prepared = store().open(done["prepared"]["ref"]).folder.parents[2]
    monkeypatch.setenv("MTA_STORE", str(tmp_path / "store"))
    for needed in ("prepare", "base_model"):
        (tmp_path / "store").mkdir(exist_ok=True)
        (tmp_path / "store" / needed).symlink_to(prepared / needed)
    state = job(done, *NAMES, seed=1, **gentle)
    assert state.name == "Completed"
    together = result(state)
    for one, other, lora in zip(alone, together, apart, strict=True):
        assert largest_difference(adapter(other), lora) < 1e-5
        for part in ("anchor", "items", "steps", "tokens", "truncated"):
            assert other["value"][part] == one["value"][part]
        assert other["value"]["losses"] == pytest.approx(one["value"]["losses"], rel=1e-4)
        # They moved, and are found under the same key as alone.
        assert max(float(b.abs().max()) for _, b in lora.layers.values()) > 1e-4
        assert other["ref"]["uri"] == one["ref"]["uri"]
    # 4, 5 and 6 items in batches of 2, twice.
    assert [one["value"]["steps"] for one in together] == [4, 6, 6]
    assert largest_difference(apart[0], apart[1]) > 1e-3


def noted(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The anchors of each training from here on."""
    trained: list[list[str]] = []
    real = meta_lora_stage._train

    def train(*given: Any) -> Any:
        trained.append(list(given[-2]))
        return real(*given)

    monkeypatch.setattr(meta_lora_stage, "_train", train)
    return trained


def test_a_known_anchor_is_not_trained_again(
    done: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    first = result(job(done, "anchor-2", seed=2))[0]
    trained = noted(monkeypatch)
    state = job(done, *NAMES, seed=2)
    assert state.name == "Completed"
    assert trained == [["anchor-1", "anchor-3"]]
    found = result(state)
    assert [one["value"]["anchor"] for one in found] == list(NAMES)
    assert [one["cached"] for one in found] == [False, True, False]
    assert found[1] == first | {"cached": True}
    again = job(done, *NAMES[::-1], seed=2)
    assert again.name == "Cached"
    assert [one["value"]["anchor"] for one in result(again)] == list(NAMES[::-1])
    assert len(trained) == 1


def test_a_lost_one_is_made_again_in_the_company_it_had(
    done: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Alone its last bits would be others, and so would be all that is keyed by them."""
    first = result(job(done, *NAMES, seed=5))
    trained = noted(monkeypatch)
    weights = store().open(first[1]["ref"]).folder / "adapter" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    state = job(done, *NAMES, seed=5)
    assert state.name == "Completed"
    again = result(state)
    assert [one["cached"] for one in again] == [True, False, True]
    assert [one["ref"] for one in again] == [one["ref"] for one in first]
    assert trained == [list(NAMES)]
    # It had company of its own choice: the others were there before it.
    beside = {"meta_lora": done["config"]["meta_lora"] | {"epochs": 1}}
    result(job(done, *NAMES[:2], seed=5, **beside))
    late = result(job(done, *NAMES, seed=5, **beside))[2]
    shutil.rmtree(store().open(late["ref"]).folder)
    assert result(job(done, *NAMES, seed=5, **beside))[2]["ref"] == late["ref"]
    assert trained[1:] == [list(NAMES[:2]), [NAMES[2]], [NAMES[2]]]
    # Of another job by now: then it is made without them.
    shutil.rmtree(store().open(first[0]["ref"]).folder)
    result(job(done, *NAMES[:2], seed=5))
    assert trained[4:] == [[NAMES[0]]]


def test_what_is_made_of_a_bank_that_lacks_anchors_is_kept_apart(done: dict[str, Any]) -> None:
    """Also of users whose recipe needs none of those: in another company they differ."""
    trained = result(job(done, *NAMES[:2]))
    users = {name: [name] for name in NAMES[:2]}
    whole = result(bank.fn(trained, users))
    lacking = result(bank.fn(trained, users | {"anchor-3": ["anchor-3"]}))
    assert lacking["value"] == whole["value"] | {"lacking": ["anchor-3"]}
    assert lacking["ref"]["uri"] != whole["ref"]["uri"]
    assert result(bank.fn(trained, users)) == whole | {"cached": True}
    recipe = {"anchors": ["anchor-1"], "weights": [1.0]}
    options = resolve(done["config"])
    parts = [
        merged_parts(options, Inputs(done["prepared"], done["base"], banked, {}), recipe)
        for banked in (whole, lacking)
    ]
    assert parts[0] == ["exact", [["anchor-1", trained[0]["ref"]["sha256"], 1.0]]]
    assert parts[1] == [["anchor-3"], *parts[0]]


def test_a_cluster_is_trained_on_all_its_members_items(done: dict[str, Any]) -> None:
    """4 and 5 items, in one LoRA that is not the anchor's own; the bank says whose they are."""
    config = resolve(done["config"]).model_dump(mode="json")
    both = [{"user_id": "anchor-2", "members": ["anchor-2", "anchor-1"]}]
    state = meta_lora.fn(config, "LaMP-2M", done["prepared"], done["base"], both)
    (found,) = result(state)
    assert found["value"]["items"] == 9
    assert found["value"]["anchor"] == "anchor-2"
    (own,) = result(job(done, "anchor-2"))
    assert own["cached"]
    assert own["value"]["items"] == 5
    assert largest_difference(adapter(found), adapter(own)) > 1e-3
    value = result(bank.fn([found], {"anchor-2": ["anchor-2", "anchor-1"]}))["value"]
    assert value["users"] == {"anchor-2": ["anchor-2", "anchor-1"]}
    assert value["members"] == {"anchor-2": found["ref"]["sha256"]}


def spoiled(monkeypatch: pytest.MonkeyPatch, *bad: int) -> None:
    """The losses of these users of a job are infinite."""
    from tasks.lora import gradients

    real = gradients.Gradients.fill

    def fill(self: Any, grad: Any, flat: Any, todo: dict[int, Any]) -> dict[int, float]:
        losses = real(self, grad, flat, todo)
        return {u: float("inf") if u in bad else loss for u, loss in losses.items()}

    monkeypatch.setattr(gradients.Gradients, "fill", fill)


def test_one_that_fails_is_named_and_the_others_are_kept(
    done: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        spoiled(patch, 1)
        state = job(done, *NAMES, seed=3)
    one, reason, other = result(state)
    assert reason == (
        "anchor anchor-2: the loss was not finite at step 1; lower meta_lora.learning_rate"
    )
    for name, found in (("anchor-1", one), ("anchor-3", other)):
        assert found["value"]["anchor"] == name
        tensors = [t for pair in adapter(found).layers.values() for t in pair]
        assert all(torch.isfinite(t).all() for t in tensors)
    # Nothing of the failed one was kept: it is trained the next time.
    again = result(job(done, *NAMES, seed=3))
    assert [found["cached"] for found in again] == [True, False, True]


def test_all_that_fail_are_one_failure(
    done: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    spoiled(monkeypatch, 0, 1)
    state = job(done, *NAMES[:2], seed=4)
    assert state.is_failed()
    assert state.message == "; ".join(
        f"anchor {name}: the loss was not finite at step 1; lower meta_lora.learning_rate"
        for name in NAMES[:2]
    )


def test_the_name_of_a_jobs_run() -> None:
    name = meta_lora.task_run_name
    assert callable(name)
    for users, wanted in (("a", "meta-lora-a"), ("abc", "meta-lora-a-and-2-more")):
        anchors = [{"user_id": user} for user in users]
        assert name(parameters={"anchors": anchors}) == wanted  # type: ignore[call-arg]


def test_seconds_of_a_list_are_those_of_what_was_made() -> None:
    """Two made (1.5 and 2 s), one found, one failed."""
    ref = {"uri": "x/k", "sha256": "s", "kind": "x"}

    def piece(seconds: float, cached: bool) -> Piece:
        return Piece(ref, {}, {"seconds": seconds}, Path("x"), cached)  # type: ignore[arg-type]

    @stage(name="demo")
    def demo() -> Any:
        return [piece(1.5, False), piece(9, True), meta_lora_stage.InputError("no"), piece(2, 0)]

    state = demo.fn()
    assert (state.name, state.message) == ("Completed", "made in 3.5 s")
    assert [isinstance(one, str) for one in state.data] == [False, False, True, False]
    assert state.data[2] == "no"


class Mapped:
    """Stands in for the mapped task: one finished future per job."""

    def __init__(self, states: list[Any]) -> None:
        self.states, self.jobs = states, []

    def map(self, *arguments: Any) -> list[Any]:
        self.jobs = arguments[-1].unwrap()
        return [SimpleNamespace(wait=lambda: None, state=state) for state in self.states]


LISTED = [{"user_id": name, "members": [name, f"{name}2"]} for name in "abcde"]


def recipes_of_flow(
    monkeypatch: pytest.MonkeyPatch, states: list[Any], known: dict[str, Any] | None = None
) -> tuple[dict[str, Any], list[str], Mapped, list[Any]]:
    """`bank_and_recipes` with two anchors per job; also what `bank` was called with."""
    called: list[Any] = []

    def result_of(task: Any, *arguments: Any) -> Any:
        if task is lamp_task_flow.bank:
            called.extend(arguments)
        return {"value": {"anchors": LISTED}, "task": task.name}

    class Quiet:
        def __init__(self, *_about: Any) -> None: ...

        def advance(self) -> None: ...

    mapped = Mapped(states)
    monkeypatch.setattr(lamp_task_flow, "result_of", result_of)
    monkeypatch.setattr(lamp_task_flow, "meta_lora", mapped)
    monkeypatch.setattr(lamp_task_flow, "as_completed", iter)
    monkeypatch.setattr(lamp_task_flow, "Progress", Quiet)
    missing: list[str] = []
    options = {"anchors": {"per_job": 2}, "fusion": {"weights": "cosine"}}
    config = resolve(options).model_dump(mode="json")
    nothing: Any = {}
    made = lamp_task_flow.bank_and_recipes(
        config, "LaMP-2M", nothing, nothing, known or {}, missing
    )
    return made, missing, mapped, called


def trained(name: str) -> dict[str, Any]:
    return {"value": {"anchor": name}}


def test_the_flow_takes_lists_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """Five anchors in jobs of two: b failed in its job, the job of c and d failed as a whole."""
    states = [
        Completed(data=[trained("a"), "anchor b: not finite"]),
        Failed(message="out of memory"),
        Completed(data=[trained("e")]),
    ]
    made, missing, mapped, called = recipes_of_flow(monkeypatch, states)
    assert [[one["user_id"] for one in own] for own in mapped.jobs] == [
        ["a", "b"],
        ["c", "d"],
        ["e"],
    ]
    assert made["meta_loras"] == {"a": trained("a"), "e": trained("e")}
    assert called == [
        [trained("a"), trained("e")],
        {name: [name, f"{name}2"] for name in "abcde"},
    ]
    assert missing == ["anchor c d: out of memory", "anchor b: not finite"]
    assert made["evidence"] is None


def test_without_any_anchor_the_flow_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    states = [Failed(message="no memory")] * 3
    with pytest.raises(StageFailed, match="no anchor could be trained; anchor a b: no memory"):
        recipes_of_flow(monkeypatch, states)


def test_a_known_bank_is_taken_for_the_same_anchors_only(monkeypatch: pytest.MonkeyPatch) -> None:
    known = {
        "anchors": {"value": {"anchors": LISTED}},
        "meta_loras": {"a": trained("a")},
        "bank": "the bank",
    }
    made, missing, mapped, called = recipes_of_flow(monkeypatch, [], known)
    assert (made["meta_loras"], made["bank"]) == ({"a": trained("a")}, "the bank")
    assert (missing, mapped.jobs, called) == ([], [], [])
    others = {"anchors": {"value": {"anchors": LISTED[:4]}}}
    pair = Completed(data=[trained("a"), trained("b")])
    states = [pair, pair, Completed(data=[trained("e")])]
    made, _, mapped, _ = recipes_of_flow(monkeypatch, states, known | others)
    assert len(mapped.jobs) == 3
    assert made["bank"] != "the bank"


def test_a_bank_is_known_by_all_that_decides_it() -> None:
    """Settings, base model and its adapter, the anchors' histories, the instruction."""
    ref = {"uri": "base", "sha256": "1", "kind": "base_model"}
    kind = {"anchors": {"count": 3}}
    prepared = {"value": {"sha256": {"anchor": "h", "few_shot": "f"}, "instruction": "Say"}}
    base = {"ref": ref, "adapter": {"ref": ref}}
    over = lamp_task_flow.made_over(kind, prepared, base)
    few = {"sha256": {"anchor": "h", "few_shot": "other"}, "instruction": "Say"}
    assert lamp_task_flow.made_over(kind, {"value": few}, base) == over
    for given in (
        ({"anchors": {"count": 4}}, prepared, base),
        (kind, {"value": few | {"sha256": {"anchor": "other"}}}, base),
        (kind, {"value": few | {"instruction": "Tell"}}, base),
        (kind, prepared, {"ref": ref}),
        (kind, prepared, base | {"ref": ref | {"sha256": "2"}}),
    ):
        assert lamp_task_flow.made_over(*given) != over
    bank = {"over": over, "bank": "the bank"}
    assert lamp_task_flow.known_bank("mta", over) == {}
    before = lamp_task_flow.BANKS.set({"mta": bank})
    try:
        assert lamp_task_flow.known_bank("mta", over) == bank
        assert lamp_task_flow.known_bank("mta", "other") == {}
        assert lamp_task_flow.known_bank("merge_only", over) == {}
    finally:
        lamp_task_flow.BANKS.reset(before)
