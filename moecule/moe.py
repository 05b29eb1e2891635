"""The MoE block of one decoder layer: its experts and its router, to listen to, cut and replace.

An experts module of transformers says of itself how its weights lie; nothing is guessed here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from moecule.errors import CheckpointError
from moecule.experts import Experts, Gate
from moecule.family import Family
from moecule.turn import Before, turn_of


@dataclass(frozen=True)
class Moe:
    """The modules of one layer's MoE block."""

    name: str  # of the block inside its layer: "mlp"
    layer: nn.Module
    block: nn.Module
    experts: Any  # a transformers experts module
    router: Any

    @property
    def top_k(self) -> int:
        """Experts that the router picks for a token."""
        k = getattr(self.router, "top_k", None)
        return int(self.router.config.top_k_experts if k is None else k)

    @property
    def prefix(self) -> str:
        """What the names of the block's modules begin with, inside the layer."""
        return f"{self.name}." if self.name else ""


def find_layers(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """(name, list) of the decoder layers: the outermost list of modules that has experts in it.

    Where vision has experts too, those of the text. Raises CheckpointError for a model without.
    """
    found: dict[str, nn.ModuleList] = {}
    for name, _ in experts_in(model):
        parts = name.split(".")
        for i in range(1, len(parts)):
            above = model.get_submodule(".".join(parts[:i]))
            if isinstance(above, nn.ModuleList):
                found.setdefault(".".join(parts[:i]), above)
                break
    if not found:
        raise CheckpointError(
            "the model has no MoE layer; there are no experts to compress, give another model"
        )
    text = [name for name in found if "language_model" in name.split(".")]
    name = (text or list(found))[0]
    return name, found[name]


def experts_in(module: nn.Module) -> list[tuple[str, Any]]:
    """(name, module) of all experts modules in `module`."""
    # an attribute that transformers sets on experts modules alone
    return [(n, m) for n, m in module.named_modules() if "is_concatenated" in vars(m)]


def find_moe(layer: nn.Module, family: Family) -> Moe | None:
    """The MoE block in a decoder layer. Raises CheckpointError for experts that are not served."""
    found = experts_in(layer)
    if not found:
        return None
    if len(found) > 1:
        raise CheckpointError(
            f"{type(layer).__name__} has {len(found)} sets of experts; its family is not served, "
            "`moecule families` lists those that are"
        )
    ((name, experts),) = found
    parent, _, _ = name.rpartition(".")
    block = layer.get_submodule(parent)
    return Moe(parent, layer, block, experts, block.get_submodule(family.router))


def first_matrix(module: Any) -> str:
    """The name of what reads an expert's input: with the gate's rows, where there is a gate."""
    return "gate_up_proj" if module.has_gate else "up_proj"


def end_of(module: Any) -> Callable[[Tensor], Tensor] | None:
    """The norm that each expert's output passes through, if any."""
    # has_post_expert_norm came with transformers 5.2x
    return module.post_expert_norm if vars(module).get("has_post_expert_norm") else None


def gate_of(module: Any) -> Gate:
    """The family's own function between an expert's matrices."""
    gate: Gate = module._apply_gate if module.has_gate else module.act_fn
    return gate


def activated(
    module: Any, up: Float[Tensor, "pairs R"], expert: Int[Tensor, " pairs"] | None
) -> Float[Tensor, "pairs F"]:
    """What enters the down projection, of what the first matrix of each pair's expert gave.

    `expert` is read where there are biases.
    """
    if module.has_bias:
        # experts of many widths have biases of one length, those that count first
        up = up + getattr(module, f"{first_matrix(module)}_bias")[expert][:, : up.shape[1]]
    return gate_of(module)(up)


def ended(
    module: Any, out: Float[Tensor, "pairs H"], expert: Int[Tensor, " pairs"] | None
) -> Float[Tensor, "pairs H"]:
    """What an expert gives, of what its down projection gave, before the coefficients."""
    if module.has_bias:
        out = out + module.down_proj_bias[expert]
    end = end_of(module)
    return out if end is None else end(out)


class _ReachedError(Exception):
    """A hook was called; the rest need not run."""


@torch.no_grad()
def until(
    register: Callable[..., Any], run: Callable[[], object], **how: bool
) -> tuple[Any, ...] | None:
    """What a hook is given when `run`, which ends there, first comes to it; None where it does not."""
    given: list[tuple[Any, ...]] = []

    def stop(*args: Any) -> None:
        given.append(args)
        raise _ReachedError

    handle = register(stop, **how)
    try:
        run()
    except _ReachedError:
        return given[0]
    finally:
        handle.remove()
    return None


def router_logits(moe: Moe, run: Callable[[], object]) -> Float[Tensor, "T E"]:
    """What the block's router says, before it picks, when `run` runs; which ends there."""
    given = until(moe.router.register_forward_hook, run)
    assert given is not None  # a MoE block asks its router
    logits: Tensor = given[2][0]
    return logits.float()


def probability(logits: Float[Tensor, "T E"], scores: str) -> Float[Tensor, "T E"]:
    """What a token thought of each expert before some were chosen; `scores` is of family.SCORES."""
    if scores == "softmax":
        return logits.softmax(-1)
    if scores == "sigmoid":
        return logits.sigmoid()
    return torch.nn.functional.softplus(logits).sqrt() if scores == "sqrtsoftplus" else logits


def try_router(moe: Moe, hidden: Float[Tensor, "B S H"]) -> tuple[Any, ...] | None:
    """Let the block pick experts, on meta too: what a hook before the experts is given, if it can be tried.

    Raises what the model raises where it cannot pick.
    """
    with suppress(NotImplementedError, TypeError):  # it cannot be tried so
        before = moe.experts.register_forward_pre_hook
        return until(before, lambda: moe.block(hidden), with_kwargs=True)
    return None


def experts_of(module: Any) -> Experts:
    """A module's weights as `Experts`: views, not copies."""
    first = first_matrix(module)
    up, down = getattr(module, first).data, module.down_proj.data
    if module.is_transposed:
        up, down = up.mT, down.mT
    gate = gate_of(module)
    if not module.has_bias:
        return Experts(up, down, gate, end=end_of(module))
    biases = getattr(module, f"{first}_bias").data, module.down_proj_bias.data
    return Experts(up, down, gate, *biases, end=end_of(module))


def put_experts(module: Any, experts: Experts) -> None:
    """Overwrite a module's matrices, whose number may have changed. Biases too."""
    up, down = experts.gate_up, experts.down
    if module.is_transposed:
        up, down = up.mT.contiguous(), down.mT.contiguous()
    first = first_matrix(module)
    setattr(module, first, nn.Parameter(up, requires_grad=False))
    module.down_proj = nn.Parameter(down, requires_grad=False)
    if experts.gate_up_bias is not None and experts.down_bias is not None:
        bias = nn.Parameter(experts.gate_up_bias, requires_grad=False)
        setattr(module, f"{first}_bias", bias)
        module.down_proj_bias = nn.Parameter(experts.down_bias, requires_grad=False)
    module.num_experts = len(experts)


def select_experts(moe: Moe, kept: Sequence[int], n_experts: int) -> None:
    """Cut the router, and its bias wherever it is, to the experts `kept`, in place."""
    shared = int(getattr(moe.router, "n_shared_experts", 0))  # scored by the router's last rows
    for module, name, axis in by_expert(moe, n_experts):
        tensor = getattr(module, name).data
        rest = range(n_experts, n_experts + shared) if tensor.shape[axis] > n_experts else ()
        at = [*kept, *rest]
        if tensor.is_meta:
            cut = tensor.narrow(axis, 0, len(at))
        else:
            cut = tensor.index_select(axis, torch.tensor(at, device=tensor.device))
        if name in module._buffers:
            module._buffers[name] = cut
        else:
            setattr(module, name, nn.Parameter(cut, requires_grad=False))
        if isinstance(module, nn.Linear):
            module.out_features = len(at)
    moe.router.num_experts = len(kept)


def set_top_k(moe: Moe, top_k: int) -> None:
    """Let the router pick so many experts for a token, in place."""
    holders = [m for m in (moe.router, moe.block) if "top_k" in vars(m)]
    for module in holders:
        module.top_k = top_k
    if not holders:  # read from the config that all layers share, as `Moe.top_k` reads it
        moe.router.config.top_k_experts = top_k


def by_expert(moe: Moe, n_experts: int) -> list[tuple[nn.Module, str, int]]:
    """(module, tensor's name, axis) of all that the router has one of for each expert."""
    shared = int(getattr(moe.router, "n_shared_experts", 0))
    sizes = (n_experts, n_experts + shared)
    places = [*moe.router.modules(), moe.block]  # some keep the bias for the choice in the block
    out = []
    for module in places:
        for name, tensor in [*module._parameters.items(), *module._buffers.items()]:
            axes = [] if tensor is None else [a for a, n in enumerate(tensor.shape) if n in sizes]
            if axes:
                out.append((module, name, axes[0]))
    return out


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
    turn: list[Float[Tensor, " T"]] = field(default_factory=list)  # as in stats.Seen

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
    moe: Moe,
    device: torch.device | None = None,
    *,
    outputs: bool = True,
    turned: bool = False,
) -> Iterator[Heard]:
    """Within, every pass through the block is noted. The routing is the model's own, never re-derived.

    Hidden states are put aside on `device`, if given. `turned`: how far the routed experts turn the
    residual stream is noted too, which raises CheckpointError where that stream is not found.
    """
    heard = Heard(device, outputs)
    before = Before(moe.layer, moe.block if moe.name else None)

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
        if turned:
            heard.turn.append(heard.keep(turn_of(before.of(x, out), out.detach())))

    def on_router(module: Any, args: Any, out: tuple[Tensor, ...]) -> None:
        if outputs:
            heard.logits.append(heard.keep(out[0].float()))

    handles = [
        moe.experts.register_forward_hook(on_experts, with_kwargs=True),
        moe.router.register_forward_hook(on_router),
        *(before.hooks() if turned else ()),
    ]
    try:
        yield heard
    finally:
        for handle in handles:
            handle.remove()
