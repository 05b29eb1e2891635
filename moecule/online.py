"""Online skipping in a loaded model: which (token, expert) pairs run, decided as tokens pass.

The rules themselves are methods/odp.py and, where masks were learnt, methods/otp.py. Attention
received, which only the first reads, is taken inside transformers' attention interface, around
whatever implementation the model uses.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from moecule.errors import PlanError
from moecule.family import Family
from moecule.methods import odp, otp
from moecule.moe import find_layers, find_moe
from moecule.skip import LEARNT, head_shapes

PREFIX = "moecule_"


@dataclass
class Switch:
    """One for the whole model."""

    on: bool = False
    listens: bool = True  # the rules read the attention that tokens receive
    # of each layer: pairs that ran, and all pairs, since it was switched on; counted in place, as CUDA
    # graphs can (attached while a model is on meta, where nothing can be counted)
    counts: Int[Tensor, "L two"] = field(
        default_factory=lambda: torch.zeros(0, 2, dtype=torch.int64, device="cpu")
    )


@dataclass
class LayerSkip:
    """The rule of one layer, and the attention its tokens have just received."""

    switch: Switch
    index: int  # of the layer
    thresholds: tuple[float, ...]
    protect: float
    renormalised: bool
    received: tuple[Float[Tensor, "B S"], Bool[Tensor, "B S"]] | None = field(default=None)

    def __call__(
        self,
        x: Float[Tensor, "T H"],
        idx: Int[Tensor, "T K"],
        coef: Float[Tensor, "T K"],
        nobody: int,
    ) -> tuple[Int[Tensor, "T K"], Float[Tensor, "T K"]]:
        """Indices, `nobody` where a pair is skipped, and coefficients for what runs."""
        if not self.switch.on:
            return idx, coef
        protected = None
        if self.received is not None:
            received, valid = self.received
            by_sequence = x.view(*received.shape, -1)
            protected = odp.protected_tokens(by_sequence, received, valid, self.protect).flatten()
            self.received = None
        run = odp.kept(coef, self.thresholds, protected)
        _count(self.switch, self.index, run)
        return idx.masked_fill(~run, nobody), odp.rescaled(coef, run, self.renormalised)


class LayerMask(nn.Module):
    """The learnt rule of one layer, called as LayerSkip is; its tensors are in the checkpoint.

    They are float32 seen as int32, so that no cast of a model's dtype touches them.
    """

    def __init__(
        self, switch: Switch, index: int, shapes: dict[str, tuple[int, ...]], renormalised: bool
    ) -> None:
        super().__init__()
        self.switch, self.index, self.renormalised = switch, index, renormalised
        for name, shape in shapes.items():
            empty = torch.empty(shape, dtype=torch.int32, device="meta")
            self.register_buffer(name, empty)

    def forward(
        self,
        x: Float[Tensor, "T H"],
        idx: Int[Tensor, "T K"],
        coef: Float[Tensor, "T K"],
        nobody: int,
    ) -> tuple[Int[Tensor, "T K"], Float[Tensor, "T K"]]:
        """Indices, `nobody` where a pair is skipped, and coefficients for what runs."""
        if not self.switch.on:
            return idx, coef
        ordered, order = otp.ranked(coef)
        head = {
            n: bits.view(torch.float32) for n, bits in self._buffers.items() if bits is not None
        }
        run = otp.unranked(otp.hard(otp.scores(head, x, ordered)), order)
        _count(self.switch, self.index, run)
        return idx.masked_fill(~run, nobody), otp.weighed(coef, run, self.renormalised)


def _count(switch: Switch, layer: int, run: Bool[Tensor, "T K"]) -> None:
    counts = switch.counts[layer]
    counts[0].add_(run.sum().to(counts.device))
    counts[1].add_(run.numel())


def attach(model: Any, family: Family, settings: dict[str, Any]) -> None:
    """Give every MoE layer its rule, switched off. Settings: as `settings` of skip.py gives them."""
    learnt = LEARNT in settings
    switch = Switch(listens=not learnt)
    renormalised = family.is_renormalised(model.config.get_text_config())
    for i, layer in enumerate(find_layers(model)[1]):
        moe = find_moe(layer, family)
        if moe is None:
            continue
        if learnt:
            shapes = head_shapes(moe.experts.hears, moe.top_k, settings["hidden"])
            moe.experts.skip = LayerMask(switch, i, shapes, renormalised)
            continue
        # a layer without thresholds skips nothing, but its pairs count
        limits = tuple(settings["thresholds"].get(str(i), ()))
        top_k = moe.top_k
        if limits and len(limits) != top_k - 1:
            raise PlanError(f"skip: layer {i} has {len(limits)} thresholds, wanted {top_k - 1}")
        limit = limits or (0.0,) * (top_k - 1)
        rule = LayerSkip(switch, i, limit, settings["protect"], renormalised)
        moe.experts.skip = rule
        for module in layer.modules():
            if "layer_idx" in vars(module) and limits and settings["protect"] > 0:
                object.__setattr__(module, "moecule_skip", rule)  # shared, not a submodule
    object.__setattr__(model, "moecule_switch", switch)


def set_skip(model: Any, on: bool) -> None:
    """Switch online skipping, as saved in the checkpoint, on or off.

    Raises PlanError for a model whose plan has none.
    """
    switch = vars(model).get("moecule_switch")
    if switch is None:
        raise PlanError(
            "this checkpoint has no skip rule; compress with a recipe that has a [skip] table"
        )
    zeros = torch.zeros(len(find_layers(model)[1]), 2, dtype=torch.int64, device=model.device)
    switch.on, switch.counts = on, zeros
    torch._dynamo.mark_static_address(switch.counts)
    name = model.config._attn_implementation or "eager"
    if on and switch.listens and not name.startswith(PREFIX):
        _wrap(name)
        model.config._attn_implementation = PREFIX + name
    if not on:
        model.config._attn_implementation = name.removeprefix(PREFIX)


def has_skip(model: Any) -> bool:
    """Whether a rule was saved in it."""
    return "moecule_switch" in vars(model)


def experts_run(model: Any) -> float:
    """Share of the (token, expert) pairs that ran since skipping was switched on; 1 without."""
    switch = vars(model).get("moecule_switch")
    ran, all_pairs = (0, 0) if switch is None else switch.counts.sum(0).tolist()
    return ran / all_pairs if all_pairs else 1.0


def experts_run_by_layer(model: Any) -> dict[int, float]:
    """The same of each layer in which there were pairs; {} without skipping."""
    switch = vars(model).get("moecule_switch")
    counts = [] if switch is None else switch.counts.tolist()
    return {i: ran / all_pairs for i, (ran, all_pairs) in enumerate(counts) if all_pairs}


def _wrap(name: str) -> None:
    """Register an attention implementation that also notes the attention each token receives."""

    def forward(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        **kwargs: Any,
    ) -> Any:
        rule: LayerSkip | None = vars(module).get("moecule_skip")
        if rule is not None:
            rule.received = None
            if query.shape[2] > 1:
                scaling = kwargs.get("scaling") or query.shape[-1] ** -0.5
                rule.received = odp.attention_received(
                    query, key, attention_mask, scaling, kwargs.get("s_aux")
                )
        return _plain(name, module)(module, query, key, value, attention_mask, **kwargs)

    AttentionInterface.register(PREFIX + name, forward)
    AttentionMaskInterface.register(PREFIX + name, ALL_MASK_ATTENTION_FUNCTIONS[name])


def _plain(name: str, module: nn.Module) -> Callable[..., Any]:
    if name != "eager":
        found: Callable[..., Any] = ALL_ATTENTION_FUNCTIONS[name]
        return found
    eager: Callable[..., Any] = next(
        vars(sys.modules[c.__module__])["eager_attention_forward"]
        for c in type(module).__mro__
        if "eager_attention_forward" in vars(sys.modules[c.__module__])
    )
    return eager
