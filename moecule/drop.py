"""Dropping whole experts: how many may go, and which, of scores alone.

A share of the experts goes: of every layer, the same number (budget "layer"), or of all layers
together (budget "model"). Where a router picks among groups of experts, each group loses as many:
the model's code cuts its scores into equal runs. Ties keep the expert of the lower number, and in
earlier layers.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from jaxtyping import Float64
from torch import Tensor

from moecule.budget import Inventory, LayerExperts
from moecule.errors import RecipeError
from moecule.plan import Drop, Keep

Spread = Literal["layer", "model"]
Kept = Mapping[int, tuple[int, ...]]  # by layer: the experts that stay, rising
Choose = Callable[["Room"], Kept]  # which stay, where that is no matter of a number each
IN_GROUP = 2  # experts that a group must keep: some routers score a group by its best two


def parse_share(given: float | str) -> float:
    """The share of "25%", "0.25" or 0.25. Raises RecipeError for what is none below 1.

    >>> parse_share("12.5%")
    0.125
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d*)?|\.\d+)\s*(%?)\s*", str(given))
    share = float(match[1]) / (100 if match[2] else 1) if match else -1.0
    if not 0 <= share < 1:
        raise RecipeError(f"to drop {given!r} was asked; wanted a share of the experts, like 25%")
    return share


