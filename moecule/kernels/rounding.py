"""Rounding on a GPU: a group's levels, and GPTQ's columns of a group, each in one launch.

The arithmetic is that of `grid._fit_groups` and of the column loop in `methods/gptq.py`, step by step
in float32; only sums over a group may come in another order.
"""

from __future__ import annotations

from typing import no_type_check

import torch
import triton
import triton.language as tl
from jaxtyping import Float
from torch import Tensor

TINY = tl.constexpr(2.0**-24)


@triton.jit
@no_type_check
def rint(x):
    """The nearest whole number, halves to even."""
    # beside this number floats are whole, so the sum is rounded to even; larger x are clamped anyway
    return (x + 12582912.0) - 12582912.0


@triton.jit
@no_type_check
def _storable(scale):
    return tl.minimum(tl.maximum(scale, TINY), 6e4).to(tl.float16).to(tl.float32)


@triton.jit
@no_type_check
def _storable_zero(zero):
    return tl.minimum(tl.maximum(zero, -6e4), 6e4).to(tl.float16).to(tl.float32)


@triton.jit
@no_type_check
def _nearest(w, scale, zero, top):
    q = rint(tl.div_rn(w, scale[:, None]) + zero[:, None])
    return tl.minimum(tl.maximum(q, 0.0), top)


@triton.jit
@no_type_check
def _loss(w, scale, zero, top, power, inside, squares: tl.constexpr):
    q = _nearest(w, scale, zero, top)
    miss = tl.abs((q - zero[:, None]) * scale[:, None] - w)
    if squares:
        miss = miss * miss
    else:
        miss = tl.exp2(power * tl.log2(tl.maximum(miss, 1e-30)))
    return tl.sum(tl.where(inside, miss, 0.0), 1)


