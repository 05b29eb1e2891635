"""What a router does for few tokens on a GPU: a product with few rows, and the largest of its scores.

For these sizes torch's own kernels take longer than a layer's experts; torch.compile leaves them be.
"""

from __future__ import annotations

from typing import no_type_check

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int
from torch import Tensor

from moecule.kernels.matrices import chained, launching, take_turn

MOST = 1024  # scores of a token, held by one warp
LOWEST = tl.constexpr(-3.0e38)  # what was not taken yet is not below it


@triton.jit
@no_type_check
def _pick_kernel(
    x_ptr, value_ptr, index_ptr, n, k: tl.constexpr, most: tl.constexpr, width: tl.constexpr,
    chain: tl.constexpr,
):  # fmt: skip
    """Program (token)."""
    if chain:
        take_turn()
    token, i = tl.program_id(0).to(tl.int64), tl.arange(0, most)
    x = tl.load(x_ptr + token * n + i, mask=i < n, other=0.0).to(tl.float32)
    left = tl.where(i < n, tl.maximum(x, LOWEST), float("-inf"))
    place = tl.arange(0, width)
    chosen = tl.zeros((width,), tl.int32)
    for turn in tl.static_range(k):
        _, at = tl.max(left, 0, return_indices=True)
        chosen = tl.where(place == turn, at, chosen)
        left = tl.where(i == at, float("-inf"), left)
    out = token * k + place
    tl.store(index_ptr + out, chosen.to(tl.int64), mask=place < k)
    tl.store(value_ptr + out, tl.load(x_ptr + token * n + chosen), mask=place < k)


@triton.jit
@no_type_check
def _thin_kernel(
    x_ptr, w_ptr, out_ptr, m, columns, rows: tl.constexpr, width: tl.constexpr,
    chain: tl.constexpr,
):  # fmt: skip
    """Program (rows, token)."""
    if chain:
        take_turn()
    token = tl.program_id(1).to(tl.int64)
    row = tl.program_id(0) * rows + tl.arange(0, rows)
    total = tl.zeros((rows, width), tl.float32)
    for start in tl.range(0, columns, width):
        column = start + tl.arange(0, width)
        x = tl.load(x_ptr + token * columns + column, mask=column < columns, other=0.0)
        at = w_ptr + row.to(tl.int64)[:, None] * columns + column[None, :]
        inside = (row < m)[:, None] & (column < columns)[None, :]
        w = tl.load(at, mask=inside, other=0.0)
        total += w.to(tl.float32) * x.to(tl.float32)[None, :]
    y = tl.sum(total, 1).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + token * m + row, y, mask=row < m)


def picked(x: Float[Tensor, "T N"], k: int) -> tuple[Float[Tensor, "T K"], Int[Tensor, "T K"]]:
    """Each row's k largest numbers, largest first, and where they are; of equal ones the first.

    At most MOST a row.
    """
    x = x.contiguous()
    values = torch.empty(len(x), k, dtype=x.dtype, device=x.device)
    where = torch.empty(len(x), k, dtype=torch.int64, device=x.device)
    with launching(x):
        _pick_kernel[(len(x),)](
            x, values, where, x.shape[1], k=k, most=triton.next_power_of_2(x.shape[1]),
            width=triton.next_power_of_2(k), num_warps=1, **chained(x),
        )  # fmt: skip
    return values, where


def thin(x: Float[Tensor, "T N"], weight: Float[Tensor, "M N"]) -> Float[Tensor, "T M"]:
    """x times the transposed weight, of few tokens and rows, added up in float32."""
    x, weight = x.contiguous(), weight.contiguous()
    out = torch.empty(len(x), len(weight), dtype=x.dtype, device=x.device)
    rows = 1 if len(weight) <= 512 else 4
    with launching(x):
        _thin_kernel[(triton.cdiv(len(weight), rows), len(x))](
            x, weight, out, len(weight), x.shape[1], rows=rows,
            width=min(1024, triton.next_power_of_2(x.shape[1])), num_warps=4, **chained(x),
        )  # fmt: skip
    return out