def n_left(e: LayerExperts, share: float) -> int:
    """Experts of a layer that stay, as many in every group of its router."""
    return e.n - e.groups * int(share * (e.n // e.groups) + 1e-9)


def first_of(ranked: Sequence[int], left: int, groups: int) -> tuple[int, ...]:
    """The first `left` of a layer's experts, as many of each group; rising."""
    size, kept = len(ranked) // groups, list[int]()
    for g in range(groups):
        kept += [j for j in ranked if j // size == g][: left // groups]
    return tuple(sorted(kept))


@dataclass(frozen=True)
class Room:
    """How many experts are to stay, by layer: so many in every group, or together over all layers."""

    left: Mapping[int, int]  # of each layer, as many in each of its router's groups
    groups: Mapping[int, int]  # of its router; 1 where it picks experts at once
    total: int | None = None  # of all layers together, instead of `left`
    least: Mapping[int, int] = field(default_factory=dict)  # that a layer must keep then


def _reach(e: LayerExperts, left: int) -> int:
    """Experts that the router can still pick for a token, of `left` a layer."""
    return min(e.top_k, e.top_groups * (left // e.groups))


@dataclass(frozen=True)
class Dropping:
    """What may go of a model's experts, and in which order."""

    scores: Mapping[int, Float64[Tensor, " E"]]
    inventory: Inventory
    spread: Spread = "layer"
    clamp: bool = False  # where fewer stay than the router picks, let it pick fewer
    choose: Choose | None = None  # instead of the scores
    part: str = "score"  # of a recipe, that says which go

    def kept(self, share: float) -> dict[int, tuple[int, ...]]:
        """The experts that stay when `share` of them goes, those of the lowest scores first."""
        if self.choose is not None and share > 0:
            return dict(self.choose(self._room(share)))
        if self.spread == "model" and share > 0:
            return self._of_model(share)
        out = {}
        for i, e in self.inventory.experts.items():
            of = self.scores[i].tolist()
            ranked = sorted(range(e.n), key=lambda j: (-of[j], j))
            out[i] = first_of(ranked, n_left(e, share), e.groups)
        return out

    def _room(self, share: float) -> Room:
        experts = self.inventory.experts
        left = {i: n_left(e, share) for i, e in experts.items()}
        groups = {i: e.groups for i, e in experts.items()}
        if self.spread == "layer":
            return Room(left, groups)
        total = sum(e.n for e in experts.values()) - self._going(share)
        return Room(left, groups, total, {i: e.top_k for i, e in experts.items()})

    def _of_model(self, share: float) -> dict[int, tuple[int, ...]]:
        """As `kept`; a layer keeps what its router picks for a token, at least."""
        experts = self.inventory.experts
        kept = {i: set(range(e.n)) for i, e in experts.items()}
        going = self._going(share)
        ranked = [(s, i, j) for i in kept for j, s in enumerate(self.scores[i].tolist())]
        for _, i, j in sorted(ranked, key=lambda at: (at[0], -at[1], -at[2])):
            if going and len(kept[i]) > experts[i].top_k:
                kept[i].remove(j)
                going -= 1
        return {i: tuple(sorted(ids)) for i, ids in kept.items()}

    def _going(self, share: float) -> int:
        """Of all layers."""
        return int(share * sum(e.n for e in self.inventory.experts.values()) + 1e-9)

    def counts(self, share: float) -> dict[int, tuple[int | None, ...]]:
        """How many channels those that stay keep: None, which is all."""
        return {i: (None,) * len(ids) for i, ids in self.kept(share).items()}

    def shares(self) -> list[float]:
        """Every share that makes another plan and that `check` lets pass, rising from 0."""
        experts = self.inventory.experts.values()
        all_of = [e.n // e.groups for e in experts]
        n = sum(e.n for e in experts) if self.spread == "model" else max(all_of)
        found = [0.0]
        for k in range(1, n):
            try:
                self.check(k / n)
            except RecipeError:  # too few stay; or in a smaller layer none would go
                continue
            found.append(k / n)
        return found

    def check(self, share: float) -> int | None:
        """How many experts the router is to pick for a token where that is fewer than it did, else None.

        Raises RecipeError for a share that drops none, or leaves fewer than the router picks: those only
        `clamp` lets pass, where all layers keep as many.
        """
        layers = list(self.inventory.experts.values())
        asked = f"to drop {share:.4g} of the experts was asked"
        if share == 0:
            return None
        if self.spread == "model":
            if any(e.groups > 1 for e in layers):
                raise RecipeError(
                    f"{asked}, over all layers at once, and this model's router picks among groups that "
                    f"must keep as many each; set {self.part}.budget=layer"
                )
            most = sum(e.n - e.top_k for e in layers)
            if not 0 < self._going(share) <= most:
                raise RecipeError(
                    f"{asked}; of {sum(e.n for e in layers)} experts 1 to {most} can go, for a layer "
                    f"keeps the {max(e.top_k for e in layers)} that its router picks for a token"
                )
            return None
        for e in layers:
            _check_layer(e, share, asked, clamp=self.clamp)
        picked = min(_reach(e, n_left(e, share)) for e in layers)
        return picked if picked < max(e.top_k for e in layers) else None

    @property
    def is_even(self) -> bool:
        """Whether all experts of a layer have one width."""
        return True


def _check_layer(e: LayerExperts, share: float, asked: str, *, clamp: bool) -> None:
    size, left = e.n // e.groups, n_left(e, share)
    where = f"{size} experts in each of {e.groups} groups" if e.groups > 1 else f"{e.n} experts"
    if left == e.n:
        least = math.ceil(10**4 / size) / 10**4
        raise RecipeError(f"{asked}, which of {where} is not one; the least is {least:g}")
    if e.groups > 1 and left // e.groups < IN_GROUP:
        raise RecipeError(
            f"{asked}, and of {where} {IN_GROUP} must stay; the most is {1 - IN_GROUP / size:.4g}"
        )
    if left < 1:
        raise RecipeError(f"{asked}, and of {where} one must stay; the most is {1 - 1 / size:.4g}")
    if _reach(e, left) < e.top_k and not clamp:
        need = -(-e.top_k // e.top_groups)  # in each group
        raise RecipeError(
            f"{asked}, which leaves {left} of {e.n} in a layer, and the router picks {e.top_k} a token"
            f"{f' from {e.top_groups} of {e.groups} groups' if e.groups > 1 else ''}; the most is "
            f"{1 - need / size:.4g}, or let it pick {_reach(e, left)} (--clamp)"
        )


def fates_of(
    kept: Kept,
    widths: Mapping[int, tuple[int | tuple[int, ...], ...]],
    inventory: Inventory,
    group: int,
    channels: Mapping[int, tuple[int | None, ...]],
) -> dict[int, tuple[Keep | Drop, ...]]:
    """What becomes of every expert; `widths` and `channels` are of those that stay, in order.

    A width is bits, or the bits of each piece. Raises RecipeError for channels that pieces do not share.
    """
    pairs = [pair for i in widths for pair in zip(widths[i], channels[i], strict=True)]
    for b, c in pairs:
        if isinstance(b, tuple) and c is not None and c % len(b):
            raise RecipeError(
                f"{len(b)} pieces of {c} channels were asked for; drop a share that leaves a multiple of "
                f"{len(b)}, or set allocate.pieces to a number that divides {c}"
            )
    out: dict[int, tuple[Keep | Drop, ...]] = {}
    for i, e in sorted(inventory.experts.items()):
        keeps = [
            Keep.in_pieces(b, group, c)
            if isinstance(b, tuple)
            else Keep(b, 0 if b == 16 else group, c)
            for b, c in zip(widths[i], channels[i], strict=True)
        ]
        by = dict(zip(kept[i], keeps, strict=True))
        out[i] = tuple(by.get(j, Drop()) for j in range(e.n))
    return out
