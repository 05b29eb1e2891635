"""Merging experts: who goes into whom, of what a method says of a layer alone.

As many go as dropping would let go, from where it would: `Dropping` says how many stay of every layer and
group of its router. A method then makes that many clusters; of each, the expert of the highest score
stays (ties: the lower number), and the others go into it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from jaxtyping import Float64
from torch import Tensor

from moecule.drop import Dropping
from moecule.plan import Drop, Merge, Merges, Plan

# (layer, its experts, how many are to stay of them) -> a number for each, of its cluster
Cluster = Callable[[int, tuple[int, ...], int], Sequence[int]]


@dataclass(frozen=True)
class Merging(Dropping):
    """What may go of a model's experts, and into what."""

    cluster: Cluster | None = None  # None, before there are statistics: those of low scores go
    aliased: bool = False  # routers keep the rows of those that go, and pick as many as they did

    def kept(self, share: float) -> dict[int, tuple[int, ...]]:
        """The experts that stay when `share` of them goes."""
        plain = super().kept(share)
        if self.cluster is None:
            return plain
        into = {i: self._into(i, len(ids)) for i, ids in plain.items()}
        return {i: tuple(e for e, to in enumerate(of) if to == e) for i, of in into.items()}

    def check(self, share: float) -> int | None:
        """As `Dropping.check`; with aliases a router never picks fewer, however few stay."""
        if not self.aliased:
            return super().check(share)
        Dropping(self.scores, self.inventory, self.spread, clamp=True).check(share)
        return None

    def _into(self, layer: int, left: int) -> tuple[int, ...]:
        """For each expert of a layer the one that it goes into, or itself."""
        e, score = self.inventory.experts[layer], self.scores[layer].tolist()
        assert self.cluster is not None  # who asks has statistics
        size, out = e.n // e.groups, list[int]()
        for g in range(e.groups):
            ids = tuple(range(g * size, (g + 1) * size))
            if left == e.n:
                out += ids
                continue
            label = self.cluster(layer, ids, left // e.groups)
            stays: dict[int, int] = {}
            for at, j in sorted(zip(label, ids, strict=True), key=lambda p: (-score[p[1]], p[1])):
                stays.setdefault(at, j)
            assert (
                len(stays) == left // e.groups
            )  # a method makes as many clusters as it is asked for
            out += [stays[at] for at in label]
        return tuple(out)

    def merged(self, plan: Plan, merges: Merges) -> Plan:
        """The plan, in which those that would be dropped go into others; `merges` says how."""
        layers = {}
        for i, fates in plan.layers.items():
            into = self._into(i, sum(f != Drop() for f in fates))
            layers[i] = tuple(
                Merge(to) if f == Drop() else f for f, to in zip(fates, into, strict=True)
            )
        return with_merges(replace(plan, layers=layers), merges)


def with_merges(plan: Plan, merges: Merges) -> Plan:
    """The plan, and how its experts are merged, if any are."""
    return plan if all(plan.stays(i) for i in plan.layers) else replace(plan, merge=merges)


def weights_of(of: Mapping[int, Float64[Tensor, " E"]]) -> dict[int, tuple[float, ...]]:
    """How much each expert counts, in as many digits as a person reads."""
    return {i: tuple(float(f"{x:.6g}") for x in w.tolist()) for i, w in sorted(of.items())}
