"""Pairs of tokens and experts, sorted by expert and cut into tiles, on a GPU that nobody waits for."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple, no_type_check

import torch
import triton
import triton.language as tl
from jaxtyping import Int, Int32
from torch import Tensor

from moecule.kernels.matrices import launching


@triton.jit
@no_type_check
def _order_kernel(
    idx_ptr, order_ptr, place_ptr, begin_ptr, pairs, experts, chunk: tl.constexpr
):  # fmt: skip
    """Program (expert); the last one is nobody."""
    e = tl.program_id(0)
    before = tl.zeros((chunk,), tl.int32)
    for start in tl.range(0, pairs, chunk):
        pair = start + tl.arange(0, chunk)
        has = tl.load(idx_ptr + pair, mask=pair < pairs, other=experts + 1)
        before += (has < e).to(tl.int32)
    at = tl.sum(before)
    tl.store(begin_ptr + e, at)
    for start in tl.range(0, pairs, chunk):
        pair = start + tl.arange(0, chunk)
        has = tl.load(idx_ptr + pair, mask=pair < pairs, other=experts + 1)
        mine = ((has == e) & (pair < pairs)).to(tl.int32)
        place = at + tl.cumsum(mine) - 1
        tl.store(order_ptr + place, pair.to(tl.int64), mask=mine > 0)
        tl.store(place_ptr + pair, place.to(tl.int64), mask=mine > 0)
        at += tl.sum(mine)


@triton.jit
@no_type_check
def _tile_kernel(
    begin_ptr, tile_ptr, tiles, experts, tokens: tl.constexpr, most: tl.constexpr,
    each: tl.constexpr,
):  # fmt: skip
    """Program (`each` tiles). most: a power of 2 that experts do not exceed."""
    e = tl.arange(0, most)
    begin = tl.load(begin_ptr + e, mask=e < experts, other=0)
    count = tl.load(begin_ptr + e + 1, mask=e < experts, other=0) - begin
    needed = (count + tokens - 1) // tokens
    end = tl.cumsum(needed)
    tile = tl.program_id(0) * each + tl.arange(0, each)
    i = tile[:, None] - (end - needed)[None, :]  # of the expert's tiles, if it is one
    its = (i >= 0) & (i < needed[None, :])
    left = tl.minimum(count[None, :] - i * tokens, tokens)
    at = tile_ptr + tile * 3
    there = tile < tiles
    tl.store(at, tl.sum(tl.where(its, e[None, :], 0), 1), mask=there)
    tl.store(at + 1, tl.sum(tl.where(its, begin[None, :] + i * tokens, 0), 1), mask=there)
    tl.store(at + 2, tl.sum(tl.where(its, left, 0), 1), mask=there)


class Sorted(NamedTuple):
    """Pairs by expert, and the tiles of tokens they are cut into."""

    order: Int[Tensor, " pairs"]  # pairs as they come, sorted; those of no expert last
    places: Int[Tensor, " pairs"]  # the inverse: where each pair is
    tiles: Int32[Tensor, "tiles three"]  # expert, first sorted pair, number of pairs
    tokens: int  # of a tile


def cut_of(pairs: int, experts: int, sizes: Iterable[int]) -> tuple[int, int]:
    """(tokens of a tile, tiles): of `sizes` the smallest that holds the usual expert's pairs.

    How many tiles are needed depends on the routing; there are as many as there can be.
    """
    sizes = sorted(sizes)
    most = min(1.5 * pairs / experts, sizes[-1])
    tokens = next(n for n in sizes if n >= most)
    return tokens, pairs // tokens + min(experts, pairs)


def sorted_pairs(idx: Int[Tensor, " pairs"], experts: int, sizes: Iterable[int]) -> Sorted:
    """`idx`: an expert, or `experts` for nobody. Tiles that are not needed have no pairs."""
    pairs = len(idx)
    tokens, tiles = cut_of(pairs, experts, sizes)
    order, places = torch.empty_like(idx), torch.empty_like(idx)
    begins = torch.empty(experts + 1, dtype=torch.int32, device=idx.device)
    table = torch.empty(tiles, 3, dtype=torch.int32, device=idx.device)
    chunk = min(4096, max(128, triton.next_power_of_2(pairs)))
    with launching(idx):
        _order_kernel[(experts + 1,)](
            idx, order, places, begins, pairs, experts, chunk=chunk,
            num_warps=8 if chunk > 1024 else 4,
        )  # fmt: skip
        _tile_kernel[(triton.cdiv(tiles, 16),)](
            begins, table, tiles, experts, tokens=tokens, most=triton.next_power_of_2(experts),
            each=16,
        )  # fmt: skip
    return Sorted(order, places, table, tokens)
