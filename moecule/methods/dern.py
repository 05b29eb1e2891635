"""DERN: drop experts, and let their channels go into alike channels of those that stay.

Zhou et al., "Dropping Experts, Recombining Neurons: Retraining-Free Pruning for Sparse
Mixture-of-Experts LLMs", 2025, arXiv:2509.10377.

    score_e = sum over the tokens routed to e of  g_e(x) / sum of the token's g;   the highest stay
    a channel of an expert that goes moves to the expert that has the channel most like it, if their
    cosine is above `threshold`; else it is lost
    row_r = row_r + sum over o of (channels moved from o to r) / F * row_o,   rows of the router

An expert that got channels then has more than F: spherical k-means makes F of them, weighted by the score
of the expert that each came from, begun with those of greatest |gate|. A cluster's channel is the weighted
mean of its members, brought to their mean length. A channel is its rows of gate and up and its column of
down. At threshold 1 nothing moves, which is dropping. How much moved is in the checkpoint's README.md.

Differences from the paper:
- There is no public code; the steps above are those that others describe. The threshold is not known.
- A channel that moved weighs as the expert that it came from scores.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Float64
from torch import Tensor
from torch.nn.functional import normalize

from moecule.experts import Expert
from moecule.group import Group, Recombined, segments, stacked
from moecule.method import Method
from moecule.stats import Statistic, Stats

ROUNDS = 30  # of k-means


@dataclass(frozen=True)
class Options:
    """How alike two channels must be."""

    threshold: float = 0.5


SHARE = Statistic("coef_share", lambda s: (s.coef / s.total.clamp(min=1e-20)).double().sum())


def score(stats: Stats, options: Options) -> dict[int, Float64[Tensor, " E"]]:
    """{layer: what the router gave each expert, of 1 a token}"""
    return {i: s["coef_share"] for i, s in stats.items()}


def recombine(group: Group, kept: Sequence[int], options: Options) -> Recombined:
    """The experts `kept`, with the channels of the others that are like theirs."""
    every = [segments(group.experts[e], group.rows) for e in group.everyone]
    full, own = len(group.rows), torch.cat([normalize(every[e], dim=1) for e in kept])
    got: list[list[tuple[Tensor, float]]] = [[] for _ in kept]
    rows = torch.eye(len(every), dtype=torch.float64)[list(kept)]
    moved, gone = 0, [e for e in group.everyone if e not in kept]
    for o in gone:
        best, at = (normalize(every[o], dim=1) @ own.mT).clamp(max=1.0).max(1)
        for r in range(len(kept)):
            goes = (best > options.threshold) & (at // full == r)
            n = int(goes.sum())
            rows[r, o] = n / full
            moved += n
            if n:
                got[r].append((every[o][goes], float(group.weights[o])))
    made = []
    for e, others in zip(kept, got, strict=True):
        pools = [(every[e], float(group.weights[e])), *others]
        pool = torch.cat([p for p, _ in pools])
        weight = torch.cat([p.new_full((len(p),), w) for p, w in pools])
        expert = group.experts[e]
        made.append(
            _with(expert, group, _clustered(pool, weight, full, expert)) if others else expert
        )
    return Recombined(stacked(made), rows, moved / max(full * len(gone), 1))


def _clustered(
    pool: Float[Tensor, "n D"], weight: Float[Tensor, " n"], full: int, expert: Expert
) -> Float[Tensor, "F D"]:
    """As many channels as an expert has, of more."""
    weight = weight if weight.sum() > 0 else torch.ones_like(weight)
    hidden, length = expert.gate_up.shape[1], pool.norm(dim=1, keepdim=True)
    unit, gate = normalize(pool, dim=1), pool[:, :hidden].abs().amax(1)
    start = gate.argsort(descending=True, stable=True)[:full].sort().values
    centre, label = unit[start], torch.full((len(pool),), -1, device=pool.device)
    for _ in range(ROUNDS):
        now = (unit @ centre.mT).argmax(1)
        if torch.equal(now, label):
            break
        label = now
        sums = torch.zeros_like(centre).index_add_(0, label, unit * weight[:, None])
        # an empty cluster, or one of no weight, keeps its centre
        filled = sums.norm(dim=1, keepdim=True) > 0
        centre = torch.where(filled, normalize(sums, dim=1), centre)
    of = torch.nn.functional.one_hot(label, full).to(pool.dtype)
    size, mass = of.sum(0)[:, None], (of.mT @ weight)[:, None]
    mean_length = torch.where(size > 0, of.mT @ length / size.clamp(min=1), length[start])
    mean = of.mT @ (unit * weight[:, None]) / mass.clamp(min=1e-30)
    return torch.where(mass > 0, mean, centre) * mean_length


def _with(expert: Expert, group: Group, channels: Float[Tensor, "F D"]) -> Expert:
    """The expert, made of these channels."""
    hidden, per = expert.gate_up.shape[1], group.rows.shape[1]
    up, bias, down = channels.split(
        [per * hidden, channels.shape[1] - (per + 1) * hidden, hidden], 1
    )
    gate_up, at = torch.empty_like(expert.gate_up), group.rows.flatten()
    gate_up[at] = up.reshape(-1, hidden).to(gate_up.dtype)
    made = replace(expert, gate_up=gate_up, down=down.mT.to(expert.down.dtype).contiguous())
    if expert.gate_up_bias is None:
        return made
    biases = torch.empty_like(expert.gate_up_bias)
    biases[at] = bias.reshape(-1).to(biases.dtype)
    return replace(made, gate_up_bias=biases)


METHOD = Method(
    paper="Zhou et al. 2025, arXiv:2509.10377",
    options=Options,
    needs=lambda options: (SHARE,),
    score=score,
    recombine=recombine,
)
