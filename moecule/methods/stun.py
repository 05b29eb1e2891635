"""STUN: cluster experts whose router rows are alike, and keep one of each cluster.

Lee et al., "STUN: Structured-Then-Unstructured Pruning for Scalable MoE Pruning", 2024, arXiv:2409.06211.

    d_ij = router * |W_i - W_j| / |W|_F  -  together * a_ij / mean(a)

W_i is the router's row of expert i, a_ij how many tokens chose both (the mean counts the diagonal, which
is 0). Clusters grow from the least d on, as the authors' code does it: two are united over the pair i, j
where all d from one's members to j and from the other's to i are below a threshold and were not used
before; such d are then used up. One threshold serves all layers (budget = "model"), found by bisection so
that no more clusters are left than wanted; equal distances may leave fewer. With budget = "layer" each
layer (and each group of its router) has its own, and keeps just as many. Of each cluster the expert whose
weights are nearest to the cluster's mean stays. Defaults read weights alone: no forward pass. What is
pruned within the experts that stay is [sparsify] (recipe `stun`).

Differences from the paper:
- Of a cluster of two both are as near to the mean: the one that is used more stays.
- Few clusters are not merged into means (the paper's reconstruction below 3 clusters, off in their code).
- a counts all pairs of a token's experts; theirs the first two, by softmax, for every model.
- A layer keeps what its router picks for a token, at least.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float64
from torch import Tensor

from moecule.alike import Distances, at_most
from moecule.drop import Room
from moecule.errors import RecipeError
from moecule.group import products
from moecule.method import Method
from moecule.stats import COUNT, Block, Routed, Statistic, Stats

NEAR = 1e-9  # of a length squared: as near to the mean


@dataclass(frozen=True)
class Options:
    """What makes experts alike, and whether all layers share a threshold."""

    router: float = 1.0
    together: float = 0.0
    budget: Literal["layer", "model"] = "model"

    def __post_init__(self) -> None:
        """Raises RecipeError where nothing would make experts alike."""
        if min(self.router, self.together) < 0 or self.router + self.together == 0:
            raise RecipeError(
                f"stun: router = {self.router:g} and together = {self.together:g}, wanted none below 0 "
                "and one above"
            )


def distances(block: Block) -> Float64[Tensor, "E E"]:
    """Between the router's rows, over the length of all of them."""
    rows = block.rows
    apart: Tensor = torch.cdist(rows, rows, compute_mode="donot_use_mm_for_euclid_dist")
    return apart.div_(rows.norm().clamp(min=torch.finfo(rows.dtype).tiny))


def weight_products(block: Block) -> Float64[Tensor, "E E"]:
    """Of the experts' weights, each expert's as one vector."""
    return products([block.experts.gate_up, block.experts.down])


def together(seen: Routed) -> Float64[Tensor, "E E"]:
    """How many tokens chose both."""
    chose = torch.zeros_like(seen.logits, dtype=torch.float64).scatter_(1, seen.idx, 1.0)
    return (chose.mT @ chose).fill_diagonal_(0)


APART = Statistic("router_distance", of_block=distances)
PRODUCTS = Statistic("weight_products", of_block=weight_products)
TOGETHER = Statistic("together", of_router=together, pairs=True)


def needs(options: Options) -> tuple[Statistic, ...]:
    """Distances, who is near a mean, and who is used more."""
    return (COUNT, APART, PRODUCTS, *((TOGETHER,) if options.together else ()))


def nearest(cluster: list[int], gram: Distances, count: Sequence[float]) -> int:
    """The expert of a cluster nearest to its mean; of equals that used more, then the lower number."""
    of = gram[np.ix_(cluster, cluster)]
    far = of.diagonal() - 2 * of.mean(1) + of.mean()
    close = far <= far.min() + NEAR * of.diagonal().max()
    return min(
        (e for e, near in zip(cluster, close, strict=True) if near), key=lambda e: (-count[e], e)
    )


def choose(stats: Stats, room: Room, options: Options) -> dict[int, tuple[int, ...]]:
    """{layer: one expert of each cluster}."""
    places: list[tuple[int, int]] = []  # layer, and the first expert of a group of its router
    parts: list[Distances] = []
    for i, s in sorted(stats.items()):
        d, size = _apart(s, options), len(s["count"]) // room.groups[i]
        for at in range(0, len(d), size):
            places.append((i, at))
            parts.append(d[at : at + size, at : at + size])
    if room.total is not None:
        found = at_most(room.total, parts, [room.least[i] for i, _ in places])[1]
    else:
        left = [room.left[i] // room.groups[i] for i, _ in places]
        found = [at_most(n, [p], [n])[1][0] for p, n in zip(parts, left, strict=True)]
    out: dict[int, list[int]] = {i: [] for i in stats}
    for (i, at), clusters in zip(places, found, strict=True):
        gram, count = stats[i][PRODUCTS.name].numpy(), stats[i]["count"].tolist()
        out[i] += [nearest([at + e for e in c], gram, count) for c in clusters]
    return {i: tuple(sorted(ids)) for i, ids in out.items()}


def _apart(s: Mapping[str, Tensor], options: Options) -> Distances:
    d = options.router * s[APART.name]
    if options.together:
        both = s[TOGETHER.name]
        d = d - options.together * both / both.mean().clamp(min=torch.finfo(both.dtype).tiny)
    found: Distances = d.numpy()
    return found


METHOD = Method(
    paper="Lee et al. 2024, arXiv:2409.06211", options=Options, needs=needs, choose=choose
)
