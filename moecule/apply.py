"""Carry a plan out: every tensor is read once and written once, layer by layer.

Later layers are calibrated on what earlier ones have become. Within a layer attention comes
first, then what reads its output; down projections see the rounded gate and up.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from moecule import runtime
from moecule.checkpoint import Writer
from moecule.errors import PlanError
from moecule.experts import Experts
from moecule.hf import Heard, Moe, Streamed, experts_of, listening, put_experts, select_experts
from moecule.inventory import rest_parts
from moecule.method import Method, load_method
from moecule.packed import Packed
from moecule.plan import Drop, Keep, Plan
from moecule.recipe import Part
from moecule.walk import Step, walk


@dataclass
class Applied:
    """What came of it, for config.json, the report and the check."""

    experts: dict[str, str] = field(default_factory=dict)  # as in runtime.PackedConfig
    weights: dict[str, str] = field(default_factory=dict)
    starved: dict[int, list[int]] = field(
        default_factory=dict
    )  # experts no token reached, by layer
    hidden: list[Tensor] = field(default_factory=list)  # the last layer's output


def check_plan(plan: Plan, streamed: Streamed) -> None:
    """Raise PlanError where the plan does not fit the model."""
    if plan.digest != streamed.checkpoint.digest:
        raise PlanError(
            f"the plan is for {plan.model} ({plan.digest}), and {streamed.checkpoint.name} is "
            f"{streamed.checkpoint.digest}; plan again for this model"
        )
    moes = {i: moe for i in range(len(streamed.base.layers)) if (moe := streamed.moe(i))}
    if sorted(moes) != sorted(plan.layers):
        raise PlanError(
            f"the plan has layers {sorted(plan.layers)}, the model's MoE layers are {sorted(moes)}"
        )
    for i, moe in moes.items():
        fates, n = plan.layers[i], moe.experts.num_experts
        if len(fates) != n:
            raise PlanError(f"plan: layer {i} has {len(fates)} experts, the model has {n}")
        kept = [e for e, f in enumerate(fates) if isinstance(f, Keep)]
        if len(kept) < moe.router.top_k:
            raise PlanError(
                f"plan: layer {i} keeps {len(kept)} experts, and the router picks {moe.router.top_k} "
                "a token; keep more"
            )
        _check_groups(plan, streamed, i, n, kept)
    if plan.skip is not None and not set(plan.skip.thresholds) <= set(moes):
        raise PlanError(
            f"plan: skip names layers {sorted(plan.skip.thresholds)}, of {sorted(moes)}"
        )
    for i, limits in (plan.skip.thresholds if plan.skip else {}).items():
        tail = moes[i].router.top_k - 1
        if len(limits) != tail:
            raise PlanError(f"plan: skip: layer {i} has {len(limits)} thresholds, wanted {tail}")


def _check_groups(plan: Plan, streamed: Streamed, layer: int, n: int, kept: Sequence[int]) -> None:
    groups = streamed.family.groups and streamed.checkpoint.config.get(streamed.family.groups)
    if not groups or groups == 1 or len(kept) == n:
        return
    sizes = {sum(e * groups // n == g for e in kept) for g in range(groups)}
    if len(sizes) > 1 or min(sizes) < 2:
        raise PlanError(
            f"plan: layer {layer}: the router picks among {groups} groups of experts; each must keep "
            f"the same number, at least 2, and the plan keeps {sorted(sizes)}"
        )


def apply_plan(
    streamed: Streamed,
    plan: Plan,
    encode: Part,
    batches: Sequence[Int[Tensor, "B S"]],
    writer: Writer,
    tick: Callable[[], None] = lambda: None,
) -> Applied:
    """Write the compressed tensors of the whole model to `writer`; `writer.close` is the caller's.

    `streamed` is used up: its layers have become what was written. Raises PlanError where the plan
    does not fit the model.
    """
    check_plan(plan, streamed)
    codec = _Codec(load_method(encode.method, "encode"), encode.options)
    done = Applied()
    stock = is_stock(plan)
    outer = {
        n: t for n, t in streamed.model.state_dict().items() if n in set(streamed.outer_names())
    }
    writer.add(streamed.to_disk(outer) if stock else _cast(streamed, outer))
    up = walk(streamed, batches, tick)
    while True:
        try:
            step = next(up)
        except StopIteration as end:
            done.hidden = end.value
            return done
        _layer(streamed, plan, codec, step, done)
        prefix = f"{streamed.prefix}{step.index}."
        state = {prefix + n: t for n, t in step.layer.state_dict().items()}
        writer.add(streamed.to_disk(state) if stock else _cast(streamed, state))


def is_stock(plan: Plan) -> bool:
    """Whether stock transformers can load the result: nothing packed, layers of one size."""
    fates = [f for layer in plan.layers.values() for f in layer] + list(plan.rest.values())
    sizes = {sum(isinstance(f, Keep) for f in layer) for layer in plan.layers.values()}
    return len(sizes) == 1 and all(isinstance(f, Drop) or f.bits == 16 for f in fates)


def _cast(streamed: Streamed, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights that stay go back to the dtype they had on disk."""
    out = {}
    for name, tensor in tensors.items():
        dtype = streamed.dtypes.get(name)
        if dtype is None and tensor.is_floating_point():  # experts that stay, stacked anew
            owner = name.partition(".packed.")[0]
            dtype = streamed.dtypes[f"{owner}.gate_up_proj"]
        out[name] = tensor.to(dtype) if dtype is not None else tensor
    return out


