"""Where packed weights of several widths lie in a GPU's memory, for kernels that read them as they are."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import reduce
from operator import or_
from typing import Any, no_type_check

import torch
import triton
import triton.language as tl
from jaxtyping import Int64
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from moecule.packed import BLOCK, Packed

GROUPS = (32, 64, 128, 256, 512, 1024)  # of columns that a kernel can tell apart by its blocks


def launching(tensor: Tensor) -> AbstractContextManager[object]:
    """Within, kernels start on the GPU where the tensor lies; on a CPU they are interpreted."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


@triton.jit
@no_type_check
def take_turn():
    """Wait for what the kernels before this one write, and let the next one start."""
    gdc_wait()
    gdc_launch_dependents()


@triton.jit
@no_type_check
def lying(table_ptr, e, there, aligned: tl.constexpr):
    """(codes, scale, zero, bits) of matrix e in a table: where they lie; nothing if it is not `there`."""
    at = table_ptr + e * 4
    codes = tl.load(at, mask=there, other=0).to(tl.pointer_type(tl.int32))
    if aligned:  # said here: of what a function has returned the compiler would not keep it
        codes = tl.multiple_of(codes, 16)
    scale = tl.load(at + 1, mask=there, other=0).to(tl.pointer_type(tl.float16))
    zero = tl.load(at + 2, mask=there, other=0).to(tl.pointer_type(tl.float16))
    return codes, scale, zero, tl.load(at + 3, mask=there, other=0).to(tl.int32)


def chained(tensor: Tensor) -> dict[str, bool]:
    """How to launch a kernel that takes its turn, and may be started before the one before ends."""
    may = tensor.is_cuda and torch.cuda.get_device_capability(tensor.device) >= (9, 0)
    return {"chain": True, "launch_pdl": True} if may else {"chain": False}


@dataclass(frozen=True, eq=False)
class Matrices:
    """Packed weights [M, N] of one shape and one group, of any widths: where each lies."""

    table: Int64[Tensor, "E four"]  # addresses of codes, scale and zero; and bits
    rows: int
    columns: int
    group: int
    widths: tuple[int, ...]  # all that occur
    aligned: bool  # whether every row of every part begins at a multiple of 16 bytes
    keeps: tuple[Tensor, ...] = ()  # what the table points into must outlive it

    @staticmethod
    def of(weights: Sequence[Packed], device: torch.device | None = None) -> Matrices | None:
        """None where the kernels do not serve them: groups that differ or are no power of 2.

        device: of the table, where weights lie in pinned memory; else their own.
        """
        first = weights[0]
        group = min(first.group, max(BLOCK, 1 << (first.columns - 1).bit_length()))
        alike = all((w.group, w.columns) == (first.group, first.columns) for w in weights)
        if not alike or group not in GROUPS:
            return None
        table, keeps = [], []
        for w in weights:
            zero = w.scale if w.zero is None else w.zero  # 1/2 is not stored, and not read
            table.append([*(t.data_ptr() for t in (w.codes, w.scale, zero)), w.bits])
            keeps += [w.codes, w.scale, zero]
        at = torch.tensor(table, dtype=torch.int64, device=device or first.codes.device)
        torch._dynamo.mark_static_address(at)  # CUDA graphs need not copy it before every step
        rows, columns = first.codes.shape[0], first.columns
        widths = tuple(sorted({w.bits for w in weights}))
        even = all(w.codes.data_ptr() % 16 == 0 for w in weights) and -(-columns // BLOCK) % 4 == 0
        return Matrices(at, rows, columns, group, widths, even, tuple(keeps))

    def __len__(self) -> int:
        return len(self.table)

    def __reduce__(self) -> Any:
        return type(None), ()  # a copy of a module finds its own weights

    @property
    def parts(self) -> int:
        """All parts that occur, of 1, 2, 4, 8 bits, in one number."""
        return reduce(or_, self.widths)

    @property
    def any_width(self) -> int:
        """All widths that occur, in one number: bit b for b bits."""
        return sum(1 << bits for bits in self.widths)

    @property
    def leads(self) -> int:
        """The parts that come first in some width, in one number."""
        return reduce(or_, (1 << (bits.bit_length() - 1) for bits in self.widths))

    @property
    def blocks(self) -> int:
        """Blocks of 32 columns."""
        return -(-self.columns // BLOCK)
