"""HEAPr: drop the channels of experts whose going would raise the loss least, to second order.

Li et al., "HEAPr: Hessian-based Efficient Atomic Expert Pruning in Output Space", 2025,
arXiv:2509.22299.

    score_{e,k} = 1/2 * mean(a_k^2) * mean((d loss / d a_k)^2)   over the tokens routed to e

a_k is what channel k gives the down projection. The paper forms the gradient's second moment G of the
expert's output, a matrix, and takes w_k^T G w_k with column w_k of the down projection; that is the
second mean (w_k . g is the gradient by a_k), so two vectors of one pass are enough, exactly.

budget = "model" ranks the channels of all layers together (the paper's HEAPr-G), "layer" those of each
layer (HEAPr-L), "expert" those of each expert: all get one width, and the result is a stock checkpoint.
Widths are multiples of `multiple`, if given: channels go in runs of so many, by the sums of scores.

Differences from the paper:
- The factor 1/2, which their code leaves out, is there; ranks are the same.
- The model is not in training mode, so that no balance loss of the router adds to the gradient.
- weigh = "tokens" multiplies by the number of tokens: the rise of the loss over all text, and not a
  token of the expert's. It is not the paper's.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float64
from torch import Tensor

from moecule.method import Method
from moecule.stats import ACT_SQ, COUNT, Statistic, Stats

UNSEEN = -1.0  # of an expert that no token reached; its channels go first


@dataclass(frozen=True)
class Options:
    """What channels are ranked with, in which widths, and per token of the expert's or in all."""

    budget: Literal["model", "layer", "expert"] = "model"
    multiple: int = 0
    weigh: Literal["mean", "tokens"] = "mean"


ACT_GRAD_SQ = Statistic("act_grad_sq", lambda s: s.act_grad.double().square().sum(0), backward=True)


def channels(stats: Stats, options: Options) -> dict[int, Float64[Tensor, "E F"]]:
    """{layer: how much the loss rises, in nats, where a channel goes}."""
    out = {}
    for i, s in stats.items():
        n = s["count"][:, None]
        rise = 0.5 * s["act_sq"] * s["act_grad_sq"] / n.clamp(min=1) ** 2
        out[i] = torch.where(n > 0, rise * n if options.weigh == "tokens" else rise, UNSEEN)
    return out


METHOD = Method(
    paper="Li et al. 2025, arXiv:2509.22299",
    options=Options,
    needs=lambda options: (COUNT, ACT_SQ, ACT_GRAD_SQ),
    channels=channels,
)
