"""Z-code M3: drop the experts used least, or experts drawn by lot.

Kim et al., "Scalable and Efficient MoE Training for Multitask Multilingual Models", 2021,
arXiv:2109.10465 (its expert pruning; `moecule train` is what follows).

    utilisation:  score_e = n_e / sum of n over the layer,   n_e tokens routed to e
    random:       score_e by lot

budget = "layer" drops as many from every layer, "model" ranks the experts of all layers together.

Differences from the paper:
- Its text was not at hand: this is what its abstract and others say of it. Ranking over all layers
  is our addition.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float64
from torch import Tensor

from moecule.method import Method
from moecule.stats import COUNT, Stats


@dataclass(frozen=True)
class Options:
    """By use or by lot, which lot, and over how many layers experts are ranked."""

    by: Literal["utilisation", "random"] = "utilisation"
    seed: int = 0
    budget: Literal["layer", "model"] = "layer"


def score(stats: Stats, options: Options) -> dict[int, Float64[Tensor, " E"]]:
    """{layer: share of the layer's tokens}, or numbers by lot."""
    if options.by == "utilisation":
        return {i: s["count"] / s["count"].sum().clamp(min=1) for i, s in stats.items()}
    draw = torch.Generator().manual_seed(options.seed)
    return {
        i: torch.rand(len(s["count"]), generator=draw, dtype=torch.float64)
        for i, s in sorted(stats.items())
    }


METHOD = Method(
    paper="Kim et al. 2021, arXiv:2109.10465",
    options=Options,
    needs=lambda options: (COUNT,),
    score=score,
)
