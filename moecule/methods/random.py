"""Random: the bits of a layer dealt to its experts by lot; what any score must beat.

The baseline of Huang et al. 2024, arXiv:2410.06270.

Differences from the paper: their code gives two experts a bit more and two a bit less than a
whole number; here a mean between two widths is met by as many experts of each as it takes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from moecule.errors import RecipeError
from moecule.method import Method
from moecule.stats import COUNT, Stats


@dataclass(frozen=True)
class Options:
    """Which draw, and how many experts of a layer, of 8, get a bit more and a bit less."""

    seed: int = 0
    swaps_of_8: int = 2


def allocate(stats: Stats, mean_bits: float, options: Options) -> dict[int, tuple[int, ...]]:
    """{layer: bits of each expert}. Raises RecipeError for a mean outside 1 to 8."""
    if not 1 <= mean_bits <= 8:
        raise RecipeError(f"random was given {mean_bits:g} bits, wanted a mean of 1 to 8")
    draw = torch.Generator().manual_seed(options.seed)
    out = {}
    for i, s in sorted(stats.items()):
        n = len(s["count"])
        low, extra = int(mean_bits), int(mean_bits * n + 1e-9) - int(mean_bits) * n
        bits = [low + 1] * extra + [low] * (n - extra)
        swaps = options.swaps_of_8 * n // 8 if extra == 0 and 1 < low < 8 else 0
        for k in range(swaps):
            bits[k] += 1
            bits[-1 - k] -= 1
        out[i] = tuple(bits[k] for k in torch.randperm(n, generator=draw).tolist())
    return out


METHOD = Method(
    paper="Huang et al. 2024, arXiv:2410.06270",
    options=Options,
    needs=lambda options: (COUNT,),
    allocate=allocate,
)
