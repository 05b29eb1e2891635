"""HC-SMoE: merge experts whose mean outputs lie together, by hierarchical clustering.

Chen et al., "Retraining-Free Merging of Sparse MoE via Hierarchical Clustering", 2024,
arXiv:2410.08589.

    o_i = mean of f_i(x) over all tokens x, routed to expert i or not
    clusters: average linkage of |o_i - o_j|, cut where as many are left as are to stay
    merged weights = sum of n_i W_i / sum of n_i over the cluster,   n_i tokens routed to i

f_i is the expert before the router's coefficient; every expert is run on every token. A cluster that no
token reached takes the plain mean.

Differences from the paper:
- merge.router = "rows" deletes the rows of all but the member used most, for a stock checkpoint; the
  paper's is "alias", which keeps them all.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float, Float64
from scipy.cluster.hierarchy import cut_tree, linkage
from torch import Tensor

from moecule.experts import Expert, Experts
from moecule.group import Group, mean
from moecule.method import Method
from moecule.stats import COUNT, LayerStats, Routed, Statistic


@dataclass(frozen=True)
class Options:
    """There is nothing to choose."""


def _outputs(experts: Experts) -> Callable[[Tensor, Routed], Tensor]:
    def outputs(x: Float[Tensor, "T H"], routed: Routed) -> Float64[Tensor, "E H"]:
        return torch.stack([experts[e](x).double().sum(0) for e in range(len(experts))])

    return outputs


OUTPUTS = Statistic("outputs", of_experts=_outputs)  # over as many tokens for all: as good as means


def cluster(
    sums: LayerStats, score: Float64[Tensor, " E"], n: int, options: Options
) -> tuple[int, ...]:
    """The number of each expert's cluster, of n."""
    tree = linkage(sums["outputs"].numpy(), method="average")
    return tuple(cut_tree(tree, n_clusters=[n])[:, 0].tolist())


def merge(group: Group, options: Options) -> Expert:
    """The mean, weighted by use."""
    return mean(group.experts, group.shares)


METHOD = Method(
    paper="Chen et al. 2024, arXiv:2410.08589",
    options=Options,
    needs=lambda options: (COUNT, OUTPUTS),
    cluster=cluster,
    merge=merge,
)
