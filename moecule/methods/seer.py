"""SEER-MoE: drop the experts that the router gives least, counted hard or soft.

Muzio et al., "SEER-MoE: Sparse Expert Efficiency through Regularization for Mixture-of-Experts",
2024, arXiv:2404.05089 (its heavy-hitter counting; the fine-tuning that follows is not part of this).

    hard:  score_e = how many tokens were routed to e
    soft:  score_e = sum over all tokens x of  p_e(x),   the router's probabilities before top-k

budget = "layer" drops as many from every layer, "model" ranks the experts of all layers together.

Differences from the paper:
- Where the family's router has no softmax, p is what it has instead (sigmoid scores, without the
  bias for the choice).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from jaxtyping import Float64
from torch import Tensor

from moecule.method import Method
from moecule.stats import COUNT, SOFT, Statistic, Stats


@dataclass(frozen=True)
class Options:
    """What is counted, and over how many layers experts are ranked."""

    count: Literal["hard", "soft"] = "soft"
    budget: Literal["layer", "model"] = "layer"


def needs(options: Options) -> tuple[Statistic, ...]:
    """The one count."""
    return (COUNT if options.count == "hard" else SOFT,)


def score(stats: Stats, options: Options) -> dict[int, Float64[Tensor, " E"]]:
    """{layer: tokens routed, or probability given}."""
    return {i: s["count" if options.count == "hard" else "soft"] for i, s in stats.items()}


METHOD = Method(
    paper="Muzio et al. 2024, arXiv:2404.05089", options=Options, needs=needs, score=score
)
