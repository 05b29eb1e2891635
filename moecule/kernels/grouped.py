"""Products of many tokens with packed weights on a GPU: each expert's tokens together, weights unpacked
on the way to the matrix units.

Pairs are sorted by expert and cut into tiles of tokens that one expert serves. How many tiles there are
depends on the routing; as many as there can be are started, and those left over return at once, so that
nothing waits for the GPU.

The matrix units are given the codes themselves, or-ed into the last bits of a power of two, which makes a
16-bit float of that power plus the code; scales come after, one group of columns at a time:

    y = sum over groups of   scale * (x . (power + code)  -  (power + zero) * sum of x)

Two codes are taken out of a word at a time, 16 columns apart, as the matrix units want them in a register;
`arranged` puts activations in that order. In it the columns of a step, n blocks of 32, are numbered by

    p (8), s (2), block (n), h (2):   column = 32 block + 16 h + 8 s + p
"""

from __future__ import annotations

from typing import NamedTuple, no_type_check

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int
from torch import Tensor

from moecule.kernels.activations import swiglu
from moecule.kernels.matrices import Matrices, launching, lying
from moecule.kernels.sort import Sorted
from moecule.packed import BLOCK

# {tokens of a tile: its rows, warps, steps read ahead}
CUTS = {16: (64, 4, 3), 32: (128, 4, 3), 64: (64, 4, 3)}
AHEAD = 16  # steps whose zeros are multiplied together


@triton.jit
@no_type_check
def _turned(q, at):
    """Every word's bits `at` places to the right, those that fall out coming in on the left."""
    q = q.to(tl.uint32, bitcast=True)
    return ((q >> (at & 31)) | (q << (-at & 31))).to(tl.int32, bitcast=True)


@triton.jit
@no_type_check
def _both(low, high, at):
    """16 bits of each, from bit `at` on, as the halves of one word."""
    return ((low >> at) & 0xFFFF) | ((high >> at) << 16)


@triton.jit
@no_type_check
def _with_codes(
    onto, at, block, there, blocks, rows: tl.constexpr, n: tl.constexpr, b: tl.constexpr,
    low: tl.constexpr,
):  # fmt: skip
    """[rows, p, s, block]: `onto` with the codes of b bits in both halves, from bit `low` on.

    at: pointers to the beginnings of the part's rows.
    """
    i, s = block + tl.arange(0, n), tl.arange(0, 2)
    inside = there[:, None] & (i < blocks)[None, :]
    at = at[:, None] + (i * b)[None, :]
    p = tl.arange(0, 8)[None, :, None, None]
    if b == 1:
        u = tl.load(at, mask=inside, other=0)[:, None, None, :]
        turn = s[None, None, :, None] * 8 + p
    else:
        # a block's words are numbered by h, s, the high bits of p
        words = tl.load(
            at[:, :, None] + tl.arange(0, b)[None, None, :], mask=inside[:, :, None], other=0
        )
        half = s * 16
        if b == 2:
            first, second = tl.split(words)
            u = _both(first[:, None, :], second[:, None, :], half[None, :, None])[:, None]
            turn = 2 * p
        elif b == 4:
            words = tl.permute(tl.reshape(words, (rows, n, 2, 2)), (0, 3, 1, 2))
            first, second = tl.split(words)
            u = _both(first[:, None], second[:, None], half[None, :, None, None])
            u = tl.broadcast_to(u[:, :, None], (rows, 2, 4, 2, n))
            u, turn = tl.reshape(u, (rows, 8, 2, n)), 4 * (p & 3)
        else:
            words = tl.permute(tl.reshape(words, (rows, n, 2, 2, 2)), (0, 4, 3, 1, 2))
            first, second = tl.split(words)
            half = half[None, None, :, None, None]
            u = _both(first[:, :, None], second[:, :, None], half)
            u = tl.broadcast_to(u[:, :, :, None], (rows, 2, 2, 2, 2, n))
            u, turn = tl.reshape(u, (rows, 8, 2, n)), 8 * (p & 1)
    mask: tl.constexpr = (((1 << b) - 1) << low) * 0x00010001
    codes = _turned(u, turn - low) & mask
    # either way sets bits; by turns, for a chain of one kind is put in an order of more instructions
    return onto | codes if low else onto ^ codes


