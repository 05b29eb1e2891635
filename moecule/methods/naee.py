"""NAEE: keep the set of experts with which a layer's routed output changes least.

Lu et al., "Not All Experts are Equal: Efficient Expert Pruning and Skipping for Mixture-of-Experts Large
Language Models", 2024, arXiv:2402.14800.

    minimise  sum over tokens x of  |F(x) - F_S(x)|^2      over the sets S of so many experts

F is the layer's routed output, F_S the same where the router picks among S alone, as in the model that is
written. Up to 10 experts all sets are tried. Of more, one goes after the other, always the one without
which the layer changes least ("greedy": the error need not be the least there is). Where the router
picks among groups, each loses one at a time: they begin with their least, by the sum of (g |f|)^2, and each
in turn takes another one if that is better. Every layer loses as many; each sees the original model below.

Their rule for skipping, the second expert where its share of the first is below the layer's median, is
`odp` with rule = "median", protect = 0 and a rate that all layers are cut for (recipe `naee_skip`): the
same formula, with medians in steps of 1/256, and for more than two experts a token over all but the first.

Differences from the paper:
- The error is over 4096 tokens, evenly out of the first batches; theirs sums the norms of batches of 8
  windows over all text, a square root a batch.
- Their search stops at 8 experts; the greedy one is ours.
- Layers are searched with all others as they were ("layerwise"), never one after the other is cut.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import combinations
from typing import Literal

import torch
from jaxtyping import Float64
from torch import Tensor

from moecule.drop import IN_GROUP, Room
from moecule.method import Method
from moecule.stats import COEF_NORM_SQ, COUNT, Block, Statistic, Stats

MOST = 10  # experts of which all sets are tried: 1023


@dataclass(frozen=True)
class Options:
    """All sets of up to 10 experts are tried, or one expert goes after the other always."""

    search: Literal["auto", "greedy"] = "auto"


def balanced(kept: tuple[int, ...], n: int, groups: int) -> bool:
    """Whether every group keeps as many, and enough to be scored."""
    if groups == 1:
        return True
    of = [sum(e * groups // n == g for e in kept) for g in range(groups)]
    return min(of) == max(of) and min(of) >= IN_GROUP


def all_sets(block: Block) -> Float64[Tensor, " sets"]:
    """The error of every set, by the sum of 2^e over its experts; 0 of sets that cannot be."""
    n = len(block.experts)
    out = torch.zeros(2**n, dtype=torch.float64)
    for size in range(1, n):
        for kept in combinations(range(n), size):
            if balanced(kept, n, block.groups):
                out[_number(kept)] = block.error(kept)
    return out


def _number(kept: tuple[int, ...]) -> int:
    return sum(1 << e for e in kept)


def one_by_one(block: Block) -> Float64[Tensor, " E"]:
    """The round in which each expert goes, from 0; of those that no round takes, their number."""
    n, size = len(block.experts), len(block.experts) // block.groups
    runs = [set(range(g * size, (g + 1) * size)) for g in range(block.groups)]
    worth = block.sums[COEF_NORM_SQ.name].tolist()
    rounds = size - (1 if block.groups == 1 else IN_GROUP)
    out = torch.full((n,), float(n), dtype=torch.float64)

    def error(gone: list[int]) -> float:
        return block.error(sorted(set().union(*runs) - set(gone)))

    for at in range(rounds):
        going = [min(run, key=lambda e: (worth[e], -e)) for run in runs]
        for g, run in enumerate(runs):  # of equals the higher number goes
            ranked = sorted(run, reverse=True)
            going[g] = min(ranked, key=lambda e: error([*going[:g], e, *going[g + 1 :]]))  # noqa: B023
        for run, e in zip(runs, going, strict=True):
            run.remove(e)
            out[e] = at
    return out


def search(block: Block) -> Tensor:
    """All sets where experts are few, else one by one."""
    return all_sets(block) if len(block.experts) <= MOST else one_by_one(block)


SETS = Statistic("naee", of_block=search)
GREEDY = Statistic("naee_greedy", of_block=one_by_one)


def needs(options: Options) -> tuple[Statistic, ...]:
    """The search's errors or rounds, and what it begins with."""
    return (COUNT, COEF_NORM_SQ, SETS if options.search == "auto" else GREEDY)


def choose(stats: Stats, room: Room, options: Options) -> dict[int, tuple[int, ...]]:
    """{layer: the experts that stay}; of equal sets the one of lower numbers."""
    out = {}
    for i, s in stats.items():
        found, n = s[needs(options)[-1].name].tolist(), len(s["count"])
        left, groups = room.left[i], room.groups[i]
        if len(found) == n:
            gone = (n - left) // groups
            out[i] = tuple(e for e in range(n) if found[e] >= gone)
        else:
            sets = (kept for kept in combinations(range(n), left) if balanced(kept, n, groups))
            out[i] = min(sets, key=lambda kept: found[_number(kept)])
    return out


METHOD = Method(
    paper="Lu et al. 2024, arXiv:2402.14800", options=Options, needs=needs, choose=choose
)
