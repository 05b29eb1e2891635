"""Unified scores: drop by the family that holds MAN, MSAN, REAP, EAN and frequency.

Liu et al., "How to Score Experts for One-Shot MoE Expert Pruning: A Unified Formulation and
Selection Principle", 2026, arXiv:2606.15716.

    score_e = 1 / n_e^mean * sum over the n_e tokens x routed to e of  g_e(x)^alpha |f_e(x)|_2^gamma

    mean, alpha, gamma:  1, 0, 1 MAN    1, 0, 2 MSAN    1, 1, 1 REAP
                         0, 0, 1 EAN    0, 0, 0 frequency    0, 1, 0 coefficient mass

g is the coefficient of the expert f; an expert that no token reached has 0 and goes first. As many
experts go from every layer.
"""

from __future__ import annotations

from dataclasses import dataclass

from jaxtyping import Float64
from torch import Tensor

from moecule.errors import RecipeError
from moecule.method import Method
from moecule.stats import (
    COEF,
    COEF_NORM,
    COEF_NORM_SQ,
    COEF_SQ,
    COUNT,
    NORM,
    NORM_SQ,
    Statistic,
    Stats,
)

SUMS = {  # by alpha and gamma
    (0, 0): COUNT,
    (1, 0): COEF,
    (2, 0): COEF_SQ,
    (0, 1): NORM,
    (0, 2): NORM_SQ,
    (1, 1): COEF_NORM,
    (2, 2): COEF_NORM_SQ,
}


@dataclass(frozen=True)
class Options:
    """Defaults are MAN."""

    alpha: int = 0
    gamma: int = 1
    mean: bool = True


def _sum_of(options: Options) -> Statistic:
    found = SUMS.get((options.alpha, options.gamma))
    if found is None:
        raise RecipeError(
            f"alpha {options.alpha} and gamma {options.gamma} have no sum; those that have are "
            f"{', '.join(f'{a} and {c}' for a, c in SUMS)}"
        )
    return found


def needs(options: Options) -> tuple[Statistic, ...]:
    """Counts, and the sum of the two powers. Raises RecipeError for powers that are not summed."""
    return tuple(dict.fromkeys((COUNT, _sum_of(options))))


def score(stats: Stats, options: Options) -> dict[int, Float64[Tensor, " E"]]:
    """{layer: the sum of the two powers, or its mean}."""
    name = _sum_of(options).name
    if not options.mean:
        return {i: s[name] for i, s in stats.items()}
    return {i: s[name] / s["count"].clamp(min=1) for i, s in stats.items()}


METHOD = Method(
    paper="Liu et al. 2026, arXiv:2606.15716", options=Options, needs=needs, score=score
)
