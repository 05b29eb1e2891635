"""Training with a capacity: an expert takes so many tokens of a step and no more, and a loss that evens.

Z-code M3: Kim et al., "Scalable and Efficient MoE Training for Multitask Multilingual Models", 2021,
arXiv:2109.10465, whose random token selection (RTS) is `select = "random"`.

    C = max(least, ceil(T * K / E * factor))             T tokens, K picks each, E experts
    random:    of the tokens that came to an expert, C by lot, anew at each call
    position:  the first C; the end of a batch starves
    probs:     the C that the router gave most
    balance = E * sum over e of (mean over t of p_te) * (share of the pairs that e was picked for)

A pair that is left out gets the coefficient 0: the residual stream carries the token. The others keep
their coefficients. Balance is taken of the router's picks, before any pair is left out.

Differences from the paper:
- Its text was not at hand; capacity, RTS and balance are what its DeepSpeed does for one pick a token.
- More picks a token: all pairs of an expert count alike, whichever pick they were (our reading), and
  `balance` is 1 where experts are used evenly, for any K (our scale).
- Scores that are no softmax are scaled to sum to 1 over the experts before they are balanced (ours).
- Each process limits and balances its own tokens of a micro batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from moecule.errors import RecipeError
from moecule.moe import Moe, probability

Select = Literal["random", "position", "probs"]
LEAST = 4  # tokens that an expert takes in any case


@dataclass
class Capacity:
    """One layer's rule, and how many (token, expert) pairs it has left out."""

    experts: int
    factor: float = 1.0
    select: Select = "random"
    least: int = LEAST
    pairs: int = 0
    left_out: Int[Tensor, ""] = field(default_factory=lambda: torch.zeros((), dtype=torch.int64))

    def __post_init__(self) -> None:
        """Raises RecipeError for what cannot be."""
        if not (self.factor > 0 and math.isfinite(self.factor)):
            raise RecipeError(
                f"capacity = {self.factor:g}, wanted more than 0: how many times its even share of the "
                "tokens an expert takes; give 1.0"
            )
        if self.least < 1:
            raise RecipeError(
                f"least = {self.least} tokens an expert, wanted 1 or more; give {LEAST}"
            )

    def room(self, pairs: int) -> int:
        """Tokens that an expert takes when routers picked so many pairs."""
        return max(self.least, math.ceil(pairs / self.experts * self.factor))

    def __call__(
        self,
        hidden: Float[Tensor, "T H"],
        idx: Int[Tensor, "T K"],
        coef: Float[Tensor, "T K"],
    ) -> Float[Tensor, "T K"]:
        """The coefficients, 0 for pairs that are left out; draws of torch's global generator."""
        keep = kept(idx, coef, self.room(idx.numel()), self.select)
        self.pairs += idx.numel()
        # where it lies: counting must not wait for the GPU
        self.left_out = self.left_out.to(keep.device) + (~keep).sum()
        return coef * keep

    def forget(self) -> None:
        """Count anew."""
        self.pairs, self.left_out = 0, torch.zeros((), dtype=torch.int64)

    @property
    def share_left_out(self) -> float:
        """Of all pairs so far."""
        return int(self.left_out) / max(1, self.pairs)


# of a step's pairs, in which order they are taken, by their coefficients
FIRST: dict[Select, Callable[[Tensor], Tensor]] = {
    "random": lambda coef: torch.rand(len(coef), device=coef.device).argsort(),
    "position": lambda coef: torch.arange(len(coef), device=coef.device),
    "probs": lambda coef: coef.argsort(descending=True, stable=True),
}


@torch.no_grad()
def kept(
    idx: Int[Tensor, "T K"], coef: Float[Tensor, "T K"], room: int, select: Select
) -> Bool[Tensor, "T K"]:
    """Which pairs stay where each expert takes `room` at most."""
    of = idx.flatten()
    first = FIRST[select](coef.flatten())
    by = first[of[first].argsort(stable=True)]  # expert after expert, who comes first before others
    sorted_of = of[by]
    # how many pairs of its expert come before each
    places = torch.arange(len(of), device=of.device) - torch.searchsorted(sorted_of, sorted_of)
    keep = torch.empty_like(of, dtype=torch.bool)
    keep[by] = places < room
    return keep.view_as(idx)


def balance(prob: Float[Tensor, "T E"], idx: Int[Tensor, "T K"]) -> Float[Tensor, ""]:
    """1 where experts are used evenly, up to E where one is; the gradient goes through `prob`."""
    n = prob.shape[1]
    share = torch.bincount(idx.flatten(), minlength=n)[:n] / idx.numel()
    return n * (prob.mean(0) * share).sum()


@contextmanager
def limiting(
    moes: Sequence[Moe], experts: int, factor: float, select: Select = "random", least: int = LEAST
) -> Iterator[list[Capacity]]:
    """Within, experts of these layers take so many tokens where a gradient is wanted; a rule a layer.

    `experts`: of a layer, over all processes that share them. What is measured without a gradient
    runs as it will be used, with nothing left out.
    Raises RecipeError as `Capacity` does.
    """
    rules = [Capacity(experts, factor, select, least) for _ in moes]

    def on_experts(
        rule: Capacity, module: object, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]
    ) -> Any:
        if not torch.is_grad_enabled():
            return None
        x, idx, coef = [*args, *kwargs.values()]
        return (x, idx, rule(x, idx, coef)), {}

    handles = [
        moe.experts.register_forward_pre_hook(
            partial(on_experts, rule), prepend=True, with_kwargs=True
        )
        for moe, rule in zip(moes, rules, strict=True)
    ]
    try:
        yield rules
    finally:
        for handle in handles:
            handle.remove()


@dataclass
class Balance:
    """What routers said since it was last asked."""

    terms: list[Float[Tensor, ""]] = field(default_factory=list)

    def take(self) -> Float[Tensor, ""]:
        """The mean over MoE layers of `balance`, and begin anew."""
        total = torch.stack(self.terms).mean()
        self.terms.clear()
        return total


@contextmanager
def balancing(moes: Sequence[Moe], experts: int, scores: str) -> Iterator[Balance]:
    """Within, every pass with a gradient adds a term a layer; `experts` as in `limiting`.

    `scores`: of family.SCORES, of the routers' logits.
    """
    told = Balance()

    def on_router(module: object, args: object, out: tuple[Tensor, ...]) -> None:
        if not torch.is_grad_enabled():
            return
        logits, idx = out[0].float(), out[2]
        # some routers score experts that always run in their last columns
        p = probability(logits, scores)[:, :experts]
        told.terms.append(balance(p if scores == "softmax" else p / p.sum(-1, keepdim=True), idx))

    handles = [moe.router.register_forward_hook(on_router) for moe in moes]
    try:
        yield told
    finally:
        for handle in handles:
            handle.remove()
