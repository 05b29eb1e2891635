"""PreMoe: drop the experts that the router's own logits of a domain's text speak least for.

Pei et al., "PreMoe: Proactive Inference for Efficient Mixture-of-Experts", 2025, arXiv:2505.17639. For a
token's router logits z, A its a largest, p = softmax of z over A alone, T tokens:

    PEU (v3):    score_e = 1/T sum of  max(z_e, sigmoid(z_e))   over tokens with e in A, p_e >= r
                 r = the layer's mean of the largest p
    TCESS (v1):  score_e = 1/T sum of  z_e                      over tokens with e in A, p_e >= r
                 r an option, off at 0

Logits are the router's, without a bias for the choice. TCESS is kept as its authors have it: a
chosen expert with negative logits scores below one that is never chosen, which PEU mends.

Differences from the paper:
- r of PEU is not known before all tokens are seen: what e would get is kept by p in 256 bins, and r is
  rounded to the nearest one's beginning.
- a of PEU is as many as the model picks, where the paper's value was not found.
- Of experts that PEU gives nothing, those routed to least go first.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float, Float64, Int
from torch import Tensor

from moecule.method import Method
from moecule.stats import BINS, COUNT, Routed, Statistic, Stats, histograms

TIE = 1e-9  # of the largest score, shared out by use


@dataclass(frozen=True)
class Options:
    """Which of the two; a, 0 for 1 (TCESS) or the model's own (PEU); r of TCESS."""

    metric: Literal["peu", "tcess"] = "peu"
    active: int = 0
    r: float = 0.0


def _locally(
    seen: Routed, active: int
) -> tuple[Float[Tensor, "T a"], Float[Tensor, "T a"], Int[Tensor, "T a"]]:
    """(z, p, expert) of every token's largest."""
    z, expert = seen.logits.float().topk(min(active, seen.logits.shape[1]), dim=-1)
    return z, z.softmax(-1), expert


def _utility(active: int, seen: Routed) -> Float64[Tensor, "E bins"]:
    """What each expert would get, by p."""
    z, p, expert = _locally(seen, active or seen.idx.shape[1])
    worth = torch.maximum(z, z.sigmoid())
    return histograms(p.flatten(), expert.flatten(), seen.logits.shape[1], worth.flatten())


def _lead(active: int, seen: Routed) -> Float64[Tensor, "E two"]:
    """Of the tokens whose largest logit is the expert's: the sum of p, and how many."""
    _, p, expert = _locally(seen, active or seen.idx.shape[1])
    n = seen.logits.shape[1]
    sums = histograms(torch.zeros_like(p[:, 0]), expert[:, 0], n, p[:, 0]).sum(1)
    return torch.stack([sums, expert[:, 0].bincount(minlength=n).double()], 1)


def _masked(active: int, r: float, seen: Routed) -> Float64[Tensor, " E"]:
    """Sums of the logits that stay."""
    z, p, expert = _locally(seen, active or 1)
    z = torch.where(p >= r, z, 0.0)
    n = seen.logits.shape[1]
    return histograms(torch.zeros_like(z).flatten(), expert.flatten(), n, z.flatten()).sum(1)


def needs(options: Options) -> tuple[Statistic, ...]:
    """Of PEU its histogram, who leads, and counts; of TCESS its sum."""
    a = options.active
    if options.metric == "tcess":
        return (
            COUNT,
            Statistic(
                f"tcess_{a or 1}_{options.r:g}", of_router=lambda s: _masked(a, options.r, s)
            ),
        )
    return (
        COUNT,
        Statistic(f"utility_{a}", of_router=lambda s: _utility(a, s)),
        Statistic(f"lead_{a}", of_router=lambda s: _lead(a, s)),
    )


def score(stats: Stats, options: Options) -> dict[int, Float64[Tensor, " E"]]:
    """{layer: PEU or the sum of TCESS, of which tokens there were does not change the order}."""
    names = [s.name for s in needs(options)[1:]]
    if options.metric == "tcess":
        return {i: s[names[0]] for i, s in stats.items()}
    out = {}
    for i, s in stats.items():
        lead, tokens = s[names[1]].sum(0).tolist()
        first = round(lead / max(tokens, 1.0) * BINS)
        found = s[names[0]][:, first:].sum(1) / max(tokens, 1.0)
        use = s["count"] / s["count"].sum().clamp(min=1)
        out[i] = found + TIE * found.max().clamp(min=1.0) * use
    return out


METHOD = Method(
    paper="Pei et al. 2025, arXiv:2505.17639", options=Options, needs=needs, score=score
)
