"""What a program of `gemv` does with one part of its rows: reads codes and scales, and multiplies.

Functions for kernels. A part holds b bits of every code, as `packed` stores them.
"""

from __future__ import annotations

import os
from typing import no_type_check

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")


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
def _half(at, mask):
    """The 16-bit floats at `at` in float32, 0 where there is no `mask`.

    A plain load would be given to threads in an order of its own, since no two neighbours lie side by
    side, and brought to the products' order through shared memory.
    """
    if INTERPRETED:
        return tl.load(at, mask=mask, other=0.0).to(tl.float32)
    else:
        return tl.inline_asm_elementwise(
            "{ .reg .pred p; .reg .b16 h; setp.ne.b32 p, $2, 0; mov.b16 h, 0; "
            "@p ld.global.nc.b16 h, [$1]; cvt.f32.f16 $0, h; }",
            "=r,l,r",
            [at.to(tl.int64), mask.to(tl.int32)],
            dtype=tl.float32,
            is_pure=True,
            pack=1,
        )


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
def _exact_sums(q, x_ptr, word, inside, columns, b: tl.constexpr):
    """[rows, words], [words]: of every word of q [rows, words], codes times x, and x."""
    sums = tl.zeros(q.shape, tl.float32)
    given = tl.zeros(word.shape, tl.float32)
    for r in tl.static_range(32 // b):
        column = word * (32 // b) + r
        x = tl.load(x_ptr + column, mask=inside & (column < columns), other=0.0).to(tl.float32)
        sums += ((q >> (b * r)) & ((1 << b) - 1)).to(tl.float32) * x[None, :]
        given += x
    return sums, given


@triton.jit
@no_type_check
def read(
    codes, scale, zero, row, there, start, columns, blocks, bits, low,
    b: tl.constexpr, group: tl.constexpr, words: tl.constexpr, leads: tl.constexpr,
):  # fmt: skip
    """[rows, words] of a part of b bits from word `start` on; scale and zero, [rows, those that differ].

    low: the sum of the wider parts, that many bits below this one; the first brings the zeros. leads:
    whether this part may be the first.
    """
    together: tl.constexpr = 4 if b == 8 else b  # words that share an activation's scale
    wide: tl.constexpr = 32 * together // b
    reach: tl.constexpr = 128 // b if 128 // b < group else group  # columns under one scale
    each: tl.constexpr = reach // wide if reach > wide else 1
    word = start + tl.arange(0, words)
    inside = word < blocks * b
    first_word = row * (blocks * bits) + low * blocks
    q = tl.load(
        codes + (first_word[:, None] + word[None, :]),
        mask=there[:, None] & inside[None, :], other=0,
    )  # fmt: skip
    i = tl.arange(0, words // together // each)
    column = (start + i * (together * each)) * (32 // b)
    which = there[:, None] & (column < columns)[None, :]
    g = (row * ((columns + group - 1) // group))[:, None] + (column // group)[None, :]
    z = tl.zeros(which.shape, tl.float32)
    if leads:
        z = _half(zero + g, which & (bits > 1) & (low == 0))
        if b == 1:  # of one bit all zeros are 1/2
            z = tl.where(bits == 1, 0.5, z)
    return q, _half(scale + g, which), z


@triton.jit
@no_type_check
def multiplied(
    q, scale, zero, start, x8, d_ptr, s_ptr, x_ptr, columns, blocks,
    b: tl.constexpr, exact: tl.constexpr, leads: tl.constexpr,
):  # fmt: skip
    """[rows, scales of a row]: products with what `read` gave."""
    rows: tl.constexpr = q.shape[0]
    words: tl.constexpr = q.shape[1]
    parts: tl.constexpr = scale.shape[1]
    together: tl.constexpr = 4 if b == 8 else b
    n: tl.constexpr = words // together
    word = start + tl.arange(0, words)
    inside = word < blocks * b
    if exact:
        sums, given = _exact_sums(q, x_ptr, word, inside, columns, b)
        y = tl.sum(tl.reshape(sums, (rows, n, together)), 2)
        x_sum = tl.sum(tl.reshape(given, (n, together)), 1)
    else:
        counts = tl.zeros((rows, words), tl.int32)
        for j in tl.static_range(8 // b):
            x = tl.load(x8 + (j * (blocks * b) + word), mask=inside, other=0)
            x = tl.broadcast_to(x[None, :], (rows, words))
            counts = _dp4a(_every_byte(q, j, b), x, counts)
        # of every sum its block; of b = 8 two sums are of one
        i = tl.arange(0, n) if together == b else tl.arange(0, n) // (b // together)
        block = start // b + i
        near = block < blocks
        d = tl.load(d_ptr + block, mask=near, other=0.0)
        y = tl.sum(tl.reshape(counts, (rows, n, together)), 2).to(tl.float32) * d[None, :]
        x_sum = tl.zeros((n,), tl.float32)
        if leads:
            if together < b:  # half a block's
                near = near & (tl.arange(0, n) % (b // together) == 0)
            x_sum = tl.load(s_ptr + block, mask=near, other=0.0)
    y = tl.sum(tl.reshape(y, (rows, parts, n // parts)), 2)
    if leads:
        y -= zero * tl.sum(tl.reshape(x_sum, (parts, n // parts)), 1)[None, :]
    return scale * y


@triton.jit
@no_type_check
def part(
    codes, scale, zero, row, there, x8, d_ptr, s_ptr, x_ptr, columns, blocks, bits, low,
    b: tl.constexpr, group: tl.constexpr, words: tl.constexpr, exact: tl.constexpr,
    leads: tl.constexpr, stages: tl.constexpr,
):  # fmt: skip
    """[rows]: the products with one part of b bits."""
    rows: tl.constexpr = row.shape[0]
    together: tl.constexpr = 4 if b == 8 else b
    reach: tl.constexpr = 128 // b if 128 // b < group else group
    wide: tl.constexpr = 32 * together // b
    each: tl.constexpr = reach // wide if reach > wide else 1
    total = tl.zeros((rows, words // together // each), tl.float32)
    for start in tl.range(0, blocks * b, words, num_stages=stages):
        q, s, z = read(
            codes, scale, zero, row, there, start, columns, blocks, bits, low, b, group, words,
            leads,
        )  # fmt: skip
        total += multiplied(
            q, s, z, start, x8, d_ptr, s_ptr, x_ptr, columns, blocks, b, exact, leads
        )
    return tl.sum(total, 1)


@triton.jit
@no_type_check
def ask_for(at, there, words, lines: tl.constexpr):
    """Have the cache fetch `words` words from each of `at` [rows] on; nobody waits for them."""
    if not INTERPRETED:
        word = tl.arange(0, lines)[None, :] * 32  # a line of the cache has 32
        tl.inline_asm_elementwise(
            "{ .reg .pred p; setp.ne.b32 p, $2, 0; @p prefetch.global.L2 [$1]; mov.u32 $0, 0; }",
            "=r,l,r",
            [(at[:, None] + word).to(tl.int64), (there[:, None] & (word < words)).to(tl.int32)],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )
