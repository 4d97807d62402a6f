"""Several anchors in one training job."""

from __future__ import annotations

import copy
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tasks.bank import bank, meta_lora
from tasks.config.options import TrainingOptions
from tasks.lora import group_train
from tasks.lora.adapters import Lora, read_peft
from tasks.lora.bank import read_bank
from tasks.record import key_of
from tasks.results.models import Anchor, MetaLora, MetaLoras
from tasks.results.run import Cell
from tasks.results.store import store
from tasks.text.questions import setting_of
from tests.unit.lora.helpers import same
from tests.unit.lora.peft_reference import largest_difference
from tests.unit.stages.pipeline import LORA, ROLES, run

NAMES = ("anchor-1", "anchor-2", "anchor-3")
# At a rate of 0.03 Adam makes rounding errors visible: see `test_group_train`.
GENTLE = LORA | {"learning_rate": 1e-3}


@pytest.fixture(scope="module")
def done(place: Path) -> Cell:
    """Three anchors of 4, 5 and 6 items."""
    return run(place, ROLES, methods=["merge_only"])


def alone(*names: str) -> tuple[Anchor, ...]:
    return tuple(Anchor(name=name, items=1, cluster=0, members=(name,)) for name in names)


def job(done: Cell, anchors: tuple[Anchor, ...], seed: int = 0, **changes: Any) -> MetaLoras:
    """One job's run."""
    method, users = done.config.method("merge_only"), done.users
    options = TrainingOptions(**(method.meta_lora.model_dump() | changes))
    setting = setting_of(done.config, method, users, done.base)
    own = setting.model_copy(update={"seed": seed})
    return meta_lora(options, anchors, users.anchor, own)


def adapter(found: MetaLora) -> Lora:
    return read_peft(store().path(found.adapter))


