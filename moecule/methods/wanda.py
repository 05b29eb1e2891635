"""Wanda: make the weights of a row 0 whose size, times the length of what they read, is least.

Sun et al., "A Simple and Effective Pruning Approach for Large Language Models", 2023, arXiv:2306.11695.

    metric_rc = |W_rc| * |X_c|_2        X_c: input c of the tokens routed to the expert

Of every row the same number goes, those of the least metric; of equals those of the higher column. Gate, up
and down are masked alike; down sees what the masked gate and up give it.

Differences from the paper:
- An expert that no token reached is masked by |W| alone.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from moecule.method import Method


@dataclass(frozen=True)
class Options:
    """There is nothing to choose."""


def mask(
    w: Float[Tensor, "E M N"], seen: Float[Tensor, "E N"], density: float, options: Options
) -> Float[Tensor, "E M N"]:
    """The weights that stay, 0 in place of the others; `seen` are sums of the inputs' squares."""
    reached = seen.amax(-1, keepdim=True) > 0
    metric = w.float().abs() * torch.where(reached, seen, 1.0).sqrt()[:, None]
    left = w.shape[-1] - int((1 - density) * w.shape[-1] + 1e-9)
    best = metric.argsort(dim=-1, descending=True, stable=True)[..., :left]
    return torch.zeros_like(w).scatter_(-1, best, w.gather(-1, best))


METHOD = Method(paper="Sun et al. 2023, arXiv:2306.11695", options=Options, mask=mask)
