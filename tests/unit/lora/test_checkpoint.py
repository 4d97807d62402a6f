"""Training that was killed and went on, against the same training left alone: to the last bit."""

from __future__ import annotations

import json
import math
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from tasks.lora import group_train
from tasks.lora.base import Base
from tasks.lora.batches import Encoded
from tasks.lora.checkpoint import Checkpoint, Saved
from tasks.lora.packing import Packed
from tasks.lora.tiny import train_tiny
from tasks.lora.train import Outcome, Trained, epochs, fit
from tests.unit.lora.group_case import CASES, HISTORIES, SEEDS, Group, group, small_device
from tests.unit.lora.helpers import MakeBase, sample, tiny_base, training

# The user with the longest history of `group` takes so many optimiser steps; others 2 or 4.
STEPS = 6


class Killed(BaseException):
    """Not an Exception: nothing on the way may take it for an error that it can handle."""


def at(
    path: Path,
    key: str = "k",
    said: list[str] | None = None,
    seconds: float = 0.0,
    most: float = math.inf,
) -> Any:
    """Written after every step, whatever it costs; what it says goes to `said`."""
    lines: list[str] = [] if said is None else said

    def log(line: str, _warning: bool) -> None:
        lines.append(line)

    return Checkpoint(path, key, {"users": ["u"]}, seconds, log, most)


def killer(step: int) -> Callable[[int, int], None]:
    def progress(done: int, _total: int) -> None:
        if done == step:
            raise Killed

    return progress


def killed(these: Group, step: int, checkpoint: Any) -> None:
    with pytest.raises(Killed):
        these.together(progress=killer(step), checkpoint=checkpoint)


def with_kills(these: Group, path: Path, kills: list[int], seconds: float = 0.0) -> Outcome:
    for step in kills:
        killed(these, step, at(path, seconds=seconds))
    return these.together(checkpoint=at(path, seconds=seconds))[1]


def assert_same(got: Outcome, wanted: Outcome) -> None:
    assert torch.equal(got.flat, wanted.flat)
    # As text: NaN is not equal to itself.
    assert repr(got.losses) == repr(wanted.losses)
    assert (got.tokens, got.failed) == (wanted.tokens, wanted.failed)
    assert (got.computed, got.halved) == (wanted.computed, wanted.halved)