def test_each_is_the_one_it_gets_alone(
    done: Cell, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two stores, so that the job finds nothing."""
    singles = [job(done, alone(name), seed=1, **GENTLE).loras[0] for name in NAMES]
    apart = [adapter(one) for one in singles]
    first = store().root
    monkeypatch.setenv("MTA_STORE", str(tmp_path / "store"))
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / "prepare").symlink_to(first / "prepare")
    together = job(done, alone(*NAMES), seed=1, **GENTLE).loras
    for one, other, lora in zip(singles, together, apart, strict=True):
        assert largest_difference(adapter(other), lora) < 1e-5
        assert other.anchor == one.anchor
        for part in ("items", "steps", "tokens", "truncated"):
            assert getattr(other.training, part) == getattr(one.training, part)
        assert other.training.losses == pytest.approx(one.training.losses, rel=1e-4)
        # They moved.
        assert max(float(b.abs().max()) for _, b in lora.layers.values()) > 1e-4
    # 4, 5 and 6 items in batches of 2, twice.
    assert [one.training.steps for one in together] == [4, 6, 6]
    assert largest_difference(apart[0], apart[1]) > 1e-3


def untimed(lora: MetaLora) -> MetaLora:
    """As it is found again: how long it took is not kept with it."""
    training = lora.training.model_copy(update={"seconds": 0.0})
    return lora.model_copy(update={"training": training})


def test_a_known_anchor_is_not_trained_again(done: Cell, work: dict[str, list[Any]]) -> None:
    (first,) = job(done, alone("anchor-2"), seed=2).loras
    work["meta_lora"].clear()
    found = job(done, alone(*NAMES), seed=2).loras
    assert work["meta_lora"] == [["anchor-1", "anchor-3"]]
    assert [one.anchor for one in found] == list(NAMES)
    assert found[1] == untimed(first)
    again = job(done, alone(*NAMES[::-1]), seed=2).loras
    assert again == tuple(map(untimed, found[::-1]))
    assert len(work["meta_lora"]) == 1


def test_a_lost_one_is_trained_again(done: Cell, work: dict[str, list[Any]]) -> None:
    """Alone: the others are there, and it is the same LoRA but for the last bits."""
    first = job(done, alone(*NAMES), seed=5, **GENTLE).loras
    whole = copy.deepcopy(adapter(first[1]))
    weights = store().path(first[1].adapter) / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    again = job(done, alone(*NAMES), seed=5, **GENTLE).loras
    assert work["meta_lora"] == [list(NAMES), [NAMES[1]]]
    assert (again[0], again[2]) == (untimed(first[0]), untimed(first[2]))
    assert largest_difference(adapter(again[1]), whole) < 1e-5
    shutil.rmtree(store().root / first[0].adapter.folder)
    job(done, alone(*NAMES[:2]), seed=5, **GENTLE)
    assert work["meta_lora"][2:] == [[NAMES[0]]]


def test_the_bank_is_the_loras_in_the_order_of_choice(done: Cell) -> None:
    merging = done.merging("merge_only")
    assert merging is not None
    made = merging.merged.bank
    stacked = read_bank(store().path(made.file))
    assert stacked.ids == tuple(made.names) == tuple(one.name for one in merging.chosen.anchors)
    assert (stacked.rank, stacked.scale) == (3, 1.0)
    for member in made.members:
        assert same(stacked.lora(member.anchor), adapter(member))
    two = bank(made.members[:2], merging.chosen, "two of three")
    assert read_bank(store().path(two.file)).ids == stacked.ids[:2]
    assert key_of(two) != key_of(made)


def test_a_cluster_is_trained_on_all_its_members_items(done: Cell) -> None:
    """4 and 5 items, in one LoRA that is not the anchor's own; the bank says whose they are."""
    members = ("anchor-2", "anchor-1")
    both = (Anchor(name="anchor-2", items=9, cluster=0, members=members),)
    (found,) = job(done, both).loras
    assert (found.anchor, found.members, found.training.items) == ("anchor-2", members, 9)
    (own,) = job(done, alone("anchor-2")).loras
    assert own.training.items == 5
    assert largest_difference(adapter(found), adapter(own)) > 1e-3
    merging = done.merging("merge_only")
    assert merging is not None
    made = bank((found,), merging.chosen, "a cluster")
    assert [(one.members, one.adapter) for one in made.members] == [(members, found.adapter)]


def spoiled(monkeypatch: pytest.MonkeyPatch, *bad: int) -> None:
    """The losses of these users of a job are infinite."""
    real = group_train.Gradients.fill

    def fill(self: Any, grad: Any, flat: Any, todo: dict[int, Any]) -> Tensor:
        losses = real(self, grad, flat, todo)
        losses[[*bad]] = float("inf")
        return losses

    monkeypatch.setattr(group_train.Gradients, "fill", fill)


def line(name: str) -> str:
    return f"anchor {name}: the loss was not finite at step 1; lower meta_lora.learning_rate"


def test_one_that_fails_is_named_and_the_others_are_kept(
    done: Cell, monkeypatch: pytest.MonkeyPatch, work: dict[str, list[Any]]
) -> None:
    with monkeypatch.context() as patch:
        spoiled(patch, 1)
        made = job(done, alone(*NAMES), seed=3)
    assert made.failed == (line("anchor-2"),)
    assert [one.anchor for one in made.loras] == ["anchor-1", "anchor-3"]
    for found in made.loras:
        tensors = [t for pair in adapter(found).layers.values() for t in pair]
        assert all(torch.isfinite(t).all() for t in tensors)
    # Nothing of the failed one was kept: it is trained the next time.
    again = job(done, alone(*NAMES), seed=3)
    assert work["meta_lora"] == [list(NAMES), ["anchor-2"]]
    assert [one.anchor for one in again.loras] == list(NAMES)
    assert again.failed == ()


def test_all_that_fail_are_named(done: Cell, monkeypatch: pytest.MonkeyPatch) -> None:
    spoiled(monkeypatch, 0, 1)
    made = job(done, alone(*NAMES[:2]), seed=4)
    assert made.loras == ()
    assert made.failed == (line("anchor-1"), line("anchor-2"))
