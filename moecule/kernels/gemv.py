"""Products of few tokens with packed weights on a GPU: experts of all widths in one launch.

The stored planes are read as they are. A word of a b-bit part holds 32 / b neighbouring columns; its bits
j * b .. of every byte are those of four columns, so activations rounded to int8 are kept in that order
too, once for each part that occurs, and dp4a multiplies four codes at a time. A code of 3 bits is a
part of 2 and a part of 1: their products add up, the second times 4.

    y = sum over groups of   scale * (sum of codes * x  -  zero * sum of x)

A layer's experts take four launches: activations are rounded; `gated` multiplies by gate and up, and
rounds silu(gate) * up; `products` multiplies by down; `combine.combined` adds up. Each starts while the
one before still runs, and waits for it where its results are needed. A pair whose expert is none of
the layer's, skipped online, reads no weight.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import no_type_check

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int
from torch import Tensor

from moecule.kernels.activations import Rounded, put_rounded, swiglu
from moecule.kernels.dots import ask_for, multiplied, part, read
from moecule.kernels.matrices import Matrices, chained, launching, lying, take_turn

Activations = Rounded | Float[Tensor, "T N"]  # rounded, or as they are


@triton.jit
@no_type_check
def _put_gated(
    y, y_ptr, y8_ptr, yd_ptr, ys_ptr, to, m, to_blocks, rows: tl.constexpr, to_parts: tl.constexpr
):  # fmt: skip
    """Store silu(gate) * up of row `to`, rounded for what `to_parts` names; the gate's y come first."""
    half: tl.constexpr = rows // 2
    gate, up = tl.split(tl.permute(tl.reshape(y, (2, half)), (1, 0)))
    column = tl.program_id(0) * half + tl.arange(0, half)
    act = tl.where(column < m // 2, swiglu(gate, up), 0.0)
    if to_parts:
        block = tl.program_id(0) + tl.arange(0, 1)
        put_rounded(act[None, :], y8_ptr, yd_ptr, ys_ptr, to, block, to_blocks, to_parts)
    else:
        tl.store(y_ptr + to * (m // 2) + column, act, mask=column < m // 2)


@triton.jit
@no_type_check
def _held(
    codes, scale, zero, row, there, columns, blocks, bits, parts: tl.constexpr,
    leads: tl.constexpr, group: tl.constexpr, words: tl.constexpr, most: tl.constexpr,
):  # fmt: skip
    """What `read` gives of whole rows, for parts of 8, 4, 2 and 1 bits; nothing of those not in `parts`."""
    held = ()
    for i in tl.static_range(4):
        if parts & (8 >> i):
            held = held + read(
                codes, scale, zero, row, there & ((bits & (8 >> i)) > 0), 0, columns, blocks, bits,
                bits & (16 - (16 >> i)), 8 >> i, group, min(words, most * (8 >> i)),
                (leads & (8 >> i)) > 0,
            )  # fmt: skip
        else:
            held = held + (bits, bits, bits)
    return held


@triton.jit
@no_type_check
def _parts(
    held, codes, scale, zero, row, there, x8, d, s, x_at, columns, blocks, bits,
    parts: tl.constexpr, leads: tl.constexpr, group: tl.constexpr, words: tl.constexpr,
    most: tl.constexpr, exact: tl.constexpr, stages: tl.constexpr, hold: tl.constexpr,
):  # fmt: skip
    """[rows]: products with all parts, of what is held or as it is read."""
    y = tl.zeros(row.shape, tl.float32)
    for i in tl.static_range(4):
        if parts & (8 >> i):
            if bits & (8 >> i):
                low, its = bits & (16 - (16 >> i)), x8 + (3 - i) * (blocks * 8)
                if hold:
                    each = multiplied(
                        held[3 * i], held[3 * i + 1], held[3 * i + 2], 0, its, d, s, x_at,
                        columns, blocks, 8 >> i, exact, (leads & (8 >> i)) > 0,
                    )  # fmt: skip
                    more = tl.sum(each, 1)
                else:
                    more = part(
                        codes, scale, zero, row, there, its, d, s, x_at, columns, blocks, bits, low,
                        8 >> i, group, min(words, most * (8 >> i)), exact, (leads & (8 >> i)) > 0,
                        stages,
                    )  # fmt: skip
                y += more * tl.exp2(low.to(tl.float32))
    return y


@triton.jit
@no_type_check
def _product_kernel(
    x8_ptr, d_ptr, s_ptr, x_ptr, table_ptr, idx_ptr, y_ptr,
    y8_ptr, yd_ptr, ys_ptr, m, columns, blocks, experts, share, to_blocks,
    parts: tl.constexpr, leads: tl.constexpr, group: tl.constexpr, rows: tl.constexpr,
    words: tl.constexpr, most: tl.constexpr, exact: tl.constexpr, aligned: tl.constexpr,
    single: tl.constexpr, gated: tl.constexpr, to_parts: tl.constexpr, stages: tl.constexpr,
    early: tl.constexpr, hold: tl.constexpr, known: tl.constexpr, chain: tl.constexpr,
):  # fmt: skip
    """Program (rows, pair).

    gated: half of the rows are the gate's. to_parts, to_blocks: of what the result is rounded for; 0:
    it is not. single: there is one matrix. known: which expert a pair has was written before the kernel
    before this one began. early: lines of a row that the cache is asked for while that one still runs.
    hold: whole rows are read while it runs.
    """
    if chain and not known:
        take_turn()
    pair, r = tl.program_id(1), tl.arange(0, rows)
    if gated:
        half: tl.constexpr = rows // 2
        channel = tl.program_id(0) * half + r % half
        row, there = channel + (r // half) * (m // 2), channel < m // 2
    else:
        row = tl.program_id(0) * rows + r
        there = row < m
    e = tl.zeros((), tl.int64)
    if not single:
        e = tl.load(idx_ptr + pair)
    codes, scale, zero, bits = lying(table_ptr, e, e < experts, aligned)
    if aligned:  # so that the compiler sees it
        blocks = blocks // 4 * 4
    if early > 0:
        ask_for(codes + row * (blocks * bits), there, blocks * bits, early)
    held = ()
    if hold:
        held = _held(
            codes, scale, zero, row, there, columns, blocks, bits, parts, leads, group, words, most
        )
    if chain and known:
        take_turn()
    at = (pair // share).to(tl.int64)
    x8, d, s = x8_ptr + at * (blocks * 32), d_ptr + at * blocks, s_ptr + at * blocks
    y = _parts(
        held, codes, scale, zero, row, there, x8, d, s, x_ptr + at * columns, columns, blocks, bits,
        parts, leads, group, words, most, exact, stages, hold,
    )  # fmt: skip
    to = pair.to(tl.int64)
    if gated:
        _put_gated(y, y_ptr, y8_ptr, yd_ptr, ys_ptr, to, m, to_blocks, rows, to_parts)
    else:
        tl.store(y_ptr + to * m + row, y.to(y_ptr.dtype.element_ty), mask=there)


@dataclass(frozen=True)
class Tiling:
    """How a product is cut.

    Rows a program; words of a row at a time, of a part of 2 bits; warps; what is read ahead.
    """

    rows: int = 8
    words: int = 128
    warps: int = 1
    stages: int = 1
    early: bool = False


REGISTERS = 128  # a thread's: 16 warps on a multiprocessor
HELD = 64  # of them, for codes read before a kernel's turn
WARPS = 4096  # that fill a GPU twice


def tiling(of: Matrices, pairs: int) -> Tiling:
    """Of a product: warps share a row where there would be too few of them."""
    rows = 8 if pairs * of.rows >= 8 * 1024 else 4
    fill = triton.next_power_of_2(triton.cdiv(WARPS, pairs * triton.cdiv(of.rows, rows)))
    row = triton.next_power_of_2(of.blocks * max(2, 1 << (of.parts.bit_length() - 1)))
    warps = max(1, min(4, fill, row // 128))
    return Tiling(rows, min(128 * warps, max(32, row)), warps, early=of.columns <= 2048)


def gated_tiling(of: Matrices) -> Tiling:
    """Of gate and up: a block of 32 channels, which is rounded together, a program."""
    return Tiling(64, 64, 4, stages=2) if of.columns > 2048 else Tiling(64, 128, 8, early=True)


def products(
    x: Activations,
    of: Matrices,
    idx: Int[Tensor, " pairs"] | None,
    share: int,
    dtype: torch.dtype = torch.float32,
    cut: Tiling | None = None,
) -> Float[Tensor, "pairs M"]:
    """Of each pair's expert with row pair // share of x. idx: None where there is one matrix.

    Rows of pairs whose expert is not there are 0.
    """
    pairs = share * len(x if isinstance(x, Tensor) else x.d)
    y = torch.empty(pairs, of.rows, dtype=dtype, device=of.table.device)
    cut = cut or tiling(of, pairs)
    _launch(x, of, idx, share, cut, (triton.cdiv(of.rows, cut.rows), pairs), y)
    return y


def gated(
    x: Activations,
    of: Matrices,
    idx: Int[Tensor, " pairs"],
    share: int,
    down: Matrices,
    cut: Tiling | None = None,
) -> Rounded | Float[Tensor, "pairs F"]:
    """silu(gate) * up of each pair's expert, the gate's rows before those of up; rounded as x is."""
    pairs, cut = len(idx), cut or gated_tiling(of)
    grid = (triton.cdiv(of.rows // 2, cut.rows // 2), pairs)
    made: Rounded | Tensor
    if isinstance(x, Tensor):
        made = torch.empty(pairs, of.rows // 2, device=of.table.device)
        _launch(x, of, idx, share, cut, grid, made, gated=True)
    else:
        made = Rounded.empty(pairs, down)
        _launch(x, of, idx, share, cut, grid, made.d, made, down, gated=True)
    return made


def _launch(
    x: Activations,
    of: Matrices,
    idx: Tensor | None,
    share: int,
    cut: Tiling,
    grid: tuple[int, int],
    y: Tensor,
    to: Rounded | None = None,
    down: Matrices | None = None,
    *,
    gated: bool = False,
) -> None:
    exact = isinstance(x, Tensor)
    places = (x.contiguous(),) * 4 if isinstance(x, Tensor) else (x.x8, x.d, x.s, x.d)
    out = (y, y, y) if to is None else (to.x8.view(torch.int8), to.d, to.s)
    most = triton.next_power_of_2(of.blocks)
    lines = triton.next_power_of_2(triton.cdiv(of.blocks * max(of.widths), 32))
    words = sum(min(cut.words, most * b) for b in (8, 4, 2, 1) if of.parts & b)
    whole = all(cut.words >= of.blocks * b for b in (8, 4, 2, 1) if of.parts & b)
    hold = whole and words * cut.rows <= HELD * 32 * cut.warps
    with launching(of.table):
        _product_kernel[grid](
            *places, of.table, of.table if idx is None else idx, y, *out,
            of.rows, of.columns, of.blocks, len(of), share, 0 if down is None else down.blocks,
            parts=of.parts, leads=of.leads, group=of.group, rows=cut.rows, words=cut.words,
            most=most, exact=exact, aligned=of.aligned,
            single=idx is None, gated=gated, to_parts=0 if down is None else down.parts,
            stages=cut.stages, early=lines if cut.early and not hold else 0, hold=hold,
            # rounding stands between a router's choice and this; without, that may be the kernel before
            known=not exact, num_warps=cut.warps, maxnreg=REGISTERS, **chained(y),
        )  # fmt: skip
