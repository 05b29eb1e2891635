"""CAMERA-P: drop the channels of experts of least energy, their outputs' squares weighted by the router.

Xu et al., "CAMERA: Multi-Matrix Joint Compression for MoE Models via Micro-Expert Redundancy
Analysis", 2025, arXiv:2508.02322 (its pruning; the mixed precision is not part of this).

    energy_{e,k} = ((1 - alpha) * sum_t (g a_k)^2 + alpha * max_t (g a_k)^2) * |w_k|^2

a_k is what channel k gives the down projection for token t, g the coefficient of the expert, w_k the
channel's column of the down projection. Sums are not divided by counts.

budget = "layer" ranks the channels of each layer (the paper's), "model" those of all layers together,
"expert" those of each expert: all get one width, and the result is a stock checkpoint. Widths are
multiples of `multiple`, if given: channels go in runs of so many, by the sums of energies.

Differences from the paper:
- All layers are ranked on what the original model gives them. Their code prunes a layer, and ranks the
  next on what the pruned one gives it.
- Shared experts stay; their code ranks them in the same list.
- g is what the model multiplies by; their code renormalises for DeepSeek, whose router does not.
- Numbers are float64; theirs are bfloat16, with ties.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float64
from torch import Tensor

from moecule.errors import RecipeError
from moecule.experts import Expert
from moecule.method import Method
from moecule.stats import Seen, Statistic, Stats


@dataclass(frozen=True)
class Options:
    """What channels are ranked with, in which widths, and what a single token counts for."""

    alpha: float = 0.9
    budget: Literal["model", "layer", "expert"] = "layer"
    multiple: int = 0


def weighed(expert: Expert) -> Callable[[Seen], Float64[Tensor, "t F"]]:
    """Squares of the lengths that channels add to the layer's sum."""
    lengths = expert.down.double().square().sum(0)
    return lambda seen: (seen.coef[:, None].double() * seen.act.double()).square() * lengths


def _sums(expert: Expert) -> Callable[[Seen], Tensor]:
    squares = weighed(expert)
    return lambda seen: squares(seen).sum(0)


def _greatest(expert: Expert) -> Callable[[Seen], Tensor]:
    squares = weighed(expert)
    # one that no token reached has none
    return lambda seen: torch.cat([squares(seen), seen.act.new_zeros(1, seen.act.shape[1])]).amax(0)


ENERGY = Statistic("energy", of_expert=_sums)
ENERGY_MAX = Statistic("energy_max", of_expert=_greatest, greatest=True)


def needs(options: Options) -> tuple[Statistic, ...]:
    """Sums and greatest. Raises RecipeError for an alpha outside of 0 to 1."""
    if not 0 <= options.alpha <= 1:
        raise RecipeError(f"channels alpha = {options.alpha:g}, wanted a number from 0 to 1")
    return (ENERGY, ENERGY_MAX)


def channels(stats: Stats, options: Options) -> dict[int, Float64[Tensor, "E F"]]:
    """{layer: the energy of each channel}."""
    a = options.alpha
    return {i: (1 - a) * s["energy"] + a * s["energy_max"] for i, s in stats.items()}


METHOD = Method(
    paper="Xu et al. 2025, arXiv:2508.02322", options=Options, needs=needs, channels=channels
)
