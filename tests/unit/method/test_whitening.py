"""Whitening, by a population whose covariance is known."""

from __future__ import annotations

import os

import numpy as np
import pytest
from threadpoolctl import threadpool_limits

from tasks.method.whitening import FLOOR, whitening


def test_within_user_variance_becomes_one() -> None:
    """Items of three users around means far apart; the means do not count.

    Covariance by numpy: deviations from the user's own mean, over 3 x 200 - 3 degrees of freedom.
    """
    generator = np.random.default_rng(0)
    mix = np.array([[3.0, 0.0, 0.0], [1.0, 1.0, 0.0], [0.0, 0.5, 0.7]])
    users = [generator.normal(size=(200, 3)) @ mix.T + mean for mean in (0.0, 50.0, -80.0)]
    deviations = np.concatenate([own - own.mean(0) for own in users])
    covariance = deviations.T @ deviations / (600 - 3)
    matrix = whitening(users).astype(np.float64)
    floor = FLOOR * np.linalg.eigvalsh(covariance)[-1]
    wanted = np.linalg.eigvalsh(covariance)
    got = np.diag(matrix.T @ covariance @ matrix)
    np.testing.assert_allclose(np.sort(got), np.sort(wanted / (wanted + floor)), rtol=1e-4)
    # W W^T is the inverse of covariance and floor: distances are Mahalanobis'.
    inverse = np.linalg.inv(covariance + floor * np.eye(3))
    np.testing.assert_allclose(matrix @ matrix.T, inverse, rtol=1e-4, atol=1e-6)


def test_a_direction_without_variance_stays_bounded() -> None:
    """Variances 4 and 0: scales 1/sqrt(4 + .04) and 1/sqrt(.04) = 5."""
    users = [np.array([[2.0, 1.0], [-2.0, 1.0], [2.0, 1.0], [-2.0, 1.0], [0.0, 1.0]])]
    matrix = whitening(users)
    np.testing.assert_allclose(np.abs(np.array([1.0, 0.0]) @ matrix).max(), 4.04**-0.5, rtol=1e-5)
    np.testing.assert_allclose(np.abs(np.array([0.0, 1.0]) @ matrix).max(), 5.0, rtol=1e-5)


@pytest.mark.parametrize("items", [np.array([[1.0, 2.0]]), np.array([[1.0, 2.0], [1.0, 2.0]])])
def test_items_that_do_not_differ_leave_vectors_alone(items: np.ndarray) -> None:
    np.testing.assert_array_equal(whitening([items]), np.eye(2, dtype=np.float32))


@pytest.mark.skipif(os.cpu_count() == 1, reason="one core: there is nothing to tell apart")
def test_the_number_of_threads_changes_nothing() -> None:
    """Left to themselves, sums of 256 numbers a user come out otherwise on two threads."""
    generator = np.random.default_rng(0)
    users = [generator.normal(size=(12, 256)).astype(np.float32) for _ in range(60)]
    with threadpool_limits(1):
        one = whitening(users)
    with threadpool_limits(2):
        assert whitening(users).tobytes() == one.tobytes()
