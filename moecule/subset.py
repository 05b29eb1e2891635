"""What a layer's routed experts would give if only some of them were there.

The family's own block picks, with its router cut as `apply` cuts it; nothing is re-derived. Every
expert's output for a sample of tokens is kept as products with the others', so that each set of
experts costs no more than letting the router pick: with the change d_t of the coefficients of token t,

    |change of the routed output|^2 = sum_t  d_t^T G_t d_t      G_t,ij = f_i(x_t) . f_j(x_t)
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float64, Int
from torch import Tensor, nn

from moecule.hf import Streamed
from moecule.moe import Heard, Moe, by_expert, experts_of, select_experts, set_top_k, until
from moecule.stats import Block

SAMPLE = 4096  # tokens; a batch is taken whole, then so many of it, evenly
PRODUCTS = 2**26  # of outputs, at most: half a GB
AT_ONCE = 2**26  # numbers of all experts' outputs that are held at a time
# bytes, at most: of the outputs, and of the products
SAMPLE_BYTES = 8 * (AT_ONCE + PRODUCTS)
Calls = list[tuple[tuple[Any, ...], dict[str, Any]]]  # batch by batch


@contextmanager
def recalling(moe: Moe, wanted: bool) -> Iterator[Calls]:
    """Within, what the block is called with is noted, until there are SAMPLE tokens of it."""
    calls: Calls = []

    def on_block(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if sum(_tokens(*call) for call in calls) < SAMPLE:
            kept = {k: _apart(v) for k, v in kwargs.items()}
            calls.append((tuple(map(_apart, args)), kept))

    handle = moe.block.register_forward_pre_hook(on_block, with_kwargs=True) if wanted else None
    try:
        yield calls
    finally:
        if handle is not None:
            handle.remove()


def _apart(value: Any) -> Any:
    return value.detach() if isinstance(value, Tensor) else value


def _tokens(args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    hidden: Tensor = [*args, *kwargs.values()][0]
    return hidden.shape[:-1].numel()


def picked(
    moe: Moe, call: tuple[tuple[Any, ...], dict[str, Any]]
) -> tuple[Int[Tensor, "T K"], Float64[Tensor, "T K"]]:
    """(experts, coefficients) that the block gives each token of a call, and nothing more."""
    args, kwargs = call
    to_experts = moe.experts.register_forward_pre_hook
    given = until(to_experts, lambda: moe.block(*args, **kwargs), with_kwargs=True)
    assert given is not None  # a MoE block calls its experts
    placed: tuple[Tensor, ...] = given[1]
    named: dict[str, Tensor] = given[2]
    _, idx, coef = (*placed, *named.values())
    return idx, coef.double()


@contextmanager
def only(moe: Moe, kept: Sequence[int], top_k: int) -> Iterator[None]:
    """Within, the router knows these experts alone, numbered anew, and picks `top_k` of them."""
    n, before = moe.experts.num_experts, moe.top_k
    tensors = [(m, name, getattr(m, name)) for m, name, _ in by_expert(moe, n)]
    counts = [(m, key, vars(m).get(key)) for m, key in _counts(moe)]
    select_experts(moe, kept, n)
    set_top_k(moe, top_k)
    try:
        yield
    finally:
        set_top_k(moe, before)
        for module, name, tensor in tensors:
            setattr(module, name, tensor)
        for module, key, count in counts:
            if count is not None:
                setattr(module, key, count)
            elif key in vars(module):
                delattr(module, key)


def _counts(moe: Moe) -> list[tuple[nn.Module, str]]:
    return [(m, key) for m in moe.router.modules() for key in ("num_experts", "out_features")]


@dataclass(frozen=True)
class Sample:
    """Some of the tokens that this process saw pass through a layer's block."""

    streamed: Streamed
    moe: Moe
    heard: Heard
    calls: Calls

    @cached_property
    def at(self) -> Int[Tensor, " T"]:
        """Which of the tokens of `calls`: so many, evenly."""
        there, n = sum(_tokens(*call) for call in self.calls), self.moe.experts.num_experts
        left = max(1, min(there, SAMPLE, PRODUCTS // n**2))
        even: Tensor = torch.arange(left) * there // left
        return even

    @cached_property
    def products(self) -> Float64[Tensor, "T E E"]:
        """Of the experts' outputs with each other, token by token."""
        experts, there = experts_of(self.moe.experts), self.streamed.device
        x = torch.cat(self.heard.x[: len(self.calls)])[self.at.to(self.heard.x[0].device)]
        step = max(1, AT_ONCE // (len(experts) * experts.down.shape[1]))
        parts = []
        for some in x.split(step):
            out = torch.stack([expert(some.to(there)).double() for expert in _each(experts)], 1)
            parts.append(out @ out.mT)
        return torch.cat(parts)

    @cached_property
    def whole(self) -> Float64[Tensor, "T E"]:
        """The coefficients that the model really used."""
        of = zip(self.heard.idx, self.heard.coef, self.calls, strict=False)
        return self._spread([(idx, coef.double()) for idx, coef, _ in of])

    def _spread(self, routing: Sequence[tuple[Tensor, Tensor]]) -> Float64[Tensor, "T E"]:
        """Of the sample's tokens, a column an expert."""
        idx, coef = (torch.cat(t) for t in zip(*routing, strict=True))
        at, n = self.at.to(idx.device), self.moe.experts.num_experts
        out = coef.new_zeros(len(at), n).scatter_add_(1, idx[at], coef[at])
        return out.to(self.streamed.device)

    def error(self, kept: Sequence[int], top_k: int) -> float:
        """The squared change of the routed output, over all processes' samples."""
        with only(self.moe, kept, top_k):
            routing = [picked(self.moe, call) for call in self.calls]
        ids = torch.tensor(list(kept), device=routing[0][0].device)
        change = self._spread([(ids[idx], coef) for idx, coef in routing]) - self.whole
        total = ((change[:, None] @ self.products)[:, 0] * change).sum()
        return float(self.streamed.ranks.add_up(total))


def _each(experts: Any) -> Iterator[Any]:
    return (experts[e] for e in range(len(experts)))


def block_of(
    streamed: Streamed, moe: Moe, heard: Heard, calls: Calls, sums: Mapping[str, Tensor]
) -> Block:
    """The layer, of what `listening` and `recalling` noted while all batches passed."""
    family, config = streamed.family, streamed.model.config.get_text_config()
    groups, n = family.n_groups(config), moe.experts.num_experts
    top_groups, top_k = family.top_groups(config), moe.top_k
    sample = Sample(streamed, moe, heard, calls)

    def error(kept: Sequence[int]) -> float:
        return sample.error(kept, min(top_k, top_groups * (len(kept) // groups)))

    return Block(experts_of(moe.experts), _rows(moe, n), groups, sums, error)


def _rows(moe: Moe, n: int) -> Float64[Tensor, "E N"]:
    """Of the router's matrix."""
    inside = set(moe.router.modules())
    found = [
        getattr(module, name).movedim(axis, 0)[:n]
        for module, name, axis in by_expert(moe, n)
        if module in inside and getattr(module, name).dim() == 2
    ]
    rows: Tensor = found[-1].double()
    return rows
