"""Who moves where when clusters are fitted again, by hand."""

from __future__ import annotations

import numpy as np

from tasks.method.clusters import assign, large_clusters, to_ask


def test_small_clusters_and_noise_are_given_up() -> None:
    """Cluster 4 has two members, 2 three; -1 is noise, however many there are."""
    labels = [4, 2, -1, 2, -1, 4, -1, 2, 0]
    assert large_clusters(labels, 2) == [2, 4]
    assert large_clusters(labels, 3) == [2]
    assert large_clusters(labels, 4) == []


def test_the_likeliest_cluster_takes_a_candidate() -> None:
    """By hand: the largest number of each row, the first of equals; -inf is nobody's.

    The last two have no held-out item: one stays where it is, the other's cluster is gone.
    """
    evidence = np.array([[-3.0, -1.0], [-2.0, -2.0], [-np.inf, -9.0], [0.0, 0.0], [0.0, 0.0]])
    assert assign([5, 5, 3, 5, 8], evidence, [2, 1, 1, 0, 0], [3, 5]) == [5, 3, 5, 5, -1]


def test_later_rounds_ask_the_nearest_that_are_left() -> None:
    """The first candidate's cluster 9 was given up; nothing is left of the second's, and the
    third has none."""
    assert to_ask([[3, 9], [9, 8], [], [7, 3]], [3, 5, 7]) == [
        [True, False, False],
        [True, True, True],
        [True, True, True],
        [True, False, True],
    ]
