"""Making weights of a layer's experts 0, in place, as the text passes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moecule.hf import Streamed
from moecule.method import Method
from moecule.moe import Heard, Moe, experts_of
from moecule.pack import chunks, gram_of


@dataclass(frozen=True)
class Masker:
    """A mask method with its options."""

    method: Method
    options: Any


def zero_weights(
    masker: Masker, streamed: Streamed, moe: Moe, heard: Heard, density: float
) -> None:
    """Leave `density` of the weights of each matrix of a layer's experts, and make the others 0.

    Down projections see what the cut gate and up give them. Every process does the same.
    """
    mask, wants = masker.method.mask, masker.method.wants_gram
    assert mask is not None  # load_method saw to it
    experts = experts_of(moe.experts)
    pairs, top_k = heard.pairs(len(experts)), heard.idx[0].shape[1]
    for ids in chunks(experts.gate_up, experts.down, streamed.device):
        for name in ("gate_up", "down"):
            weights = getattr(experts, name)
            totals: list[Tensor] = []
            for e in ids:
                n = weights.shape[-1]
                total = weights.new_zeros((n, n) if wants else (n,), dtype=torch.float64)
                for b, at in enumerate(pairs[e]):
                    if len(at):
                        x = heard.x[b][at // top_k].to(streamed.device)
                        x = x if name == "gate_up" else experts[e].act(x)
                        total += gram_of(x) if wants else x.double().square().sum(0)
                totals.append(streamed.ranks.add_up(total))
            seen = torch.stack(totals).float()
            weights[ids] = mask(weights[ids], seen, density, masker.options).to(weights.dtype)
