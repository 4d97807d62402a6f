"""A training's state on the disk, so that one that was killed goes on where it was.

One safetensors file, written beside its place and renamed into it. Its header has the key of the
work (nothing else may go on from it), a hash over all it holds, and what the caller tells of it.
What is read is what was written to the last bit; on a CPU in float32 a training that was killed and
went on ends with the same numbers as one that was not.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tasks.store.files import write_atomic

# The form of the file and of what the trainings keep in it.
VERSION = 1
HEADER = "mta"
# No more of the time than this goes into writing, however slow the disk.
MOST = 0.02


@dataclass(frozen=True)
class Saved:
    """The state after `step` optimiser steps: tensors by name, and JSON values besides."""

    step: int
    tensors: dict[str, Tensor]
    facts: dict[str, Any]


class Checkpoint:
    """Where one training keeps its state, and when.

    key: what the training depends on, the company of users that share its rows included. about:
    JSON values for those who find the file. seconds: the least time between two writings.
    log: told, in one line and whether it is a warning, what became of an earlier state. most: the
    share of the time that may go into writing.
    """

    def __init__(
        self,
        path: Path,
        key: str,
        about: dict[str, Any],
        seconds: float,
        log: Callable[[str, bool], None],
        most: float = MOST,
    ) -> None:
        self.most = most
        self.path, self.key, self.about, self.log = path, key, about, log
        self._seconds = self._wait = seconds
        self._last = time.monotonic()

    def load(self, like: Mapping[str, Tensor]) -> Saved | None:
        """The state of an earlier try, or None: training starts anew.

        A file that is damaged, of other work, or without a tensor of the name, shape and type of
        each in `like` is said so and left alone; the next `save` replaces it.
        """
        if not self.path.exists():
            return None
        try:
            saved = self._read(like)
        except Exception as error:  # what safetensors raises of a damaged file is of many kinds
            why = " ".join(str(error).split())[:200]
            self.log(f"checkpoint {self.path}: {why}; it is ignored, training starts anew", True)
            return None
        self.log(f"checkpoint {self.path}: training goes on after step {saved.step}", False)
        return saved

    def due(self) -> bool:
        """Whether it is time to `save`."""
        return time.monotonic() - self._last >= self._wait

    def save(self, saved: Saved) -> None:
        """Replace what is there, whole or not at all. Raises OSError where the disk does not."""
        from safetensors.torch import save

        started = time.monotonic()
        tensors = {name: one.detach().cpu().contiguous() for name, one in saved.tensors.items()}
        told = {"version": VERSION, "key": self.key, "step": saved.step, "facts": saved.facts}
        told |= {"about": self.about, "sha256": _hash(tensors, told)}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(self.path, save(tensors, {HEADER: json.dumps(told, ensure_ascii=False)}))
        self._last = time.monotonic()
        self._wait = max(self._seconds, (self._last - started) / self.most)

    def remove(self) -> None:
        """What the training was for is there: nobody will go on from here."""
        self.path.unlink(missing_ok=True)

    def _read(self, like: Mapping[str, Tensor]) -> Saved:
        from safetensors import safe_open

        with safe_open(self.path, framework="pt") as file:
            told = json.loads((file.metadata() or {})[HEADER])
            if told["version"] != VERSION or told["key"] != self.key:
                raise ValueError("it is of other work")
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
        signed = {name: told[name] for name in ("version", "key", "step", "facts")}
        if _hash(tensors, signed) != told["sha256"]:
            raise ValueError("it does not match its hash")
        for name, wanted in like.items():
            found = tensors[name]
            if found.shape != wanted.shape or found.dtype != wanted.dtype:
                raise ValueError(f"{name} is {found.dtype} {list(found.shape)}")
        return Saved(told["step"], tensors, told["facts"])


def about_of(path: Path) -> dict[str, Any] | None:
    """What is told of a checkpoint in its header; None where the file cannot be read."""
    from safetensors import safe_open

    try:
        with safe_open(path, framework="pt") as file:
            about: dict[str, Any] = json.loads((file.metadata() or {})[HEADER])["about"]
            return about
    except Exception:  # see `load`
        return None


def _hash(tensors: Mapping[str, Tensor], told: dict[str, Any]) -> str:
    found = hashlib.sha256(json.dumps(told, sort_keys=True).encode())
    for name in sorted(tensors):
        one = tensors[name]
        found.update(f"{name} {one.dtype} {list(one.shape)}".encode())
        found.update(one.reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()
