"""Experts that become one: what a method of merging is given, and what several of them share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Float64, Int
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from moecule.experts import Expert, Experts

Total = Callable[[Callable[[Tensor], Tensor], Sequence[int]], Tensor]
ROUNDS = 100  # of k-means, at most
AT_ONCE = 2**22  # numbers of all experts' weights that are multiplied at a time


@dataclass(frozen=True)
class Group:
    """Some experts of a layer, or all of them, and what they heard."""

    experts: Experts  # of those that become one, the first is the one that stays
    rows: Int[Tensor, "F P"]  # of the first matrix, that are each channel's
    weights: Float64[Tensor, " E"]  # how much each counts, 0 or more
    # (f, members) -> the sum of f(x) in float64, x being the inputs routed to any of the members
    total: Total

    @property
    def shares(self) -> Float64[Tensor, " E"]:
        """The weights, to the sum of 1; where all are 0, alike."""
        w = self.weights if self.weights.sum() > 0 else torch.ones_like(self.weights)
        return w / w.sum()

    @property
    def everyone(self) -> range:
        """All members, for `total`."""
        return range(len(self.experts))


@dataclass(frozen=True)
class Recombined:
    """Experts that stay, with parts of those that do not."""

    experts: Experts
    # of each that stays: how much of every expert's router row is added up to its own
    rows: Float64[Tensor, "left E"]
    moved: float  # the share of the channels of those that go that went into others


def mean(experts: Experts, shares: Float64[Tensor, " E"]) -> Expert:
    """The weighted mean of all matrices and biases."""

    def of(w: Tensor) -> Tensor:
        made: Tensor = torch.tensordot(shares.to(w.device, torch.float32), w.float(), 1)
        return made.to(w.dtype)

    up, down = experts.gate_up_bias, experts.down_bias
    return Expert(
        of(experts.gate_up),
        of(experts.down),
        experts.gate,
        None if up is None else of(up),
        None if down is None else of(down),
        experts.end,
    )


def segments(expert: Expert, rows: Int[Tensor, "F P"]) -> Float[Tensor, "F D"]:
    """All that is a channel's, a channel a row: its rows of the first matrix, biases, its column."""
    parts = [expert.gate_up[rows].flatten(1), expert.down.mT]
    if expert.gate_up_bias is not None:
        parts.insert(1, expert.gate_up_bias[rows])
    return torch.cat(parts, 1).float()


def permuted(expert: Expert, rows: Int[Tensor, "F P"], order: Int[Tensor, " F"]) -> Expert:
    """The same expert, its channels in that order."""
    at = torch.empty_like(rows.flatten())
    at[rows.flatten()] = rows[order].flatten()
    return expert.taken(at, order)


def matched(profit: Float[Tensor, "F F"]) -> Int[Tensor, " F"]:
    """For each row the column that it gets, each once, so that the sum is greatest."""
    _, column = linear_sum_assignment(profit.double().cpu().numpy(), maximize=True)
    return torch.from_numpy(column).long()


def aligned(group: Group, profit: Callable[[int], Float[Tensor, "F F"]]) -> Experts:
    """The members, their channels where those of the first are that they fit best.

    profit(member): what each channel of the first has in common with each of the member.
    """
    e, out = group.experts, [group.experts[0]]
    for j in group.everyone[1:]:
        order = matched(profit(j)).to(e.down.device)
        out.append(permuted(e[j], group.rows, order))
    return stacked(out)


def stacked(of: Sequence[Expert]) -> Experts:
    """Experts of one shape together."""

    def all_of(parts: Sequence[Tensor | None]) -> Tensor | None:
        return None if parts[0] is None else torch.stack([p for p in parts if p is not None])

    return Experts(
        torch.stack([x.gate_up for x in of]),
        torch.stack([x.down for x in of]),
        of[0].gate,
        all_of([x.gate_up_bias for x in of]),
        all_of([x.down_bias for x in of]),
        of[0].end,
    )


def by_weights(group: Group) -> Experts:
    """The members, aligned by the inner products of their channels' weights."""
    first = segments(group.experts[0], group.rows)
    return aligned(group, lambda j: first @ segments(group.experts[j], group.rows).mT)


def products(of: Sequence[Float[Tensor, "E _ _"]]) -> Float64[Tensor, "E E"]:
    """Of experts' weights with each other, all matrices of an expert as one vector."""
    n = len(of[0])
    total = torch.zeros(n, n, dtype=torch.float64, device=of[0].device)
    for weight in of:
        for some in weight.split(max(1, AT_ONCE // weight[:, :1].numel()), dim=1):
            flat = some.double().flatten(1)
            total += flat @ flat.mT
    return total


def cosines(gram: Float64[Tensor, "E E"]) -> Float64[Tensor, "E E"]:
    """Of sums of products; 0 where there is nothing."""
    length = gram.diagonal().clamp(min=0).sqrt()
    return gram / (length[:, None] * length).clamp(min=1e-300)


def highest(score: Float64[Tensor, " E"], n: int) -> list[int]:
    """The n of highest score, the highest first; ties go to the lower number."""
    of: list[int] = score.argsort(descending=True, stable=True)[:n].tolist()
    return of


def nearest(alike: Float64[Tensor, "E E"], score: Float64[Tensor, " E"], n: int) -> tuple[int, ...]:
    """The n of highest score stay; each other one goes into that of them which is most alike."""
    stay = sorted(highest(score, n))
    best = alike[:, stay].argmax(1).tolist()
    return tuple(e if e in stay else stay[best[e]] for e in range(len(score)))


def kmeans(gram: Float64[Tensor, "E E"], n: int) -> tuple[int, ...]:
    """n clusters of points of which the products are given: a number for each point.

    The first centres are the point farthest from the mean and then, each time, that farthest from those
    taken: nothing is drawn by lot, so the order of points does not matter. No cluster is empty.
    """
    size = gram.diagonal()
    far = size - 2 * gram.mean(1)
    taken: list[int] = []
    for _ in range(n):
        far[taken] = -torch.inf
        taken.append(int(far.argmax()))
        to = size + size[taken[-1]] - 2 * gram[:, taken[-1]]
        far = to if len(taken) == 1 else torch.minimum(far, to)
    label = (size[taken] - 2 * gram[:, taken]).argmin(1)
    label[taken] = torch.arange(n)  # points may lie upon each other
    for _ in range(ROUNDS):
        of = torch.nn.functional.one_hot(label, n).double()
        of = of / of.sum(0)
        distance = size[:, None] - 2 * gram @ of + (of * (gram @ of)).sum(0)
        now = distance.argmin(1)
        for c in range(n):  # an empty cluster gets the point farthest from its own centre
            if not (now == c).any():
                alone = now.bincount(minlength=n)[now] == 1
                now[distance.gather(1, now[:, None])[:, 0].masked_fill(alone, -1).argmax()] = c
        if torch.equal(now, label):
            break
        label = now
    found: list[int] = label.tolist()
    return tuple(found)
