"""Clusters of experts that are alike, from distances alone.

The greedy rule is that of STUN's authors (methods/stun.py). Clusters and their members are in the order of
the experts' numbers, and so are ties.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Distances = NDArray[np.float64]  # [E, E]
Clusters = list[list[int]]


def clustered(d: Distances, threshold: float, least: int) -> Clusters:
    """Clusters of at least `least`, in the order of their first experts."""
    d, n = d.copy(), len(d)
    np.fill_diagonal(d, np.inf)
    of, left = [[e] for e in range(n)], n
    # entries only ever become inf, so the least of what is left comes next in this order
    for at in d.argsort(axis=None, kind="stable"):
        i, j = divmod(int(at), n)
        if d[i, j] == np.inf or of[i] is of[j]:
            continue
        if d[i, j] >= threshold or left <= least:
            break
        a, b = of[i], of[j]
        if max(d[a, j].max(), d[b, i].max()) < threshold:
            d[a, j] = d[b, i] = np.inf
            for e in (united := sorted(a + b)):
                of[e] = united
            left -= 1
        else:
            d[i, j] = d[j, i] = np.inf
    return [of[e] for e in range(n) if of[e][0] == e]


def at_most(
    wanted: int, parts: Sequence[Distances], least: Sequence[int]
) -> tuple[float, list[Clusters]]:
    """(the threshold that leaves no more clusters than wanted over all parts, those clusters)."""
    known = np.unique(np.concatenate([p[~np.eye(len(p), dtype=bool)] for p in parts]))
    values = [*known.tolist(), math.inf]
    low, high = 0, len(values) - 1

    def made(at: int) -> list[Clusters]:
        return [clustered(p, values[at], n) for p, n in zip(parts, least, strict=True)]

    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if sum(map(len, made(middle))) <= wanted else (middle + 1, high)
    return values[high], made(high)
