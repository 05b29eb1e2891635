"""PMQ: bits per expert by an exact integer program over how much each expert matters.

Huang et al., "Mixture Compressor for Mixture-of-Experts LLMs Gains More", 2024,
arXiv:2410.06270.

    minimise   sum_e  phi_e^alpha * w_e^beta * eps_{e, b(e)}^gamma      over b(e) in `bits`
    such that  sum_e b(e) <= B  and the two widest classes hold at least `floor` experts each

phi is the expert's share of the routed pairs, w its share of the softmax mass before top-k
renormalisation, eps the error of the MoE block's output when that expert alone is rounded to b
bits. Only expert e changes then, so eps needs no more than e's own tokens:

    eps^2 = sum over the tokens of e  coef^2 * |E(x) - E_b(x)|^2

Solved exactly (solver.py).

Differences from the paper:
- Defaults alpha, beta, gamma = 1, 1.5, 1 are those of the authors' code; the text says gamma = 2.
- error = "norm" adds up norms batch by batch, as their code does; "squared" adds up squares, and
  "fisher" adds up (gradient of the loss . error)^2 token by token (close to gemq).
- budget = "model" shares the bits among all layers at once instead of giving each the same.
- clip = "none" is their trial quantiser; "wide" rounds trials as the real quantiser will.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from torch import Tensor

from moecule import solver
from moecule import trial as trials
from moecule.method import Method
from moecule.solver import Costs
from moecule.stats import COUNT, MASS, Statistic, Stats


@dataclass(frozen=True)
class Options:
    """Defaults are the authors' code."""

    bits: tuple[int, ...] = (1, 2, 3)
    alpha: float = 1.0
    beta: float = 1.5
    gamma: float = 1.0
    floor: int = 1
    error: Literal["norm", "squared", "fisher"] = "norm"
    budget: Literal["layer", "model"] = "layer"
    clip: Literal["none", "narrow", "wide"] = "none"
    group: int = 128


def trial(options: Options) -> Statistic:
    """[E, len(bits)]: the error of the block's output with one expert rounded."""
    return trials.trial(options.error, options.bits, options.clip, options.group)


def needs(options: Options) -> tuple[Statistic, ...]:
    """Counts, mass and the trial table."""
    return (COUNT, MASS, trial(options))


def solve(
    count: Sequence[float] | Costs | Tensor,
    mass: Sequence[float] | Costs | Tensor,
    error: Sequence[Sequence[float]] | Costs | Tensor,
    total: int,
    bits: tuple[int, ...] = (1, 2, 3),
    alpha: float = 1.0,
    beta: float = 1.5,
    gamma: float = 1.0,
    floor: int = 1,
) -> tuple[int, ...]:
    """Bits of each expert of one layer, at most `total` together.

    count [E], mass [E], error [E, len(bits)]: sequences, arrays or tensors.

    Ties go to the lower total, then to more bits for earlier experts. Raises RecipeError where
    no allocation fits, saying the least total that does.
    """
    cost = costs(count, mass, error, alpha, beta, gamma)
    return solver.solve(cost, total, bits, floor)


def costs(
    count: Sequence[float] | Costs | Tensor,
    mass: Sequence[float] | Costs | Tensor,
    error: Sequence[Sequence[float]] | Costs | Tensor,
    alpha: float,
    beta: float,
    gamma: float,
) -> Costs:
    """[E, len(bits)]: the terms of the objective, shares taken within the layer."""
    n, m = (np.asarray(t, dtype=np.float64) for t in (count, mass))
    shares = (n / max(n.sum(), 1e-300)) ** alpha * (m / max(m.sum(), 1e-300)) ** beta
    terms: Costs = shares[:, None] * np.asarray(error, dtype=np.float64) ** gamma
    return terms


def allocate(stats: Stats, mean_bits: float, options: Options) -> dict[int, tuple[int, ...]]:
    """{layer: bits of each expert} within `mean_bits` a weight. Raises RecipeError if none fits."""
    name = trial(options).name
    cost = {
        i: costs(s["count"], s["mass"], s[name], options.alpha, options.beta, options.gamma)
        for i, s in stats.items()
    }
    return solver.share_out(cost, mean_bits, options.bits, options.floor, options.budget)


METHOD = Method(
    paper="Huang et al. 2024, arXiv:2410.06270", options=Options, needs=needs, allocate=allocate
)
