"""Uniform: the same bits for every expert; what every allocation is compared with.

The baseline of Huang et al. 2024, arXiv:2410.06270 (there with a weaker quantiser than ours).
"""

from __future__ import annotations

from dataclasses import dataclass

from moecule.errors import RecipeError
from moecule.method import Method
from moecule.stats import COUNT, Stats


@dataclass(frozen=True)
class Options:
    """There is nothing to choose."""


def allocate(stats: Stats, mean_bits: float, options: Options) -> dict[int, tuple[int, ...]]:
    """{layer: bits of each expert}. Raises RecipeError for a width that is not whole."""
    if mean_bits != int(mean_bits) or not 1 <= mean_bits <= 8:
        raise RecipeError(f"uniform wants 1 to 8 whole bits, not {mean_bits:g}; use pmq for a mean")
    return {i: (int(mean_bits),) * len(s["count"]) for i, s in stats.items()}


METHOD = Method(
    paper="Huang et al. 2024, arXiv:2410.06270",
    options=Options,
    needs=lambda options: (COUNT,),
    allocate=allocate,
    whole_bits=True,
)
