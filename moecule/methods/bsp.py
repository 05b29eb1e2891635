"""BSP: whole layers at high or low bits, by how much a layer changes its input.

Li et al., "Examining Post-Training Quantization for Mixture-of-Experts: A Benchmark"
(QuantMoE-Bench), 2024, arXiv:2406.08155; a baseline of Huang et al. 2024, arXiv:2410.06270.

    a layer is important where  cos(input, output)  is low;
    the most important quarter gets 4 bits, the others 2  (mean 2.5)

Differences from the paper:
- Their predictor (a two-layer perceptron) regresses the cosine; here it is the measured one.
- Another mean than 2.5 takes the same two steps of width below and above it: layers go from
  `low` to `low` + 2 in order of importance, the last of them to `low` + 1 where bits are over.
"""

from __future__ import annotations

from dataclasses import dataclass

from moecule.errors import RecipeError
from moecule.method import Method
from moecule.stats import COSINE, COUNT, Stats


@dataclass(frozen=True)
class Options:
    """The widths of unimportant layers is the mean less this, rounded down."""

    below: float = 0.5


def allocate(stats: Stats, mean_bits: float, options: Options) -> dict[int, tuple[int, ...]]:
    """{layer: bits of each expert}. Raises RecipeError for a mean outside 1 to 8."""
    if not 1 <= mean_bits <= 8:
        raise RecipeError(f"bsp was given {mean_bits:g} bits, wanted a mean of 1 to 8")
    low = max(1, int(mean_bits - options.below))
    rising = sorted(stats, key=lambda i: (float(stats[i]["cosine"]), i))
    left = int((mean_bits - low) * len(stats) + 1e-9)
    out = {}
    for i in rising:
        step = min(2, left, 8 - low)
        left -= step
        out[i] = (low + step,) * len(stats[i]["count"])
    return dict(sorted(out.items()))


METHOD = Method(
    paper="Li et al. 2024, arXiv:2406.08155",
    options=Options,
    needs=lambda options: (COUNT, COSINE),
    allocate=allocate,
)
