"""Products of many tokens with packed weights on a GPU, activations rounded to int8: each expert's tokens
together, codes as bytes on the way to the matrix units.

As in `grouped`, pairs are sorted by expert and cut into tiles. A word's bits b * j .. of every byte are the
codes of four columns, so that a shift and a mask make four weights at a time; activations lie in that
order too, once for each part that occurs:

    j (8 / b), word (n b), byte (4):   column = (32 / b) word + (8 / b) byte + j    of a step's 32 n

A step's columns share a scale of the weights and one of the activations:

    y = sum over steps of   scale * d * (codes . x8  -  zero * sum of x8)

where the bracket is a whole number but for the zero point, and exact.
"""

from __future__ import annotations

import os
from typing import NamedTuple, no_type_check

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int, Int8
from torch import Tensor

from moecule.kernels.activations import swiglu, to_int8
from moecule.kernels.grouped import blocks_of
from moecule.kernels.matrices import Matrices, launching, lying
from moecule.kernels.sort import Sorted
from moecule.packed import BLOCK

# {tokens of a tile: its rows, warps, steps read ahead}
CUTS = {16: (64, 4, 3), 32: (64, 4, 3), 64: (64, 4, 3)}
NEAR = 16  # tiles that are taken together: those of one expert find its weights in the cache
INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")


@triton.jit
@no_type_check
def _bytes_of(q):
    """[..., 4] int8: the bytes of every word, which stay where they are."""
    if INTERPRETED:
        left = 24 - tl.arange(0, 4) * 8
        return ((q[:, :, :, None] << left[None, None, None, :]) >> 24).to(tl.int8)
    else:
        two = tl.join(q, q)
        four = tl.reshape(tl.join(two, two), (q.shape[0], q.shape[1], q.shape[2], 4))
        return tl.inline_asm_elementwise(
            "mov.b32 $0, $1;", "=r,r,r,r,r", [four], dtype=tl.int8, is_pure=True, pack=4
        )


