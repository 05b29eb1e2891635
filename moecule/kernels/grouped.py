"""Products of many tokens with packed weights on a GPU: each expert's tokens together, weights unpacked
on the way to the matrix units.

Pairs are sorted by expert and cut into tiles of tokens that one expert serves. How many tiles there are
depends on the routing; as many as there can be are started, and those left over return at once, so that
nothing waits for the GPU. One launch for each width; a tile of another width returns at once too.

The matrix units are given the codes themselves, which 16-bit floats hold exactly; a step of the loop
covers columns of one group, whose scale comes after:

    y += scale * (x . codes  -  zero * sum of x)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import no_type_check

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int
from torch import Tensor

from moecule.kernels.matrices import Matrices, launching
from moecule.kernels.unpack import codes_at
from moecule.packed import BLOCK


@triton.jit
@no_type_check
def _grouped_kernel(
    x_ptr, given_ptr, tile_ptr, table_ptr, codes_ptr, scale_ptr, out_ptr, m, columns, blocks,
    bits: tl.constexpr, group: tl.constexpr, tokens: tl.constexpr, rows: tl.constexpr,
    n: tl.constexpr,
):  # fmt: skip
    """Program (rows, tile)."""
    tile = tile_ptr + tl.program_id(1) * 3
    e, first, count = tl.load(tile).to(tl.int64), tl.load(tile + 1), tl.load(tile + 2)
    if count > 0:
        if tl.load(table_ptr + e * 4 + 3) == bits:
            at = tl.arange(0, tokens)
            here = at < count
            given = tl.load(given_ptr + first + at, mask=here, other=0)
            row = (tl.program_id(0) * rows + tl.arange(0, rows)).to(tl.int64)
            there, groups = row < m, (columns + group - 1) // group
            codes = codes_ptr + tl.load(table_ptr + e * 4) + row * (blocks * bits)
            scale_at = scale_ptr + tl.load(table_ptr + e * 4 + 1) + row * groups
            zero_at = scale_ptr + tl.load(table_ptr + e * 4 + 2) + row * groups
            total = tl.zeros((tokens, rows), tl.float32)
            for block in tl.range(0, blocks, n):
                column = block * 32 + tl.arange(0, 32 * n)
                x = tl.load(
                    x_ptr + given[:, None] * columns + column[None, :],
                    mask=here[:, None] & (column < columns)[None, :], other=0.0,
                )  # fmt: skip
                q = codes_at(codes, block, there, blocks, rows, n, bits)
                # or-ed into the last bits of a power of two, a code is that power plus itself
                if bits == 8 or x.dtype == tl.float32:
                    w, more = q.to(x.dtype), 0.0
                elif x.dtype == tl.bfloat16:
                    w, more = (q | 0x4300).to(tl.int16).to(tl.bfloat16, bitcast=True), 128.0
                else:
                    w, more = (q | 0x6400).to(tl.int16).to(tl.float16, bitcast=True), 1024.0
                g = (block * 32) // group
                scale = tl.load(scale_at + g, mask=there, other=0.0).to(tl.float32)
                zero = 0.5
                if bits > 1:
                    zero = tl.load(zero_at + g, mask=there, other=0.0).to(tl.float32)
                y = tl.dot(x, tl.trans(w), input_precision="ieee")
                x_sum = tl.sum(x.to(tl.float32), 1)
                shift = scale * (zero + more)
                total += y * scale[None, :] - x_sum[:, None] * shift[None, :]
            out = out_ptr + (first + at).to(tl.int64)[:, None] * m + row[None, :]
            inside = here[:, None] & there[None, :]
            tl.store(out, total.to(out_ptr.dtype.element_ty), mask=inside)


@dataclass(frozen=True)
class Sorted:
    """Pairs by expert, and the tiles of tokens they are cut into."""

    order: Int[Tensor, " pairs"]  # pairs as they come, sorted; those of no expert last
    tiles: Int[Tensor, "tiles three"]  # expert, first sorted pair, number of pairs
    tokens: int  # of a tile

    @staticmethod
    def of(idx: Int[Tensor, " pairs"], experts: int) -> Sorted:
        """Nothing here waits for the GPU."""
        pairs = len(idx)
        mean = pairs / experts
        tokens = next(n for n in (16, 32, 64) if n >= min(mean, 64))
        by_expert, order = idx.sort(stable=True)
        places = torch.arange(experts + 1, device=idx.device)
        begins = torch.searchsorted(by_expert, places)  # of each expert, and of no expert's
        counts = begins.diff()
        needed = (counts + tokens - 1) // tokens
        ends = needed.cumsum(0)
        tile = torch.arange(pairs // tokens + min(experts, pairs), device=idx.device)
        e = torch.searchsorted(ends, tile, right=True).clamp(max=experts - 1)
        before = (tile - ends[e] + needed[e]) * tokens
        left = torch.where(tile < ends[-1], counts[e] - before, 0).clamp(max=tokens)
        table = torch.stack([e, begins[e] + before, left], 1)
        return Sorted(order, table.int(), tokens)


def grouped(
    x: Float[Tensor, "T N"],
    given: Int[Tensor, " pairs"],
    of: Matrices,
    pairs: Sorted,
) -> Float[Tensor, "pairs M"]:
    """Of each sorted pair's expert with row `given` of x, in its dtype.

    Rows of pairs that no expert serves are not written.
    """
    x = x.contiguous()
    out = torch.empty(len(given), of.rows, dtype=x.dtype, device=x.device)
    rows, n = 128, min(4, of.group // BLOCK)
    grid = (triton.cdiv(of.rows, rows), len(pairs.tiles))
    with launching(x):
        for bits in of.widths:
            _grouped_kernel[grid](
                x, given, pairs.tiles, of.table, of.codes, of.scale, out, of.rows, of.columns,
                of.blocks, bits=bits, group=of.group, tokens=pairs.tokens, rows=rows, n=n,
                num_warps=4 if pairs.tokens == 16 else 8, num_stages=3,
            )  # fmt: skip
    return out
