"""A packed model that can be trained: scales and zero points as parameters, codes as they are.

    weight = (code - zero) * scale        codes stay; scale and zero move

Buffers become parameters in their place and under their name, and the model's own forward runs.
Experts are unpacked together and run by transformers' grouped products. What is computed while
training is what will be stored: scales and zero points are rounded to fp16 in the forward pass, and
gradients pass the rounding by (Bengio et al. 2013, arXiv:1308.3432). That scales alone win much back
of what rounding cost is of EfficientQAT (Chen et al. 2024, arXiv:2407.11062), its second phase.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from jaxtyping import Float, Int, Shaped, UInt8
from torch import Tensor, nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from moecule.forward import in_pieces
from moecule.hf import set_experts
from moecule.moe import activated, ended, experts_in, first_matrix
from moecule.packed import unpack
from moecule.ragged import Ragged
from moecule.runtime import MODEL_TYPE

# names of `thawed_forward` and `plain_forward` in transformers' experts interface
EXPERTS, PLAIN = "moecule_thawed", "moecule_plain"
PACKED = "packed"  # the child of an experts module that holds its stacks
BYTES = "code_bytes"  # of a thawed module: its codes, a byte each, by the name of the weight
HELD = "held"  # of thawed experts: their matrices in float32, where `hold` unpacked them
ORDER = "code_order"  # of thawed experts: where each lies when all stacks lie one after the other
ALIGNED = 16  # bytes; torch's grouped product wants rows to begin at multiples


class _Dequantise(torch.autograd.Function):
    """Codes, a byte each, to weights. Nothing else of the weights' size is kept for the backward pass."""

    @staticmethod
    def forward(
        ctx: Any,
        codes: UInt8[Tensor, "*E M N"],
        scale: Float[Tensor, "*E M G"],
        zero: Float[Tensor, "*E M G"],
        group: int,
    ) -> Float[Tensor, "*E M N"]:
        scale, zero = scale.half().float(), zero.half().float()
        ctx.save_for_backward(codes, scale, zero)
        ctx.group = group
        q = _grouped(codes, group).float()
        made = (q.sub_(zero[..., None])).mul_(scale[..., None]).flatten(-2)
        return made[..., : codes.shape[-1]]

    @staticmethod
    def backward(ctx: Any, grad: Float[Tensor, "*E M N"]) -> tuple[Tensor | None, ...]:
        codes, scale, zero = ctx.saved_tensors
        by_group = _grouped(grad, ctx.group)
        total = by_group.sum(-1)
        of_codes = (by_group * _grouped(codes, ctx.group)).sum(-1)
        return None, of_codes - zero * total, -total * scale, None


def _grouped(x: Shaped[Tensor, "*E M N"], group: int) -> Shaped[Tensor, "*E M G group"]:
    """Columns by the scale that they share; past the last are zeros."""
    short = -x.shape[-1] % group
    padded: Tensor = nn.functional.pad(x, (0, short)) if short else x
    made: Tensor = padded.unflatten(-1, (-1, group))
    return made


def packed_in(model: nn.Module) -> Iterator[tuple[str, nn.Module, str]]:
    """(the module's name, module, the weight's name) of every packed weight."""
    for prefix, module in model.named_modules():
        for name in vars(module).get("widths", {}):
            yield prefix, module, name


@torch.no_grad()
def thaw(model: nn.Module) -> None:
    """Make scales and zero points parameters, in place, once the model is where it runs; see `freeze`."""
    for _, module, name in packed_in(model):
        keep, columns = module.widths[name]  # type: ignore[index]
        codes = unpack(module.get_buffer(f"{name}_codes"), keep.bits, columns).to(torch.uint8)
        vars(module).setdefault(BYTES, {})[name] = codes  # no buffer: no checkpoint holds it
        for part in (f"{name}_scale", f"{name}_zero"):
            if part in module._buffers:
                stored: Any = module._buffers.pop(part)
                module.register_parameter(part, nn.Parameter(stored.view(torch.float16).float()))
        if name == "weight":  # of a Linear or a router; stacks of experts are read below
            _give_class(module)
    for _, module in experts_in(model):
        if PACKED in module._modules:
            vars(module)[ORDER] = _order(module)
            _put_in_order(module)
    set_experts(model, EXPERTS)


