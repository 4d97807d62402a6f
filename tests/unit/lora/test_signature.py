"""Signatures against autograd's own gradient of log p(answer)."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tasks.lora.base import Base
from tasks.lora.batches import Encoded
from tasks.lora.signature import input_signatures, item_signatures, projection
from tests.unit.lora.helpers import HIDDEN, MakeBase, sample

ITEMS = [
    sample(seed, *sizes) for seed, sizes in enumerate([(6, 3), (15, 1), (4, 5), (9, 2), (30, 4)])
]


def gradient(base: Base, item: Encoded, at_input: bool = False) -> Tensor:
    """d/dW of the mean over answer tokens of log p(token), W the LM head's weight [V, d].

    `at_input`: W the input embeddings' weight.
    """
    model = base.model
    layer = model.get_input_embeddings() if at_input else model.get_output_embeddings()
    weight = layer.weight.requires_grad_()
    ids = item.prompt + item.answer
    log_p = base.model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
    places = range(len(item.prompt) - 1, len(ids) - 1)
    mean = torch.stack([log_p[at, ids[at + 1]] for at in places]).mean()
    return torch.autograd.grad(mean, weight)[0]


def assert_same(got: Tensor, wanted: Tensor) -> None:
    assert wanted.norm() > 0.1
    assert (got - wanted).norm() <= 1e-5 * wanted.norm()


@pytest.mark.parametrize("positions", [1, 40, 8192])
def test_is_the_gradient(fresh_base: MakeBase, positions: int) -> None:
    """Nothing is projected where both sides are as large as asked."""
    base = fresh_base()
    vocabulary = base.model.config.vocab_size
    got = item_signatures(base, ITEMS, vocabulary, HIDDEN, seed=0, positions=positions)
    assert got.shape == (len(ITEMS), vocabulary * HIDDEN)
    for row, item in zip(got, ITEMS, strict=True):
        assert_same(row.view(vocabulary, HIDDEN), gradient(base, item))


@pytest.mark.parametrize(("to_v", "to_h"), [(10, 6), (10, HIDDEN), (1000, 6)])
def test_projected_on_both_sides(fresh_base: MakeBase, to_v: int, to_h: int) -> None:
    """P_v^T G P_h, a side that is not larger than asked staying as it is."""
    base = fresh_base()
    vocabulary = base.model.config.vocab_size
    p_v = projection(vocabulary, to_v, 5)
    p_h = projection(HIDDEN, to_h, 6)
    p_v = torch.eye(vocabulary) if p_v is None else p_v
    p_h = torch.eye(HIDDEN) if p_h is None else p_h
    got = item_signatures(base, ITEMS, to_v, to_h, seed=5, positions=40)
    for row, item in zip(got, ITEMS, strict=True):
        assert_same(row.view(p_v.shape[1], p_h.shape[1]), p_v.T @ gradient(base, item) @ p_h)


@pytest.mark.parametrize("positions", [1, 40, 8192, None])
def test_at_the_input_it_is_the_gradient_of_the_embeddings(
    fresh_base: MakeBase, positions: int | None
) -> None:
    """Rows of tokens that stand several times in an item are sums; others are 0."""
    base = fresh_base()
    vocabulary = base.model.config.vocab_size
    got = input_signatures(base, ITEMS, vocabulary, HIDDEN, seed=0, positions=positions)
    assert got.shape == (len(ITEMS), vocabulary * HIDDEN)
    for row, item in zip(got, ITEMS, strict=True):
        assert_same(row.view(vocabulary, HIDDEN), gradient(base, item, at_input=True))


def test_at_the_input_projected_on_both_sides(fresh_base: MakeBase) -> None:
    """P_v^T G P_h, with the matrices that the head's signature has."""
    base = fresh_base()
    p_v = projection(base.model.config.vocab_size, 10, 5)
    p_h = projection(HIDDEN, 6, 6)
    assert p_v is not None
    assert p_h is not None
    got = input_signatures(base, ITEMS, 10, 6, seed=5, positions=40)
    for row, item in zip(got, ITEMS, strict=True):
        assert_same(row.view(10, 6), p_v.T @ gradient(base, item, at_input=True) @ p_h)


def test_projection_keeps_inner_products() -> None:
    """Entries of variance 1/to: E[P P^T] = I (Johnson-Lindenstrauss). 200 rows, 4000 columns.

    Off the diagonal the standard deviation is 1/sqrt(4000) = 0.016, on it sqrt(2/4000) = 0.022.
    """
    matrix = projection(5000, 4000, seed=1)
    assert matrix is not None
    gram = matrix[:200] @ matrix[:200].T
    assert (gram - torch.eye(200)).abs().max() < 6 * 0.022
    assert torch.equal(matrix, projection(5000, 4000, seed=1))
    assert not torch.equal(matrix[:10], projection(5000, 4000, seed=2)[:10])  # type: ignore[index]
    assert projection(10, 10, 0) is None
    assert projection(11, 10, 0) is not None


def test_leaves_the_model_as_it_was(fresh_base: MakeBase) -> None:
    """No hook stays, also when it fails half way."""
    base = fresh_base()
    item_signatures(base, ITEMS, 4, 4, seed=0)
    with pytest.raises(IndexError):
        item_signatures(base, [Encoded([10**6], [2])], 4, 4, seed=0)
    input_signatures(base, ITEMS, 4, 4, seed=0)
    with pytest.raises(IndexError):
        input_signatures(base, [Encoded([10**6], [2])], 4, 4, seed=0)
    assert not base.model.lm_head._forward_pre_hooks
    assert not base.model.get_input_embeddings()._forward_hooks
    assert all(parameter.grad is None for parameter in base.model.parameters())


def test_at_the_input_no_hook_stays_when_the_model_fails(
    fresh_base: MakeBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = fresh_base()

    def fails(*_about: object, **_more: object) -> None:
        raise RuntimeError("out of order")

    monkeypatch.setattr(base.model.lm_head, "forward", fails)
    with pytest.raises(RuntimeError, match="out of order"):
        input_signatures(base, ITEMS, 4, 4, seed=0)
    assert not base.model.get_input_embeddings()._forward_hooks
