"""PMQ: bits per expert by an exact integer program over how much each expert matters.

Huang et al., "Mixture Compressor for Mixture-of-Experts LLMs Gains More", 2024,
arXiv:2410.06270.

    minimise   sum_e  phi_e^alpha * w_e^beta * eps_{e, b(e)}^gamma      over b(e) in `bits`
    such that  sum_e b(e) <= B  and the two widest classes hold at least `floor` experts each

phi is the expert's share of the routed pairs, w its share of the softmax mass before top-k
renormalisation, eps the error of the MoE block's output when that expert alone is rounded to b
bits. Only expert e changes then, so eps needs no more than e's own tokens:

    eps^2 = sum over the tokens of e  coef^2 * |E(x) - E_b(x)|^2

Solved exactly by dynamic programming (the gap to the second-best allocation can be 2e-6).

Differences from the paper:
- Defaults alpha, beta, gamma = 1, 1.5, 1 are those of the authors' code; the text says gamma = 2.
- error = "norm" adds up norms batch by batch, as their code does; "squared" adds up squares, and
  "fisher" adds up (gradient of the loss . error)^2 token by token (close to GEMQ, Xu et al. 2026).
- budget = "model" shares the bits among all layers at once instead of giving each the same.
- clip = "none" is their trial quantiser; "wide" rounds trials as the real quantiser will.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from moecule.errors import RecipeError
from moecule.experts import Expert
from moecule.grid import CLIPS, quantized_at
from moecule.method import Method
from moecule.stats import COUNT, MASS, Seen, Statistic, Stats

Costs = NDArray[np.float64]


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
    of: dict[str, Callable[[Seen, Tensor], Tensor]] = {
        "norm": lambda s, miss: miss.square().sum((1, 2)).sqrt(),
        "squared": lambda s, miss: miss.square().sum((1, 2)),
        "fisher": _fisher,
    }
    clip, add = CLIPS[options.clip], of[options.error]

    def measure(expert: Expert) -> Callable[[Seen], Float[Tensor, " bits"]]:
        up, down = (
            quantized_at(w, options.bits, options.group, clip)
            for w in (expert.gate_up, expert.down)
        )

        def losses(seen: Seen) -> Float[Tensor, " bits"]:  # all widths at once: [bits, t, H]
            act = expert.gate(_linear(seen.x, up, expert.gate_up_bias))
            miss = seen.coef[:, None] * (_linear(act, down, expert.down_bias) - seen.out)
            return add(seen, miss.double())

        return losses

    widths = "".join(map(str, options.bits))
    name = f"trial_{options.error}_{options.clip}_b{widths}_g{options.group}"
    return Statistic(name, of_expert=measure, backward=options.error == "fisher")


def _linear(
    x: Float[Tensor, "*bits t N"], w: Float[Tensor, "bits M N"], bias: Float[Tensor, " M"] | None
) -> Float[Tensor, "bits t M"]:
    out = x @ w.mT
    return out if bias is None else out + bias


def _fisher(seen: Seen, miss: Float[Tensor, "bits t H"]) -> Float[Tensor, " bits"]:
    assert seen.grad is not None  # the statistic says backward
    return (seen.grad.double() * miss).sum(-1).square().sum(-1)


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
    tables = _tables(cost, bits, floor)
    return _trace(cost, tables, _affordable(tables[0], total, bits), bits, floor)


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


def _tables(cost: Costs, bits: tuple[int, ...], floor: int) -> list[Costs]:
    """Table e: least cost of experts e.. by [bits left, and how many of the two widest classes
    are still owed]. Built from the last expert, so that the trace never has to guess."""
    wide, size = _wide(bits, floor), len(cost) * max(bits) + 1
    last = np.full((size, *([floor + 1] * len(wide))), np.inf)
    _none_owed(last)[:] = 0.0
    tables = [last]
    for row in cost[::-1]:
        after, new = tables[0], np.full_like(last, np.inf)
        for b, term in zip(bits, row, strict=True):
            paid = _paid(after, wide.index(b) + 1 if b in wide else None)
            np.minimum(new[b:], paid[: size - b] + term, out=new[b:])
        tables.insert(0, new)
    return tables


def _none_owed(table: Costs) -> Costs:
    """By total, a view: no expert of the widest classes is owed any more."""
    while table.ndim > 1:
        table = table[:, 0]
    return table


def _all_owed(table: Costs) -> Costs:
    """By total: every floor is still to be met."""
    while table.ndim > 1:
        table = table[:, -1]
    return table


def _wide(bits: tuple[int, ...], floor: int) -> list[int]:
    return sorted(bits)[-2:] if floor > 0 and len(bits) > 1 else []


def _paid(after: Costs, axis: int | None) -> Costs:
    """What follows, seen from before an expert of the class that `axis` counts: one less is owed."""
    if axis is None:
        return after
    owed = np.maximum(np.arange(after.shape[axis]) - 1, 0)
    paid: Costs = after.take(owed, axis=axis)
    return paid


def _affordable(table: Costs, total: int, bits: tuple[int, ...]) -> int:
    """The least total that costs no more than `total` does."""
    full = _all_owed(table)
    if not np.isfinite(full).any():
        raise RecipeError(f"there are too few experts for the floors of the bit set {bits}")
    least = int(np.isfinite(full).argmax())
    if total < least:
        raise RecipeError(
            f"{total} bits for a layer's experts cannot be met with {bits}; the least is {least}"
        )
    return int((full <= full[min(total, len(full) - 1)]).argmax())


def _trace(
    cost: Costs, tables: list[Costs], left: int, bits: tuple[int, ...], floor: int
) -> tuple[int, ...]:
    """The allocation that the tables price, expert by expert."""
    wide, owed = _wide(bits, floor), [floor] * len(_wide(bits, floor))
    out = []
    for row, after in zip(cost, tables[1:], strict=True):
        options = []
        for b, term in zip(bits, row, strict=True):
            then = [max(o - (b == w), 0) for w, o in zip(wide, owed, strict=True)]
            if b <= left:
                price = float(term) + float(after[left - b][tuple(then)])
                options.append((price, -b, then))
        _, minus_b, owed = min(options, key=lambda o: o[:2])
        out.append(-minus_b)
        left += minus_b
    return tuple(out)


def allocate(stats: Stats, mean_bits: float, options: Options) -> dict[int, tuple[int, ...]]:
    """{layer: bits of each expert} within `mean_bits` a weight. Raises RecipeError if none fits."""
    if mean_bits > max(options.bits):
        raise RecipeError(
            f"{mean_bits:g} bits were asked for, and the widest of {options.bits} is "
            f"{max(options.bits)}; give the recipe wider bits (--set allocate.bits=[2,3,4,5])"
        )
    name = trial(options).name
    cost = {
        i: costs(s["count"], s["mass"], s[name], options.alpha, options.beta, options.gamma)
        for i, s in stats.items()
    }
    tables = {i: _tables(c, options.bits, options.floor) for i, c in cost.items()}
    shares = {i: int(mean_bits * len(c) + 1e-9) for i, c in cost.items()}
    if options.budget == "model":
        shares = _shared(tables, int(mean_bits * sum(len(c) for c in cost.values()) + 1e-9))
    return {
        i: _trace(
            c,
            tables[i],
            _affordable(tables[i][0], shares[i], options.bits),
            options.bits,
            options.floor,
        )
        for i, c in cost.items()
    }


def _shared(tables: Mapping[int, list[Costs]], total: int) -> dict[int, int]:
    """Each layer's total, so that all layers together cost least: a min-plus product of tables."""
    layers = sorted(tables)
    curves = [_all_owed(tables[i][0]) for i in layers]
    after = [np.zeros(total + 1)]
    for curve in reversed(curves):
        new = np.full(total + 1, np.inf)
        for b in np.flatnonzero(np.isfinite(curve)):
            if b <= total:
                np.minimum(new[b:], curve[b] + after[0][: total + 1 - b], out=new[b:])
        after.insert(0, new)
    if not np.isfinite(after[0][total]):
        least = sum(int(np.isfinite(c).argmax()) for c in curves)
        raise RecipeError(f"{total} bits for all experts cannot be met; the least is {least}")
    shares, left = {}, total
    for i, curve, rest in zip(layers, curves, after[1:], strict=True):
        usable = min(len(curve), left + 1)
        value = curve[:usable] + rest[left - np.arange(usable)]
        shares[i] = int(value.argmin())
        left -= shares[i]
    return shares


METHOD = Method(
    paper="Huang et al. 2024, arXiv:2410.06270", options=Options, needs=needs, allocate=allocate
)
