"""OWL: leave more weights in layers where more of them stand out.

Yin et al., "Outlier Weighed Layerwise Sparsity (OWL): A Missing Secret Sauce for Pruning LLMs to High
Sparsity", 2023, arXiv:2310.05175.

    metric = |W_rc| * sqrt(mean over tokens of x_c^2)     of all weights of the layer's experts
    D_l    = share of the layer's weights whose metric is above m times the layer's mean
    density_l = (1 - share) + D_l stretched over [-width, width], its mean over the weights moved to 0

`share` of the weights of the experts that stay becomes 0, over all layers; width = 0 gives all layers as
much. At least 1 % goes and 1 % stays. Which weights go is [mask].

Differences from the paper:
- Routed experts alone are looked at and cut. Layers of fewer experts count for fewer weights.
- m = 5 is the paper's; STUN's experiments have 3. The layer's mean is over all experts, before any goes.
- An expert that no token reached counts as one where nothing stands out.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from moecule.errors import RecipeError
from moecule.method import Method
from moecule.stats import ACT_SQ, COUNT, IN_SQ, Block, Statistic, Stats

LEAST = 0.01  # that goes, and that stays


@dataclass(frozen=True)
class Options:
    """Defaults are the paper's, but for the share."""

    share: float = 0.5
    width: float = 0.08
    m: float = 5.0

    def __post_init__(self) -> None:
        """Raises RecipeError for a share that is none, and a width that is wider than that."""
        if not 0 < self.share < 1 or not 0 <= self.width < 1 or self.m <= 0:
            raise RecipeError(
                f"owl: share = {self.share:g}, width = {self.width:g} and m = {self.m:g}; wanted a share "
                "between 0 and 1, a width from 0 to below 1, and m above 0"
            )


def metrics(block: Block, e: int) -> Iterator[Float[Tensor, "M N"]]:
    """Of the matrices of an expert; none of one that no token reached."""
    n, expert = float(block.sums[COUNT.name][e]), block.experts[e]
    for weight, name in ((expert.gate_up, IN_SQ.name), (expert.down, ACT_SQ.name)):
        if n > 0:
            mean = (block.sums[name][e] / n).sqrt().float().to(weight.device)
            yield weight.float().abs() * mean


def outliers(block: Block, m: float) -> Float64[Tensor, " E"]:
    """The share of each expert's weights that stand out in the layer."""
    ids = range(len(block.experts))
    total, size = 0.0, 0
    for e in ids:
        for found in metrics(block, e):
            total, size = total + float(found.sum(dtype=torch.float64)), size + found.numel()
    limit, each = m * total / max(size, 1), block.experts.weights_per_expert
    above = [sum(int((of > limit).sum()) for of in metrics(block, e)) / each for e in ids]
    return torch.tensor(above, dtype=torch.float64)


def standing_out(options: Options) -> Statistic:
    """As `outliers`, once the inputs' squares are summed."""
    return Statistic(
        f"outliers_{options.m:g}", of_block=lambda b: outliers(b, options.m), by_expert=True
    )


def needs(options: Options) -> tuple[Statistic, ...]:
    """Squares of what the matrices read, and what stands out."""
    return (COUNT, IN_SQ, ACT_SQ, standing_out(options))


def densities(stats: Stats, options: Options) -> dict[int, float]:
    """{layer: the share of its experts' weights that stays}; the layers' mean is 1 - share."""
    name = standing_out(options).name
    found = {i: float(s[name].mean()) for i, s in sorted(stats.items())}
    n = {i: len(s["count"]) for i, s in stats.items()}
    low, wide = min(found.values()), max(found.values()) - min(found.values())
    moved = {i: 2 * options.width * (d - low) / wide if wide else 0.0 for i, d in found.items()}
    mean = sum(n[i] * d for i, d in moved.items()) / sum(n.values())
    plain = {i: 1 - options.share + d - mean for i, d in moved.items()}
    return {i: min(max(d, LEAST), 1 - LEAST) for i, d in plain.items()}


METHOD = Method(
    paper="Yin et al. 2023, arXiv:2310.05175", options=Options, needs=needs, densities=densities
)
