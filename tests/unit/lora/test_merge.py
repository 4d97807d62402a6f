"""Merging against sums worked out in numpy, float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.pytorch_utils import Conv1D

from tasks.lora.adapters import Lora
from tasks.lora.bank import stack
from tasks.lora.merge import MergedUsers, add_to_model, concatenate, merge
from tests.unit.lora.helpers import delta, random_lora, same

# Three decimals: float32 has no digits to lose, as it does below 1e-38.
weight = st.integers(-3000, 3000).map(lambda number: number / 1000)
MERGES = ("exact", "factors", "svd")
quick = settings(deadline=None, max_examples=60)


@st.composite
def mergers(draw: st.DrawFn, narrow: bool = False) -> tuple[list[Lora], list[float]]:
    """1 to 4 LoRAs of one scale on two layers; `narrow`: the rank may exceed the layers' sizes."""
    rank = draw(st.integers(1, 6))
    size = st.integers(1 if narrow else rank, 12)
    shapes = {name: (draw(size), draw(size)) for name in ("one", "two.deep")}
    scale = draw(st.sampled_from([0.5, 1.0, 2.0, 16 / 3]))
    weights = draw(st.lists(weight, min_size=1, max_size=4))
    seed = draw(st.integers(0, 10_000))
    return [random_lora(shapes, rank, scale, seed + i, 1.0) for i in range(len(weights))], weights


def dense(loras: list[Lora], weights: list[float], layer: str) -> np.ndarray:
    """sum_i w_i * s * B_i A_i."""
    total = np.zeros((loras[0].layers[layer][1].shape[0], loras[0].layers[layer][0].shape[1]))
    for lora, w in zip(loras, weights, strict=True):
        a, b = (tensor.numpy().astype(np.float64) for tensor in lora.layers[layer])
        total += w * lora.scale * (b @ a)
    return total


def sizes(loras: list[Lora], weights: list[float], layer: str) -> float:
    """What rounding errors are relative to: the sum of the norms of the terms."""
    terms = zip(loras, weights, strict=True)
    return sum(float(np.linalg.norm(dense([lora], [w], layer))) for lora, w in terms)


def best_of_rank(matrix: np.ndarray, rank: int) -> np.ndarray:
    """Eckart-Young (1936): the truncated SVD of the dense matrix is its best approximation."""
    u, s, vt = np.linalg.svd(matrix, full_matrices=False)
    return (u[:, :rank] * s[:rank]) @ vt[:rank]


@quick
@given(mergers(narrow=True))
def test_exact_is_the_weighted_sum_of_updates(case: tuple[list[Lora], list[float]]) -> None:
    loras, weights = case
    merged = merge(loras, weights, "exact")
    assert merged.rank == loras[0].rank * len(loras)
    for layer in loras[0].layers:
        wanted = dense(loras, weights, layer)
        size = sizes(loras, weights, layer)
        assert np.linalg.norm(delta(merged, layer).numpy() - wanted) <= 1e-6 * size + 1e-30


@quick
@given(mergers(narrow=True))
def test_factors_is_the_product_of_the_weighted_factors(
    case: tuple[list[Lora], list[float]],
) -> None:
    loras, weights = case
    merged = merge(loras, weights, "factors")
    assert merged.rank == loras[0].rank
    for layer in loras[0].layers:
        a, b = (
            sum(
                w * lora.layers[layer][side].numpy().astype(np.float64)
                for lora, w in zip(loras, weights, strict=True)
            )
            for side in (0, 1)
        )
        wanted = loras[0].scale * (b @ a)
        np.testing.assert_allclose(delta(merged, layer).numpy(), wanted, rtol=1e-4, atol=1e-4)


def assert_best_approximation(loras: list[Lora], weights: list[float]) -> None:
    rank = loras[0].rank
    merged = merge(loras, weights, "svd")
    assert merged.rank == rank
    for layer in loras[0].layers:
        total = dense(loras, weights, layer)
        spectrum = np.linalg.svd(total, compute_uv=False)
        got = delta(merged, layer).numpy()
        # The error is that of the best approximation, the tail of the spectrum ...
        tail = np.sqrt((spectrum[rank:] ** 2).sum())
        size = sizes(loras, weights, layer)
        assert abs(np.linalg.norm(total - got) - tail) <= 1e-5 * size + 1e-30
        # ... and where the spectrum has a gap, so that there is one best, it is that one.
        kept = spectrum[rank - 1] if rank <= len(spectrum) else np.inf
        lost = spectrum[rank] if rank < len(spectrum) else 0.0
        if kept - lost > 0.05 * size:
            np.testing.assert_allclose(got, best_of_rank(total, rank), atol=1e-4 * size)


@quick
@given(mergers())
def test_svd_is_the_best_approximation(case: tuple[list[Lora], list[float]]) -> None:
    assert_best_approximation(*case)


@pytest.mark.parametrize(
    ("out", "fan"),
    [
        (1, 1),
        (3, 3),
        (2, 9),
        (9, 2),
        (2, 4),
    ],
)
def test_svd_of_a_layer_narrower_than_the_rank(out: int, fan: int) -> None:
    """Rank 5 holds all of such a layer: the merge is exact, its shape still that of rank 5."""
    loras = [random_lora({"x": (out, fan)}, 5, 2.0, seed, 1.0) for seed in (1, 2, 3)]
    weights = [0.5, 0.3, 0.2]
    merged = merge(loras, weights, "svd")
    a, b = merged.layers["x"]
    assert (a.shape, b.shape) == ((5, fan), (out, 5))
    np.testing.assert_allclose(delta(merged, "x").numpy(), dense(loras, weights, "x"), atol=1e-5)
    assert_best_approximation(loras, weights)


