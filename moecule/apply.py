"""Carry a plan out: every tensor is read once and written once, layer by layer.

Later layers are calibrated on what earlier ones have become. Within a layer attention comes
first, then what reads its output; down projections see the rounded gate and up.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from moecule import runtime
from moecule.batch import Batch
from moecule.errors import PlanError
from moecule.experts import Expert, Experts
from moecule.family import Family
from moecule.hf import Streamed
from moecule.inventory import rest_parts
from moecule.journal import NO_TRAIL, Trail
from moecule.learnt import HEADS, check_skip, first_heads
from moecule.method import load_method
from moecule.moe import end_of, experts_of, listening
from moecule.pack import Codec, pack_experts, pack_weights
from moecule.packed import BLOCK, Packed
from moecule.plan import Keep, Plan
from moecule.recipe import Part, part_of
from moecule.runs import in_runs, run_of
from moecule.sparse import Masker, zero_weights
from moecule.states import States
from moecule.target import check_plan as check_loads
from moecule.target import target_of
from moecule.unite import check_merges, take_away
from moecule.walk import Step, Tick, finish, walk
from moecule.width import width_key
from moecule.writer import Writer
from moecule.zeros import Sparse


@dataclass
class Applied:
    """What came of it, for config.json, the report and the check."""

    experts: dict[str, str] = field(default_factory=dict)  # as in runtime.PackedConfig
    weights: dict[str, str] = field(default_factory=dict)
    starved: dict[int, list[int]] = field(
        default_factory=dict
    )  # experts no token reached, by layer
    aliased: dict[str, int] = field(default_factory=dict)
    moved: dict[int, float] = field(default_factory=dict)  # share of dropped experts' channels
    last: States | None = None  # the last layer's output
    width_key: str | None = None  # of config.json, where one says how many channels experts keep


def check_plan(plan: Plan, streamed: Streamed) -> None:
    """Raise PlanError where the plan does not fit the model."""
    if plan.digest != streamed.checkpoint.digest:
        raise PlanError(
            f"the plan is for {plan.model} ({plan.digest}), and {streamed.checkpoint.name} is "
            f"{streamed.checkpoint.digest}; plan again for this model"
        )
    moes = {i: moe for i in range(len(streamed.layers)) if (moe := streamed.moe(i))}
    if sorted(moes) != sorted(plan.layers):
        raise PlanError(
            f"the plan has layers {sorted(plan.layers)}, the model's MoE layers are "
            f"{sorted(moes)}; plan again for this model"
        )
    for i, moe in moes.items():
        fates, n = plan.layers[i], moe.experts.num_experts
        if len(fates) != n:
            raise PlanError(
                f"plan: layer {i} has {len(fates)} experts, the model has {n}; plan again for this model"
            )
        check_merges(plan, i)
        if plan.refit and end_of(moe.experts) is not None:
            raise PlanError("plan: refit: a norm follows this model's experts; give refit: false")
        kept = [e for e, f in enumerate(fates) if isinstance(f, Keep)]
        top_k = moe.top_k if plan.top_k is None else plan.top_k
        if top_k > moe.top_k:
            raise PlanError(
                f"plan: top_k has {top_k}, and the router of layer {i} picks {moe.top_k}; "
                "give that or fewer"
            )
        if not kept or (len(kept) < top_k and not plan.has_aliases(i)):
            raise PlanError(
                f"plan: layer {i} keeps {len(kept)} experts, and the router picks {top_k} "
                "a token; keep more, or give the plan a smaller top_k"
            )
        if not plan.has_aliases(i):  # the router still picks as it did
            _check_groups(plan, streamed, i, n, kept, top_k)
        experts = experts_of(moe.experts)
        _check_channels(plan, i, n, experts)
        if experts.end is not None and any(isinstance(f, Keep) and f.pieces for f in fates):
            raise PlanError(
                f"plan: layer {i}: a norm ends its experts, and pieces of them do not add up; "
                "give each expert one width"
            )
    _check_sparse(plan)
    if plan.skip is not None:
        check_skip(
            plan.skip,
            {i: plan.top_k if plan.top_k is not None else m.top_k for i, m in moes.items()},
        )


def _check_sparse(plan: Plan) -> None:
    """Raise PlanError for zeros that do not go with the rest of the plan, or are of no MoE layer."""
    if plan.sparse is None:
        return
    every = [f for of in plan.layers.values() for f in of]
    if any(isinstance(f, Keep) and f.pieces for f in every):
        raise PlanError("plan: experts in pieces and sparse; wanted one or the other")
    if not plan.leaves_experts:
        raise PlanError(
            "plan: sparse, and experts of fewer than 16 bits: rounding has no 0 and would undo it; give "
            "one or the other"
        )
    named, there = sorted(plan.sparse.density), sorted(plan.layers)
    if not {*named} <= {*there}:
        raise PlanError(f"plan: sparse names layers {named}, wanted some of {there}")


def _check_channels(plan: Plan, layer: int, n: int, experts: Experts) -> None:
    full = experts.down.shape[2]
    keeps = [f for f in plan.layers[layer] if isinstance(f, Keep)]
    widths = {full if k.channels is None else k.channels for k in keeps}
    cut = {len(k.each) for k in keeps}
    if all(k.channels is None for k in keeps) and cut == {1}:
        return
    if len(cut) > 1:
        raise PlanError(
            f"plan: layer {layer}: experts in {' and in '.join(map(str, sorted(cut)))} pieces; cut all of "
            "a layer into as many"
        )
    if max(widths) > full:
        raise PlanError(
            f"plan: layer {layer}: an expert keeps {max(widths)} channels; the model's have "
            f"{full}; keep so many at most"
        )
    if widths == {0}:
        raise PlanError(f"plan: layer {layer}: no expert keeps a channel; wanted some")
    if len(widths) > 1 and plan.sparse is not None:
        raise PlanError(
            f"plan: layer {layer}: experts of many widths, and sparse; give all of the layer as many "
            "channels, or no sparse"
        )
    (pieces,), wide, run = cut, min(widths), run_of(keeps, full)
    if run is not None and (experts.gate_up_bias is not None or experts.end is not None):
        raise PlanError(
            f"plan: layer {layer}: this model's experts have biases or end in a norm, so experts of many "
            "widths can only stay at 16 bits; give all of the layer as many channels, or no bits"
        )
    if run is not None and (run % BLOCK or pieces > 1 or any(k.bits == 16 for k in keeps)):
        raise PlanError(
            f"plan: layer {layer}: experts of many widths are rounded in runs of {BLOCK} channels, all of "
            f"them, each to bits of its own; found runs of {run} channels, {pieces} pieces, bits from "
            f"{min(k.bits for k in keeps)} to {max(k.bits for k in keeps)}; give them multiples of "
            f"{BLOCK}, one width each and fewer than 16 bits, or all 16"
        )
    if wide % pieces:
        raise PlanError(
            f"plan: layer {layer}: {pieces} pieces of {wide} channels; wanted a number that divides them"
        )
    order = plan.order.get(layer)
    if order is None or tuple(order.shape) != (n, full):
        raise PlanError(
            f"plan: layer {layer}: the order of channels that goes with the plan is not of {n} experts of "
            f"{full} channels; plan again"
        )


def _check_groups(
    plan: Plan, streamed: Streamed, layer: int, n: int, kept: Sequence[int], top_k: int
) -> None:
    config = streamed.model.config.get_text_config()
    groups, top_groups = streamed.family.n_groups(config), streamed.family.top_groups(config)
    if groups == 1 or len(kept) == n:
        return
    sizes = {sum(e * groups // n == g for e in kept) for g in range(groups)}
    if len(sizes) > 1 or min(sizes) < 2:
        raise PlanError(
            f"plan: layer {layer}: the router picks among {groups} groups of experts; each must keep "
            f"the same number, at least 2, and the plan keeps {sorted(sizes)}"
        )
    if top_groups * min(sizes) < top_k:
        raise PlanError(
            f"plan: layer {layer}: the router picks {top_k} experts from {top_groups} groups, and the "
            f"plan keeps {min(sizes)} in each; keep more, or give the plan a smaller top_k"
        )


def apply_plan(
    streamed: Streamed,
    plan: Plan,
    encode: Part,
    batches: Sequence[Batch],
    writer: Writer,
    tick: Tick = lambda: None,
    trail: Trail = NO_TRAIL,
    seen: Callable[[Step], None] = lambda step: None,
) -> Applied:
    """Write the compressed tensors of the whole model to `writer`; `writer.close` is the caller's.

    `seen` is given each layer once it is what was written and the batches have passed. `streamed` is
    used up: its layers have become what was written. Layers that the trail's journal has are not
    done again. Raises PlanError where the plan does not fit the model.
    """
    check_plan(plan, streamed)
    if plan.sparse is not None:
        _masker(plan.sparse)  # raises RecipeError for what is no method
    heads = first_heads(streamed, plan)
    codec = Codec(load_method(encode.method, "encode"), encode.options)
    key = key_of(streamed, plan)
    check_target(plan, key, streamed.family)
    stock, first = is_stock(plan, key), streamed.ranks.is_first
    if first and trail.done("up") == 0:
        names = set(streamed.outer_names())
        outer = {n: t for n, t in streamed.model.state_dict().items() if n in names}
        writer.add("outer", streamed.to_disk(outer) if stock else _cast(streamed, outer))
    if first and heads:
        writer.add(HEADS, heads)
    notes = list(trail.journal.entries) if trail.journal else []

    def compress(step: Step) -> None:
        _layer(streamed, plan, codec, step, trail.aside, stock=stock)
        notes.append(step.note)
        prefix = f"{streamed.prefix}{step.index}."
        state = {prefix + n: t for n, t in step.layer.state_dict().items()}
        if first:
            tensors = streamed.to_disk(state) if stock else _cast(streamed, state)
            writer.add(f"layer-{step.index:04d}", tensors)
            seen(step)

    walked = finish(walk(streamed, batches, tick, trail), compress)
    return replace(_applied(notes, walked.last), width_key=key)


def _applied(notes: Sequence[Mapping[str, Any]], last: States) -> Applied:
    """All layers' notes in one."""
    done = Applied(last=last)
    for note in notes:
        done.experts.update(note.get("experts", {}))
        done.weights.update(note.get("weights", {}))
        done.aliased.update(note.get("aliased", {}))
        done.moved.update({int(i): share for i, share in note.get("moved", {}).items()})
        done.starved.update({int(i): ids for i, ids in note.get("starved", {}).items()})
    return done


