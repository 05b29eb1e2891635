"""How long and how fast a model is trained, and what came of it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import torch

from moecule.errors import RecipeError

Precision = Literal["float32", "bfloat16"]


@dataclass(frozen=True)
class Schedule:
    """How long and how fast."""

    steps: int = 200
    batch: int = 16  # windows a step, over all processes
    micro: int = 0  # windows at a time in a process; 0: all that it has of a step
    lr: float = 1e-3
    warmup: float = 0.05  # share of the steps in which the rate rises
    end: float = 0.1  # share of the rate that is left at the end of the cosine
    decay: float = 0.0  # AdamW's, of matrices
    clip: float = 1.0  # norm of the gradient, at most
    every: int = 50  # steps from one held-out figure to the next
    seed: int = 0
    precision: Precision = "float32"  # of products, by autocast

    def __post_init__(self) -> None:
        """Raises RecipeError for what cannot be."""
        for name in ("steps", "batch", "every"):
            if getattr(self, name) < 1:
                raise RecipeError(f"{name} = {getattr(self, name)}, wanted 1 or more")
        if self.micro < 0:
            raise RecipeError(f"micro = {self.micro}, wanted 1 window or more, or 0 for all")
        for name in ("lr", "clip"):
            if not (getattr(self, name) > 0 and math.isfinite(getattr(self, name))):
                raise RecipeError(f"{name} = {getattr(self, name):g}, wanted more than 0")
        if not (self.decay >= 0 and math.isfinite(self.decay)):
            raise RecipeError(f"decay = {self.decay:g}, wanted 0 or more")
        if not 0 <= self.seed < 10**9:
            raise RecipeError(f"seed = {self.seed}, wanted 0 to 999999999")
        if self.precision not in get_args(Precision):
            raise RecipeError(
                f"precision = {self.precision!r}, wanted {' or '.join(get_args(Precision))}"
            )
        for name in ("warmup", "end"):
            if not 0 <= getattr(self, name) <= 1:
                raise RecipeError(f"{name} = {getattr(self, name):g}, wanted a share from 0 to 1")

    def rate(self, step: int) -> float:
        """The learning rate of a step, the first being 0."""
        rising = max(1, round(self.warmup * self.steps))
        if step < rising:
            return self.lr * (step + 1) / rising
        at = (step - rising) / max(1, self.steps - rising)
        return self.lr * (self.end + (1 - self.end) * (1 + math.cos(math.pi * at)) / 2)

    def picks(self, step: int, n: int) -> list[int]:
        """Which of n windows a step is given: all once, in a seeded order, before any again."""
        at = range(step * self.batch, (step + 1) * self.batch)
        orders = {e: self._order(e, n) for e in {i // n for i in at}}
        return [orders[i // n][i % n] for i in at]

    def _order(self, epoch: int, n: int) -> list[int]:
        lot = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
        return torch.randperm(n, generator=lot).tolist()


@dataclass
class Trained:
    """What came of it."""

    began: float | None  # the held-out figure before the first step; None: none was asked for
    best: float | None = None
    best_step: int = 0
    steps: int = 0  # that were made
    history: list[tuple[int, float | None, float | None]] = field(default_factory=list)
    stopped: str | None = None  # why, where it was before the last step

    @staticmethod
    def from_dict(said: Mapping[str, Any]) -> Trained:
        """Of what JSON made of it. Raises KeyError, TypeError or ValueError where it is none."""
        return Trained(**{**said, "history": [(s, v, c) for s, v, c in said["history"]]})
