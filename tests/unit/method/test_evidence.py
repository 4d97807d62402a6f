"""Anchors weighed by the evidence of a user's own items: shortlists and weights, by hand."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tasks.config.options import FusionOptions
from tasks.method.weights import by_evidence, shortlists, vector_likelihoods

NAN = float("nan")
COSINES = np.array([[0.1, 0.9, 0.5, 0.5], [-0.2, -0.2, -0.2, -0.9], [0.5, 0.5, 0.5, 0.6]])


@pytest.mark.parametrize(
    ("size", "wanted"),
    [
        (1, ["-x--", "x---", "---x"]),
        # Ties go to the earlier anchor.
        (2, ["-xx-", "xx--", "x--x"]),
        (3, ["-xxx", "xxx-", "xx-x"]),
        (4, ["xxxx"] * 3),
        (9, ["xxxx"] * 3),
        (None, ["xxxx"] * 3),
    ],
)
def test_shortlists_by_hand(size: int | None, wanted: list[str]) -> None:
    got = shortlists(COSINES, size)
    assert got.dtype == bool
    assert ["".join("x" if one else "-" for one in row) for row in got] == wanted


def weighed(evidence: list[float], **options: Any) -> dict[str, Any]:
    """Similarities are 0.0, 0.1, ... and 0.1234567, which is rounded."""
    similarities = np.array([[0.1 * k for k in range(len(evidence) - 1)] + [0.1234567]])
    chosen = by_evidence(similarities, np.array([evidence]), FusionOptions(**options))
    return {
        "members": chosen[0][0].tolist(),
        "similarities": chosen[1][0].tolist(),
        "weights": chosen[2][0].tolist(),
    }


def test_weights_by_hand() -> None:
    """exp of the differences over 3: 1, e^-1 and e^-2 of 12, 9 and 6 log units."""
    got = weighed([-109.0, -112.0, -140.0, -106.0], top_m=3, evidence_temperature=3.0)
    total = 1 + math.exp(-1) + math.exp(-2)
    assert got["members"] == [3, 0, 1]
    assert got["weights"] == pytest.approx([1 / total, math.exp(-1) / total, math.exp(-2) / total])
    assert got["similarities"] == pytest.approx([0.123457, 0.0, 0.1], abs=1e-9)


def test_temperature_one_is_bayes() -> None:
    """p(items | anchor) of 0.6, 0.3 and 0.1 under equal priors."""
    got = weighed([math.log(x) for x in (0.1, 0.6, 0.3)], top_m=3, evidence_temperature=1.0)
    assert got["members"] == [1, 2, 0]
    assert got["weights"] == pytest.approx([0.6, 0.3, 0.1])


def test_far_apart_does_not_overflow() -> None:
    got = weighed([-1e5, -3e4, -1e5], top_m=2, evidence_temperature=0.1)
    assert (got["members"], got["weights"]) == ([1, 0], [1.0, 0.0])


def test_ties_go_to_the_earlier_anchor() -> None:
    assert weighed([-5.0, -4.0, -4.0, -5.0], top_m=3)["members"] == [1, 2, 0]
    assert weighed([-4.0] * 4, top_m=2) == {
        "members": [0, 1],
        "similarities": [0.0, 0.1],
        "weights": [0.5, 0.5],
    }


def test_what_is_not_known_weighs_nothing() -> None:
    """Two are known and three are asked for: the third is the first of the others, with weight 0.

    All recipes have the same length, as a batch of users needs.
    """
    got = weighed([NAN, -8.0, NAN, -5.0], top_m=3, evidence_temperature=3.0)
    first = 1 / (1 + math.exp(-1))
    assert got["members"] == [3, 1, 0]
    assert got["weights"] == pytest.approx([first, 1 - first, 0.0])
    assert got["weights"][2] == 0.0


def test_more_asked_than_there_are() -> None:
    assert weighed([-1.0, -2.0], top_m=9)["members"] == [0, 1]
    assert weighed([-2.0, -1.0], top_m=1)["weights"] == [1.0]


LOG_P = st.one_of(st.floats(-1e4, 0), st.just(NAN), st.sampled_from([-7.0, -7.5]))


@settings(deadline=None)
@given(
    st.lists(st.lists(LOG_P, min_size=5, max_size=5), min_size=1, max_size=6),
    st.integers(1, 7),
    st.floats(0.05, 50),
)
def test_any_evidence(rows: list[list[float]], top_m: int, temperature: float) -> None:
    """At least one anchor of each user is known: a shortlist is never empty."""
    evidence = np.array(rows)
    evidence[np.isnan(evidence).all(1), 2] = -3.0
    options = FusionOptions(top_m=top_m, evidence_temperature=temperature)
    similarities = np.zeros(evidence.shape)
    members, _, weights = by_evidence(similarities, evidence, options)
    known = np.where(np.isnan(evidence), -np.inf, evidence)
    assert members.shape == weights.shape == (len(rows), min(top_m, 5))
    np.testing.assert_allclose(weights.sum(1), 1)
    for user, (own, heavy) in enumerate(zip(members, weights, strict=True)):
        # Best first, ties by number; nobody left out is better; weights in the same order.
        order = sorted(range(5), key=lambda k: (-known[user, k], k))
        assert own.tolist() == order[:top_m]
        assert (np.diff(heavy) <= 0).all()
        assert (heavy[np.isnan(evidence[user, own])] == 0).all()
        # A user's weights do not depend on company.
        alone = by_evidence(similarities[:1], evidence[user : user + 1], options)
        assert alone[0].tolist() == [own.tolist()]
        assert alone[2].tolist() == [heavy.tolist()]


def test_vectors_are_as_likely_as_their_items() -> None:
    """The density of each item around each anchor, summed; anchors differ by as much."""
    generator = np.random.default_rng(0)
    anchors = generator.normal(size=(3, 5))
    items = [generator.normal(size=(count, 5)) for count in (1, 4, 10)]
    got = vector_likelihoods(np.stack([own.mean(0) for own in items]), [1, 4, 10], anchors)
    wanted = [[-0.5 * ((own - one) ** 2).sum() for one in anchors] for own in items]
    np.testing.assert_allclose(np.diff(got, axis=1), np.diff(np.array(wanted), axis=1), atol=1.1e-4)