@triton.jit
@no_type_check
def _codes(
    at, there, step, blocks, rows: tl.constexpr, n: tl.constexpr, b: tl.constexpr,
    low: tl.constexpr,
):  # fmt: skip
    """[rows, 32 n] int8: a step's codes of b bits, from bit `low` on; of 8 bits less 128.

    at: pointers to the beginnings of the part's rows.
    """
    word = step * (n * b) + tl.arange(0, n * b)
    inside = there[:, None] & (word < blocks * b)[None, :]
    q = tl.load(at[:, None] + word[None, :], mask=inside, other=0)[:, None, :]
    if b == 8:
        q = q ^ -2139062144  # 0x80808080
    else:
        right = tl.arange(0, 8 // b)[None, :, None] * b - low
        mask: tl.constexpr = (((1 << b) - 1) << low) * 0x01010101
        if low:
            left = tl.maximum(-right, 0)
            q = tl.where(right < 0, q << left, q >> tl.maximum(right, 0)) & mask
        else:
            q = (q >> right) & mask
    return tl.reshape(_bytes_of(q), (rows, 32 * n))


@triton.jit
@no_type_check
def _tile(
    x_at, d_at, codes, scale_at, zero_at, there, blocks, x_all, d_all,
    bits: tl.constexpr, group: tl.constexpr, rows: tl.constexpr, tokens: tl.constexpr,
    n: tl.constexpr,
):  # fmt: skip
    """[rows, tokens]: products of the rows that codes, scale_at and zero_at [rows] point to."""
    per: tl.constexpr = group // (32 * n)  # steps of a group
    total = tl.zeros((rows, tokens), tl.float32)
    for step in tl.range(0, (blocks + n - 1) // n):
        # asked for before the product, so that they come while it runs
        scale = tl.load(scale_at + step // per, mask=there, other=0.0).to(tl.float32)
        zero = tl.full((rows,), 0.5, tl.float32)
        if bits > 1:
            zero = tl.load(zero_at + step // per, mask=there, other=0.0).to(tl.float32)
        if bits == 8:
            zero -= 128.0
        d = tl.load(d_at + step * tokens)
        x_sum = tl.load(d_at + d_all + step * tokens)
        sums = tl.zeros((rows, tokens), tl.int32)
        for i in tl.static_range(4):
            if bits & (8 >> i):
                x = tl.load(x_at + ((3 - i) * x_all.to(tl.int64) + step * (32 * n)))
                q = _codes(
                    codes + (bits & (16 - (16 >> i))) * blocks, there, step, blocks, rows, n,
                    8 >> i, bits & (16 - (16 >> i)),
                )  # fmt: skip
                sums = tl.dot(q, tl.trans(x), sums, out_dtype=tl.int32)
        whole = sums.to(tl.float32) - zero[:, None] * x_sum[None, :]
        total += whole * (scale[:, None] * d[None, :])
    return total


@triton.jit
@no_type_check
def _product_kernel(
    x_ptr, d_ptr, tile_ptr, table_ptr, out_ptr, m, columns, blocks, tiles, x_all, d_all,
    widths: tl.constexpr, group: tl.constexpr, tokens: tl.constexpr, rows: tl.constexpr,
    n: tl.constexpr, near: tl.constexpr, aligned: tl.constexpr,
):  # fmt: skip
    """Program (rows, tile), `near` tiles by turns. x_all, d_all: numbers of one part's, of the scales."""
    each = near * ((m + rows - 1) // rows)
    tile = tl.program_id(0) // each * near + tl.program_id(0) % near
    r = tl.program_id(0) % each // near
    at, tile = tile_ptr + tile * 3, tile.to(tl.int64)
    count = tl.load(at + 2, mask=tile < tiles, other=0)
    if count > 0:
        e, first = tl.load(at).to(tl.int64), tl.load(at + 1)
        t = tl.arange(0, tokens)
        row = (r * rows + tl.arange(0, rows)).to(tl.int64)
        there, groups = row < m, (columns + group - 1) // group
        start, scale, zero, bits = lying(table_ptr, e, True, aligned)
        if aligned:  # so that the compiler sees it
            blocks = blocks // 4 * 4
        steps = (blocks + n - 1) // n
        scale_at, zero_at = scale + row * groups, zero + row * groups
        x_row = (tile * tokens + t) * (steps * 32 * n)
        x_at = x_ptr + x_row[:, None] + tl.arange(0, 32 * n)[None, :]
        d_at = d_ptr + tile * (steps * tokens) + t
        out = out_ptr + (first + t).to(tl.int64)[None, :] * m + row[:, None]
        inside = (t < count)[None, :] & there[:, None]
        for b in tl.static_range(1, 9):
            if widths & (1 << b):
                if bits == b:
                    y = _tile(
                        x_at, d_at, start + row * (blocks * b), scale_at, zero_at, there, blocks,
                        x_all, d_all, b, group, rows, tokens, n,
                    )  # fmt: skip
                    tl.store(out, y.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
@no_type_check
def _round_kernel(
    x_ptr, given_ptr, tile_ptr, x8_ptr, d_ptr, columns, steps, x_all, d_all, parts: tl.constexpr,
    tokens: tl.constexpr, picked: tl.constexpr, gated: tl.constexpr, n: tl.constexpr,
    each: tl.constexpr,
):  # fmt: skip
    """Program (token of a tile, `each` steps)."""
    slot = tl.program_id(0).to(tl.int64)
    tile, t = slot // tokens, slot % tokens
    if t < tl.load(tile_ptr + tile * 3 + 2):
        row = tl.load(tile_ptr + tile * 3 + 1) + t
        if picked:
            row = tl.load(given_ptr + row)
        step = tl.program_id(1) * each + tl.arange(0, each)
        column = step[:, None] * (32 * n) + tl.arange(0, 32 * n)[None, :]
        inside = column < columns
        if gated:
            gate = tl.load(x_ptr + row * 2 * columns + column, mask=inside, other=0.0)
            up = tl.load(x_ptr + (row * 2 + 1) * columns + column, mask=inside, other=0.0)
            x = swiglu(gate.to(tl.float32), up.to(tl.float32))
        else:
            x = tl.load(x_ptr + row * columns + column, mask=inside, other=0.0).to(tl.float32)
        q, d = to_int8(x)
        at = d_ptr + (tile * steps + step) * tokens + t
        tl.store(at, d, mask=step < steps)
        tl.store(at + d_all, tl.sum(q, 1), mask=step < steps)
        to = x8_ptr + slot * (steps * 32 * n) + column
        for i in tl.static_range(4):
            if parts & (1 << i):
                split = tl.reshape(q.to(tl.int8), (each, n << i, 4, 8 >> i))
                ordered = tl.reshape(tl.permute(split, (0, 3, 1, 2)), (each, 32 * n))
                tl.store(to + i * x_all.to(tl.int64), ordered, mask=(step < steps)[:, None])


class Tiled(NamedTuple):
    """Activations of all tiles: int8 in the order of each part; scales, and sums of the int8."""

    x8: Int8[Tensor, "parts tiles tokens padded"]
    d: Float[Tensor, "two tiles steps tokens"]


def tiled(
    x: Float[Tensor, "T _"],
    given: Int[Tensor, " pairs"] | None,
    of: Matrices,
    pairs: Sorted,
    *,
    gated: bool = False,
) -> Tiled:
    """Of each sorted pair row `given` of x, or its own, rounded for products with `of`.

    `gated`: first silu(gate) * up, the gate's columns before those of up. What belongs to no pair is not
    written.
    """
    x, n, each, tiles = x.contiguous(), blocks_of(of), 4, len(pairs.tiles)
    steps, orders = triton.cdiv(of.blocks, n), of.parts.bit_length()
    shape = orders, tiles, pairs.tokens, steps * BLOCK * n
    x8 = torch.empty(shape, dtype=torch.int8, device=x.device)
    d = torch.empty(2, tiles, steps, pairs.tokens, device=x.device)
    with launching(x):
        _round_kernel[(tiles * pairs.tokens, triton.cdiv(steps, each))](
            x, x if given is None else given, pairs.tiles, x8, d, of.columns, steps,
            x8[0].numel(), d[0].numel(), parts=of.parts, tokens=pairs.tokens,
            picked=given is not None, gated=gated, n=n, each=each, num_warps=2,
        )  # fmt: skip
    return Tiled(x8, d)


def products(x: Tiled, of: Matrices, pairs: Sorted, dtype: torch.dtype) -> Float[Tensor, "pairs M"]:
    """Of each sorted pair's expert with its activations.

    Rows of pairs that no expert serves are not written.
    """
    out = torch.empty(len(pairs.order), of.rows, dtype=dtype, device=x.d.device)
    rows, warps, stages = CUTS[pairs.tokens]
    tiles = len(pairs.tiles)
    grid = triton.cdiv(tiles, NEAR) * NEAR * triton.cdiv(of.rows, rows)
    with launching(out):
        _product_kernel[(grid,)](
            x.x8, x.d, pairs.tiles, of.table, out, of.rows, of.columns, of.blocks, tiles,
            x.x8[0].numel(), x.d[0].numel(), widths=of.any_width, group=of.group,
            tokens=pairs.tokens, rows=rows, n=blocks_of(of), near=NEAR, aligned=of.aligned,
            num_warps=warps, num_stages=stages,
        )  # fmt: skip
    return out
