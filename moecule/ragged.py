"""Experts of many widths, at 16 bits: their matrices one after the other, and where each begins."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import torch
from jaxtyping import Float
from torch import Tensor, nn


class Ragged(nn.Module):
    """As runtime.Stack for experts that each keep channels of their own number.

    A down projection lies transposed, so that a channel is a row of it too.
    """

    def __init__(self, widths: Sequence[int], rows: int, hidden: int, dtype: torch.dtype) -> None:
        """`rows`: of the first matrix, for each channel."""
        super().__init__()
        self.ends = [0, *accumulate(widths)]
        self.rows = {"gate_up": rows, "down": 1}
        for name, each in self.rows.items():
            weight = torch.empty(each * self.ends[-1], hidden, dtype=dtype)
            self.register_parameter(f"{name}_weight", nn.Parameter(weight, requires_grad=False))

    def _piece(self, name: str, row: int) -> Float[Tensor, "channels H"]:
        each = self.rows[name]
        return self.get_parameter(f"{name}_weight")[
            each * self.ends[row] : each * self.ends[row + 1]
        ]

    def times(
        self, x: Float[Tensor, "T N"], name: str, row: int, *, exact: bool
    ) -> Float[Tensor, "T M"]:
        """x times one expert's matrix."""
        return nn.functional.linear(x, self.weight(name, row))

    def weight(self, name: str, row: int) -> Float[Tensor, "M N"]:
        """One expert's matrix."""
        piece = self._piece(name, row)
        return piece.mT if name == "down" else piece

    def set(self, name: str, row: int, value: Float[Tensor, "M N"]) -> None:
        """Store one expert's matrix."""
        self._piece(name, row).data.copy_(value.mT if name == "down" else value)
