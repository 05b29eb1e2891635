"""Dropping channels of experts: how many may go, and which, of scores alone.

A share of the channels goes, which is that share of the experts' weights: of every expert, the same
number (spread "expert"), or those of the lowest scores of a layer ("layer") or of all layers ("model").
With a `multiple` they go in runs of so many, the lowest of an expert first, each run ranked by the sum
of its scores, so that widths are multiples of it. Ties keep the channel of the lower number, in the
expert of the lower number, in earlier layers. An expert may lose all its channels: it then adds nothing,
and the router still picks it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float64, Int32
from torch import Tensor

from moecule.budget import Inventory
from moecule.errors import RecipeError
from moecule.packed import BLOCK

Spread = Literal["model", "layer", "expert"]
Order = Mapping[
    int, Int32[Tensor, "E F"]
]  # by layer: channels of each expert, those that stay longest first
ALIGNED = 8  # channels: torch's grouped product wants rows to begin at multiples of 16 bytes
STEPS = 1000  # shares that are tried where channels are many


@dataclass(frozen=True)
class Narrowing:
    """What may go of a model's experts, and in which order."""

    scores: Mapping[int, Float64[Tensor, "E F"]]
    inventory: Inventory
    spread: Spread = "model"
    multiple: int = 0  # 0: as torch wants it where all experts get one width, else 1
    rounds: bool = False  # what stays

    @staticmethod
    def of(
        scores: Mapping[int, Tensor], inventory: Inventory, options: Any, group: int | None = None
    ) -> Narrowing:
        """By the options that all methods of channels have; `group` of columns where what stays is rounded.

        Experts of many widths are then made of whole groups if they can be, else of blocks of the packed
        layout, unless the options say another multiple.
        """
        multiple, wide = options.multiple, {e.down[1] for e in inventory.experts.values()}
        if group is not None and not multiple and options.budget != "expert":
            multiple = next((u for u in (group, BLOCK) if not any(w % u for w in wide)), BLOCK)
        return Narrowing(scores, inventory, options.budget, multiple, group is not None)

    @property
    def run(self) -> int:
        """Channels that go together."""
        return self.multiple or (ALIGNED if self.spread == "expert" else 1)

    def order(self) -> Order:
        """Which channels stay longest."""
        return {
            i: s.argsort(dim=1, descending=True, stable=True).int() for i, s in self.scores.items()
        }

    def kept(self, share: float) -> dict[int, tuple[int, ...]]:
        """The experts that stay: all of them."""
        return {i: tuple(range(e.n)) for i, e in self.inventory.experts.items()}

    def counts(self, share: float) -> dict[int, tuple[int | None, ...]]:
        """How many channels each expert keeps; None: all."""
        experts = self.inventory.experts
        if share == 0:
            return {i: (None,) * e.n for i, e in experts.items()}
        if self.spread == "expert":
            left = {i: [self._left(e.down[1] // self.run, share)] * e.n for i, e in experts.items()}
        elif self.spread == "layer":
            left = {}
            for i in experts:
                left |= self._ranked([i], share)
        else:
            left = self._ranked(sorted(experts), share)
        return {
            i: tuple(None if n * self.run == experts[i].down[1] else n * self.run for n in of)
            for i, of in left.items()
        }

    def _left(self, runs: int, share: float) -> int:
        return runs - int(share * runs + 1e-9)

    def _ranked(self, layers: list[int], share: float) -> dict[int, list[int]]:
        """Runs that each expert keeps when those of these layers are ranked together."""
        runs = []
        for i in layers:
            high = self.scores[i].sort(dim=1, descending=True).values
            runs.append(high.unflatten(1, (-1, self.run)).sum(-1))
        flat = torch.cat([r.flatten() for r in runs])
        best = flat.argsort(descending=True, stable=True)[: self._left(len(flat), share)]
        stays = torch.zeros(len(flat), dtype=torch.bool)
        stays[best] = True
        parts = stays.split([r.numel() for r in runs])
        return {
            i: part.view(r.shape).sum(1).tolist()
            for i, part, r in zip(layers, parts, runs, strict=True)
        }

    def shares(self) -> list[float]:
        """Shares among which one is found that meets a size, rising from 0."""
        widths = [e.down[1] // self.run for e in self.inventory.experts.values()]
        n = max(widths) if self.spread == "expert" else min(STEPS, self._runs())
        return [k / n for k in range(n)]

    def _runs(self) -> int:
        of = [e.n * (e.down[1] // self.run) for e in self.inventory.experts.values()]
        return min(of) if self.spread == "layer" else sum(of)

    def check(self, share: float) -> int | None:
        """None: routers pick as many experts as they did.

        Raises RecipeError for a share that drops no channel, and runs that an expert is not made of.
        """
        widths = sorted({e.down[1] for e in self.inventory.experts.values()})
        if share and self.rounds:
            self._check_runs(widths)
        odd = [w for w in widths if w % self.run] if self.multiple >= 0 else widths
        if odd:
            raise RecipeError(
                f"widths in multiples of {self.multiple or self.run} were asked for, and experts of this "
                f"model have {odd[0]} channels; set channels.multiple to a number that divides it"
            )
        runs = widths[0] // self.run if self.spread == "expert" else self._runs()
        if share and int(share * runs + 1e-9) == 0:
            raise RecipeError(
                f"to drop {share:.4g} of the channels was asked, which of {runs} runs of {self.run} is not "
                f"one; the least is {math.ceil(10**4 / runs) / 10**4:g}"
            )
        return None

    def _check_runs(self, widths: list[int]) -> None:
        """Raise RecipeError where experts of many widths could not be rounded in runs of whole blocks."""
        if self.is_even or not (self.run % BLOCK or any(w % BLOCK for w in widths)):
            return
        raise RecipeError(
            f"experts of many widths are rounded in runs of {BLOCK} channels; they have {max(widths)}, and "
            f"widths in multiples of {self.run} were asked for; set channels.multiple to a multiple of "
            f"{BLOCK}, or channels.budget=expert, which gives all experts one width"
        )

    @property
    def is_even(self) -> bool:
        """Whether all experts of a layer get one width, whatever the scores."""
        return self.spread == "expert"