@dataclass(frozen=True)
class _Codec:
    """An encode method with its options."""

    method: Method
    options: Any

    def __call__(
        self, w: Float[Tensor, "E M N"], gram: Float[Tensor, "E N N"] | None, keeps: Sequence[Keep]
    ) -> list[Packed | None]:
        """One Packed for each weight; None where 16 bits are kept."""
        assert self.method.encode is not None  # load_method saw to it
        out: list[Packed | None] = [None] * len(keeps)
        for group in sorted({k.group for k in keeps if k.bits < 16}):
            of = [e for e, k in enumerate(keeps) if k.bits < 16 and k.group == group]
            grams = None if gram is None else gram[of]
            bits = tuple(keeps[e].bits for e in of)
            for e, packed in zip(
                of, self.method.encode(w[of], grams, bits, group, self.options), strict=True
            ):
                out[e] = packed
        return out


def _layer(streamed: Streamed, plan: Plan, codec: _Codec, step: Step, done: Applied) -> None:
    """Compress one layer in place and pass the batches through what it has become."""
    i, moe = step.index, streamed.moe(step.index)
    parts = rest_parts(streamed.model, streamed.family, i)
    rest = {n: plan.rest[p] for n, p in parts.items()}
    packed: dict[str, Packed] = {}
    attention = [n for n, p in parts.items() if p == "attention"]
    _pack_weights(codec, step, {n: rest[n] for n in attention}, packed)
    if moe is not None:
        fates = plan.layers[i]
        kept = [e for e, f in enumerate(fates) if isinstance(f, Keep)]
        if len(kept) < len(fates):
            put_experts(moe.experts, experts_of(moe.experts).select(kept))
            select_experts(moe, kept, len(fates))
    others = {n: k for n, k in rest.items() if n not in attention}
    with listening(moe) if moe is not None else _nothing() as heard:
        _pack_weights(codec, step, others, packed, always_run=moe is not None)
    keeps: list[Keep] = []
    expert_codes: dict[str, list[Packed | None]] = {}
    if moe is not None and heard is not None:
        keeps = [f for f in plan.layers[i] if isinstance(f, Keep)]
        expert_codes = _pack_experts(codec, moe, heard, keeps, done, i, kept)
    step.run()
    for name, keep in rest.items():
        if keep.bits < 16:
            module = step.layer.get_submodule(name)
            runtime.prepare_weight(module, keep)
            runtime.fill_weight(module, packed[name])
            done.weights[f"{streamed.prefix}{i}.{name}"] = runtime.keep_text(keep)
    if moe is not None and not is_stock(plan):
        experts = experts_of(moe.experts)
        runtime.prepare_experts(moe.experts, keeps)
        runtime.fill_experts(moe.experts, experts, expert_codes)
        done.experts[str(i)] = " ".join(map(runtime.keep_text, keeps))


