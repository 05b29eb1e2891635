"""REAP: drop the experts whose outputs, weighted by the router, are shortest on average.

Lasby et al., "REAP the Experts: Why Pruning Prevails for One-Shot MoE Compression", 2025,
arXiv:2510.13999.

    score_e = 1 / n_e * sum over the n_e tokens x routed to e of  g_e(x) |f_e(x)|_2

g is the coefficient of the expert f; an expert that no token reached has 0 and goes first. As many
experts go from every layer.

Differences from the paper:
- g is what the model multiplies by, after bias, groups, renormalisation and scaling; their code
  takes the softmax of the raw logits for every model.
- Experts of outstanding activations are not protected beyond their score.
"""

from __future__ import annotations

from dataclasses import dataclass

from jaxtyping import Float64
from torch import Tensor

from moecule.method import Method
from moecule.stats import COEF_NORM, COUNT, Stats


@dataclass(frozen=True)
class Options:
    """There is nothing to choose."""


def score(stats: Stats, options: Options) -> dict[int, Float64[Tensor, " E"]]:
    """{layer: mean weighted length of the outputs}."""
    return {i: s["coef_norm"] / s["count"].clamp(min=1) for i, s in stats.items()}


METHOD = Method(
    paper="Lasby et al. 2025, arXiv:2510.13999",
    options=Options,
    needs=lambda options: (COUNT, COEF_NORM),
    score=score,
)
