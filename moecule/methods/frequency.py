"""Frequency: the experts used most get more bits, the experts used least fewer.

The "manual" baseline of Huang et al. 2024, arXiv:2410.06270: a bit more for the top ones, a bit
less for the bottom ones (two of eight each there, `swaps_of_8` here).

Differences from the paper: a mean between two widths gives the wider one to the experts used
most, before any bit is moved.
"""

from __future__ import annotations

from dataclasses import dataclass

from moecule.errors import RecipeError
from moecule.method import Method
from moecule.stats import COUNT, Stats


@dataclass(frozen=True)
class Options:
    """How many experts of a layer, of 8, gain a bit where the mean is whole; as many lose one."""

    swaps_of_8: int = 2


def allocate(stats: Stats, mean_bits: float, options: Options) -> dict[int, tuple[int, ...]]:
    """{layer: bits of each expert}. Raises RecipeError for a mean outside 1 to 8."""
    if not 1 <= mean_bits <= 8:
        raise RecipeError(f"frequency was given {mean_bits:g} bits, wanted a mean of 1 to 8")
    out = {}
    for i, s in stats.items():
        n = len(s["count"])
        low, extra = int(mean_bits), int(mean_bits * n + 1e-9) - int(mean_bits) * n
        falling = s["count"].argsort(descending=True, stable=True).tolist()
        bits = dict.fromkeys(falling, low) | dict.fromkeys(falling[:extra], low + 1)
        swaps = options.swaps_of_8 * n // 8 if extra == 0 and 1 < low < 8 else 0
        for k in range(swaps):
            bits[falling[k]] += 1
            bits[falling[-1 - k]] -= 1
        out[i] = tuple(bits[e] for e in range(n))
    return out


METHOD = Method(
    paper="Huang et al. 2024, arXiv:2410.06270",
    options=Options,
    needs=lambda options: (COUNT,),
    allocate=allocate,
)