def key_of(streamed: Streamed, plan: Plan) -> str | None:
    """The config key of the one width that the plan gives all experts, if there is one."""
    found = {f.channels for of in plan.layers.values() for f in of if isinstance(f, Keep)}
    (width, *others) = found
    return None if others or width is None else width_key(streamed.model, width)


def is_stock(plan: Plan, key: str | None) -> bool:
    """Whether stock transformers can load the result: nothing packed or skipped, layers of one size.

    Where channels go: and `key`, the config key of the one width that all experts have, is there.
    """
    if plan.skip is not None or plan.aliased or (plan.narrowed and key is None):
        return False
    sizes = {sum(isinstance(f, Keep) for f in layer) for layer in plan.layers.values()}
    as_it_is = plan.leaves_experts and all(f.bits == 16 for f in plan.rest.values())
    return len(sizes) == 1 and as_it_is


def _masker(sparse: Sparse) -> Masker:
    part = part_of("plan, sparse", sparse.mask, "mask")
    return Masker(load_method(part.method, "mask"), part.options)


def check_target(plan: Plan, key: str | None, family: Family) -> None:
    """Raise PlanError for a plan that was made for a target (target.py) and makes what that does not load.

    `key`: of `key_of`. Raises RecipeError for widths that the target does not take.
    """
    target = plan.made_by.get("target")
    if target is None or is_stock(plan, key):
        return
    takes = target_of(target)
    rounds = not plan.leaves_experts or any(f.bits < 16 for f in plan.rest.values())
    if takes.most_bits and rounds and not (plan.narrowed and key is None) and plan.skip is None:
        check_loads(plan, target)
        if family.model_type not in takes.families:
            raise PlanError(
                f"the plan is for {target}, which takes codes of {', '.join(takes.families)}, and this is "
                f"{family.model_type}; plan with --bits 16 and a recipe that drops, or without --target"
            )
        return
    why = "it was edited: experts are rounded or skipped, or layers keep different numbers of them"
    if plan.narrowed and key is None:
        why = "no key of this family's config says how many channels its experts keep and nothing else"
    raise PlanError(
        f"the plan is for {target}, which loads stock checkpoints only, and {why}; drop whole experts, or "
        "plan without --target"
    )


