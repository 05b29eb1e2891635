"""Cutting channels out of a layer's experts, and under which key a config holds their number."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float, Int, Int32
from torch import Tensor

from moecule.experts import Expert, Experts
from moecule.hf import WRONG, Streamed, auto_class, quiet, set_experts
from moecule.moe import Moe, experts_in, experts_of, put_experts
from moecule.narrow import ALIGNED
from moecule.plan import Keep
from moecule.runs import run_of


def widths_of(keeps: Sequence[Keep], full: int) -> list[int]:
    """Channels of each expert."""
    return [full if k.channels is None else k.channels for k in keeps]


def stay_of(keeps: Sequence[Keep], order: Int32[Tensor, "E F"]) -> list[Int32[Tensor, " _c"]]:
    """The channels of each expert that stay, rising, or for experts in pieces in their order.

    `order` is of those experts that are there.
    """
    widths = widths_of(keeps, order.shape[1])
    stay = zip(order, widths, keeps, strict=True)
    return [of[:n] if k.pieces else of[:n].sort().values for of, n, k in stay]


def zero_channels(down: Float[Tensor, "H F"], gone: Int[Tensor, " c"]) -> None:
    """Let the expert add nothing for these channels, in place."""
    down[:, gone.to(down.device)] = 0


def rows_of(module: Any, channels: Int[Tensor, " c"], full: int) -> Int[Tensor, " R"]:
    """The rows of an expert's first matrix that are of these channels, in their order."""
    if not module.has_gate:
        return channels
    if module.is_concatenated:
        return torch.cat([channels, full + channels])
    return torch.stack([2 * channels, 2 * channels + 1], 1).flatten()


def narrow_expert(module: Any, expert: Expert, channels: Int[Tensor, " c"]) -> Expert:
    """The expert with these channels alone, in their order."""
    at = channels.long().to(expert.down.device)
    return expert.taken(rows_of(module, at, expert.down.shape[1]), at)


def of_one_width(module: Any, stay: Int[Tensor, "E C"]) -> Experts:
    """Copies of a module's experts with these channels of each alone, in their order."""
    experts = experts_of(module)
    device = experts.down.device
    at = stay.long().to(device)
    rows = torch.stack([rows_of(module, of, experts.down.shape[2]) for of in at])
    each, bias = torch.arange(len(at), device=device)[:, None], experts.gate_up_bias
    return replace(
        experts,
        gate_up=experts.gate_up[each, rows],
        down=experts.down.mT[each, at].mT.contiguous(),
        gate_up_bias=None if bias is None else bias[each, rows],
    )


def cut_channels(
    streamed: Streamed, moe: Moe, keeps: Sequence[Keep], order: Int32[Tensor, "E F"]
) -> list[Expert] | None:
    """Let the experts have the channels that stay, in place; `order` is of those that are there.

    Of one width they become narrower. Of many, what the other channels give is multiplied by 0, and the
    narrow experts are returned besides, if they stay at 16 bits. Channels keep the order they had, but for
    experts in pieces or in runs, whose channels come in `order`.
    """
    experts = experts_of(moe.experts)
    full = experts.down.shape[2]
    widths = widths_of(keeps, full)
    runs = run_of(keeps, full) is not None
    stay = list(order) if runs else stay_of(keeps, order)
    if len(set(widths)) > 1 and not runs:
        narrow = [narrow_expert(moe.experts, experts[e], at) for e, at in enumerate(stay)]
        for e, n in enumerate(widths):
            zero_channels(experts.down[e], order[e, n:].long())
        return narrow
    made = of_one_width(moe.experts, torch.stack(stay))
    for e, n in enumerate(widths if runs else ()):
        zero_channels(made.down[e], torch.arange(n, full))
    put_experts(moe.experts, made)
    if any(p.shape[-1] * p.element_size() % 16 for p in moe.experts.parameters()):
        set_experts(streamed.model, "eager")  # as hf.choose_experts
    return None


def width_key(model: Any, channels: int) -> str | None:
    """The config key that, set to `channels`, makes the model's experts so wide and changes nothing else.

    It is tried, on meta. None where no key does so alone: where shared experts get their width from the
    same key, say; and for widths that torch's grouped product cannot take.
    """
    text = model.config.get_text_config().to_dict()
    wide = {experts_of(m).down.shape[2] for _, m in experts_in(model)}
    if len(wide) > 1 or channels % ALIGNED or not channels:
        return None
    (full,) = wide
    keys = [k for k, v in text.items() if v == full and ("intermediate" in k or "ffn" in k)]
    want = _narrowed(model, channels)
    key: str
    for key in sorted(keys, key=lambda k: (not k.startswith("moe"), k)):
        if shapes_with(model, {key: channels}) == want:
            return key
    return None


def shapes_with(model: Any, changes: Mapping[str, int]) -> dict[str, torch.Size] | None:
    """Shapes of all tensors of the model that transformers makes, on meta, with these config keys.

    `changes` are of the text part. None where no model comes of it.
    """
    config = copy.deepcopy(model.config)
    for key, value in changes.items():
        setattr(config.get_text_config(), key, value)
    try:
        config = type(config).from_dict(config.to_dict())  # as it is when it is opened
        with torch.device("meta"), quiet():
            made = auto_class(type(config)).from_config(config, dtype=model.dtype)
    except WRONG:  # it is not meant so
        return None
    return {n: t.shape for n, t in made.state_dict().items()}


def _narrowed(model: Any, channels: int) -> dict[str, torch.Size]:
    """Shapes of all tensors when every expert has so many channels."""
    names = {id(m): n for n, m in experts_in(model)}
    found = {n: t.shape for n, t in model.state_dict().items()}
    for _, module in experts_in(model):
        full = experts_of(module).down.shape[2]
        rows = (2 * full, 2 * channels) if module.has_gate else (full, channels)
        first = "gate_up_proj" if module.has_gate else "up_proj"
        for leaf, (before, after) in {
            first: rows, f"{first}_bias": rows, "down_proj": (full, channels),
        }.items():  # fmt: skip
            name = f"{names[id(module)]}.{leaf}"
            if name in found:
                shape = list(found[name])
                last = leaf.endswith("_bias") or module.is_transposed == (leaf == first)
                at = len(shape) - 1 if last else len(shape) - 2
                assert shape[at] == before  # the experts module says how its weights lie
                shape[at] = after
                found[name] = torch.Size(shape)
    return found
