"""GEMQ: bits per expert by one exact integer program over all layers, errors weighted by the gradient.

Deng et al., "GEMQ: Global Expert-Level Mixed-Precision Quantization for MoE LLMs", 2026,
arXiv:2605.23078 (its allocation; the fine-tuning of routers that follows is not part of this).

    minimise   sum_l sum_e  cost_{l, e, b(l, e)}      over b(l, e) in `bits`
    such that  sum_l sum_e b(l, e) <= B  and in every layer the two widest classes hold at least
               `floor` experts each

    cost_{l, e, b} = sum over the tokens t of e  sum_d  g_{t,d}^2 * (z - z_{e -> b})_{t,d}^2

z is the output of the layer's MoE block, z_{e -> b} the same with expert e alone rounded to b bits, g the
gradient of the loss by that output. What an expert's error does to the loss is in g, so layers can be
compared, and there is nothing to tune. Solved exactly (solver.py).

Differences from the paper:
- g is taken at the routed experts' sum; their code takes it at the decoder layer's output, which is the
  same where the block's output is added to the stream as it is.
- Shared experts and dense layers are not items of the program: recipes give them bits.
- The paper goes down in steps, each with statistics of the model tuned before it. Nothing is tuned here,
  so there is one step.
- error = "fisher" adds up (g . error)^2 token by token: what recipe mc reads, so one calibration
  serves both.
- clip = "none" is their trial quantiser; "wide" rounds trials as the real quantiser will.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from moecule import solver
from moecule import trial as trials
from moecule.method import Method
from moecule.stats import COUNT, Statistic, Stats


@dataclass(frozen=True)
class Options:
    """Defaults are the authors' code."""

    bits: tuple[int, ...] = (1, 2, 3)
    floor: int = 1
    error: Literal["gradient", "fisher"] = "gradient"
    clip: Literal["none", "narrow", "wide"] = "none"
    group: int = 128


def trial(options: Options) -> Statistic:
    """[E, len(bits)]: the cost of each expert at each width."""
    return trials.trial(options.error, options.bits, options.clip, options.group)


def needs(options: Options) -> tuple[Statistic, ...]:
    """Counts and the costs."""
    return (COUNT, trial(options))


def allocate(stats: Stats, mean_bits: float, options: Options) -> dict[int, tuple[int, ...]]:
    """{layer: bits of each expert} within `mean_bits` over all layers.

    Raises RecipeError if none fits.
    """
    cost = {i: s[trial(options).name].numpy() for i, s in stats.items()}
    return solver.share_out(cost, mean_bits, options.bits, options.floor, "model")


METHOD = Method(
    paper="Deng et al. 2026, arXiv:2605.23078", options=Options, needs=needs, allocate=allocate
)