@pytest.mark.parametrize("case", CASES)
@settings(
    max_examples=5, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(kills=st.lists(st.integers(1, STEPS), min_size=1, max_size=3).map(sorted))
def test_killed_at_any_steps(
    base: Base, tmp_path_factory: pytest.TempPathFactory, case: str, kills: list[int]
) -> None:
    """Five users of 2, 4, 6, 2 and 2 steps (of 10 down to 1 one by one), killed up to three times.

    A later kill at a step that is already done kills nothing: it is left out.
    """
    these = group(base, case=case)
    wanted = these.together()[1]
    path = tmp_path_factory.mktemp("kept") / "c.safetensors"
    assert_same(with_kills(these, path, sorted(set(kills))), wanted)


def test_from_step_to_step(fresh_base: MakeBase, tmp_path: Path) -> None:
    """Killed after every single step; each try goes on where the one before was."""
    these = group(fresh_base())
    wanted = these.together()[1]
    said: list[str] = []
    path = tmp_path / "c.safetensors"
    for step in range(1, STEPS + 1):
        killed(these, step, at(path, said=said))
    done: list[int] = []
    _, got = these.together(
        progress=lambda number, _: done.append(number), checkpoint=at(path, said=said)
    )
    assert_same(got, wanted)
    assert done == []  # all was done: nothing was trained twice
    assert said == [
        f"checkpoint {path}: training goes on after step {step}" for step in range(1, STEPS + 1)
    ]


def test_what_was_not_kept_is_done_again(fresh_base: MakeBase, tmp_path: Path) -> None:
    """Kept after step 2 only; killed in step 5."""
    these = group(fresh_base())
    wanted = these.together()[1]
    path = tmp_path / "c.safetensors"
    killed(these, 2, at(path))
    assert_same(with_kills(these, path, [5], seconds=3600.0), wanted)


def test_with_failed_users(
    fresh_base: MakeBase, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """User 2's loss is NaN in the third step, user 4's in the first; killed after 1, 3, and 4."""
    these = group(fresh_base())
    third = list(epochs(HISTORIES[2], these.options, SEEDS[2]))[2][0][0]
    for user, number in [(2, third), (4, 0), (4, 1), (4, 2), (4, 3)]:
        own = these.samples[user][number]
        these.samples[user][number] = Encoded(own.prompt, [299, 2])
    real = group_train.label_losses

    def poisoned(base: Base, packed: Packed) -> torch.Tensor:
        return real(base, packed) * torch.where(packed.label == 299, float("nan"), 1.0)

    monkeypatch.setattr(group_train, "label_losses", poisoned)
    wanted = these.together()[1]
    assert (sorted(wanted.failed), len(wanted.losses[2]), len(wanted.losses[4])) == ([2, 4], 3, 1)
    # User 1 has four steps: after that nobody is left, and the run is over.
    assert_same(with_kills(these, tmp_path / "c.safetensors", [1, 3, 4]), wanted)


def test_the_budget_of_memory_goes_on(
    fresh_base: MakeBase, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A device that has room for two users: what it was learnt in step 1 is not tried again."""
    these = group(fresh_base())
    sizes = small_device(monkeypatch, 2)
    wanted = these.together()[1]
    assert wanted.halved > 0
    without = len(sizes)
    sizes.clear()
    assert_same(with_kills(these, tmp_path / "c.safetensors", [1, 3]), wanted)
    assert len(sizes) == without


@pytest.mark.parametrize("place", [0.02, 0.3, 0.9])
@pytest.mark.parametrize("how", ["flipped", "cut"])
def test_a_damaged_file(fresh_base: MakeBase, tmp_path: Path, how: str, place: float) -> None:
    """A bit, or the end, in the header, among the weights, and near the end."""
    these = group(fresh_base())
    wanted = these.together()[1]
    path = tmp_path / "c.safetensors"
    killed(these, 3, at(path))
    data = bytearray(path.read_bytes())
    where = int(len(data) * place)
    data[where] ^= 4
    path.write_bytes(data if how == "flipped" else data[:where])
    said: list[str] = []
    _, got = these.together(checkpoint=at(path, said=said))
    assert_same(got, wanted)
    assert len(said) == 1
    assert said[0].startswith(f"checkpoint {path}: ")
    assert said[0].endswith("; it is ignored, training starts anew")
    assert "\n" not in said[0]


def test_of_other_work(fresh_base: MakeBase, tmp_path: Path) -> None:
    these = group(fresh_base())
    wanted = these.together()[1]
    path = tmp_path / "c.safetensors"
    killed(these, 3, at(path))
    said: list[str] = []
    _, got = these.together(checkpoint=at(path, key="other", said=said))
    assert_same(got, wanted)
    assert said == [f"checkpoint {path}: it is of other work; it is ignored, training starts anew"]


CHILD = """
import os, signal, sys
from pathlib import Path
import torch
from tests.unit.lora.group_case import group
from tests.unit.lora.helpers import tiny_base
from tests.unit.lora.test_checkpoint import at
torch.set_num_threads(1)
def progress(done, total):
    if done == 4:
        os.kill(os.getpid(), signal.SIGKILL)
group(tiny_base()).together(progress=progress, checkpoint=at(Path(sys.argv[1])))
"""


def test_a_process_that_is_killed(fresh_base: MakeBase, tmp_path: Path) -> None:
    path = tmp_path / "c.safetensors"
    child = subprocess.run([sys.executable, "-c", CHILD, str(path)], check=False)
    assert child.returncode == -signal.SIGKILL
    these = group(fresh_base())
    said: list[str] = []
    _, got = these.together(checkpoint=at(path, said=said))
    assert said == [f"checkpoint {path}: training goes on after step 4"]
    assert_same(got, these.together()[1])


# --- the whole model ------------------------------------------------------------------------------


QUESTIONS = [(f"the film number {n} is", ["comedy", "classic", "sci-fi"][n % 3]) for n in range(12)]


def tiny(folder: Path, checkpoint: Any = None, progress: Any = None) -> Trained:
    return train_tiny(
        folder, QUESTIONS, hidden=16, layers=1, heads=2, steps=9, batch_size=4, learning_rate=1e-2,
        vocabulary=280, max_tokens=64, seed=5, device=torch.device("cpu"), progress=progress,
        checkpoint=checkpoint,
    )  # fmt: skip


@pytest.mark.parametrize("kills", [[1], [4], [9], [2, 3, 8]])
def test_the_tiny_base(tmp_path: Path, kills: list[int]) -> None:
    """Nine steps of warm-up and cosine: files of the same bytes, the same losses and tokens."""
    wanted = tiny(tmp_path / "wanted")
    kept = tmp_path / "c.safetensors"
    for step in kills:
        with pytest.raises(Killed):
            tiny(tmp_path / "cut", at(kept), killer(step))
    assert tiny(tmp_path / "got", at(kept)) == wanted
    for name in ("model.safetensors", "tokenizer.json"):
        assert (tmp_path / "got" / name).read_bytes() == (tmp_path / "wanted" / name).read_bytes()


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
def test_the_rate_goes_on(tmp_path: Path, schedule: str) -> None:
    samples = [sample(n, 5 + n, 2) for n in range(6)]
    options = training(schedule=schedule, warmup_share=0.4)

    def trained(checkpoint: Any = None, progress: Any = None) -> tuple[list[torch.Tensor], Trained]:
        model = tiny_base()
        model.model.requires_grad_(True)
        steps = list(epochs(len(samples), options, 1))
        parameters = list(model.model.parameters())
        return parameters, fit(model, parameters, samples, steps, options, progress, checkpoint)

    parameters, wanted = trained()
    kept = tmp_path / "c.safetensors"
    for step in (2, 7):
        with pytest.raises(Killed):
            trained(at(kept), killer(step))
    again, got = trained(at(kept))
    assert got == wanted
    assert all(torch.equal(one, other) for one, other in zip(again, parameters, strict=True))


# --- the file -------------------------------------------------------------------------------------


def test_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk that is full keeps the state before, and nothing half-written."""
    import os

    path = tmp_path / "sub" / "c.safetensors"
    kept = at(path)
    kept.save(Saved(1, {"x": torch.arange(3.0)}, {"n": 1}))
    before = path.read_bytes()

    def full(_handle: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space left"):
            kept.save(Saved(2, {"x": torch.arange(3.0)}, {"n": 2}))
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]
    assert path.read_bytes() == before
    saved = at(path).load()
    assert (saved.step, saved.facts) == (1, {"n": 1})
    assert torch.equal(saved.tensors["x"], torch.arange(3.0))


def test_the_header_names_its_users(tmp_path: Path) -> None:
    path = tmp_path / "c.safetensors"
    at(path).save(Saved(1, {"x": torch.zeros(1)}, {}))
    with safe_open(path, framework="pt") as file:
        header = json.loads(file.metadata()["mta"])
    assert (header["key"], header["about"]) == ("k", {"users": ["u"]})


def test_no_more_than_a_share_of_the_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A writing of 0.5 s is followed by at least 25 s of training: 2 %."""
    from tasks.lora import checkpoint as module

    now = [100.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    kept = at(tmp_path / "c.safetensors", seconds=10.0, most=0.02)
    now[0] = 109.9
    assert not kept.due()
    now[0] = 110.0
    assert kept.due()

    def slow(_path: Path, _data: bytes) -> None:
        now[0] += 0.5

    monkeypatch.setattr(module, "write_atomic", slow)
    kept.save(Saved(1, {"x": torch.zeros(1)}, {}))
    now[0] = 110.5 + 24.9
    assert not kept.due()
    now[0] = 110.5 + 25.0
    assert kept.due()
