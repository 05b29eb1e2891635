"""What training minimises: means over the predicted tokens, in nats.

Token s predicts token s + 1, so of a window's S tokens the first S - 1 count.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn


def next_token(logits: Float[Tensor, "B S V"], ids: Int[Tensor, "B S"]) -> Float[Tensor, ""]:
    """Cross entropy of the next token."""
    return nn.functional.cross_entropy(logits[:, :-1].float().flatten(0, 1), ids[:, 1:].flatten())


def distil(logits: Float[Tensor, "B S V"], teacher: Float[Tensor, "B S V"]) -> Float[Tensor, ""]:
    """KL(teacher || student) over the whole vocabulary (Hinton et al. 2015, arXiv:1503.02531, T = 1)."""
    q = logits[:, :-1].float().log_softmax(-1).flatten(0, 1)
    p = teacher[:, :-1].float().log_softmax(-1).flatten(0, 1)
    return nn.functional.kl_div(q, p, log_target=True, reduction="batchmean")


def top_k_of(
    logits: Float[Tensor, "B S V"], k: int
) -> tuple[Int[Tensor, "B S k"], Float[Tensor, "B S k"]]:
    """(ids, log probabilities) of the k likeliest next tokens: what of a teacher is kept."""
    logp, ids = logits.float().log_softmax(-1).topk(k, dim=-1)
    return ids, logp


def distil_top_k(
    logits: Float[Tensor, "B S V"],
    ids: Int[Tensor, "B S k"],
    logp: Float[Tensor, "B S k"],
) -> Float[Tensor, ""]:
    """KL(teacher || student) where all but the teacher's k likeliest tokens are one event, the tail.

    By the log sum inequality it is at most the KL over the whole vocabulary.
    """
    q = logits[:, :-1].float().log_softmax(-1).gather(-1, ids[:, :-1])
    p = logp[:, :-1].float()
    tail_p, tail_q = _rest(p), _rest(q)
    known = (p.exp() * (p - q)).sum(-1)
    return (known + tail_p.exp() * (tail_p - tail_q)).mean()


def _rest(logp: Float[Tensor, "B S k"]) -> Float[Tensor, "B S"]:
    """Log of the probability that is left; one float32 step at least, for it is divided by."""
    left = 1 - logp.exp().sum(-1)
    return left.clamp(min=torch.finfo(torch.float32).eps).log()
