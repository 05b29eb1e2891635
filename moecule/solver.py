"""Bits that cost least within a budget, exactly: dynamic programming over experts, then over layers.

    minimise   sum_e  cost[e, b(e)]    over b(e) in `bits`
    such that  sum_e b(e) <= total  and the two widest classes hold at least `floor` experts each

of a layer, or of all layers at once with the floors in each. (The gap to the second-best allocation can
be 2e-6 of the cost, so nothing is relaxed.)
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from moecule.errors import RecipeError

Costs = NDArray[np.float64]  # [E, len(bits)]
Spread = Literal["layer", "model"]


def solve(cost: Costs, total: int, bits: tuple[int, ...], floor: int) -> tuple[int, ...]:
    """Bits of each expert of one layer, at most `total` together.

    Ties go to the lower total, then to more bits for earlier experts. Raises RecipeError where
    no allocation fits, saying the least total that does.
    """
    tables = _tables(cost, bits, floor)
    return _trace(cost, tables, _affordable(tables[0], total, bits), bits, floor)


def share_out(
    cost: Mapping[int, Costs], mean_bits: float, bits: tuple[int, ...], floor: int, spread: Spread
) -> dict[int, tuple[int, ...]]:
    """{layer: bits of each expert}: `mean_bits` a weight for every layer, or for all together.

    Raises RecipeError where no allocation fits, and for more than the widest of `bits`.
    """
    if mean_bits > max(bits):
        raise RecipeError(
            f"{mean_bits:g} bits were asked for, and the widest of {bits} is {max(bits)}; give the "
            "recipe wider bits (--set allocate.bits=[2,3,4,5])"
        )
    tables = {i: _tables(c, bits, floor) for i, c in cost.items()}
    totals = {i: int(mean_bits * len(c) + 1e-9) for i, c in cost.items()}
    if spread == "model":
        totals = _shared(tables, int(mean_bits * sum(map(len, cost.values())) + 1e-9))
    return {
        i: _trace(c, tables[i], _affordable(tables[i][0], totals[i], bits), bits, floor)
        for i, c in cost.items()
    }


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
        raise RecipeError(
            f"there are too few experts for the floors of the bit set {bits}; set others (--set "
            "allocate.bits=[...])"
        )
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