def _put_in_order(module: Any) -> None:
    """Codes of all stacks in the order of the experts, where one product of all is to be made of them."""
    stacks = [*module.packed.values()]
    if any(isinstance(stack, Ragged) or stack.keep.bits == 16 for stack in stacks):
        return
    if len({stack.keep.group for stack in stacks}) == 1:
        at = vars(module)[ORDER]
        of = [vars(stack).pop(BYTES) for stack in stacks]
        vars(module)[BYTES] = {n: torch.cat([codes[n] for codes in of])[at] for n in of[0]}


@torch.no_grad()
def hold(model: nn.Module) -> None:
    """Unpack a thawed model's experts once, in float32, where neither codes nor scales are to move."""
    for _, module in experts_in(model):
        if not any(isinstance(stack, Ragged) for stack in module.packed.values()):
            vars(module)[HELD] = {name: _stacked(module, name) for name in ("gate_up", "down")}
            for holder in (module, *module.packed.values()):
                vars(holder).pop(BYTES, None)


@torch.no_grad()
def freeze(model: nn.Module) -> None:
    """The way back from `thaw`, in place."""
    for _, module, name in packed_in(model):
        for part in (f"{name}_scale", f"{name}_zero"):
            if part in module._parameters:
                parameter: Any = module._parameters.pop(part)
                module.register_buffer(part, frozen(parameter.detach()))
        if type(module) in _thawed_classes.values():
            (module.__class__,) = type(module).__bases__
    for module in model.modules():
        for mark in (BYTES, ORDER, HELD):
            vars(module).pop(mark, None)
    set_experts(model, MODEL_TYPE)


@torch.no_grad()
def frozen(parameter: Float[Tensor, "*E M G"]) -> Int[Tensor, "*E M G"]:
    """A thawed parameter as checkpoints hold it: fp16, seen as int16."""
    return parameter.half().contiguous().view(torch.int16)


def thawed_names(model: nn.Module) -> set[str]:
    """The full names of the parameters that `thaw` made."""
    return {
        f"{prefix}.{name}_{part}"
        for prefix, module, name in packed_in(model)
        for part in ("scale", "zero")
        if f"{name}_{part}" in module._parameters
    }


_thawed_classes: dict[type, type] = {}


def _give_class(module: nn.Module) -> None:
    """The module's own class, with a weight that is made of its parameters."""
    base = type(module)
    if base not in _thawed_classes:
        own: dict[str, Any] = {"weight": property(lambda self: _weight(self, "weight"))}
        if isinstance(module, nn.Linear):
            own["forward"] = nn.Linear.forward
        _thawed_classes[base] = type(f"Thawed{base.__name__}", (base,), own)
    module.__class__ = _thawed_classes[base]


def _scales(module: Any, name: str) -> tuple[Tensor, Tensor]:
    """(scales, zero points) of a packed weight."""
    scale: Tensor = module.get_parameter(f"{name}_scale")
    if module.widths[name][0].bits == 1:
        return scale, torch.full_like(scale, 0.5)
    return scale, module.get_parameter(f"{name}_zero")


def _weight(module: Any, name: str) -> Float[Tensor, "*E M N"]:
    """A packed weight whose scales are parameters, unpacked."""
    return _made(vars(module)[BYTES][name], *_scales(module, name), module.widths[name][0].group)


def _made(codes: Tensor, scale: Tensor, zero: Tensor, group: int) -> Float[Tensor, "*E M N"]:
    made: Tensor = _Dequantise.apply(codes, scale, zero, group)  # type: ignore[no-untyped-call]
    return cast(made)


def cast(weight: Float[Tensor, "*E M N"]) -> Float[Tensor, "*E M N"]:
    """In the precision of products: autocast passes grouped ones by."""
    kind = weight.device.type
    on = torch.is_autocast_enabled(kind)
    return weight.to(torch.get_autocast_dtype(kind)) if on else weight


class _Dense:
    """An experts module to transformers' functions, with weights that are given."""

    def __init__(self, module: Any, up: Tensor, down: Tensor, *, transposed: bool = False) -> None:
        vars(self).update({"_module": module, first_matrix(module): up, "down_proj": down})
        self.num_experts, self.is_transposed = len(up), transposed

    def __getattr__(self, name: str) -> Any:
        return getattr(vars(self)["_module"], name)