@contextmanager
def _nothing() -> Iterator[None]:
    yield None


def _pack_weights(
    codec: _Codec,
    step: Step,
    keeps: Mapping[str, Keep],
    packed: dict[str, Packed],
    *,
    always_run: bool = False,
) -> None:
    """Round the named weights in place, with one pass for the gram matrices if the codec wants them."""
    chosen = {n: k for n, k in keeps.items() if k.bits < 16}
    grams: dict[str, Tensor] = {}
    if always_run or (chosen and codec.method.wants_gram):
        with _grams(step.layer, list(chosen) if codec.method.wants_gram else []) as grams:
            step.run()
    for name, keep in chosen.items():
        module = step.layer.get_submodule(name)
        weight = module.get_parameter("weight").data
        gram = grams[name][None] if name in grams else None
        (code,) = codec(weight[None], gram, [keep])
        assert code is not None  # only widths below 16 were chosen
        packed[name] = code
        module.weight = nn.Parameter(code.dequantize(weight.dtype), requires_grad=False)


@contextmanager
def _grams(layer: nn.Module, names: Sequence[str]) -> Iterator[dict[str, Float[Tensor, "N N"]]]:
    """Within, sum x x^T over the inputs of the named modules."""
    grams: dict[str, Tensor] = {}

    def listen(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
            x = [*args, *kwargs.values()][0].flatten(0, -2).float()
            grams[name] = grams[name] + x.mT @ x if name in grams else x.mT @ x

        return hook

    handles = [
        layer.get_submodule(n).register_forward_pre_hook(listen(n), with_kwargs=True) for n in names
    ]
    try:
        yield grams
    finally:
        for handle in handles:
            handle.remove()


def _pack_experts(
    codec: _Codec,
    moe: Moe,
    heard: Heard,
    keeps: Sequence[Keep],
    done: Applied,
    layer: int,
    ids: Sequence[int],
) -> dict[str, list[Packed | None]]:
    """Round a layer's experts in place; note those that no token reached."""
    experts = experts_of(moe.experts)
    x, idx = torch.cat(heard.x), torch.cat(heard.idx)
    at = [torch.where((idx == e).any(-1))[0] for e in range(len(experts))]
    starved = [ids[e] for e, t in enumerate(at) if len(t) == 0]
    if starved:
        done.starved[layer] = starved
    wants = codec.method.wants_gram
    gram = torch.stack([_gram(x[t]) for t in at]) if wants else None
    up = codec(experts.gate_up, gram, keeps)
    rounded = _with(experts, gate_up=up)
    if wants:
        gram = torch.stack([_gram(rounded[e].act(x[t])) for e, t in enumerate(at)])
    down = codec(experts.down, gram, keeps)
    put_experts(moe.experts, _with(rounded, down=down))
    return {"gate_up": up, "down": down}


def _gram(x: Float[Tensor, "t N"]) -> Float[Tensor, "N N"]:
    return x.float().mT @ x.float()


def _with(experts: Experts, **codes: list[Packed | None]) -> Experts:
    """Experts with some matrices replaced by what their codes stand for."""
    new = {"gate_up": experts.gate_up, "down": experts.down}
    for name, packed in codes.items():
        old = new[name]
        new[name] = torch.stack(
            [w if p is None else p.dequantize(w.dtype) for w, p in zip(old, packed, strict=True)]
        )
    return Experts(
        new["gate_up"], new["down"], experts.gate, experts.gate_up_bias, experts.down_bias
    )
