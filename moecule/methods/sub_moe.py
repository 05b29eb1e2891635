"""Sub-MoE: merge experts whose outputs lie together, in a basis that they share.

Li et al., "Sub-MoE: Efficient Mixture-of-Expert LLMs Compression via Subspace Expert Merging", 2025,
arXiv:2506.23266.

    clusters: k-means of the outputs f_i(x) over all tokens x, routed to expert i or not
    [W_1 ... W_n] = U S [V_1 ... V_n]^T,   merged W = U S V^T,   V = sum of n_i V_i / sum of n_i

of gate, up and down each; n_i tokens routed to i. As U S V_i^T = W_i, the merged matrix is the mean
weighted by use, unless U is cut: rank = 0.5 keeps half of its columns. The merged matrix is then P mean,
P the projection on the greatest eigenvectors of sum W_i W_i^T, or with whiten = true (the paper's second
form) of sum W_i X_i X_i^T W_i^T, X_i the inputs of expert i: no W_i need be decomposed.

Differences from the paper:
- Each layer is clustered by itself; the paper shares clusters out among two layers at a time.
- k-means starts from the point farthest from the mean and those farthest from it, not by lot.
- A cut matrix is written whole, not as two factors: it says what rank costs, and saves no bytes.
- merge.router = "rows" deletes the rows of all but the member used most; the paper does not say.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from moecule.experts import Expert, Experts
from moecule.group import Group, kmeans, mean
from moecule.method import Method
from moecule.stats import COUNT, LayerStats, Routed, Statistic

TOKENS = 256  # whose outputs, of all experts, are held at a time


@dataclass(frozen=True)
class Options:
    """The share of the rank that is kept, and whether inputs say which."""

    rank: float = 1.0
    whiten: bool = True


def _products(experts: Experts) -> Callable[[Tensor, Routed], Tensor]:
    def products(x: Float[Tensor, "T H"], routed: Routed) -> Float64[Tensor, "E E"]:
        out = torch.zeros(len(experts), len(experts), dtype=torch.float64, device=x.device)
        for some in x.split(TOKENS):
            y = torch.stack([experts[e](some).flatten() for e in range(len(experts))]).float()
            out += (y @ y.mT).double()
        return out

    return products


PRODUCTS = Statistic("output_products", of_experts=_products, pairs=True)


def cluster(
    sums: LayerStats, score: Float64[Tensor, " E"], n: int, options: Options
) -> tuple[int, ...]:
    """The number of each expert's cluster, of n."""
    return kmeans(sums["output_products"], n)


def merge(group: Group, options: Options) -> Expert:
    """The mean weighted by use, projected on what the members' matrices share."""
    made = mean(group.experts, group.shares)
    if options.rank >= 1:
        return made
    up = made.gate_up.clone()
    for rows in group.rows.mT:  # gate and up, each by itself
        up[rows] = _projected(group, "gate_up", up[rows], rows, options)
    every = torch.arange(len(made.down), device=group.rows.device)
    return replace(made, gate_up=up, down=_projected(group, "down", made.down, every, options))


def _projected(
    group: Group, name: str, w: Float[Tensor, "M N"], rows: Tensor, options: Options
) -> Float[Tensor, "M N"]:
    """w in the basis of the members' matrices `name`, of these rows."""
    total = torch.zeros(len(w), len(w), dtype=torch.float64, device=w.device)
    for e in group.everyone:
        of, member = getattr(group.experts, name)[e][rows].float(), group.experts[e]

        def products(x: Tensor, of: Tensor = of, member: Expert = member) -> Tensor:
            y = (x if name == "gate_up" else member.act(x)).float() @ of.mT
            gram: Tensor = y.mT @ y
            return gram

        total += group.total(products, [e]) if options.whiten else (of @ of.mT).double()
    keep = max(1, round(options.rank * min(w.shape)))
    basis = torch.linalg.eigh(total).eigenvectors[:, -keep:]
    made: Tensor = basis @ (basis.mT @ w.double())
    return made.to(w.dtype)


METHOD = Method(
    paper="Li et al. 2025, arXiv:2506.23266",
    options=Options,
    needs=lambda options: (COUNT, PRODUCTS),
    cluster=cluster,
    merge=merge,
)
