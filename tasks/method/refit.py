"""Clusters fitted again by evidence: who moves where (tasks/clusters.py has the rounds)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

T = TypeVar("T")


def large_clusters(labels: Sequence[int], size: int) -> list[int]:
    """The numbers, in order, of the clusters with `size` members or more; noise (-1) is none."""
    members = list(labels)
    return [k for k in sorted(set(labels) - {-1}) if members.count(k) >= size]


def shown(items: Sequence[list[T]], labels: Sequence[int], clusters: list[int]) -> list[list[T]]:
    """What each of `clusters` is trained on: the first, third, ... item of its members."""
    pairs = list(zip(items, labels, strict=True))
    return [[one for own, label in pairs if label == k for one in own[0::2]] for k in clusters]


def to_ask(nearest: Sequence[Sequence[int]], clusters: list[int]) -> list[list[bool]]:
    """[U, K]: which of `clusters` each candidate is asked: the nearest that are left, or all."""
    return [
        [k in own for k in clusters] if set(own) & set(clusters) else [True] * len(clusters)
        for own in nearest
    ]


def assign(
    labels: Sequence[int], evidence: NDArray[np.float64], items: list[int], clusters: list[int]
) -> list[int]:
    """Each candidate's cluster by `evidence` [U, K] for `clusters` [K], the first of equals.

    A candidate without held-out `items` stays, or becomes noise where its cluster was given up.
    """
    best = np.argmax(evidence, axis=1)
    return [
        clusters[k] if count else label if label in clusters else -1
        for k, count, label in zip(best, items, labels, strict=True)
    ]


def nearest(evidence: NDArray[np.float64], clusters: list[int], count: int) -> list[list[int]]:
    """Each candidate's `count` likeliest of `clusters`, best first, by `evidence` [U, K]."""
    order = np.argsort(-evidence, axis=1, kind="stable")[:, :count]
    return [[clusters[k] for k in own] for own in order.tolist()]