@triton.jit
@no_type_check
def _spread(at, step, there, steps, each: tl.constexpr, n: tl.constexpr):
    """[rows, each] in float32: what a group's columns share, for steps from `step` on."""
    g = step + tl.arange(0, each)
    inside = there[:, None] & (g < steps)[None, :]
    shared = tl.load(at[:, None] + (g // n)[None, :], mask=inside, other=0.0)
    return shared.to(tl.float32)


@triton.jit
@no_type_check
def _tile(
    x_ptr, sum_ptr, given, codes, scale_at, zero_at, there, blocks, magic,
    bits: tl.constexpr, group: tl.constexpr, rows: tl.constexpr, n: tl.constexpr,
    ahead: tl.constexpr,
):  # fmt: skip
    """[rows, tokens]: products of the rows that codes, scale_at and zero_at [rows] point to."""
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    whole: tl.constexpr = bits == 8 and dtype == tl.bfloat16
    power = 0.0
    if not whole:
        power = 128.0 if dtype == tl.bfloat16 else 1024.0
    per: tl.constexpr = group // (32 * n)  # steps of a group
    steps = (blocks + n - 1) // n
    total = tl.zeros((rows, given.shape[0]), tl.float32)
    for step in tl.range(0, steps, ahead, num_stages=1):
        scale = _spread(scale_at, step, there, steps, ahead, per)
        zero = tl.full((rows, ahead), 0.5, tl.float32)
        if bits > 1:
            zero = _spread(zero_at, step, there, steps, ahead, per)
        g = step + tl.arange(0, ahead)[None, :]
        x_sum = tl.load(sum_ptr + (given * steps)[:, None] + g, mask=g < steps, other=0.0)
        shift = scale * (-power - zero)
        total = tl.dot(shift, tl.trans(x_sum), total, input_precision="tf32x3")
    k = tl.arange(0, 32 * n)
    x_at = x_ptr + (given * (steps * 32 * n))[:, None] + k[None, :]
    for step in tl.range(0, steps):
        x = tl.load(x_at + step * (32 * n))
        q, block = tl.full((rows, 8, 2, n), 0, tl.int32), step * n
        if not whole:
            q += magic
        if bits & 8:
            q = _with_codes(q, codes, block, there, blocks, rows, n, 8, 0)
        if bits & 4:
            q = _with_codes(q, codes, block, there, blocks, rows, n, 4, 0)
        if bits & 2:
            low: tl.constexpr = bits & 4
            q = _with_codes(q, codes + low * blocks, block, there, blocks, rows, n, 2, low)
        if bits & 1:
            under: tl.constexpr = bits & 6
            q = _with_codes(q, codes + under * blocks, block, there, blocks, rows, n, 1, under)
        if whole:  # 255 is more than the last bits of a bfloat16 hold
            first = (q & 0xFFFF).to(tl.float32).to(dtype)
            second = (q >> 16).to(tl.float32).to(dtype)
        else:
            first = q.to(tl.int16).to(dtype, bitcast=True)
            second = (q >> 16).to(tl.int16).to(dtype, bitcast=True)
        w = tl.reshape(tl.join(first, second), (rows, 32 * n))
        scale = tl.load(scale_at + step // per, mask=there, other=0.0).to(tl.float32)
        total += tl.dot(w, tl.trans(x)) * scale[:, None]
    return total


@triton.jit
@no_type_check
def _grouped_kernel(
    x_ptr, sum_ptr, given_ptr, tile_ptr, table_ptr, out_ptr, m, columns, blocks,
    magic, widths: tl.constexpr, group: tl.constexpr, tokens: tl.constexpr, rows: tl.constexpr,
    n: tl.constexpr, ahead: tl.constexpr, aligned: tl.constexpr,
):  # fmt: skip
    """Program (rows, tile). `magic` has the power of two in both halves; it is no constant, for the
    compiler would spend one more instruction on it."""
    tile = tile_ptr + tl.program_id(1) * 3
    e, first, count = tl.load(tile).to(tl.int64), tl.load(tile + 1), tl.load(tile + 2)
    if count > 0:
        t = tl.arange(0, tokens)
        given = tl.load(given_ptr + first + t, mask=t < count, other=0).to(tl.int64)
        row = (tl.program_id(0) * rows + tl.arange(0, rows)).to(tl.int64)
        there, groups = row < m, (columns + group - 1) // group
        start, scale, zero, bits = lying(table_ptr, e, True, aligned)
        if aligned:  # so that the compiler sees it
            blocks = blocks // 4 * 4
        scale_at, zero_at = scale + row * groups, zero + row * groups
        out = out_ptr + (first + t).to(tl.int64)[None, :] * m + row[:, None]
        inside = (t < count)[None, :] & there[:, None]
        for b in tl.static_range(1, 9):
            if widths & (1 << b):
                if bits == b:
                    codes = start + row * (blocks * b)
                    y = _tile(
                        x_ptr, sum_ptr, given, codes, scale_at, zero_at, there, blocks, magic,
                        b, group, rows, n, ahead,
                    )  # fmt: skip
                    tl.store(out, y.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
@no_type_check
def _arrange_kernel(
    x_ptr, out_ptr, sum_ptr, columns, steps, gated: tl.constexpr, n: tl.constexpr, each: tl.constexpr
):  # fmt: skip
    """Program (row, `each` steps). `gated`: of silu(first half) * second half of the row."""
    row = tl.program_id(0).to(tl.int64)
    step = tl.program_id(1) * each + tl.arange(0, each)
    column = step[:, None] * (32 * n) + tl.arange(0, 32 * n)[None, :]
    inside = column < columns
    if gated:
        gate = tl.load(x_ptr + row * 2 * columns + column, mask=inside, other=0.0).to(tl.float32)
        up = tl.load(x_ptr + (row * 2 + 1) * columns + column, mask=inside, other=0.0)
        x = swiglu(gate, up.to(tl.float32)).to(out_ptr.dtype.element_ty)
    else:
        x = tl.load(x_ptr + row * columns + column, mask=inside, other=0.0)
    here = step < steps
    tl.store(sum_ptr + row * steps + step, tl.sum(x.to(tl.float32), 1), mask=here)
    ordered = tl.permute(tl.reshape(x, (each, n, 2, 2, 8)), (0, 4, 3, 1, 2))
    at = out_ptr + row * (steps * 32 * n) + column
    tl.store(at, tl.reshape(ordered, (each, 32 * n)), mask=here[:, None])


class Arranged(NamedTuple):
    """Activations in the order of the codes, and their sums over a step's columns."""

    x: Float[Tensor, "T padded"]
    sums: Float[Tensor, "T steps"]


def arranged(x: Float[Tensor, "T _"], of: Matrices, *, gated: bool = False) -> Arranged:
    """x for products with `of`. `gated`: first silu(gate) * up, the gate's columns before those of up.

    x is of 16 bits.
    """
    x, n, each = x.contiguous(), blocks_of(of), 4
    steps = triton.cdiv(of.blocks, n)
    out = torch.empty(len(x), steps * BLOCK * n, dtype=x.dtype, device=x.device)
    sums = torch.empty(len(x), steps, device=x.device)
    with launching(x):
        _arrange_kernel[(len(x), triton.cdiv(steps, each))](
            x, out, sums, of.columns, steps, gated=gated, n=n, each=each, num_warps=2
        )
    return Arranged(out, sums)


def blocks_of(of: Matrices) -> int:
    """Of a step: in one group."""
    return min(4, of.group // BLOCK)


def grouped(
    x: Arranged, given: Int[Tensor, " pairs"], of: Matrices, pairs: Sorted
) -> Float[Tensor, "pairs M"]:
    """Of each sorted pair's expert with row `given` of x, in its dtype.

    Rows of pairs that no expert serves are not written.
    """
    out = torch.empty(len(given), of.rows, dtype=x.x.dtype, device=x.x.device)
    rows, warps, stages = CUTS[pairs.tokens]
    magic = 0x43004300 if x.x.dtype == torch.bfloat16 else 0x64006400
    with launching(out):
        _grouped_kernel[(triton.cdiv(of.rows, rows), len(pairs.tiles))](
            x.x, x.sums, given, pairs.tiles, of.table, out, of.rows,
            of.columns, of.blocks, magic, widths=of.any_width, group=of.group,
            tokens=pairs.tokens, rows=rows, n=blocks_of(of), ahead=AHEAD, aligned=of.aligned,
            num_warps=warps, num_stages=stages,
        )  # fmt: skip
    return out
