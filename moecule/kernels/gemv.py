"""Products of few tokens with packed weights on a GPU: experts of all widths in one launch.

The stored planes are read as they are. A word of a b-bit part holds 32 / b neighbouring columns; its bits
j * b .. of every byte are those of four columns, so activations rounded to int8 are kept in that order
too, once for each part that occurs, and dp4a multiplies four codes at a time. A code of 3 bits is a
part of 2 and a part of 1: their products add up, the second times 4.

    y = sum over groups of   scale * (sum of codes * x  -  zero * sum of x)

A pair whose expert is none of the layer's, skipped online, returns before it reads a weight. Sums over
splits and over a token's experts are added in a fixed order.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import no_type_check

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int, Int32
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from moecule.kernels.matrices import Matrices, chained, launching
from moecule.kernels.rounding import rint

INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")
ORDERS = 4  # of the activations' bytes: for parts of 1, 2, 4 and 8 bits


@triton.jit
@no_type_check
def _dp4a(codes, x, total):
    """total + the four products of unsigned bytes of `codes` and signed bytes of `x`."""
    if INTERPRETED:
        for i in tl.static_range(4):
            total += ((codes >> (8 * i)) & 0xFF) * ((x << (24 - 8 * i)) >> 24)
        return total
    else:
        return tl.inline_asm_elementwise(
            "dp4a.u32.s32 $0, $1, $2, $3;",
            "=r,r,r,r",
            [codes, x, total],
            dtype=tl.int32,
            is_pure=True,
            pack=1,
        )


@triton.jit
@no_type_check
def _ask_for(at, words, warps: tl.constexpr):
    """Have the cache fetch `words` words from `at` on; nobody waits for them."""
    if not INTERPRETED:
        lane = tl.arange(0, 32 * warps) * 32  # a line of the cache has 32 words
        for start in range(0, words, 1024 * warps):
            tl.inline_asm_elementwise(
                "{ .reg .pred p; setp.ne.b32 p, $2, 0; @p prefetch.global.L2 [$1]; mov.u32 $0, 0; }",
                "=r,l,r",
                [(at + start + lane).to(tl.int64), (start + lane < words).to(tl.int32)],
                dtype=tl.int32,
                is_pure=False,
                pack=1,
            )


@triton.jit
@no_type_check
def _take_turn():
    """Wait for what the kernels before this one write, and let the next one start."""
    gdc_wait()
    gdc_launch_dependents()


@triton.jit
@no_type_check
def _every_byte(q, j: tl.constexpr, b: tl.constexpr):
    """The codes of b bits at bit j * b of every byte."""
    if b == 8:
        return q
    else:
        return (q >> (b * j)) & (((1 << b) - 1) * 0x01010101)


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
def _put_rounded(x, x8_ptr, d_ptr, s_ptr, row, block, blocks, parts: tl.constexpr):
    """Round blocks of 32 activations [n, 32] to int8 and store them in the orders that `parts` names."""
    most = tl.max(tl.abs(x), 1)
    d = most / 127.0
    q = rint(tl.where((d > 0)[:, None], x / tl.where(d > 0, d, 1.0)[:, None], 0.0)).to(tl.int32)
    there = block < blocks
    tl.store(d_ptr + row * blocks + block, d, mask=there)
    tl.store(s_ptr + row * blocks + block, tl.sum(q, 1).to(tl.float32) * d, mask=there)
    at = x8_ptr + row * 4 * blocks * 32
    for k in tl.static_range(4):
        if parts & (1 << k):
            _put_order(q, at + k * blocks * 32, block, 1 << k, blocks)


@triton.jit
@no_type_check
def _added(x_ptr, row, column, inside, stride, splits, apart):
    """Sums over splits that lie `apart`."""
    total = tl.load(x_ptr + row * stride + column, mask=inside, other=0.0).to(tl.float32)
    for split in range(1, splits):
        at = split * apart + row * stride
        total += tl.load(x_ptr + at + column, mask=inside, other=0.0).to(tl.float32)
    return total


@triton.jit
@no_type_check
def _round_kernel(
    x_ptr, x8_ptr, d_ptr, s_ptr, idx_ptr, experts, columns, blocks, stride, splits, apart,
    gated: tl.constexpr, parts: tl.constexpr, n: tl.constexpr, chain: tl.constexpr,
):  # fmt: skip
    """Program (row, n blocks). `gated`: of silu(first half) * second half of the row's splits."""
    if chain:
        _take_turn()
    row = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1) * n + tl.arange(0, n)
    column = block[:, None] * 32 + tl.arange(0, 32)[None, :]
    inside = column < columns
    x = _added(x_ptr, row, column, inside, stride, splits, apart)
    if gated:
        up = _added(x_ptr, row, column + columns, inside, stride, splits, apart)
        x = x / (1.0 + tl.exp(-x)) * up
        here = tl.load(idx_ptr + row) < experts  # others were never written
        x = tl.where(here, x, 0.0)
    _put_rounded(x, x8_ptr, d_ptr, s_ptr, row, block, blocks, parts)


