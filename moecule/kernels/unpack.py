"""All weights of some packed matrices, unpacked by one launch on a GPU.

The arithmetic is that of `packed.affine`, step by step in float32.
"""

from __future__ import annotations

from typing import no_type_check

import torch
import triton
import triton.language as tl
from jaxtyping import Float
from torch import Tensor

from moecule.kernels.matrices import Matrices, launching


@triton.jit
@no_type_check
def _codes(at, column, there, b: tl.constexpr):
    """The parts of b bits of some columns; `at` points to the beginnings of rows."""
    each: tl.constexpr = 32 // b
    word = tl.load(at[:, None] + (column // each)[None, :], mask=there, other=0)
    return (word >> ((column % each) * b)[None, :]) & ((1 << b) - 1)


@triton.jit
@no_type_check
def _unpack_kernel(
    table_ptr, codes_ptr, scale_ptr, out_ptr, m, columns, blocks,
    parts: tl.constexpr, group: tl.constexpr, rows: tl.constexpr, width: tl.constexpr,
):  # fmt: skip
    """Program (rows, columns, matrix)."""
    row = (tl.program_id(0) * rows + tl.arange(0, rows)).to(tl.int64)
    column = tl.program_id(1) * width + tl.arange(0, width)
    e = tl.program_id(2).to(tl.int64)
    there = (row < m)[:, None] & (column < columns)[None, :]
    bits = tl.load(table_ptr + e * 4 + 3).to(tl.int32)
    codes = codes_ptr + tl.load(table_ptr + e * 4) + row * (blocks * bits)
    q = tl.zeros((rows, width), tl.int32)
    # the widest part comes first in a row and holds the lowest bits
    if parts & 8:
        if bits & 8:
            q += _codes(codes, column, there, 8)
    if parts & 4:
        if bits & 4:
            q += _codes(codes, column, there, 4)
    if parts & 2:
        if bits & 2:
            low = bits & 4
            q += _codes(codes + low * blocks, column, there, 2) << low
    if parts & 1:
        if bits & 1:
            low = bits & 6
            q += _codes(codes + low * blocks, column, there, 1) << low
    groups = (columns + group - 1) // group
    of = row[:, None] * groups + (column // group)[None, :]
    scale = tl.load(scale_ptr + tl.load(table_ptr + e * 4 + 1) + of, mask=there, other=0.0)
    zero_at = scale_ptr + tl.load(table_ptr + e * 4 + 2) + of
    zero = tl.load(zero_at, mask=there & (bits != 1), other=0.5)
    w = (q.to(tl.float32) - zero.to(tl.float32)) * scale.to(tl.float32)
    out = out_ptr + (e * m + row)[:, None] * columns + column[None, :]
    tl.store(out, w.to(out_ptr.dtype.element_ty), mask=there)


def unpacked(of: Matrices, dtype: torch.dtype) -> Float[Tensor, "E M N"]:
    """The weights that the codes stand for."""
    out = torch.empty(len(of), of.rows, of.columns, dtype=dtype, device=of.codes.device)
    rows, width = 8, 256
    grid = (triton.cdiv(of.rows, rows), triton.cdiv(of.columns, width), len(of))
    with launching(of.codes):
        _unpack_kernel[grid](
            of.table, of.codes, of.scale, out, of.rows, of.columns, of.blocks,
            parts=of.parts, group=of.group, rows=rows, width=width, num_warps=4,
        )  # fmt: skip
    return out
