"""Which experts the tokens of a text go to, in their order, and which the router before guesses."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from moecule.batch import Batch
from moecule.hf import Streamed
from moecule.moe import Moe, until
from moecule.walk import Step, Tick, walk


@dataclass(frozen=True)
class Routes:
    """Of one layer: the experts of each token, sequence after sequence, as the model picked them."""

    n: int  # experts of the layer
    idx: Int[Tensor, "T K"]
    # picked from what the router of the MoE layer before was given; None for the first one
    guess: Int[Tensor, "T K"] | None


def routes(
    streamed: Streamed, batches: Sequence[Batch], tick: Tick = lambda: None
) -> dict[int, Routes]:
    """By MoE layer, in one walk over the batches. What a layer's router is given is kept for one layer."""
    found, before = dict[int, Routes](), list[Tensor]()
    for step in walk(streamed, batches, tick):
        moe = streamed.moe(step.index)
        if moe is None:
            continue
        with _heard(moe) as (given, picked):
            step.run()
        alike = [a.shape for a in before] == [b.shape for b in given]
        guesses = [_guess(step, moe, b, x) for b, x in enumerate(before)] if alike else []
        n, guess = moe.experts.num_experts, torch.cat(guesses) if guesses else None
        found[step.index] = Routes(n, torch.cat(picked), guess)
        before = given
    return found


@contextmanager
def _heard(moe: Moe) -> Iterator[tuple[list[Tensor], list[Tensor]]]:
    """Within: what the router was given, and what the experts were told to run, batch after batch."""
    given, picked = list[Tensor](), list[Tensor]()

    def on_router(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given.append((*args, *kwargs.values())[0].detach())

    def on_experts(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        picked.append((*args, *kwargs.values())[1].detach().int().cpu())

    handles = (
        moe.router.register_forward_pre_hook(on_router, with_kwargs=True),
        moe.experts.register_forward_pre_hook(on_experts, with_kwargs=True),
    )
    try:
        yield given, picked
    finally:
        for handle in handles:
            handle.remove()


def _guess(step: Step, moe: Moe, b: int, x: Tensor) -> Int[Tensor, "T K"]:
    """Those that the layer picks for batch b, its router being given x."""

    def instead(
        module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if args:
            return (x, *args[1:]), kwargs
        return args, {**kwargs, next(iter(kwargs)): x}

    handle = moe.router.register_forward_pre_hook(instead, with_kwargs=True)
    try:
        told = until(
            moe.experts.register_forward_pre_hook,
            lambda: step.calls[b][step.index](step.layer, *step.inputs.both(b)),
            with_kwargs=True,
        )
    finally:
        handle.remove()
    assert told is not None  # the layer has experts
    _, args, kwargs = told
    picked: Tensor = (*args, *kwargs.values())[1]
    return picked.detach().int().cpu()