@triton.jit
@no_type_check
def _part(
    codes, scale, zero, there, has_zero, x8, d_ptr, s_ptr, x_ptr, columns,
    blocks, first_block, last_block, low, b: tl.constexpr, group: tl.constexpr,
    rows: tl.constexpr, words: tl.constexpr, exact: tl.constexpr,
):  # fmt: skip
    """[rows]: the products with one part of b bits, from `first_block` up to `last_block`.

    `low` is the sum of the wider parts, that many bits below this one; the first brings the zeros.
    codes, scale, zero: pointers [rows] to the beginnings of rows.
    """
    together: tl.constexpr = 4 if b == 8 else b  # words that share an activation's scale
    wide: tl.constexpr = 32 * together // b
    reach: tl.constexpr = 128 // b if 128 // b < group else group  # columns under one scale
    each: tl.constexpr = reach // wide if reach > wide else 1
    n: tl.constexpr = words // together
    total = tl.zeros((rows, n // each), tl.float32)
    from_word, to_word = first_block * b, last_block * b
    below, apart = low * blocks, blocks * b  # words of the wider parts; from order to order
    for start in tl.range(from_word, to_word, words):
        word = start + tl.arange(0, words)
        inside = word < to_word
        q = tl.load(
            codes[:, None] + (below + word)[None, :],
            mask=there[:, None] & inside[None, :], other=0,
        )  # fmt: skip
        if exact:
            sums = tl.zeros((rows, words), tl.float32)
            given = tl.zeros((words,), tl.float32)
            for r in tl.static_range(32 // b):
                column = word * (32 // b) + r
                x = tl.load(x_ptr + column, mask=inside & (column < columns), other=0.0)
                x = x.to(tl.float32)
                sums += ((q >> (b * r)) & ((1 << b) - 1)).to(tl.float32) * x[None, :]
                given += x
            y = tl.sum(tl.reshape(sums, (rows, n, together)), 2)
            x_sum = tl.sum(tl.reshape(given, (n, together)), 1)
        else:
            counts = tl.zeros((rows, words), tl.int32)
            for j in tl.static_range(8 // b):
                x = tl.load(x8 + j * apart + word, mask=inside, other=0)
                x = tl.broadcast_to(x[None, :], (rows, words))
                counts = _dp4a(_every_byte(q, j, b), x, counts)
            at = start + tl.arange(0, n) * together
            near = at < to_word
            d = tl.load(d_ptr + at // b, mask=near, other=0.0)
            y = tl.sum(tl.reshape(counts, (rows, n, together)), 2).to(tl.float32) * d[None, :]
            x_sum = tl.load(s_ptr + at // b, mask=near & (at % b == 0), other=0.0)
        y = tl.sum(tl.reshape(y, (rows, n // each, each)), 2)
        x_here = tl.sum(tl.reshape(x_sum, (n // each, each)), 1)
        column = (start + tl.arange(0, n // each) * (together * each)) * (32 // b)
        which = there[:, None] & (column < columns)[None, :]
        s = tl.load(scale[:, None] + (column // group)[None, :], mask=which, other=0.0)
        if low == 0:
            z = tl.load(
                zero[:, None] + (column // group)[None, :], mask=which & has_zero, other=0.5
            )
            y -= z.to(tl.float32) * x_here[None, :]
        total += s.to(tl.float32) * y
    return tl.sum(total, 1) * tl.exp2(low.to(tl.float32))


@triton.jit
@no_type_check
def _product_kernel(
    x8_ptr, d_ptr, s_ptr, x_ptr, table_ptr, codes_ptr, scale_ptr, idx_ptr, y_ptr,
    m, columns, blocks, experts, pairs, share, run,
    parts: tl.constexpr, group: tl.constexpr, rows: tl.constexpr, words: tl.constexpr,
    exact: tl.constexpr, aligned: tl.constexpr, warps: tl.constexpr, chain: tl.constexpr,
):  # fmt: skip
    """Program (rows, pair, split): `run` blocks of columns of the pair's expert.

    Which expert that is was known before the kernel that comes before this one.
    """
    row = (tl.program_id(0) * rows + tl.arange(0, rows)).to(tl.int64)
    pair, split, there = tl.program_id(1), tl.program_id(2), row < m
    if aligned:  # so that the compiler sees it
        blocks = blocks // 4 * 4
    e = tl.load(idx_ptr + pair)
    if e < experts:
        bits = tl.load(table_ptr + e * 4 + 3).to(tl.int32)
        # where an expert's tensors begin, from where the layer's first do
        start = tl.load(table_ptr + e * 4)
        if aligned:
            start = tl.multiple_of(start, 4)
        groups = (columns + group - 1) // group
        codes = codes_ptr + start + row * (blocks * bits)
        scale = scale_ptr + tl.load(table_ptr + e * 4 + 1) + row * groups
        zero = scale_ptr + tl.load(table_ptr + e * 4 + 2) + row * groups
        if run >= blocks:
            begin, end = tl.program_id(0) * rows, tl.minimum(m, (tl.program_id(0) + 1) * rows)
            each = (blocks * bits).to(tl.int64)
            _ask_for(codes_ptr + start + begin * each, ((end - begin) * each).to(tl.int32), warps)
        if chain:
            _take_turn()
        at, first = (pair // share).to(tl.int64), split * run
        last = tl.minimum(first + run, blocks)
        x8, d, s = x8_ptr + at * blocks * 32, d_ptr + at * blocks, s_ptr + at * blocks
        y = tl.zeros((rows,), tl.float32)
        for k in tl.static_range(4):
            if parts & (8 >> k):
                if bits & (8 >> k):
                    y += _part(
                        codes, scale, zero, there, bits != 1, x8 + (3 - k) * (blocks * 8), d, s,
                        x_ptr + at * columns, columns, blocks, first, last, bits & (16 - (16 >> k)),
                        8 >> k, group, rows, min(words, max(words * (8 >> k) // 2, 16)), exact,
                    )  # fmt: skip
        tl.store(y_ptr + (split * pairs + pair).to(tl.int64) * m + row, y, mask=there)
    elif chain:
        _take_turn()


@triton.jit
@no_type_check
def _sum_kernel(
    y_ptr, idx_ptr, coef_ptr, place_ptr, out_ptr, m, experts, pairs, splits,
    share: tl.constexpr, weighted: tl.constexpr, moved: tl.constexpr, width: tl.constexpr,
    chain: tl.constexpr,
):  # fmt: skip
    """Program (token, columns): over its pairs and all splits, weighted."""
    if chain:
        _take_turn()
    token = tl.program_id(0)
    column = tl.program_id(1) * width + tl.arange(0, width)
    total = tl.zeros((width,), tl.float32)
    for k in tl.static_range(share):
        pair = token * share + k
        e = tl.load(idx_ptr + pair)
        if e < experts:
            y, place = tl.zeros((width,), tl.float32), pair
            if moved:
                place = tl.load(place_ptr + pair)
            for split in range(splits):
                at = (split * pairs + place).to(tl.int64) * m
                y += tl.load(y_ptr + at + column, mask=column < m, other=0.0).to(tl.float32)
            total += y * tl.load(coef_ptr + pair).to(tl.float32) if weighted else y
    out = total.to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + token.to(tl.int64) * m + column, out, mask=column < m)


@dataclass(frozen=True)
class Rounded:
    """Activations for a product: int8 in the orders of the parts."""

    x8: Int32[Tensor, "T words"]
    d: Float[Tensor, "T blocks"]  # int8 times this
    s: Float[Tensor, "T blocks"]  # sums of what int8 stands for


Activations = Rounded | Float[Tensor, "T N"]  # rounded, or as they are


def rounded(x: Float[Tensor, "T N"], of: Matrices) -> Rounded:
    """x for products with `of`, 32 columns to a scale."""
    y = x.contiguous()[None]
    return _rounded(y, of, of.table, 0, gated=False)


def gated(
    y: Float[Tensor, "splits pairs R"], of: Matrices, idx: Int[Tensor, " pairs"], experts: int
) -> Rounded:
    """silu(gate) * up for products with `of`; the gate's rows lie before those of up in y."""
    return _rounded(y, of, idx, experts, gated=True)


def _rounded(y: Tensor, of: Matrices, idx: Tensor, experts: int, *, gated: bool) -> Rounded:
    (splits, rows, stride), n = y.shape, 8
    x8 = torch.empty(rows, ORDERS * of.blocks * 8, dtype=torch.int32, device=y.device)
    d, s = (torch.empty(rows, of.blocks, device=y.device) for _ in range(2))
    with launching(y):
        _round_kernel[(rows, triton.cdiv(of.blocks, n))](
            y, x8.view(torch.int8), d, s, idx, experts, of.columns, of.blocks, stride, splits,
            rows * stride, gated=gated, parts=of.parts, n=n, num_warps=2, **chained(y),
        )  # fmt: skip
    return Rounded(x8, d, s)


@dataclass(frozen=True)
class Tiling:
    """How a product is cut: rows a program, words of a row at a time, splits of the columns, warps."""

    rows: int = 8
    words: int = 128
    splits: int = 1
    warps: int = 1


def tiling(of: Matrices, pairs: int) -> Tiling:
    """One that fills the GPU with programs."""
    programs = pairs * triton.cdiv(of.rows, 8)
    splits = max(1, min(of.blocks // 32, 4096 // programs))
    return Tiling(splits=splits, words=128 if of.columns > 1024 else 64)


def products(
    x: Activations,
    of: Matrices,
    idx: Int[Tensor, " pairs"],
    share: int,
    cut: Tiling | None = None,
) -> Float[Tensor, "splits pairs M"]:
    """Of each pair's expert with row pair // share of x, not yet summed over splits.

    Rows of pairs whose expert is not there are not written.
    """
    cut = cut or tiling(of, len(idx))
    run = triton.cdiv(triton.cdiv(of.blocks, cut.splits), 32) * 32  # a group never splits
    splits = triton.cdiv(of.blocks, run)
    y = torch.empty(splits, len(idx), of.rows, device=of.codes.device)
    exact = isinstance(x, Tensor)
    places = (x.contiguous(),) * 4 if isinstance(x, Tensor) else (x.x8, x.d, x.s, x.d)
    with launching(of.codes):
        _product_kernel[(triton.cdiv(of.rows, cut.rows), len(idx), splits)](
            *places, of.table, of.codes, of.scale, idx, y,
            of.rows, of.columns, of.blocks, len(of), len(idx), share, run,
            parts=of.parts, group=of.group, rows=cut.rows, words=cut.words, exact=exact,
            aligned=of.aligned, warps=cut.warps, num_warps=cut.warps, **chained(y),
        )  # fmt: skip
    return y


def summed(
    y: Float[Tensor, "splits pairs M"],
    idx: Int[Tensor, " pairs"],
    share: int,
    experts: int,
    dtype: torch.dtype,
    coef: Float[Tensor, " pairs"] | None = None,
    places: Int[Tensor, " pairs"] | None = None,
) -> Float[Tensor, "T M"]:
    """Over splits and each token's `share` pairs, times `coef`. `places`: where in y each pair lies."""
    splits, pairs, m = y.shape
    out = torch.empty(pairs // share, m, dtype=dtype, device=y.device)
    width = 256
    with launching(y):
        _sum_kernel[(pairs // share, triton.cdiv(m, width))](
            y, idx, idx if coef is None else coef, idx if places is None else places, out, m,
            experts, pairs, splits, share=share, weighted=coef is not None,
            moved=places is not None, width=width, num_warps=2, **chained(y),
        )  # fmt: skip
    return out
