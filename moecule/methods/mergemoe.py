"""MergeMoE: merge experts of alike weights, and fit the down projection to the mean of their outputs.

Miao et al., "MergeMoE: Efficient Compression of MoE Models via Expert Output Merging", 2025,
arXiv:2510.14436.

    alike(i, j) = cosine of the first matrices (gate and up) of i and j
    every expert goes into that of those used most to which it is most alike
    gate, up = sum of b_i W_i,   b_i = n_i / sum of n_i,   n_i tokens routed to i
    down = argmin over V  sum over the group's tokens of  |V a(x) - sum of b_i f_i(x)|^2

a(x) is what the merged gate and up give the down projection, f_i the expert before the router's
coefficient.

Differences from the paper:
- Least squares are damped towards the mean of the down projections, by `damp` times the mean of the
  diagonal of sum a a^T, so that few tokens do no harm; the error over the group's tokens is never above
  that of the mean.
- All layers are merged, at one share. merge.router = "rows" deletes the rows of experts that went into
  others; the paper's is "alias".
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from jaxtyping import Float64
from torch import Tensor

from moecule.experts import Expert
from moecule.group import Group, cosines, mean, nearest, products
from moecule.method import Method
from moecule.stats import COUNT, Block, LayerStats, Statistic


@dataclass(frozen=True)
class Options:
    """How much least squares are damped."""

    damp: float = 0.01


def _weights(block: Block) -> Float64[Tensor, "E E"]:
    return products([block.experts.gate_up])


WEIGHTS = Statistic("weights", of_block=_weights, by_expert=True, pairs=True)


def cluster(
    sums: LayerStats, score: Float64[Tensor, " E"], n: int, options: Options
) -> tuple[int, ...]:
    """For each expert the one that it goes into, of n."""
    return nearest(cosines(sums["weights"]), score, n)


def merge(group: Group, options: Options) -> Expert:
    """The mean, its down projection fitted."""
    made, members, shares = mean(group.experts, group.shares), group.experts, group.shares.tolist()
    height, width = made.down.shape

    def sums(x: Tensor) -> Tensor:
        a = made.act(x).float()
        lacks = -(a @ made.down.float().mT)  # biases are the mean's
        for e, share in enumerate(shares):
            lacks = lacks + share * (members[e].act(x) @ members[e].down.mT).float()
        return torch.cat([a, lacks], 1).mT @ a

    gram, cross = group.total(sums, group.everyone).split([width, height])
    damp = options.damp * gram.diagonal().mean()
    if not damp > 0:  # no token reached them
        return made
    more = torch.linalg.solve(gram + damp * torch.eye(width).to(gram), cross.mT).mT
    return replace(made, down=(made.down.double() + more).to(made.down.dtype))


METHOD = Method(
    paper="Miao et al. 2025, arXiv:2510.14436",
    options=Options,
    needs=lambda options: (COUNT, WEIGHTS),
    cluster=cluster,
    merge=merge,
)
