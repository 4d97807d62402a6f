"""The tiny model and its tokenizer, made once."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import pytest
import torch

from tasks.lora.base import Base
from tests.unit.lora.group_case import precise_norms
from tests.unit.lora.helpers import MakeBase, tiny_base


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def base() -> Base:
    """The tiny model, for tests that leave it as it is. Attach LoRAs to `fresh_base()`."""
    return tiny_base()


@pytest.fixture(scope="session")
def fresh_base(base: Base) -> MakeBase:
    """Makes copies of `base` with the same weights."""
    pristine = copy.deepcopy(base.model)

    def make() -> Base:
        return Base(copy.deepcopy(pristine), base.tokenizer, base.device, base.max_tokens)

    return make


@pytest.fixture(params=[torch.float32, torch.float64], ids=["fp32", "fp64"])
def dtype(request: pytest.FixtureRequest) -> Iterator[torch.dtype]:
    if request.param == torch.float32:
        yield request.param
    else:
        with precise_norms():
            yield request.param
