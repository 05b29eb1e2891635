"""What the loss feels of each channel and each group of heads, by gradients of the whole model in memory.

The scores are SlimMoE's (methods/slimmoe.py). So is the loss, of which this is our reading:

    topk_ce   sum over the teacher's 8 likeliest tokens of p (log p - log q), p and q not scaled to sum to 1
    lm        the next token's
    noise     KL(teacher || model), the model's embeddings moved by NOISE of their spread

A model that is its own teacher has a gradient of 0 by the KL over all tokens, which is why there are three.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Float64, Int
from torch import Tensor, nn

from moecule.heads import PROJECTIONS, attention_in, heads_of
from moecule.methods.slimmoe import channel_scores, felt, group_scores
from moecule.moe import experts_in, find_layers, first_matrix
from moecule.ranks import SOLO, Ranks
from moecule.train.losses import distil, next_token
from moecule.width import rows_of

SIGNALS = ("topk_ce", "lm", "noise")
LIKELIEST = 8  # tokens of the teacher's, by the paper
NOISE = 0.1  # of the spread of a token's embedding


@dataclass(frozen=True)
class Felt:
    """Sums over batches; means rank alike."""

    channels: Mapping[int, Float64[Tensor, "E F"]]  # of MoE layers
    groups: Mapping[
        int, Float64[Tensor, " G"]
    ]  # of layers with attention; none where not asked for

    def channels_kept(self, width: int) -> dict[int, Int[Tensor, "E C"]]:
        """The channels of each expert that stay, rising. Of equal ones the first stay."""
        return {i: _best(s, width) for i, s in self.channels.items()}

    def groups_kept(self, groups: int) -> dict[int, Int[Tensor, " g"]]:
        """The groups of each layer that stay, rising. Of equal ones the first stay."""
        return {i: _best(s, groups) for i, s in self.groups.items()}

    @property
    def starved(self) -> int:
        """Experts whose channels the loss did not feel at all: no token, or no gradient, reached them."""
        return sum(int((s == 0).all(-1).sum()) for s in self.channels.values())


def _best(scores: Float64[Tensor, "*E n"], k: int) -> Int[Tensor, "*E k"]:
    order = scores.argsort(dim=-1, descending=True, stable=True)
    return order[..., :k].sort(dim=-1).values


def likeliest_kl(
    logits: Float[Tensor, "B S V"], teacher: Float[Tensor, "B S V"], k: int = LIKELIEST
) -> Float[Tensor, ""]:
    """Mean over predicted tokens of  sum over the teacher's k likeliest of  p (log p - log q),  in nats.

    The gradient by logit j is  q_j P - p_j [j among the k],  P the sum of their p: not 0 where q = p.
    """
    logp, at = teacher[:, :-1].float().log_softmax(-1).topk(min(k, teacher.shape[-1]), dim=-1)
    logq = logits[:, :-1].float().log_softmax(-1).gather(-1, at)
    return (logp.exp() * (logp - logq)).sum(-1).mean()


@contextmanager
def _noisy(model: Any, seed: int) -> Iterator[None]:
    """Within, embeddings are moved by seeded noise."""

    def move(module: nn.Module, args: Any, out: Tensor) -> Tensor:
        lot = torch.Generator().manual_seed(seed)
        noise = torch.randn(out.shape, generator=lot).to(out.device, out.dtype)
        return out + NOISE * out.std(-1, keepdim=True) * noise

    handle = model.get_input_embeddings().register_forward_hook(move)
    try:
        yield
    finally:
        handle.remove()


def signal_loss(
    model: Any, teacher: Any, ids: Int[Tensor, "B S"], signal: str, seed: int = 0
) -> Float[Tensor, ""]:
    """The loss that is differentiated, nats a token; `signal` is of SIGNALS. `seed`: of the noise."""
    if signal == "lm":
        return next_token(model(ids, use_cache=False).logits, ids)
    with torch.no_grad():
        wanted = teacher(ids, use_cache=False).logits
    if signal == "topk_ce":
        return likeliest_kl(model(ids, use_cache=False).logits, wanted)
    assert signal == "noise"  # one of SIGNALS
    with _noisy(model, seed):
        return distil(model(ids, use_cache=False).logits, wanted)


def feel(
    model: Any,
    teacher: Any,
    batches: list[Int[Tensor, "_B S"]],
    signal: str = "topk_ce",
    *,
    full: bool = False,
    groups: bool = False,
    ranks: Ranks = SOLO,
    tick: Callable[[], None] = lambda: None,
) -> Felt:
    """Score the model's channels, and groups of heads where asked, over batches of windows.

    `full`: by all three slices of a channel. What wants a gradient is as before afterwards. Raises
    RecipeError where groups of heads cannot be told apart.
    """
    _, layers = find_layers(model)
    heads = heads_of(model).groups if groups else 0
    experts = {i: m for i, layer in enumerate(layers) for _, m in experts_in(layer)}
    attentions = {i: a[1] for i, x in enumerate(layers) if heads and (a := attention_in(x))}
    wanted = [p for m in experts.values() for p in _slices(m, full).values()]
    wanted += [p for attention in attentions.values() for p in _projections(attention)]
    before = {n: p.requires_grad for n, p in model.named_parameters()}
    channels, of_heads = dict[int, Tensor](), dict[int, Tensor]()
    try:
        model.requires_grad_(False)
        for p in wanted:
            p.requires_grad_(True)
        device = wanted[0].device
        for b, batch in enumerate(batches):
            if b % ranks.size == ranks.rank:
                with torch.enable_grad():
                    loss = signal_loss(model, teacher, batch.to(device), signal, b)
                    loss.backward()
                for i, m in experts.items():
                    _add(channels, i, _of_channels(m, full))
                for i, attention in attentions.items():
                    _add(of_heads, i, _of_groups(attention, heads))
                model.zero_grad()
            tick()
    finally:
        model.zero_grad()
        for n, p in model.named_parameters():
            p.requires_grad_(before[n])
    return Felt(_together(channels, ranks), _together(of_heads, ranks))


def _slices(module: Any, full: bool) -> dict[str, nn.Parameter]:
    """The parameters of an experts module whose gradients are read."""
    names = {"down_proj"}
    if full:
        names |= {first_matrix(module)} | (
            {f"{first_matrix(module)}_bias"} if module.has_bias else set()
        )
    return {n: p for n, p in module.named_parameters(recurse=False) if n in names}


def _projections(attention: nn.Module) -> list[nn.Parameter]:
    held = [(leaf, attention.get_submodule(leaf)) for leaf in PROJECTIONS]
    return [
        p for leaf, m in held for n, p in m.named_parameters() if (leaf, n) != ("o_proj", "bias")
    ]


def _grad(parameter: nn.Parameter) -> Tensor:
    """Zeros where the loss did not reach it."""
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad


@torch.no_grad()
def _of_channels(module: Any, full: bool) -> Float64[Tensor, "E F"]:
    held = {n: (p.data, _grad(p)) for n, p in _slices(module, full).items()}
    down, rows = held["down_proj"], None
    if module.is_transposed:
        down = (down[0].mT, down[1].mT)
    if full:
        first = held[first_matrix(module)]
        if not module.is_transposed:
            first = (first[0].mT, first[1].mT)
        by_row = felt(*first)
        if module.has_bias:
            bias = held[f"{first_matrix(module)}_bias"]
            by_row = by_row + bias[0].double() * bias[1].double()
        width = down[0].shape[2]
        at = rows_of(module, torch.arange(width, device=by_row.device), width)
        apart = module.has_gate and not module.is_concatenated
        rows = by_row[:, at.view(width, -1).mT if apart else at.view(-1, width)]
    return channel_scores(*down, rows).cpu()


@torch.no_grad()
def _of_groups(attention: nn.Module, groups: int) -> Float64[Tensor, " groups"]:
    out = []
    for leaf in PROJECTIONS:
        module: Any = attention.get_submodule(leaf)
        of = (module.weight.data, _grad(module.weight))
        sums = felt(*of) if leaf == "o_proj" else felt(of[0].mT, of[1].mT)
        if leaf != "o_proj" and module.bias is not None:
            sums = sums + module.bias.data.double() * _grad(module.bias).double()
        out.append(sums)
    return group_scores(out, groups).cpu()


def _add(sums: dict[int, Tensor], i: int, more: Tensor) -> None:
    sums[i] = sums[i] + more if i in sums else more


def _together(sums: Mapping[int, Tensor], ranks: Ranks) -> dict[int, Tensor]:
    """Over all processes, each of which had a batch."""
    return {i: ranks.add_up(t) for i, t in sorted(sums.items())}
