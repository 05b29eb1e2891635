"""UNCURL: merge experts whose router logits go together, by spectral clustering.

Sarkar et al., "Revisiting SMoE Language Models by Evaluating Inefficiencies with Task Specific Expert
Pruning", 2024, arXiv:2409.01483.

    S_ij = (1 + cosine of z_i and z_j) / 2,   z_i the router's logits for expert i over all tokens
    L = D^-1/2 S D^-1/2,   D the row sums of S;   rows of its n greatest eigenvectors, to length 1
    clusters: k-means of those rows
    merged weights = sum of n_i P_i W_i / sum of n_i over the cluster,   n_i tokens routed to i

P_i puts the channels of i where those of the member used most are that they fit best, by the inner
products of their weights. A cluster that no token reached takes the plain mean.

Differences from the paper:
- It makes a new router, at random, and trains that and then all. Merging trains nothing: a cluster's
  row is the mean of its members' rows, weighted as the experts are (merge.router = "mean"). What the
  paper does then is `moecule train --new-routers --router-steps N`.
- k-means starts from the point farthest from the mean and those farthest from it, not by lot.
- Rows of gate and up projections both count in an alignment; the paper's experts have no gate.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float64
from torch import Tensor

from moecule.experts import Expert
from moecule.group import Group, by_weights, cosines, kmeans, mean
from moecule.method import Method
from moecule.stats import COUNT, LOGITS, LayerStats


@dataclass(frozen=True)
class Options:
    """There is nothing to choose."""


def alike(logits: Float64[Tensor, "E E"]) -> Float64[Tensor, "E E"]:
    """S, of the logits' products."""
    return (1 + cosines(logits)) / 2


def cluster(
    sums: LayerStats, score: Float64[Tensor, " E"], n: int, options: Options
) -> tuple[int, ...]:
    """The number of each expert's cluster, of n."""
    s = alike(sums["logits"])
    degree = s.sum(1)
    vectors = torch.linalg.eigh(s / (degree[:, None] * degree).sqrt()).eigenvectors[:, -n:]
    rows = vectors / torch.linalg.vector_norm(vectors, dim=1, keepdim=True).clamp(min=1e-300)
    return kmeans(rows @ rows.mT, n)


def merge(group: Group, options: Options) -> Expert:
    """The mean of aligned members, weighted by use."""
    return mean(by_weights(group), group.shares)


METHOD = Method(
    paper="Sarkar et al. 2024, arXiv:2409.01483",
    options=Options,
    needs=lambda options: (COUNT, LOGITS),
    cluster=cluster,
    merge=merge,
)