def test_svd_keeps_the_largest_directions_by_hand() -> None:
    """Two anchors along the axes: 0.6 * diag(3, 0) + 0.4 * diag(0, 5) = diag(1.8, 2.0), rank 1."""
    one = Lora({"x": (torch.tensor([[1.0, 0.0]]), torch.tensor([[3.0], [0.0]]))}, 1.0)
    two = Lora({"x": (torch.tensor([[0.0, 1.0]]), torch.tensor([[0.0], [5.0]]))}, 1.0)
    merged = merge([one, two], [0.6, 0.4], "svd")
    torch.testing.assert_close(
        delta(merged, "x"), torch.tensor([[0.0, 0.0], [0.0, 2.0]], dtype=torch.float64)
    )


@quick
@given(mergers(), st.sampled_from(MERGES))
def test_one_lora_at_weight_one_is_itself(case: tuple[list[Lora], list[float]], how: str) -> None:
    lora = case[0][0]
    merged = merge([lora], [1.0], how)
    if how != "svd":
        assert same(merged, lora)
    for layer in lora.layers:
        torch.testing.assert_close(delta(merged, layer), delta(lora, layer), rtol=1e-5, atol=1e-5)


def test_factors_has_cross_terms_and_exact_has_none() -> None:
    """A = B = 1 and A = B = -1, half each: the factors cancel, the updates (both 1) do not."""
    plus = Lora({"x": (torch.tensor([[1.0]]), torch.tensor([[1.0]]))}, 1.0)
    minus = Lora({"x": (torch.tensor([[-1.0]]), torch.tensor([[-1.0]]))}, 1.0)
    values = {how: delta(merge([plus, minus], [0.5, 0.5], how), "x").item() for how in MERGES}
    assert values["factors"] == 0.0
    assert values["exact"] == 1.0
    assert values["svd"] == pytest.approx(1.0)


@quick
@given(
    st.integers(1, 5), st.integers(1, 5), st.integers(1, 8), st.integers(1, 8), st.integers(0, 99)
)
def test_concatenation_is_the_sum(under: int, over: int, out: int, fan: int, seed: int) -> None:
    """Other ranks and other scales (0.5 and 3)."""
    first = random_lora({"x": (out, fan)}, under, 0.5, seed, 1.0)
    second = random_lora({"x": (out, fan)}, over, 3.0, seed + 1, 1.0)
    both = concatenate(first, second)
    assert (both.rank, both.scale) == (under + over, 1.0)
    wanted = dense([first], [1.0], "x") + dense([second], [1.0], "x")
    np.testing.assert_allclose(delta(both, "x").numpy(), wanted, rtol=1e-5, atol=1e-5)


def test_what_does_not_fit_together() -> None:
    one = random_lora({"x": (3, 4)}, 2, 1.0, 0)
    for loras, weights, how, words in (
        ([one, one], [1.0], "exact", "one weight per LoRA"),
        (
            [one, random_lora({"x": (3, 4)}, 2, 2.0, 0)],
            [0.5, 0.5],
            "exact",
            "one scale",
        ),
        ([one, random_lora({"y": (3, 4)}, 2, 1.0, 0)], [0.5, 0.5], "svd", "layers"),
    ):
        with pytest.raises(ValueError, match=words):
            merge(loras, weights, how)


@pytest.mark.parametrize("how", MERGES)
def test_many_users_are_merged_as_one_by_one(how: str) -> None:
    """Four users' recipes over five anchors, asked for in any order and company: the update of
    each is the dense sum of its own anchors (for `factors` and `svd`: that of `merge` alone)."""
    shapes = {"one": (6, 9), "two.deep": (3, 2)}
    loras = dict(zip("abcde", (random_lora(shapes, 3, 1.5, s, 1.0) for s in range(5)), strict=True))
    recipes = [("ab", (0.7, 0.3)), ("ec", (0.5, 0.5)), ("bd", (1.2, -0.2)), ("ab", (0.1, 0.9))]
    merged = MergedUsers(
        stack(list(loras), list(loras.values())), recipes, how, torch.device("cpu")
    )
    for users in ([0, 1, 2, 3], [3], [2, 0]):
        parts = merged.parts(users)
        assert parts.layers.keys() == shapes.keys()
        assert parts.scale == 1.5
        for name, (a, b) in parts.layers.items():
            assert a.shape[:2] == (len(users), 6 if how == "exact" else 3)
            for row, user in enumerate(users):
                members, weights = [loras[m] for m in recipes[user][0]], list(recipes[user][1])
                got = 1.5 * b[row].double().numpy() @ a[row].double().numpy()
                alone = delta(merge(members, weights, how), name).numpy()
                np.testing.assert_allclose(got, alone, atol=1e-5)
                if how == "exact":
                    np.testing.assert_allclose(got, dense(members, weights, name), atol=1e-5)


def test_a_recipe_of_an_unknown_anchor() -> None:
    bank = stack(["a"], [random_lora({"x": (3, 4)}, 2, 1.0, 0)])
    with pytest.raises(KeyError, match="stranger"):
        MergedUsers(bank, [(["stranger"], [1.0])], "exact", torch.device("cpu"))


def test_added_to_a_model_is_its_delta() -> None:
    """A Linear's weight is [out, in], GPT-2's Conv1D's [in, out]."""
    model = torch.nn.ModuleDict({"one": torch.nn.Linear(5, 7), "two": Conv1D(7, 5)})
    lora = random_lora({"one": (7, 5), "two": (7, 5)}, 3, 0.5, 1)
    before = {name: model[name].weight.detach().clone() for name in lora.layers}
    add_to_model(model, lora)
    for name, transposed in (("one", False), ("two", True)):
        update = delta(lora, name).T if transposed else delta(lora, name)
        torch.testing.assert_close(model[name].weight, before[name] + update.float())
