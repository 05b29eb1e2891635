"""HAWQ-V2: bits by the Hessian's mean trace times the squared change of the weights.

Dong et al., "HAWQ-V2: Hessian Aware trace-Weighted Quantization of Neural Networks", 2019,
arXiv:1911.03852; the "Hessian" baseline of Huang et al. 2024, arXiv:2410.06270.

    minimise  sum_e sum_W  tr(H_W) / n_W * |W - Q_b(W)|^2   over b(e), per layer, sum b <= B

for the matrices W of an expert. With the layer-wise Hessian H = 2 X X^T of a linear map, the
mean trace is 2 sum |x|^2 / N over the tokens routed to the expert.

Differences from the paper:
- The trace is that of the layer-wise quadratic loss, exact, not Hutchinson's estimate of the
  trace of the network's loss; MC's authors published no code for this baseline.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from moecule.errors import RecipeError
from moecule.experts import Expert
from moecule.grid import WIDE, quantized_at
from moecule.method import Method
from moecule.stats import COUNT, Seen, Statistic, Stats


@dataclass(frozen=True)
class Options:
    """The widths to choose from, and the group of columns that shares a scale."""

    bits: tuple[int, ...] = (1, 2, 3)
    group: int = 128


def sensitivity(options: Options) -> Statistic:
    """[E, len(bits)]: trace times squared change, both matrices of the expert."""

    def measure(expert: Expert) -> Callable[[Seen], Float[Tensor, " bits"]]:
        weights = (expert.gate_up, expert.down)
        changes = torch.stack([_changes(w, options) for w in weights], -1)

        def traces(seen: Seen) -> Float[Tensor, " bits"]:
            sums = [2 * x.double().square().mean(-1).sum() for x in (seen.x, seen.act)]
            return changes @ torch.stack(sums)

        return traces

    widths = "".join(map(str, options.bits))
    return Statistic(f"hawq_b{widths}_g{options.group}", of_expert=measure)


def _changes(w: Float[Tensor, "M N"], options: Options) -> Float[Tensor, " bits"]:
    rounded = quantized_at(w, options.bits, options.group, WIDE)
    return (w - rounded).double().square().sum((1, 2))


def allocate(stats: Stats, mean_bits: float, options: Options) -> dict[int, tuple[int, ...]]:
    """{layer: bits of each expert} within `mean_bits`, the same for every layer."""
    name = sensitivity(options).name
    return {
        i: _knapsack(s[name].numpy(), int(mean_bits * len(s[name]) + 1e-9), options.bits)
        for i, s in stats.items()
    }


def _knapsack(cost: np.ndarray, total: int, bits: tuple[int, ...]) -> tuple[int, ...]:
    """The bits that cost least within `total`. Raises RecipeError where none fit."""
    if total < len(cost) * min(bits):
        raise RecipeError(
            f"{total} bits cannot be met with {bits}; the least is {len(cost) * min(bits)}"
        )
    after = [np.zeros(total + 1)]
    for row in cost[::-1]:
        new = np.full(total + 1, np.inf)
        for b, term in zip(bits, row, strict=True):
            np.minimum(new[b:], after[0][: total + 1 - b] + term, out=new[b:])
        after.insert(0, new)
    out, left = [], total
    for row, rest in zip(cost, after[1:], strict=True):
        b = min((term + rest[left - b], b) for b, term in zip(bits, row, strict=True) if b <= left)[
            1
        ]
        out.append(b)
        left -= b
    return tuple(out)


METHOD = Method(
    paper="Dong et al. 2019, arXiv:1911.03852",
    options=Options,
    needs=lambda options: (COUNT, sensitivity(options)),
    allocate=allocate,
)
