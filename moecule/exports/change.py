"""What became of weights on their way into another format: how much of what, and by how much it differs."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True)
class Change:
    """All weights of one width that became one type."""

    bits: int  # as moecule had them
    kind: str
    matrices: int
    size_bytes: int
    error: float  # |new - old| / |old| over all of them; 0: the very numbers


@dataclass
class Tally:
    """Sums over weights, by width and type."""

    of: dict[tuple[int, str], list[float]] = field(default_factory=dict)

    def add(
        self,
        bits: int,
        kind: str,
        size_bytes: int,
        old: Float[Tensor, "*shape"],
        new: Float[Tensor, "*shape"],
    ) -> None:
        """Note a matrix and what it became."""
        sums = self.of.setdefault((bits, kind), [0, 0, 0.0, 0.0])
        missed, whole = (old - new).double().square().sum(), old.double().square().sum()
        for i, more in enumerate((1, size_bytes, float(missed), float(whole))):
            sums[i] += more

    def keep(self, kind: str, tensor: Tensor) -> None:
        """Note a tensor that stays as it is."""
        self.keep_bytes(kind, tensor.nbytes)

    def keep_bytes(self, kind: str, size_bytes: int) -> None:
        """Note one that stays as it is, unread."""
        sums = self.of.setdefault((16, kind), [0, 0, 0.0, 0.0])
        sums[0] += 1
        sums[1] += size_bytes

    def changes(self) -> tuple[Change, ...]:
        """By width and type."""
        return tuple(
            Change(bits, kind, int(n), int(size), math.sqrt(missed / whole) if whole else 0.0)
            for (bits, kind), (n, size, missed, whole) in sorted(self.of.items())
        )
