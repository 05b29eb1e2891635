"""SlimMoE: drop the channels of experts whose masks the loss feels least, to first order.

Li et al., "SlimMoE: Structured Compression of Large MoE Models via Expert Slimming and Distillation",
2025, arXiv:2506.18349.

    score_{e,j} = mean over batches of | <W_down[:, j], d loss / d W_down[:, j]> |
                = mean over batches of | sum over tokens of a_j * d loss / d a_j |
    score_g     = mean over batches of | sum over all theta of group g of  theta * d loss / d theta |

a_j is what channel j of expert e gives the down projection, so both lines say how fast the loss changes
with a mask on it. A group g is a key and a value head, the query heads that read them, and the columns of
the output projection that read those. `moecule slim` scores by the gradients of weights, cuts, and distils,
stage after stage (train/slim.py); recipes take the second line, of the loss of the next token, and cut
at once.

budget and multiple are as in HEAPr; the paper's is "expert": all experts keep as many channels.

Differences from the paper:
- Its text was not at hand. That a loss of the teacher's 8 likeliest tokens is differentiated, experts keep
  one width and whole groups go is said of it; these formulas, the sums and the mean are our reading.
- full = True adds the inner products of the expert's gate and up rows before the absolute value. Without
  biases that of the up rows equals that of the down column, for both scale the same a_j.
- In a recipe the loss is that of the next token: the teacher is the model itself there.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from moecule.method import Method
from moecule.stats import COUNT, Statistic, Stats

UNSEEN = -1.0  # of an expert that no token reached; its channels go first


@dataclass(frozen=True)
class Options:
    """Among which channels those that go are found, and in which widths."""

    budget: Literal["model", "layer", "expert"] = "expert"
    multiple: int = 0


def felt(weight: Float[Tensor, "*E M N"], grad: Float[Tensor, "*E M N"]) -> Float64[Tensor, "*E N"]:
    """Of each column, the inner product with its gradient: what the loss feels of a mask on it."""
    wide = torch.promote_types(weight.dtype, torch.float32)
    return (weight.to(wide) * grad.to(wide)).sum(-2, dtype=torch.float64)


def channel_scores(
    down: Float[Tensor, "E H F"],
    down_grad: Float[Tensor, "E H F"],
    rows: Float64[Tensor, "E n F"] | None = None,
) -> Float64[Tensor, "E F"]:
    """What one batch adds to each channel's score.

    `rows` are the inner products of each channel's n rows of the first matrix with their gradients; given,
    the score is the one of all three slices.
    """
    found = felt(down, down_grad)
    return (found if rows is None else found + rows.sum(1)).abs()


def group_scores(rows: list[Float64[Tensor, " _n"]], groups: int) -> Float64[Tensor, " groups"]:
    """What one batch adds to each group's score.

    `rows` are the inner products with their gradients of the rows of the projections to queries, keys and
    values, and of the columns of the one to the output; each holds its groups in runs of as many.
    """
    return torch.stack([of.view(groups, -1).sum(-1) for of in rows]).sum(0).abs()


MASK_GRAD = Statistic(
    "mask_grad", lambda s: (s.act.double() * s.act_grad.double()).sum(0).abs(), backward=True
)


def channels(stats: Stats, options: Options) -> dict[int, Float64[Tensor, "E F"]]:
    """{layer: what the loss feels of a mask on each channel}: sums over batches, which rank as means do."""
    return {
        i: torch.where(s["count"][:, None] > 0, s["mask_grad"], UNSEEN) for i, s in stats.items()
    }


METHOD = Method(
    paper="Li et al. 2025, arXiv:2506.18349",
    options=Options,
    needs=lambda options: (COUNT, MASK_GRAD),
    channels=channels,
)