@triton.jit
@no_type_check
def _fit_kernel(
    w_ptr, top_ptr, multiple_ptr, scale_ptr, zero_ptr,
    rows, rows_per_top, row_stride, group_stride, groups, power,
    n_multiples: tl.constexpr, n: tl.constexpr, width: tl.constexpr, block: tl.constexpr,
    refine: tl.constexpr, squares: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * block + tl.arange(0, block)
    group, column = tl.program_id(1), tl.arange(0, width)
    inside = (row < rows)[:, None] & (column < n)[None, :]
    at = row.to(tl.int64)[:, None] * row_stride + group * group_stride + column[None, :]
    w = tl.load(w_ptr + at, mask=inside, other=0.0).to(tl.float32)
    # all rows of a block are of one expert
    top = tl.load(top_ptr + (tl.program_id(0) * block) // rows_per_top)
    low = tl.minimum(tl.min(w, 1), 0.0)
    high = tl.maximum(tl.max(w, 1), 0.0)
    tops = tl.zeros((block,), tl.float32) + top
    scale = tl.full((block,), 1.0, tl.float32)
    zero = tl.zeros((block,), tl.float32)
    best = tl.full((block,), float("inf"), tl.float32)
    for i in range(n_multiples):
        p = tl.load(multiple_ptr + i)
        s = _storable(tl.div_rn(p * (high - low), tops))
        z = _storable_zero(tl.div_rn(-p * low, s))
        loss = _loss(w, s, z, top, power, inside, squares)
        won = loss < best
        best = tl.where(won, loss, best)
        scale = tl.where(won, s, scale)
        zero = tl.where(won, z, zero)
    total = tl.full((block,), n, tl.float32)
    for _ in tl.static_range(refine):
        q = _nearest(w, scale, zero, top)
        mean_q = tl.div_rn(tl.sum(tl.where(inside, q, 0.0), 1), total)
        mean_w = tl.div_rn(tl.sum(w, 1), total)
        dq = tl.where(inside, q - mean_q[:, None], 0.0)
        spread = tl.sum(dq * dq, 1)
        slope = tl.sum(dq * (w - mean_w[:, None]), 1)
        s = _storable(tl.div_rn(slope, tl.maximum(spread, TINY)))
        z = _storable_zero(mean_q - tl.div_rn(mean_w, s))
        z = tl.where((spread > 0) & (tl.abs(z) <= 2 * top), z, 1e4)
        loss = _loss(w, s, z, top, power, inside, squares)
        won = loss < best
        best = tl.where(won, loss, best)
        scale = tl.where(won, s, scale)
        zero = tl.where(won, z, zero)
    single = _storable(2.0 * tl.div_rn(tl.sum(tl.abs(w), 1), total))
    scale = tl.where(tops == 1.0, single, scale)
    zero = tl.where(tops == 1.0, 0.5, zero)
    out = row.to(tl.int64) * groups + group
    tl.store(scale_ptr + out, scale, mask=row < rows)
    tl.store(zero_ptr + out, zero, mask=row < rows)


def fit_groups(
    w: Float[Tensor, "E M N"],
    tops: Float[Tensor, " E"],
    group: int,
    multiples: Float[Tensor, " tried"],
    power: float,
    refine: int,
) -> tuple[Float[Tensor, "E M G"], Float[Tensor, "E M G"]]:
    """(scale, zero) of every row and group; `tops` are the highest codes. N is a multiple of `group`.

    The last axis of `w` is contiguous, and rows are evenly spaced through all experts.
    """
    e, m, n = w.shape
    if w.stride(2) != 1 or w.stride(0) != m * w.stride(1):
        w = w.contiguous()
    groups = n // group
    scale = torch.empty(e, m, groups, device=w.device)
    zero = torch.empty_like(scale)
    block = next(b for b in (16, 8, 4, 2, 1) if m % b == 0)
    width = max(16, triton.next_power_of_2(group))
    with torch.cuda.device(w.device):
        _fit_kernel[(e * m // block, groups)](
            w, tops, multiples, scale, zero, e * m, m, w.stride(1), group, groups, power,
            n_multiples=len(multiples), n=group, width=width, block=block, refine=refine,
            squares=power == 2,
            enable_fp_fusion=False, num_warps=4,
        )  # fmt: skip
    return scale, zero


@triton.jit
@no_type_check
def _levels_kernel(
    w_ptr, scale_ptr, zero_ptr, top_ptr, out_ptr, rows, columns, groups, group,
    width: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    row, at = tl.program_id(0) * block + tl.arange(0, block), tl.program_id(1)
    column = tl.program_id(2) * width + tl.arange(0, width)
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    here = row.to(tl.int64)[:, None] * columns + column[None, :]
    w = tl.load(w_ptr + here, mask=inside, other=0.0).to(tl.float32)
    of = (at.to(tl.int64) * rows + row)[:, None] * groups + (column // group)[None, :]
    scale = tl.load(scale_ptr + of, mask=inside, other=1.0)
    zero = tl.load(zero_ptr + of, mask=inside, other=0.0)
    top = tl.load(top_ptr + at)
    q = tl.minimum(tl.maximum(rint(tl.div_rn(w, scale) + zero), 0.0), top)
    q = tl.where(top == 1.0, tl.where(w >= 0, 1.0, 0.0), q)
    out = ((q - zero) * scale).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + at.to(tl.int64) * rows * columns + here, out, mask=inside)


def levels_at(
    w: Float[Tensor, "M N"],
    scale: Float[Tensor, "bits M G"],
    zero: Float[Tensor, "bits M G"],
    tops: Float[Tensor, " bits"],
    group: int,
) -> Float[Tensor, "bits M N"]:
    """The levels nearest to `w`, in its dtype, at several widths; `tops` are the highest codes."""
    (m, n), w = w.shape, w.contiguous()
    out = torch.empty(len(tops), m, n, dtype=w.dtype, device=w.device)
    block, width = 8, 256
    with torch.cuda.device(w.device):
        _levels_kernel[(triton.cdiv(m, block), len(tops), triton.cdiv(n, width))](
            w, scale, zero, tops, out, m, n, scale.shape[-1], group,
            width=width, block=block, enable_fp_fusion=False, num_warps=4,
        )  # fmt: skip
    return out


@triton.jit
@no_type_check
def _columns_kernel(
    w_ptr, u_ptr, scale_ptr, zero_ptr, top_ptr, feedback_ptr,
    q_ptr, error_ptr, m, w_expert, w_row, u_expert, u_row,
    q_expert, q_row, n: tl.constexpr, width: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    expert = tl.program_id(1).to(tl.int64)
    row, column = tl.program_id(0) * block + tl.arange(0, block), tl.arange(0, width)
    there = row < m
    inside = there[:, None] & (column < n)[None, :]
    at = expert * w_expert + row.to(tl.int64)[:, None] * w_row + column[None, :]
    w = tl.load(w_ptr + at, mask=inside, other=0.0)
    scale = tl.load(scale_ptr + expert * m + row, mask=there, other=1.0)
    zero = tl.load(zero_ptr + expert * m + row, mask=there, other=0.0)
    top, feedback = tl.load(top_ptr + expert), tl.load(feedback_ptr + expert)
    codes, errors = tl.zeros_like(w), tl.zeros_like(w)
    for j in range(n):
        here = column[None, :] == j
        value = tl.sum(tl.where(here, w, 0.0), 1)
        code = rint(tl.div_rn(value, scale) + zero)
        code = tl.minimum(tl.maximum(code, 0.0), top)
        u = tl.load(u_ptr + expert * u_expert + j * u_row + column, mask=column < n, other=0.0)
        pivot = tl.sum(tl.where(column == j, u, 0.0), 0)
        error = tl.div_rn(value - (code - zero) * scale, tl.zeros_like(value) + pivot)
        w -= error[:, None] * tl.where(column > j, u * feedback, 0.0)[None, :]
        codes = tl.where(here, code[:, None], codes)
        errors = tl.where(here, error[:, None], errors)
    out = expert * q_expert + row.to(tl.int64)[:, None] * q_row + column[None, :]
    tl.store(q_ptr + out, codes, mask=inside)
    e_at = (expert * m + row)[:, None] * n + column[None, :]
    tl.store(error_ptr + e_at, errors, mask=inside)


def round_columns(
    w: Float[Tensor, "E M n"],
    u: Float[Tensor, "E n n"],
    scale: Float[Tensor, "E M"],
    zero: Float[Tensor, "E M"],
    tops: Float[Tensor, " E"],
    feedback: Float[Tensor, " E"],
    q: Float[Tensor, "E M n"],
) -> Float[Tensor, "E M n"]:
    """Round one group's columns in turn into `q`; return the errors that later columns make up for.

    `feedback` is 1 where columns of the group itself do, else 0. `w` and `q` may be parts of wider
    tensors whose last axis is contiguous.
    """
    e, m, n = w.shape
    error = torch.empty(e, m, n, device=w.device)
    block = 16
    with torch.cuda.device(w.device):
        _columns_kernel[(triton.cdiv(m, block), e)](
            w, u, scale.contiguous(), zero.contiguous(), tops, feedback, q, error,
            m, w.stride(0), w.stride(1), u.stride(0), u.stride(1), q.stride(0), q.stride(1),
            n=n, width=max(16, triton.next_power_of_2(n)), block=block,
            enable_fp_fusion=False, num_warps=4,
        )  # fmt: skip
    return error
