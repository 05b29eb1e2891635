"""EASY-EP: drop the experts that do least where the routed experts turn the residual stream.

Dong et al., "Domain-Specific Pruning of Large Mixture-of-Experts Models with Few-shot
Demonstrations", 2025, arXiv:2504.06792.

    score_e = sum over the tokens x routed to e of  g_e(x) |f_e(x)|_2 s(x)
    s(x)    = 1 - cos(h, h + y)

h is the residual stream before the layer's MoE block, y what all its routed experts add, g the
coefficient of the expert f. Shared experts do not count to y. As many experts go from every layer.
For a domain, calibrate on a few of its questions with the model's own answers.

Differences from the paper:
- Lengths and cosines are in float32 or wider; their code takes lengths in the model's dtype.
- s is half the squared distance of the unit vectors, which is the same, exact where s is small.
- Where a family scales or normalises what a block adds to the stream, y is before that; where its
  layers hand on several streams, h is what the block is given of them.
"""

from __future__ import annotations

from dataclasses import dataclass

from jaxtyping import Float64
from torch import Tensor

from moecule.method import Method
from moecule.stats import TURN_COEF_NORM, Stats


@dataclass(frozen=True)
class Options:
    """There is nothing to choose."""


def score(stats: Stats, options: Options) -> dict[int, Float64[Tensor, " E"]]:
    """{layer: sum of coefficient, length and turn}."""
    return {i: s["turn_coef_norm"] for i, s in stats.items()}


METHOD = Method(
    paper="Dong et al. 2025, arXiv:2504.06792",
    options=Options,
    needs=lambda options: (TURN_COEF_NORM,),
    score=score,
)
