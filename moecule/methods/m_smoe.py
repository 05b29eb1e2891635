"""M-SMoE: merge experts into those used most, by how alike the router speaks for them.

Li et al., "Merge, Then Compress: Demystify Efficient SMoE with Hints from Its Routing Policy", 2023,
arXiv:2310.01334.

    alike(i, j) = cosine of z_i and z_j,   z_i the router's logits for expert i over all tokens
    every expert goes into that of those used most to which it is most alike
    merged weights = sum of n_i P_i W_i / sum of n_i,   n_i tokens routed to i

P_i puts the channels of i where those of the one that stays are that they fit best: an assignment that
makes the inner products of the weights greatest (align = false: as they lie). Those used most are found
over all layers (score.budget = "model"), so layers keep different numbers.

Differences from the paper:
- merge.router = "rows" deletes the rows of experts that went into others; the paper's is "alias".
- A layer keeps as many experts as its router picks for a token; the paper's keeps one.
- The low rank and sparse compression of the result, and the training, are not part of this.
"""

from __future__ import annotations

from dataclasses import dataclass

from jaxtyping import Float64
from torch import Tensor

from moecule.experts import Expert
from moecule.group import Group, by_weights, cosines, mean, nearest
from moecule.method import Method
from moecule.stats import COUNT, LOGITS, LayerStats


@dataclass(frozen=True)
class Options:
    """Whether channels are aligned before they are averaged."""

    align: bool = True


def cluster(
    sums: LayerStats, score: Float64[Tensor, " E"], n: int, options: Options
) -> tuple[int, ...]:
    """For each expert the one that it goes into, of n."""
    return nearest(cosines(sums["logits"]), score, n)


def merge(group: Group, options: Options) -> Expert:
    """The mean, weighted by use."""
    return mean(by_weights(group) if options.align else group.experts, group.shares)


METHOD = Method(
    paper="Li et al. 2023, arXiv:2310.01334",
    options=Options,
    needs=lambda options: (COUNT, LOGITS),
    cluster=cluster,
    merge=merge,
)
