"""The state of a training on disk, so that a killed training goes on where it was.

One safetensors file. Its header has the key of the work, a hash of the contents and what the
caller says about it. On a CPU in float32 a training that was killed and went on ends with the same
numbers as an undisturbed one, to the last bit.
"""

import hashlib
import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from tasks.errors import short
from tasks.files import write_atomic

# The format of the file and of the trainings' states in it. It is part of every key.
VERSION = 4
HEADER = "mta"


@dataclass(frozen=True)
class Saved:
    """The state after `step` steps: tensors by name, and JSON values, which may be NaN."""

    step: int
    tensors: dict[str, Tensor]
    facts: dict[str, Any]


@dataclass
class Checkpoint:
    """Where one training keeps its state, and when.

    key: identifies all that the training depends on. about: JSON values for whoever finds the file.
    seconds: the least time between two writes. log: takes a line and whether it is a warning. most:
    the largest share of the time that goes into writing, however slow the disk is.
    """

    path: Path
    key: str
    about: dict[str, Any]
    seconds: float
    log: Callable[[str, bool], None]
    most: float = 0.02
    _next: float = field(init=False)

    def __post_init__(self) -> None:
        self._next = time.monotonic() + self.seconds

    def load(self) -> Saved | None:
        """The state of an earlier try, or None: training starts anew.

        A file that is damaged, or of other work, is ignored with a warning.
        """
        if not self.path.exists():
            return None
        try:
            with safe_open(self.path, framework="pt") as file:
                header = json.loads((file.metadata() or {})[HEADER])
                tensors = {n: file.get_tensor(n).clone() for n in file.keys()}  # noqa: SIM118
            sha256 = header.pop("sha256")
            if header["key"] != self.key:
                raise ValueError("it is of other work")
            if _hash(tensors, header) != sha256:
                raise ValueError("it does not match its hash")
        except Exception as error:  # a damaged file raises errors of many kinds
            why = short(error)
            self.log(f"checkpoint {self.path}: {why}; it is ignored, training starts anew", True)
            return None
        self.log(f"checkpoint {self.path}: training goes on after step {header['step']}", False)
        return Saved(header["step"], tensors, header["facts"])

    def due(self) -> bool:
        """Whether it is time to `save`."""
        return time.monotonic() >= self._next

    def save(self, saved: Saved) -> None:
        """Replace the file, whole or not at all. Raises OSError, as of a full disk."""
        started = time.monotonic()
        tensors = {name: one.detach().cpu().contiguous() for name, one in saved.tensors.items()}
        header = {"key": self.key, "step": saved.step, "facts": saved.facts, "about": self.about}
        header["sha256"] = _hash(tensors, header)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(self.path, save(tensors, {HEADER: json.dumps(header, ensure_ascii=False)}))
        now = time.monotonic()
        self._next = now + max(self.seconds, (now - started) / self.most)


def _hash(tensors: dict[str, Tensor], header: dict[str, Any]) -> str:
    about = json.dumps(header, sort_keys=True).encode()
    return hashlib.sha256(about + save(tensors)).hexdigest()
