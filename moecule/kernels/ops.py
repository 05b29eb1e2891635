"""The kernels for few tokens as torch operators, which torch.compile takes as they are.

A `Matrices` is passed in pieces: its table, and whole numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from moecule.kernels import activations, combine, gemv, routing
from moecule.kernels.matrices import Matrices


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


def _rounded(x: Tensor, at: Tensor, how: list[int]) -> list[Tensor]:
    made = activations.rounded(x, whole(at, how))
    return [made.x8, made.d, made.s]


def _rounded_fake(x: Tensor, at: Tensor, how: list[int]) -> list[Tensor]:
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


def _combined(y: Tensor, idx: Tensor, coef: Tensor, experts: int, as_: Tensor) -> Tensor:
    return combine.combined(y, idx, coef, experts, as_.dtype)


def _combined_fake(y: Tensor, idx: Tensor, coef: Tensor, experts: int, as_: Tensor) -> Tensor:
    return as_.new_empty(len(idx), y.shape[1])


def _picked_fake(x: Tensor, k: int) -> tuple[Tensor, Tensor]:
    return x.new_empty(len(x), k), x.new_empty(len(x), k, dtype=torch.int64)


def _thin_fake(x: Tensor, weight: Tensor) -> Tensor:
    return x.new_empty(len(x), len(weight))


_OF = "Tensor at, int[] how"
round_op = _define("rounded", f"(Tensor x, {_OF}) -> Tensor[]", _rounded, _rounded_fake)
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
    "(Tensor y, Tensor idx, Tensor coef, int experts, Tensor as_) -> Tensor",
    _combined,
    _combined_fake,
)
pick_op = _define("picked", "(Tensor x, int k) -> (Tensor, Tensor)", routing.picked, _picked_fake)
thin_op = _define("thin", "(Tensor x, Tensor weight) -> Tensor", routing.thin, _thin_fake)

Given = list[Tensor]  # activations: as they are, or the three tensors of `activations.Rounded`


def rounded(x: Float[Tensor, "T N"], of: Matrices) -> Given:
    """As `activations.rounded`."""
    made: Given = round_op(x, *pieces(of))
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
) -> Float[Tensor, "T M"]:
    """As `combine.combined`, in the dtype of `as_`."""
    made: Tensor = combine_op(y, idx, coef, experts, as_)
    return made


def picked(x: Float[Tensor, "T N"], k: int) -> tuple[Float[Tensor, "T {k}"], Int[Tensor, "T {k}"]]:
    """As `routing.picked`."""
    values, where = pick_op(x, k)
    return values, where


def thin(x: Float[Tensor, "T N"], weight: Float[Tensor, "M N"]) -> Float[Tensor, "T M"]:
    """As `routing.thin`."""
    made: Tensor = thin_op(x, weight)
    return made
