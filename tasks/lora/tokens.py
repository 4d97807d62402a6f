"""Token ids of many users' samples in one safetensors file that is mapped into memory, not read.

So of gigabytes of tokens only those in use are in memory, and the place of each sample.

    ids        [T] int32   all samples' prompts and answers, end to end
    ends       [N] int64   where in `ids` each sample ends
    answers    [N] int32   how many of a sample's last tokens are its answer
    truncated  [N] uint8   whether the sample was cut
    users      [U] int64   where in the samples each user ends
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, overload

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.torch import save_file

from tasks.lora.batches import Encoded


@dataclass(frozen=True, eq=False)
class Table:
    """The arrays of one file, mapped."""

    ids: NDArray[Any]
    ends: NDArray[Any]
    answers: NDArray[Any]
    truncated: NDArray[Any]

    def sample(self, number: int) -> Encoded:
        """One sample, made of the mapped arrays."""
        start, end = int(self.ends[number - 1]) if number else 0, int(self.ends[number])
        ids = self.ids[start:end].tolist()
        middle = end - start - int(self.answers[number])
        return Encoded(ids[:middle], ids[middle:], bool(self.truncated[number]))


class Samples(Sequence[Encoded]):
    """Samples in mapped files, made into `Encoded` when asked for.

    places: each sample's table, and its number in the table.
    """

    def __init__(self, places: Iterable[tuple[Table, int]]) -> None:
        self.places = [*places]

    def __len__(self) -> int:
        return len(self.places)

    @overload
    def __getitem__(self, index: int) -> Encoded: ...

    @overload
    def __getitem__(self, index: slice) -> list[Encoded]: ...

    def __getitem__(self, index: int | slice) -> Encoded | list[Encoded]:
        if isinstance(index, slice):
            return [table.sample(number) for table, number in self.places[index]]
        table, number = self.places[index]
        return table.sample(number)

    def chosen(self, indices: Iterable[int]) -> Samples:
        """The samples at these places, in this order."""
        return Samples(self.places[index] for index in indices)

    @property
    def truncated(self) -> int:
        """How many of the samples were cut to fit."""
        return sum(int(table.truncated[number]) for table, number in self.places)


def joined(many: Iterable[Samples]) -> Samples:
    """All of them, one after another."""
    return Samples(place for samples in many for place in samples.places)


def write_tokens(path: Path, users: Sequence[Sequence[Encoded]]) -> None:
    """Write the users' samples to one file (module docstring)."""
    samples = [sample for of_user in users for sample in of_user]
    ids = [np.asarray(sample.prompt + sample.answer, dtype=np.int32) for sample in samples]
    arrays: dict[str, NDArray[Any]] = {
        "ids": np.concatenate([np.zeros(0, dtype=np.int32), *ids]),
        "ends": np.cumsum([len(one) for one in ids], dtype=np.int64),
        "answers": np.array([len(sample.answer) for sample in samples], dtype=np.int32),
        "truncated": np.array([sample.truncated for sample in samples], dtype=np.uint8),
        "users": np.cumsum([len(of_user) for of_user in users], dtype=np.int64),
    }
    save_file({name: torch.from_numpy(array) for name, array in arrays.items()}, path)


def read_tokens(path: Path) -> list[Samples]:
    """The users' samples of a file, in the order written; nothing is read yet."""
    with safe_open(path, framework="pt") as file:
        # Views of the mapping: torch keeps it as long as one of them lives.
        arrays = {name: file.get_tensor(name).numpy() for name in file.keys()}  # noqa: SIM118
    borders = [0, *arrays.pop("users").tolist()]
    table = Table(**arrays)
    return [Samples((table, n) for n in range(start, end)) for start, end in pairwise(borders)]
