"""The MoE block of one decoder layer: its experts and its router, to listen to, cut and replace.

An experts module of transformers says of itself how its weights lie; nothing is guessed here.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from moecule.errors import CheckpointError
from moecule.experts import Experts
from moecule.family import Family


@dataclass(frozen=True)
class Moe:
    """The modules of one layer's MoE block."""

    name: str  # of the block inside its layer: "mlp"
    block: nn.Module
    experts: Any  # a transformers experts module
    router: Any


def find_layers(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """(name, list) of the decoder layers: the outermost list of modules that has experts in it.

    Raises CheckpointError for a model without experts.
    """
    for name, module in model.named_modules():
        if "is_concatenated" not in vars(module):  # set by transformers on experts modules alone
            continue
        parts = name.split(".")
        for i in range(1, len(parts)):
            above = model.get_submodule(".".join(parts[:i]))
            if isinstance(above, nn.ModuleList):
                return ".".join(parts[:i]), above
    raise CheckpointError("the model has no MoE layer; there are no experts to compress")


def find_moe(layer: nn.Module, family: Family) -> Moe | None:
    """The MoE block in a decoder layer. Raises CheckpointError for experts that are not served."""
    for name, module in layer.named_modules():
        if "is_concatenated" not in vars(module):  # set by transformers on experts modules alone
            continue
        experts: Any = module
        parent, _, _ = name.rpartition(".")
        block = layer.get_submodule(parent)
        # has_post_expert_norm came with transformers 5.2x
        if vars(module).get("has_post_expert_norm") or not experts.has_gate:
            raise CheckpointError(
                f"{type(experts).__name__} is not served: no gate, or a norm inside"
            )
        return Moe(parent, block, experts, block.get_submodule(family.router))
    return None


def experts_of(module: Any) -> Experts:
    """A module's weights as `Experts`: views, not copies."""
    up, down = module.gate_up_proj.data, module.down_proj.data
    if module.is_transposed:
        up, down = up.mT, down.mT
    biases = (module.gate_up_proj_bias.data, module.down_proj_bias.data) if module.has_bias else ()
    return Experts(up, down, module._apply_gate, *biases)


def put_experts(module: Any, experts: Experts) -> None:
    """Overwrite a module's matrices, whose number may have changed. Biases too."""
    up, down = experts.gate_up, experts.down
    if module.is_transposed:
        up, down = up.mT.contiguous(), down.mT.contiguous()
    module.gate_up_proj = nn.Parameter(up, requires_grad=False)
    module.down_proj = nn.Parameter(down, requires_grad=False)
    if experts.gate_up_bias is not None and experts.down_bias is not None:
        module.gate_up_proj_bias = nn.Parameter(experts.gate_up_bias, requires_grad=False)
        module.down_proj_bias = nn.Parameter(experts.down_bias, requires_grad=False)
    module.num_experts = len(experts)


def select_experts(moe: Moe, kept: Sequence[int], n_experts: int) -> None:
    """Cut the router, and its bias, to the experts `kept`, in place."""
    at = list(kept)
    for name, tensor in [*moe.router.named_parameters(), *moe.router.named_buffers()]:
        if tensor.shape[0] == n_experts:
            cut = tensor.data[at].contiguous() if not tensor.is_meta else tensor.data[: len(at)]
            if name in moe.router._buffers:
                moe.router._buffers[name] = cut
            else:
                setattr(moe.router, name, nn.Parameter(cut, requires_grad=False))
    moe.router.num_experts = len(at)


@dataclass
class Heard:
    """What a MoE block's experts and router were given, batch after batch; on `device`."""

    device: torch.device | None = None  # None: where they come to pass
    outputs: bool = True  # also what the experts and the router gave
    x: list[Float[Tensor, "T H"]] = field(default_factory=list)
    idx: list[Int[Tensor, "T K"]] = field(default_factory=list)
    coef: list[Float[Tensor, "T K"]] = field(default_factory=list)
    routed: list[Float[Tensor, "T H"]] = field(default_factory=list)
    logits: list[Float[Tensor, "T E"]] = field(default_factory=list)
    live: list[Float[Tensor, "T H"]] = field(default_factory=list)  # routed, with its graph

    def keep(self, tensor: Tensor) -> Tensor:
        """As it is put aside."""
        return tensor.detach().to(self.device or tensor.device)

    def pairs(self, n: int) -> list[list[Tensor]]:
        """[expert][batch]: the (token, rank) pairs that came to it, numbered token * K + rank."""
        by_batch = []
        for idx in self.idx:
            order = idx.flatten().argsort(stable=True)
            counts = idx.flatten().bincount(minlength=n).tolist()
            by_batch.append(order.split(counts))
        return [[pairs[e] for pairs in by_batch] for e in range(n)]


@contextmanager
def listening(
    moe: Moe, device: torch.device | None = None, *, outputs: bool = True
) -> Iterator[Heard]:
    """Within, every pass through the block is noted. The routing is the model's own, never re-derived.

    Hidden states are put aside on `device`, if given.
    """
    heard = Heard(device, outputs)

    def on_experts(
        module: Any, args: tuple[Tensor, ...], kwargs: dict[str, Tensor], out: Tensor
    ) -> None:
        x, idx, coef = (*args, *kwargs.values())
        heard.x.append(heard.keep(x))
        heard.idx.append(heard.keep(idx))
        heard.coef.append(heard.keep(coef.float()))
        if outputs:
            heard.routed.append(heard.keep(out))
        if out.requires_grad:
            heard.live.append(out)

    def on_router(module: Any, args: Any, out: tuple[Tensor, Tensor, Tensor]) -> None:
        if outputs:
            heard.logits.append(heard.keep(out[0].float()))

    handles = [
        moe.experts.register_forward_hook(on_experts, with_kwargs=True),
        moe.router.register_forward_hook(on_router),
    ]
    try:
        yield heard
    finally:
        for handle in handles:
            handle.remove()
