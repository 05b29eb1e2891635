"""Codes of 1 to 8 bits with scales and zero points: the one layout, and the reference.

    weight = (code - zero) * scale        scale and zero: one a row and group of columns

Codes are stored as bit planes. A width is a sum of powers of two (3 = 2 + 1, 7 = 4 + 2 + 1),
and each part of b bits takes b int32 words for 32 columns: column k of a block of 32 sits in
word k // (32 / b) of that block, at bit b * (k mod 32 / b). Columns pad to 32 and no further;
rows do not pad. Parts lie one after the other along the last axis, the widest first; that one
holds the lowest bits. The kernels' tile-major form holds the same codes and is a lossless
rearrangement of this one.

Scales and zero points are fp16. One-bit codes have no stored zero: it is 1/2, codes mean +-.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Float16, Int, Int32
from torch import Tensor, nn

BLOCK = 32  # columns that share the words of a plane
WIDTHS = range(1, 9)


@dataclass(frozen=True)
class Packed:
    """A weight [..., M, N] in `bits`-bit codes, `group` columns to a scale."""

    codes: Int32[Tensor, "*E M words"]
    scale: Float16[Tensor, "*E M G"]
    zero: Float16[Tensor, "*E M G"] | None  # None: 1/2, for one-bit codes
    bits: int
    group: int
    columns: int

    @property
    def size_bytes(self) -> int:
        """Bytes stored: codes with their padding, scales and zero points."""
        tensors = [self.codes, self.scale] + ([] if self.zero is None else [self.zero])
        return sum(t.numel() * t.element_size() for t in tensors)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Float[Tensor, "*E M N"]:
        """The weights that the codes stand for, computed in float32."""
        q = unpack(self.codes, self.bits, self.columns)
        return affine(q, self.scale, self.zero, self.group).to(dtype)


def packed_of(module: nn.Module, name: str, row: Any = ...) -> Packed:
    """The packed weight of that name that `runtime.register_packed` made room for."""
    keep, columns = module.widths[name]  # type: ignore[index]
    scale = getattr(module, f"{name}_scale")[row].view(torch.float16)
    zero = None if keep.bits == 1 else getattr(module, f"{name}_zero")[row].view(torch.float16)
    return Packed(
        getattr(module, f"{name}_codes")[row], scale, zero, keep.bits, keep.group, columns
    )


def affine(
    codes: Int[Tensor, "*E M N"],
    scale: Float[Tensor, "*E M G"],
    zero: Float[Tensor, "*E M G"] | None,
    group: int,
) -> Float[Tensor, "*E M N"]:
    """(codes - zero) * scale, in float32."""
    n = codes.shape[-1]
    spread = [
        t.float().repeat_interleave(min(group, n), -1)[..., :n]
        for t in (scale, zero)
        if t is not None
    ]
    half = spread[1] if zero is not None else 0.5
    return (codes.float() - half) * spread[0]


def parts(bits: int) -> list[int]:
    """The powers of two that make up `bits`, in the order in which their planes are stored.

    >>> parts(3), parts(7), parts(8)
    ([2, 1], [4, 2, 1], [8])
    """
    if bits not in WIDTHS:
        raise ValueError(f"a code has 1 to 8 bits, not {bits}")
    return [b for b in (8, 4, 2, 1) if bits & b]


def words_per_row(bits: int, columns: int) -> int:
    """int32 words that a row of `columns` codes takes."""
    return -(-columns // BLOCK) * bits


def packed_bytes(bits: int, rows: int, columns: int, group: int) -> int:
    """Bytes of a packed [rows, columns] weight: codes, padding, scales and zero points."""
    scales = -(-columns // group) * (1 if bits == 1 else 2)
    return rows * (4 * words_per_row(bits, columns) + 2 * scales)


def pack(codes: Int[Tensor, "*E M N"], bits: int) -> Int32[Tensor, "*E M words"]:
    """Codes below 2**bits as bit planes. Raises ValueError where a code does not fit."""
    if codes.numel() and not 0 <= int(codes.min()) <= int(codes.max()) < 2**bits:
        raise ValueError(
            f"a code lies outside 0..{2**bits - 1} and cannot be stored in {bits} bits"
        )
    q = torch.nn.functional.pad(codes.long(), (0, -codes.shape[-1] % BLOCK))
    planes, low = [], 0
    for b in parts(bits):
        at = torch.arange(BLOCK // b, device=q.device) * b
        part = (q >> low & (1 << b) - 1).unflatten(-1, (-1, BLOCK // b))
        word = (part << at).sum(-1)
        planes.append(torch.where(word >= 2**31, word - 2**32, word).int())
        low += b
    return torch.cat(planes, -1)


def unpack(words: Int32[Tensor, "*E M words"], bits: int, columns: int) -> Int[Tensor, "*E M N"]:
    """The inverse of `pack`."""
    blocks, low, start = -(-columns // BLOCK), 0, 0
    out = torch.zeros((), dtype=torch.int32, device=words.device)
    for b in parts(bits):
        at = torch.arange(0, BLOCK, b, dtype=torch.int32, device=words.device)
        plane = words[..., start : start + blocks * b, None]
        # >> keeps the sign; the mask takes that off again
        out = out + ((plane >> at & (1 << b) - 1) << low).flatten(-2)
        low, start = low + b, start + blocks * b
    return out[..., :columns]
