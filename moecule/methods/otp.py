"""OTP: a small head in each layer learns how many of a token's experts to run, the first ones.

Huang et al., "MC#: Mixture Compressor for Mixture-of-Experts Large Models", 2025, arXiv:2510.10962.

    mask of r experts: the r of largest coefficient run, r = 1 .. k, so a token's first always runs
    head: (LN(x), log of the sorted coefficients) -> `hidden` units -> a score for each of the k masks
    learning: mask ~ softmax((scores + Gumbel noise) / tau), hard forward, soft backward
    loss: KL(all experts || masked), and a price on pairs that brings their share to `keep`
    afterwards: the mask of highest score, no noise

Only the heads learn. Kept coefficients are scaled back to the sum they had, where the family
renormalises.

Differences from the paper. Its text says, as far as we know it: a light router per layer over
candidate masks, Gumbel-Softmax with a falling temperature, distillation from the quantised model
without masks beside an l1 term on the mask, hard masks afterwards. All else is our own reading:
- The candidates are the k prefixes, not all 2^k subsets: of equally many experts the first ones.
- What a head reads, its one hidden layer (SiLU), and that it begins with down = 0, so with all
  experts whatever the token.
- Logarithms of the coefficients, so that their ratios, by which ODP decides, are differences.
- KL of the whole vocabulary between outputs of the whole model, not layer by layer.
- The l1 term's weight is not given but found: it rises while more than `keep` of the pairs run and
  falls while fewer do (dual ascent). One number, added for all layers' heads to every further
  expert, is at last set so that the hard masks, too, run that share of text not learnt from.
- tau falls exponentially from `hot` to `cold`; AdamW, `steps`, `batch` and `lr` are ours.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Float32, Int
from torch import Tensor
from torch.nn import functional as F

from moecule.errors import RecipeError
from moecule.method import Method
from moecule.skip import head_shapes

ALL_RUN = 0.9  # how likely the mask of all experts is before anything is learnt
LEAST = 1e-6  # of a coefficient, before its logarithm is taken


@dataclass(frozen=True)
class Options:
    """Ours: the paper's are not known."""

    keep: float = 0.8  # share of all (token, expert) pairs that run in the end
    hidden: int = 64  # units of a head
    samples: int = 1024  # windows of text to learn from
    steps: int = 400
    batch: int = 16  # windows a step
    lr: float = 0.01
    hot: float = 4.0  # the temperature of the first step
    cold: float = 0.1  # and of the last
    seed: int = 0

    def __post_init__(self) -> None:
        """Raises RecipeError for what cannot be learnt with."""
        if not 0 < self.keep <= 1:
            raise RecipeError(f"otp: keep = {self.keep:g}, wanted a share above 0 and up to 1")
        if not 0 < self.cold <= self.hot:
            raise RecipeError(
                f"otp: hot = {self.hot:g} and cold = {self.cold:g}, wanted temperatures above 0 that fall"
            )
        if self.lr <= 0:
            raise RecipeError(f"otp: lr = {self.lr:g}, wanted a rate above 0")
        for name in ("hidden", "samples", "steps", "batch"):
            if not 1 <= getattr(self, name) < 10**6:
                raise RecipeError(f"otp: {name} = {getattr(self, name)}, wanted 1 or more")


def first_head(
    layer: int, width: int, top_k: int, options: Options
) -> dict[str, Float32[Tensor, " ..."]]:
    """A layer's head before it has learnt: all experts run, whatever the token.

    `width`: of what the experts hear. The same for the same seed and layer.
    """
    draw = torch.Generator().manual_seed(options.seed * 10**6 + layer)
    shapes = head_shapes(width, top_k, options.hidden)
    head = {name: torch.zeros(shape) for name, shape in shapes.items()}
    # what is read of the token and of its coefficients weighs alike
    head["up"].normal_(generator=draw)
    head["up"][:, :width] /= math.sqrt(2 * width)
    head["up"][:, width:] /= math.sqrt(2 * top_k)
    head["down_bias"][-1] = math.log(ALL_RUN / (1 - ALL_RUN) * max(top_k - 1, 1))
    return head


def ranked(coef: Float[Tensor, "T K"]) -> tuple[Float[Tensor, "T K"], Int[Tensor, "T K"]]:
    """(coefficients, the largest first; where each was). Of equal ones the first stays first."""
    ordered, order = coef.sort(dim=-1, descending=True, stable=True)
    return ordered, order


def scores(
    head: Mapping[str, Float32[Tensor, " ..."]],
    x: Float[Tensor, "T H"],
    ordered: Float[Tensor, "T K"],
) -> Float32[Tensor, "T K"]:
    """Of the masks of 1, 2 .. K experts. In float32, whatever the model's dtype."""
    read = F.layer_norm(x.float(), x.shape[-1:])
    shares = ordered.float().clamp(min=LEAST).log()
    units = F.silu(F.linear(torch.cat([read, shares], -1), head["up"], head["up_bias"]))
    return F.linear(units, head["down"], head["down_bias"])


def prefixes(k: int, device: torch.device | None = None) -> Float32[Tensor, "k k"]:
    """The candidate masks: row r has the first r + 1 experts."""
    return torch.ones(k, k, device=device).tril()


def hard(scores: Float[Tensor, "T K"]) -> Bool[Tensor, "T K"]:
    """The mask of highest score, by rank; of equal scores that of fewer experts."""
    ranks = torch.arange(scores.shape[-1], device=scores.device)
    return ranks <= scores.argmax(-1, keepdim=True)


def drawn(
    scores: Float[Tensor, "T K"], noise: Float[Tensor, "T K"], tau: float
) -> Float[Tensor, "T K"]:
    """A mask by rank, drawn by the scores: whole numbers, with the gradient of the soft mask.

    `noise` is uniform in [0, 1).
    """
    gumbel = -torch.log(-torch.log(noise.clamp(1e-9, 1 - 1e-7)))
    soft = ((scores + gumbel) / tau).softmax(-1)
    picked = F.one_hot(soft.argmax(-1), scores.shape[-1]).to(soft.dtype)
    return (picked + soft - soft.detach()) @ prefixes(scores.shape[-1], scores.device)


def unranked(mask: Tensor, order: Int[Tensor, "T K"]) -> Tensor:
    """A mask by rank, as the pairs lie: the inverse of `ranked`."""
    return torch.zeros_like(mask).scatter(-1, order, mask)


def weighed(coef: Float[Tensor, "T K"], mask: Tensor, renormalised: bool) -> Float[Tensor, "T K"]:
    """Coefficients of the pairs that run, 0 of the others; back to the old sum where renormalised.

    Where all pairs run they are as they were, to the bit.
    """
    left = coef * mask.to(coef.dtype)
    if not renormalised:
        return left
    total, rest = coef.sum(-1, keepdim=True), left.sum(-1, keepdim=True)
    return left * (total / rest.clamp(min=torch.finfo(coef.dtype).tiny))


def temperature(step: int, options: Options) -> float:
    """Of a step, 0 the first."""
    at = min(step / max(options.steps - 1, 1), 1.0)
    return float(options.hot * (options.cold / options.hot) ** at)


METHOD = Method(paper="Huang et al. 2025, arXiv:2510.10962", options=Options, learn=first_head)