def _cast(streamed: Streamed, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights that stay go back to the dtype they had on disk."""
    out = {}
    for name, tensor in tensors.items():
        dtype = streamed.dtypes.get(name)
        if dtype is None and tensor.is_floating_point():  # experts that stay, stacked anew
            owner = name.partition(".packed.")[0]
            dtype = streamed.dtypes[f"{owner}.down_proj"]
        out[name] = tensor.to(dtype) if dtype is not None else tensor
    return out


def _layer(
    streamed: Streamed,
    plan: Plan,
    codec: Codec,
    step: Step,
    aside: torch.device | None,
    *,
    stock: bool,
) -> None:
    """Compress one layer in place and pass the batches through what it has become."""
    i, moe = step.index, streamed.moe(step.index)
    parts = rest_parts(streamed.model, streamed.family, i)
    rest = {n: plan.rest[p] for n, p in parts.items() if plan.rest[p].bits < 16}
    attention = {n: k for n, k in rest.items() if parts[n] == "attention"}
    others = {n: k for n, k in rest.items() if n not in attention}
    packed = pack_weights(codec, streamed, step, attention)
    fates = plan.layers[i] if moe is not None else ()
    kept = [e for e, f in enumerate(fates) if isinstance(f, Keep)]
    keeps = [f for f in fates if isinstance(f, Keep)]
    codes: dict[str, list[Packed | None]] = {}
    narrow: list[Expert] | None = None  # of many widths
    if moe is None:
        packed |= pack_weights(codec, streamed, step, others)
    else:
        narrow = take_away(streamed, plan, moe, step, aside)
        rounds = any(k.bits < 16 for k in keeps)
        density = plan.sparse.density.get(i, 1.0) if plan.sparse is not None else 1.0
        with listening(moe, aside, outputs=False) as heard:
            packed |= pack_weights(codec, streamed, step, others, always_run=rounds or density < 1)
        codes, starved = dict.fromkeys(("gate_up", "down"), [None] * len(keeps)), list[int]()
        if plan.sparse is not None and density < 1:
            zero_weights(_masker(plan.sparse), streamed, moe, heard, density)
        if rounds:  # else there is nothing to hear for
            cut = in_runs(keeps, experts_of(moe.experts).down.shape[2])
            codes, starved = pack_experts(codec, streamed, moe, heard, cut)
        if starved:
            step.note["starved"] = {str(i): [kept[e] for e in starved]}
    step.run()
    for name, keep in rest.items():
        module = step.layer.get_submodule(name)
        runtime.prepare_weight(module, keep)
        runtime.fill_weight(module, packed[name])
    full = f"{streamed.prefix}{i}."
    step.note["weights"] = {full + n: runtime.keep_text(k) for n, k in rest.items()}
    if moe is not None and not stock:
        experts = experts_of(moe.experts)
        runtime.prepare_experts(moe.experts, keeps)
        if plan.has_aliases(i):
            step.note["aliased"] = {str(i): len(fates)}
        if narrow is None:
            runtime.fill_experts(moe.experts, experts, codes)
        else:
            runtime.fill_ragged(moe.experts, narrow)
        step.note["experts"] = {str(i): " ".join(map(runtime.keep_text, keeps))}
