"""EAN: drop the experts whose outputs are shortest in sum, whatever the router made of them.

Jaiswal et al., "Finding Fantastic Experts in MoEs: A Unified Study for Expert Dropping Strategies
and Observations", 2025, arXiv:2504.05586.

    score_e = sum over the tokens x routed to e of  |f_e(x)|_2

As many experts go from every layer.

Differences from the paper:
- One shot, as Lasby et al. 2025 (arXiv:2510.13999) compare with it; theirs is one of many criteria,
  also applied in steps with fine-tuning between.
"""

from __future__ import annotations

from dataclasses import dataclass

from jaxtyping import Float64
from torch import Tensor

from moecule.method import Method
from moecule.stats import NORM, Stats


@dataclass(frozen=True)
class Options:
    """There is nothing to choose."""


def score(stats: Stats, options: Options) -> dict[int, Float64[Tensor, " E"]]:
    """{layer: summed length of the outputs}."""
    return {i: s["norm"] for i, s in stats.items()}


METHOD = Method(
    paper="Jaiswal et al. 2025, arXiv:2504.05586",
    options=Options,
    needs=lambda options: (NORM,),
    score=score,
)
