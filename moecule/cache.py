"""What decoding keeps of past tokens, as the model's own cache says.

A pass over one and over two tokens on the meta device fills a cache, without weights and without
computing; the shapes of what it holds tell the rest. So grouped heads, latent attention, windows
and recurrent states are the model's affair.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from moecule.budget import Cache
from moecule.moe import experts_in

BITS = 16  # of a number of the model's dtype, whatever a walk computes in
OURS = "transformers.cache_utils"  # whose windows hold that many tokens and no more


def caches_of(model: Any) -> tuple[Cache, ...]:
    """The layers' caches for one sequence, those alike as one. `model` may lie on meta, or in part.

    A model that does not pass on meta counts as keeping all keys and values of every layer: no cache
    is larger.
    """
    try:
        one, two = _filled(model, 1), _filled(model, 2)
    except (RuntimeError, NotImplementedError, ValueError, AttributeError):
        return (Cache(_dense_bytes(model.config.get_text_config())),)
    found: dict[int | None, list[int]] = {}
    for layer, first, second in zip(two, one, two, strict=True):
        window = getattr(layer, "sliding_window", None)
        window = int(window) if window and type(layer).__module__ == OURS else None
        token = _bytes(second, model.dtype) - _bytes(first, model.dtype)
        sums = found.setdefault(window if token else None, [0, 0])
        sums[0] += token
        sums[1] += _bytes(first, model.dtype) - token
    ordered = sorted(found.items(), key=lambda item: (item[0] is not None, item[0] or 0))
    return tuple(Cache(token, window, state) for window, (token, state) in ordered)


def _filled(model: Any, tokens: int) -> list[Any]:
    """The layers of the cache after a pass on meta."""
    base = model.base_model
    tensors = [*base.named_parameters(), *base.named_buffers()]
    meta = {name: t.to("meta") for name, t in tensors}
    ids = torch.zeros(1, tokens, dtype=torch.long, device="meta")
    with _no_experts(base), torch.no_grad():
        out = functional_call(base, meta, (), {"input_ids": ids, "use_cache": True})
    return list(out.past_key_values.layers)


@contextmanager
def _no_experts(model: nn.Module) -> Iterator[None]:
    """Within, experts give zeros: which of them run depends on numbers, and meta has none."""
    experts = [module for _, module in experts_in(model)]
    for module in experts:
        module.forward = lambda x, *args, **kwargs: torch.zeros_like(x)
    try:
        yield
    finally:
        for module in experts:
            del module.forward


def _bytes(layer: Any, dtype: torch.dtype) -> int:
    """Of the tensors that a layer's cache holds; those in the model's dtype count 16 bits a number."""
    total = 0
    for value in vars(layer).values():
        inside = value.values() if isinstance(value, dict) else value
        for t in inside if isinstance(value, (list, tuple, dict)) else [value]:
            if isinstance(t, Tensor) and t.dim():  # a window's width is a tensor too
                total += t.numel() * (BITS // 8 if t.dtype == dtype else t.element_size())
    return total


def _dense_bytes(config: Any) -> int:
    """Of one token in all layers, each with keys and values of its own."""
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    if getattr(config, "kv_lora_rank", None):
        width = config.qk_nope_head_dim + config.qk_rope_head_dim + config.v_head_dim
    else:
        head = getattr(config, "head_dim", None)
        width = 2 * (head or config.hidden_size // config.num_attention_heads)
    return int(config.num_hidden_layers * heads * width * BITS // 8)
