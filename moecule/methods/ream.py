"""REAM: merge the experts that REAP would drop into those that it keeps, with their channels aligned.

"REAM: Merging Improves Pruning of Experts", 2026, arXiv:2604.04356 (its code).

    alike(i, j) = 1/2 (1 + cosine of o_i and o_j) / 2 + 1/2 (1 - |z_i - z_j| / 2)
    o_i = mean of p_i(x) f_i(x) over all tokens,   z_i = the router's logits for i over them, to length 1
    the highest of REAP's scores stay; the highest first takes the `most` - 1 that are most like it, of
    those that nobody has taken, and so on
    merged weights = sum of s_i P_i W_i / sum of s_i over the group,   s_i REAP's score

p is the router's probability, f the expert, run on every token. P_i gives each channel of the one that
stays one of i's, so that the sum of two distances is least: of their activations over the group's
tokens, to length 1, and of their weights, in the `components` directions in which those of both experts
vary most, to length 1. A score of 0 counts as the group's least above 0, or 1/2 if that is less.

Differences from the paper:
- Activations are compared over all tokens routed to a member, not over a sample of all tokens.
- How its code makes a likeness of the distances of z, and of which experts it takes the directions, was
  not at hand; the above is ours.
- Statistics of a layer are of the original model, not of one whose earlier layers are merged.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from moecule.experts import Expert, Experts
from moecule.group import Group, aligned, cosines, highest, mean, segments
from moecule.method import Method
from moecule.stats import LOGITS, LayerStats, Routed, Statistic


@dataclass(frozen=True)
class Options:
    """How many a group may have, and in how many directions weights are compared."""

    most: int = 16
    components: int = 64


def _gated(experts: Experts) -> Callable[[Tensor, Routed], Tensor]:
    def gated(x: Float[Tensor, "T H"], routed: Routed) -> Float64[Tensor, "E H"]:
        prob = routed.prob.to(x.device, torch.float64)
        return torch.stack([prob[:, e] @ experts[e](x).double() for e in range(len(experts))])

    return gated


GATED = Statistic("gated", of_experts=_gated)


def alike(sums: LayerStats) -> Float64[Tensor, "E E"]:
    """Of each two experts, 0 to 1."""
    outputs = (1 + cosines(sums["gated"] @ sums["gated"].mT)) / 2
    return outputs / 2 + (1 - _distance(cosines(sums["logits"])) / 2) / 2


def _distance(cosine: Tensor) -> Tensor:
    """Between vectors of length 1."""
    return (2 - 2 * cosine).clamp(min=0).sqrt()


def cluster(
    sums: LayerStats, score: Float64[Tensor, " E"], n: int, options: Options
) -> tuple[int, ...]:
    """For each expert the one that it goes into, of n."""
    of, stay = alike(sums).tolist(), highest(score, n)
    into = list(range(len(score)))
    free = [e for e in into if e not in stay]
    for c in stay:
        taken = sorted(free, key=lambda e: (-of[c][e], e))[: max(options.most - 1, 0)]
        for e in taken:
            into[e] = c
            free.remove(e)
    for e in free:  # more than the groups have room for
        into[e] = max(stay, key=lambda c: (of[c][e], -c))
    return tuple(into)


def merge(group: Group, options: Options) -> Expert:
    """The mean of aligned members, weighted by their scores."""
    above = group.weights[group.weights > 0]
    least = min(0.5, float(above.min())) if len(above) else 1.0
    lifted = replace(group, weights=group.weights.clamp(min=least))

    def profit(j: int) -> Tensor:
        weights = _distance(_directions(group, j, options.components))
        return -(_distance(_activations(group, j)) + weights.to(group.rows.device))

    return mean(aligned(lifted, profit), lifted.shares)


def _activations(group: Group, j: int) -> Float64[Tensor, "F F"]:
    """Cosines of the channels' activations, of the first by member j."""

    def products(x: Tensor) -> Tensor:
        a, b = (group.experts[e].act(x).float() for e in (0, j))
        return torch.cat([a.mT @ b, a.square().sum(0)[None], b.square().sum(0)[None]])

    *gram, a, b = group.total(products, group.everyone)
    cosine: Tensor = torch.stack(gram) / (a.sqrt()[:, None] * b.sqrt()).clamp(min=1e-300)
    return cosine


def _directions(group: Group, j: int, n: int) -> Float64[Tensor, "F F"]:
    """Cosines of the channels' weights where they vary most, of the first by member j."""
    both = torch.cat([segments(group.experts[e], group.rows) for e in (0, j)]).double()
    u, s, _ = torch.linalg.svd(both - both.mean(0), full_matrices=False)
    at = torch.nn.functional.normalize(u[:, :n] * s[:n], dim=1)
    half = len(at) // 2
    return at[:half] @ at[half:].mT


METHOD = Method(
    paper="SAIL Montreal 2026, arXiv:2604.04356",
    options=Options,
    needs=lambda options: (LOGITS, GATED),
    cluster=cluster,
    merge=merge,
)
