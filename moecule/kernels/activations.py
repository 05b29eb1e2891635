"""Activations rounded to int8, in the order in which the codes of each part meet them, on a GPU.

32 columns share a scale. A word of a b-bit part holds 32 / b neighbouring columns; its bits j * b .. of
every byte are those of four columns, so the bytes of these four columns make a word here, once for each
part that occurs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import no_type_check

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int32
from torch import Tensor

from moecule.kernels.matrices import Matrices, chained, launching, take_turn
from moecule.kernels.rounding import rint

ORDERS = 4  # of the bytes: for parts of 1, 2, 4 and 8 bits


@triton.jit
@no_type_check
def swiglu(gate, up):
    """What enters a down projection, in float32."""
    return gate / (1.0 + tl.exp(-gate)) * up


@triton.jit
@no_type_check
def to_int8(x):
    """(whole numbers of 127 at most [n, width], scales [n]) that stand for rows of x."""
    d = tl.max(tl.abs(x), 1) / 127.0
    return rint(tl.where((d > 0)[:, None], x / tl.where(d > 0, d, 1.0)[:, None], 0.0)), d


@triton.jit
@no_type_check
def _put_order(q, at, block, b: tl.constexpr, blocks):
    """Store int8 [n, 32] of blocks as the parts of b bits want them; `at` is where the order begins."""
    column = tl.arange(0, 32)[None, :]
    word, r = block[:, None] * b + column // (32 // b), column % (32 // b)
    byte = ((r % (8 // b)) * (blocks * b) + word) * 4 + r // (8 // b)
    tl.store(at + byte, q.to(tl.int8), mask=(block < blocks)[:, None])


@triton.jit
@no_type_check
def put_rounded(x, x8_ptr, d_ptr, s_ptr, row, block, blocks, parts: tl.constexpr):
    """Round blocks of 32 activations [n, 32] to int8 and store them in the orders that `parts` names."""
    q, d = to_int8(x)
    q = q.to(tl.int32)
    there = block < blocks
    tl.store(d_ptr + row * blocks + block, d, mask=there)
    tl.store(s_ptr + row * blocks + block, tl.sum(q, 1).to(tl.float32) * d, mask=there)
    at = x8_ptr + row * 4 * blocks * 32
    for k in tl.static_range(4):
        if parts & (1 << k):
            _put_order(q, at + k * blocks * 32, block, 1 << k, blocks)


@triton.jit
@no_type_check
def _round_kernel(
    x_ptr, x8_ptr, d_ptr, s_ptr, columns, blocks, parts: tl.constexpr, n: tl.constexpr,
    chain: tl.constexpr,
):  # fmt: skip
    """Program (row, n blocks)."""
    if chain:
        take_turn()
    row = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1) * n + tl.arange(0, n)
    column = block[:, None] * 32 + tl.arange(0, 32)[None, :]
    x = tl.load(x_ptr + row * columns + column, mask=column < columns, other=0.0)
    put_rounded(x.to(tl.float32), x8_ptr, d_ptr, s_ptr, row, block, blocks, parts)


@dataclass(frozen=True)
class Rounded:
    """Activations for a product: int8 in the orders of the parts."""

    x8: Int32[Tensor, "T words"]
    d: Float[Tensor, "T blocks"]  # int8 times this
    s: Float[Tensor, "T blocks"]  # sums of what int8 stands for

    @staticmethod
    def empty(rows: int, of: Matrices) -> Rounded:
        """Room for products with `of`."""
        x8 = torch.empty(rows, ORDERS * of.blocks * 8, dtype=torch.int32, device=of.table.device)
        d, s = (torch.empty(rows, of.blocks, device=of.table.device) for _ in range(2))
        return Rounded(x8, d, s)


def rounded(x: Float[Tensor, "T N"], of: Matrices) -> Rounded:
    """x for products with `of`, 32 columns to a scale."""
    x, out, n = x.contiguous(), Rounded.empty(len(x), of), 8
    with launching(x):
        _round_kernel[(len(x), triton.cdiv(of.blocks, n))](
            x, out.x8.view(torch.int8), out.d, out.s, of.columns, of.blocks, parts=of.parts, n=n,
            num_warps=2, **chained(x),
        )  # fmt: skip
    return out