def plain_forward(
    self: Any, hidden: Float[Tensor, "T H"], idx: Int[Tensor, "T K"], coef: Float[Tensor, "T K"]
) -> Float[Tensor, "T H"]:
    """The forward of an experts module that was never packed: grouped products, in autocast's precision."""
    up, down = cast(getattr(self, first_matrix(self))), cast(self.down_proj)
    given = _Dense(self, up, down, transposed=self.is_transposed)
    made: Tensor = ALL_EXPERTS_FUNCTIONS["grouped_mm"](given, hidden, idx, coef)
    return made


def thawed_forward(
    self: Any, hidden: Float[Tensor, "T H"], idx: Int[Tensor, "T K"], coef: Float[Tensor, "T K"]
) -> Float[Tensor, "T H"]:
    """The forward of an experts module that was packed, with gradients."""
    if "into" in self._buffers:  # experts that became part of others
        idx = self.into[idx].to(idx.dtype)
    runs = self._buffers.get("runs")
    if self.cuts > 1 or runs is not None:
        idx, coef = in_pieces(idx, coef, self.cuts, self.num_experts, runs)
    nobody = idx >= self.num_experts  # of runs that are not there
    idx, coef = idx.masked_fill(nobody, 0), coef.masked_fill(nobody, 0)
    if any(isinstance(stack, Ragged) for stack in self.packed.values()):
        return _one_by_one(self, hidden, idx, coef, None)
    up, down = (_stacked(self, name) for name in ("gate_up", "down"))
    if any(w.shape[-1] * w.element_size() % ALIGNED for w in (up, down)):
        return _one_by_one(self, hidden, idx, coef, (up, down))
    made: Tensor = ALL_EXPERTS_FUNCTIONS["grouped_mm"](_Dense(self, up, down), hidden, idx, coef)
    return made


def _stacked(module: Any, name: str) -> Float[Tensor, "E M N"]:
    """One matrix of all experts, or of all pieces of them, in their order."""
    if HELD in vars(module):
        return cast(vars(module)[HELD][name])
    stacks, at = [*module.packed.values()], vars(module)[ORDER]
    if BYTES not in vars(module):
        return torch.cat([_of_stack(stack, name) for stack in stacks])[at]
    scales = [_scales(stack, name) for stack in stacks]
    scale, zero = (torch.cat([pair[i] for pair in scales])[at] for i in (0, 1))
    return _made(vars(module)[BYTES][name], scale, zero, stacks[0].keep.group)


def _order(module: Any) -> Int[Tensor, " E"]:
    """What ORDER says."""
    firsts, total = {}, 0
    for kind, stack in module.packed.items():
        firsts[kind], total = total, total + sum(k == kind for k, _ in module.slots)
        device = next(stack.parameters()).device
    return torch.tensor([firsts[kind] + row for kind, row in module.slots], device=device)


def _of_stack(stack: Any, name: str) -> Float[Tensor, "n M N"]:
    if stack.keep.bits == 16:
        return cast(stack.get_parameter(f"{name}_weight"))
    return _weight(stack, name)


def _one_by_one(
    module: Any,
    hidden: Float[Tensor, "T H"],
    idx: Int[Tensor, "T K"],
    coef: Float[Tensor, "T K"],
    weights: tuple[Tensor, Tensor] | None,
) -> Float[Tensor, "T H"]:
    """Expert after expert: of many widths, or of widths that grouped products do not take."""
    out = torch.zeros_like(hidden)
    for e, (kind, row) in enumerate(module.slots):
        token, rank = torch.where(idx == e)
        if not len(token):
            continue
        stack = module.packed[kind]
        up, down = (
            (stack.weight("gate_up", row), stack.weight("down", row))
            if weights is None
            else (weights[0][e], weights[1][e])
        )
        expert = torch.full_like(token, e) if module.has_bias else None
        act = activated(module, nn.functional.linear(hidden[token], up), expert)
        made = ended(module, nn.functional.linear(act, down), expert)
        out = out.index_add(0, token, (made * coef[token, rank, None]).to(out.dtype))
    return out


ALL_EXPERTS_FUNCTIONS.register(EXPERTS, thawed_forward)
ALL_EXPERTS_FUNCTIONS.register(PLAIN, plain_forward)
