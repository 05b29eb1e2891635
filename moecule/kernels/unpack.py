"""All weights of a packed matrix, unpacked by one launch on a GPU.

The arithmetic is that of `packed.affine`, step by step in float32.
"""

from __future__ import annotations

from typing import no_type_check

import torch
import triton
import triton.language as tl
from jaxtyping import Float
from torch import Tensor

from moecule.kernels.matrices import Matrices, launching, lying

CUT = 32, 4, 4  # of a program: rows, blocks of 32 columns, warps


@triton.jit
@no_type_check
def _codes_of(
    at, block, there, blocks, rows: tl.constexpr, n: tl.constexpr, b: tl.constexpr
):  # fmt: skip
    """[rows, 32 n]: the parts of b bits of n blocks; `at` points to the beginnings of the part's rows."""
    word = block * b + tl.arange(0, n * b)
    inside = there[:, None] & (word < blocks * b)[None, :]
    words = tl.load(at[:, None] + word[None, :], mask=inside, other=0)
    shift = tl.arange(0, 32 // b) * b
    codes = (words[:, :, None] >> shift[None, None, :]) & ((1 << b) - 1)
    return tl.reshape(codes, (rows, 32 * n))


@triton.jit
@no_type_check
def _codes_at(
    at, block, there, blocks, rows: tl.constexpr, n: tl.constexpr, bits: tl.constexpr
):  # fmt: skip
    """[rows, 32 n]: the codes of n blocks; the widest part comes first in a row, with the lowest bits."""
    if bits == 8:
        q = _codes_of(at, block, there, blocks, rows, n, 8)
    else:
        q = tl.zeros((rows, 32 * n), tl.int32)
        if bits & 4:
            q = _codes_of(at, block, there, blocks, rows, n, 4)
        if bits & 2:
            low: tl.constexpr = bits & 4
            q |= _codes_of(at + low * blocks, block, there, blocks, rows, n, 2) << low
        if bits & 1:
            under: tl.constexpr = bits & 6
            q |= _codes_of(at + under * blocks, block, there, blocks, rows, n, 1) << under
    return q


@triton.jit
@no_type_check
def _spread(
    at, block, there, groups, other, rows: tl.constexpr, n: tl.constexpr, group: tl.constexpr
):
    """What a group of columns shares, in float32, for n blocks: [rows, 32 n], or [rows, 1] if one does."""
    if group >= 32 * n:
        shared = tl.load(at + (block * 32) // group, mask=there, other=other)
        return shared.to(tl.float32)[:, None]
    else:
        count: tl.constexpr = 32 * n // group
        g = (block * 32) // group + tl.arange(0, count)
        inside = there[:, None] & (g < groups)[None, :]
        shared = tl.load(at[:, None] + g[None, :], mask=inside, other=other).to(tl.float32)
        each = tl.broadcast_to(shared[:, :, None], (rows, count, group))
        return tl.reshape(each, (rows, 32 * n))


@triton.jit
@no_type_check
def _unpack_kernel(
    table_ptr, out_ptr, m, columns, blocks, e,
    widths: tl.constexpr, group: tl.constexpr, rows: tl.constexpr, n: tl.constexpr,
):  # fmt: skip
    """Program (rows, n blocks) of matrix e."""
    row = (tl.program_id(0) * rows + tl.arange(0, rows)).to(tl.int64)
    block, there = tl.program_id(1) * n, row < m
    codes, scale_at, zero_at, bits = lying(table_ptr, e, True, False)
    codes += row * (blocks * bits)
    q = tl.zeros((rows, 32 * n), tl.int32)
    for b in tl.static_range(1, 9):
        if widths & (1 << b):
            if bits == b:
                q = _codes_at(codes, block, there, blocks, rows, n, b)
    groups = (columns + group - 1) // group
    scale_at, zero_at = scale_at + row * groups, zero_at + row * groups
    scale = _spread(scale_at, block, there, groups, 0.0, rows, n, group)
    zero = _spread(zero_at, block, there & (bits != 1), groups, 0.5, rows, n, group)
    w = (q.to(tl.float32) - zero) * scale
    column = block * 32 + tl.arange(0, 32 * n)
    inside = there[:, None] & (column < columns)[None, :]
    out = out_ptr + row[:, None] * columns + column[None, :]
    tl.store(out, w.to(out_ptr.dtype.element_ty), mask=inside)


def unpacked(of: Matrices, e: int, dtype: torch.dtype) -> Float[Tensor, "M N"]:
    """The weights that the codes of matrix e stand for."""
    out = torch.empty(of.rows, of.columns, dtype=dtype, device=of.table.device)
    rows, n, warps = CUT
    with launching(of.table):
        _unpack_kernel[(triton.cdiv(of.rows, rows), triton.cdiv(of.blocks, n))](
            of.table, out, of.rows, of.columns, of.blocks, e,
            widths=of.any_width, group=of.group, rows=rows, n=n, num_warps=warps,
        )  # fmt: skip
    return out
