"""The kernels as torch operators, which torch.compile takes as they are.

A `Matrices` is passed in pieces: its table, and whole numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from moecule.kernels import activations, combine, gemv, grouped, grouped_int8, routing, sort
from moecule.kernels.grouped import Arranged
from moecule.kernels.grouped_int8 import Tiled
from moecule.kernels.matrices import Matrices
from moecule.kernels.sort import Sorted
from moecule.packed import BLOCK


def pieces(of: Matrices) -> tuple[Tensor, list[int]]:
    """What `whole` puts together again."""
    return of.table, [of.rows, of.columns, of.group, int(of.aligned), *of.widths]


def whole(table: Tensor, numbers: Sequence[int]) -> Matrices:
    """The inverse of `pieces`; whoever calls keeps alive what the table points into."""
    rows, columns, group, aligned, *widths = numbers
    return Matrices(table, rows, columns, group, tuple(widths), bool(aligned))


def _given(x: list[Tensor]) -> gemv.Activations:
    return x[0] if len(x) == 1 else activations.Rounded(*x)


def _define(
    name: str, schema: str, run: Callable[..., Any], fake: Callable[..., Any]
) -> Callable[..., Any]:
    """An operator. fake: shapes and dtypes of what it gives."""
    full = f"moecule::{name}"
    torch.library.define(full, schema)
    torch.library.impl(full, "CompositeExplicitAutograd")(run)
    torch.library.register_fake(full)(fake)
    made: Callable[..., Any] = getattr(torch.ops.moecule, name)
    return made


def _rounded(x: Tensor, at: Tensor, how: list[int], after: Tensor | None) -> list[Tensor]:
    made = activations.rounded(x, whole(at, how))
    return [made.x8, made.d, made.s]


def _rounded_fake(x: Tensor, at: Tensor, how: list[int], after: Tensor | None) -> list[Tensor]:
    return _room(x, len(x), -(-how[1] // 32))


def _room(x: Tensor, rows: int, blocks: int) -> list[Tensor]:
    floats = [x.new_empty(rows, blocks, dtype=torch.float32) for _ in range(2)]
    return [x.new_empty(rows, activations.ORDERS * blocks * 8, dtype=torch.int32), *floats]


def _products(
    x: list[Tensor], at: Tensor, how: list[int], idx: Tensor | None, share: int,
    as_: Tensor | None,
) -> Tensor:  # fmt: skip
    dtype = torch.float32 if as_ is None else as_.dtype
    return gemv.products(_given(x), whole(at, how), idx, share, dtype)


def _products_fake(
    x: list[Tensor], at: Tensor, how: list[int], idx: Tensor | None, share: int,
    as_: Tensor | None,
) -> Tensor:  # fmt: skip
    dtype = torch.float32 if as_ is None else as_.dtype
    return x[0].new_empty(share * len(x[0]), how[0], dtype=dtype)


def _gated(
    x: list[Tensor], at: Tensor, how: list[int], idx: Tensor, share: int,
    down: Tensor, down_how: list[int],
) -> list[Tensor]:  # fmt: skip
    made = gemv.gated(_given(x), whole(at, how), idx, share, whole(down, down_how))
    return [made] if isinstance(made, Tensor) else [made.x8, made.d, made.s]


def _gated_fake(
    x: list[Tensor], at: Tensor, how: list[int], idx: Tensor, share: int,
    down: Tensor, down_how: list[int],
) -> list[Tensor]:  # fmt: skip
    if len(x) == 1:
        return [x[0].new_empty(len(idx), how[0] // 2, dtype=torch.float32)]
    return _room(x[0], len(idx), -(-down_how[1] // 32))


def _combined(
    y: Tensor, idx: Tensor, coef: Tensor, experts: int, as_: Tensor, places: Tensor | None
) -> Tensor:
    return combine.combined(y, idx, coef, experts, as_.dtype, places)


def _combined_fake(
    y: Tensor, idx: Tensor, coef: Tensor, experts: int, as_: Tensor, places: Tensor | None
) -> Tensor:
    return as_.new_empty(len(idx), y.shape[1])


def _sorted(idx: Tensor, experts: int, sizes: list[int]) -> tuple[Tensor, Tensor, Tensor]:
    made = sort.sorted_pairs(idx, experts, sizes)
    return made.order, made.places, made.tiles


def _sorted_fake(idx: Tensor, experts: int, sizes: list[int]) -> tuple[Tensor, Tensor, Tensor]:
    tiles = sort.cut_of(len(idx), experts, sizes)[1]
    table = idx.new_empty(tiles, 3, dtype=torch.int32)
    return torch.empty_like(idx), torch.empty_like(idx), table


def _sorted_of(pairs: Sequence[Tensor], tokens: int) -> Sorted:
    order, places, tiles = pairs
    return Sorted(order, places, tiles, tokens)


def _arranged(x: Tensor, at: Tensor, how: list[int], gated: bool) -> tuple[Tensor, Tensor]:
    made = grouped.arranged(x, whole(at, how), gated=gated)
    return made.x, made.sums


def _arranged_fake(x: Tensor, at: Tensor, how: list[int], gated: bool) -> tuple[Tensor, Tensor]:
    steps, columns = _steps(at, how)
    return x.new_empty(len(x), steps * columns), x.new_empty(len(x), steps, dtype=torch.float32)


def _steps(at: Tensor, how: list[int]) -> tuple[int, int]:
    """(steps, columns of each) of a grouped product."""
    of = whole(at, how)
    n = grouped.blocks_of(of)
    return -(-of.blocks // n), n * BLOCK


def _grouped(
    x: Tensor, sums: Tensor, given: Tensor, pairs: list[Tensor], tokens: int, at: Tensor,
    how: list[int],
) -> Tensor:  # fmt: skip
    return grouped.grouped(Arranged(x, sums), given, whole(at, how), _sorted_of(pairs, tokens))


def _grouped_fake(
    x: Tensor, sums: Tensor, given: Tensor, pairs: list[Tensor], tokens: int, at: Tensor,
    how: list[int],
) -> Tensor:  # fmt: skip
    return x.new_empty(len(given), how[0])


def _tiled(
    x: Tensor, given: Tensor | None, pairs: list[Tensor], tokens: int, at: Tensor, how: list[int],
    gated: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    made = grouped_int8.tiled(x, given, whole(at, how), _sorted_of(pairs, tokens), gated=gated)
    return made.x8, made.d


def _tiled_fake(
    x: Tensor, given: Tensor | None, pairs: list[Tensor], tokens: int, at: Tensor, how: list[int],
    gated: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    tiles, orders, (steps, columns) = (
        len(pairs[2]),
        whole(at, how).parts.bit_length(),
        _steps(at, how),
    )
    x8 = x.new_empty(orders, tiles, tokens, steps * columns, dtype=torch.int8)
    return x8, x.new_empty(2, tiles, steps, tokens, dtype=torch.float32)


def _grouped_int8(
    x8: Tensor, d: Tensor, pairs: list[Tensor], tokens: int, at: Tensor, how: list[int],
    as_: Tensor,
) -> Tensor:  # fmt: skip
    of, by_expert = whole(at, how), _sorted_of(pairs, tokens)
    return grouped_int8.products(Tiled(x8, d), of, by_expert, as_.dtype)


def _grouped_int8_fake(
    x8: Tensor, d: Tensor, pairs: list[Tensor], tokens: int, at: Tensor, how: list[int],
    as_: Tensor,
) -> Tensor:  # fmt: skip
    return as_.new_empty(len(pairs[0]), how[0])


def _picked_fake(x: Tensor, k: int) -> tuple[Tensor, Tensor]:
    return x.new_empty(len(x), k), x.new_empty(len(x), k, dtype=torch.int64)


def _thin_fake(x: Tensor, weight: Tensor) -> Tensor:
    return x.new_empty(len(x), len(weight))


_OF = "Tensor at, int[] how"
round_op = _define(
    "rounded", f"(Tensor x, {_OF}, Tensor? after) -> Tensor[]", _rounded, _rounded_fake
)
product_op = _define(
    "products",
    f"(Tensor[] x, {_OF}, Tensor? idx, int share, Tensor? as_) -> Tensor",
    _products,
    _products_fake,
)
gate_op = _define(
    "gated",
    f"(Tensor[] x, {_OF}, Tensor idx, int share, Tensor down, int[] down_how) -> Tensor[]",
    _gated,
    _gated_fake,
)
combine_op = _define(
    "combined",
    "(Tensor y, Tensor idx, Tensor coef, int experts, Tensor as_, Tensor? places) -> Tensor",
    _combined,
    _combined_fake,
)
sort_op = _define(
    "sorted",
    "(Tensor idx, int experts, int[] sizes) -> (Tensor, Tensor, Tensor)",
    _sorted,
    _sorted_fake,
)
arrange_op = _define(
    "arranged", f"(Tensor x, {_OF}, bool gated) -> (Tensor, Tensor)", _arranged, _arranged_fake
)
grouped_op = _define(
    "grouped",
    f"(Tensor x, Tensor sums, Tensor given, Tensor[] pairs, int tokens, {_OF}) -> Tensor",
    _grouped,
    _grouped_fake,
)
tile_op = _define(
    "tiled",
    f"(Tensor x, Tensor? given, Tensor[] pairs, int tokens, {_OF}, bool gated) -> (Tensor, Tensor)",
    _tiled,
    _tiled_fake,
)
grouped_int8_op = _define(
    "grouped_int8",
    f"(Tensor x8, Tensor d, Tensor[] pairs, int tokens, {_OF}, Tensor as_) -> Tensor",
    _grouped_int8,
    _grouped_int8_fake,
)
pick_op = _define("picked", "(Tensor x, int k) -> (Tensor, Tensor)", routing.picked, _picked_fake)
thin_op = _define("thin", "(Tensor x, Tensor weight) -> Tensor", routing.thin, _thin_fake)

Given = list[Tensor]  # activations: as they are, or the three tensors of `activations.Rounded`


def rounded(x: Float[Tensor, "T N"], of: Matrices, after: Tensor | None = None) -> Given:
    """As `activations.rounded`, once `after` is made: products may read that before they take turns."""
    made: Given = round_op(x, *pieces(of), after)
    return made


def products(
    x: Given,
    of: Matrices,
    idx: Int[Tensor, " pairs"] | None,
    share: int,
    as_: Tensor | None = None,
) -> Float[Tensor, "pairs M"]:
    """As `gemv.products`, in the dtype of `as_`."""
    made: Tensor = product_op(x, *pieces(of), idx, share, as_)
    return made


def gated(x: Given, of: Matrices, idx: Int[Tensor, " pairs"], share: int, down: Matrices) -> Given:
    """As `gemv.gated`."""
    made: Given = gate_op(x, *pieces(of), idx, share, *pieces(down))
    return made


def combined(
    y: Float[Tensor, "pairs M"],
    idx: Int[Tensor, "T K"],
    coef: Float[Tensor, "T K"],
    experts: int,
    as_: Tensor,
    places: Int[Tensor, " pairs"] | None = None,
) -> Float[Tensor, "T M"]:
    """As `combine.combined`, in the dtype of `as_`."""
    made: Tensor = combine_op(y, idx, coef, experts, as_, places)
    return made


def sorted_pairs(idx: Int[Tensor, " pairs"], experts: int, sizes: Iterable[int]) -> Sorted:
    """As `sort.sorted_pairs`."""
    sizes = list(sizes)
    return _sorted_of(sort_op(idx, experts, sizes), sort.cut_of(len(idx), experts, sizes)[0])


def arranged(x: Float[Tensor, "T _"], of: Matrices, *, gated: bool = False) -> Arranged:
    """As `grouped.arranged`."""
    return Arranged(*arrange_op(x, *pieces(of), gated))


def exact_products(
    x: Arranged, given: Int[Tensor, " pairs"], of: Matrices, pairs: Sorted
) -> Float[Tensor, "pairs M"]:
    """As `grouped.grouped`."""
    made: Tensor = grouped_op(*x, given, list(pairs[:3]), pairs.tokens, *pieces(of))
    return made


def tiled(
    x: Float[Tensor, "T _"],
    given: Int[Tensor, " pairs"] | None,
    of: Matrices,
    pairs: Sorted,
    *,
    gated: bool = False,
) -> Tiled:
    """As `grouped_int8.tiled`."""
    return Tiled(*tile_op(x, given, list(pairs[:3]), pairs.tokens, *pieces(of), gated))


def tiled_products(x: Tiled, of: Matrices, pairs: Sorted, as_: Tensor) -> Float[Tensor, "pairs M"]:
    """As `grouped_int8.products`, in the dtype of `as_`."""
    made: Tensor = grouped_int8_op(*x, list(pairs[:3]), pairs.tokens, *pieces(of), as_)
    return made


def picked(x: Float[Tensor, "T N"], k: int) -> tuple[Float[Tensor, "T K"], Int[Tensor, "T K"]]:
    """As `routing.picked`."""
    values, where = pick_op(x, k)
    return values, where


def thin(x: Float[Tensor, "T N"], weight: Float[Tensor, "M N"]) -> Float[Tensor, "T M"]:
    """As `routing.thin`."""
    made: Tensor = thin_op(x, weight)
    return made
