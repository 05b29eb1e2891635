"""Making one of several experts of a layer, and letting its router know."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float64, Int
from torch import Tensor

from moecule.errors import PlanError, RecipeError
from moecule.experts import Expert, Experts
from moecule.group import Group, stacked
from moecule.hf import Streamed
from moecule.method import load_method
from moecule.moe import (
    Heard,
    Moe,
    by_expert,
    experts_of,
    listening,
    put_experts,
    select_experts,
    set_top_k,
)
from moecule.plan import Drop, Fate, Keep, Merge, Merges, Plan
from moecule.recipe import Part, part_of
from moecule.refit import refit
from moecule.runs import run_of
from moecule.walk import Step
from moecule.width import cut_channels, rows_of, stay_of, widths_of


def check_merges(plan: Plan, layer: int) -> None:
    """Raise PlanError where an expert goes into one that does not stay, or weights are missing."""
    fates, merge = plan.layers[layer], plan.merge
    for e, fate in enumerate(fates):
        if isinstance(fate, Merge) and (
            fate.into >= len(fates) or not isinstance(fates[fate.into], Keep)
        ):
            raise PlanError(
                f"plan: layer {layer}: expert {e} goes into {fate.into}, which does not stay; name one "
                "that is kept"
            )
    if merge is None or all(isinstance(f, Keep) for f in fates):
        return
    joins = _joins(fates)
    try:
        part_of("plan, merge", merge.how, joins)
    except RecipeError as e:
        raise PlanError(f"plan: layer {layer}: merge: {e}") from e
    if joins == "recombine" and merge.router != "rows":
        raise PlanError(
            f"plan: layer {layer}: {merge.how['method']} moves channels of experts that are dropped, whose "
            f"rows go; router is {merge.router}, wanted rows"
        )
    given = len(merge.weights.get(layer, ()))
    if given != len(fates):
        raise PlanError(f"plan: merge: layer {layer} has {given} weights, wanted {len(fates)}")
    if merge.router == "alias" and Drop() in fates:
        raise PlanError(
            f"plan: layer {layer}: with router: alias its rows all stay, and none is left for experts that "
            "are dropped; merge them, or give router: rows"
        )


@dataclass
class Hearing:
    """What a layer's experts are given, once it is asked for."""

    streamed: Streamed
    moe: Moe
    step: Step
    aside: torch.device | None
    outputs: bool = True  # also what they give, for `refit`

    @cached_property
    def heard(self) -> Heard:
        """One pass of all batches."""
        with listening(self.moe, self.aside, outputs=self.outputs) as heard:
            self.step.listen()
        return heard

    def group(self, ids: Sequence[int], experts: Experts, weights: Float64[Tensor, " E"]) -> Group:
        """Some of the experts, which must be as they are when the batches first pass."""
        device, full = self.streamed.device, experts.down.shape[2]
        rows = rows_of(self.moe.experts, torch.arange(full), full)
        split = self.moe.experts.has_gate and self.moe.experts.is_concatenated
        rows = rows.view(2, -1).mT if split else rows.view(full, -1)

        def total(f: Callable[[Tensor], Tensor], members: Sequence[int]) -> Tensor:
            wanted = torch.tensor([ids[j] for j in members])
            found = torch.zeros(())
            for x, idx in zip(self.heard.x, self.heard.idx, strict=True):
                at = torch.isin(idx, wanted.to(idx.device)).any(1)
                found = f(x[at].to(device)).double() + found.to(device)
            return self.streamed.ranks.add_up(found)

        at = torch.tensor(list(ids))
        return Group(experts.select(ids), rows.to(device), weights[at], total)


def unite(hearing: Hearing, part: Part, merges: Merges, fates: Sequence[Fate]) -> float | None:
    """Let the layer's experts be those that stay, made of all, and cut its router or alias it, in place.

    Returns the share of the channels of others that went into them, where the method moves channels.
    """
    moe, experts = hearing.moe, experts_of(hearing.moe.experts)
    weights = torch.tensor(merges.weights[hearing.step.index], dtype=torch.float64)
    kept = [e for e, f in enumerate(fates) if isinstance(f, Keep)]
    of = {k: [k, *(e for e, f in enumerate(fates) if f == Merge(k))] for k in kept}
    mix, moved = torch.eye(len(fates), dtype=torch.float64)[kept], None
    if any(isinstance(f, Merge) for f in fates):
        join = load_method(part.method, "merge").merge
        assert join is not None  # load_method saw to it
        made = []
        for row, (k, ids) in enumerate(of.items()):
            group = hearing.group(ids, experts, weights)
            made.append(join(group, part.options) if len(ids) > 1 else experts[k])
            if merges.router == "mean":
                mix[row, ids] = group.shares
        united = stacked(made)
    else:
        recombine = load_method(part.method, "recombine").recombine
        assert recombine is not None  # as above
        group = hearing.group(range(len(fates)), experts, weights)
        found = recombine(group, kept, part.options)
        united, mix, moved = found.experts, found.rows, found.moved
    put_experts(moe.experts, united)
    if merges.router == "alias":
        into = [kept.index(f.into if isinstance(f, Merge) else e) for e, f in enumerate(fates)]
        alias(moe.experts, torch.tensor(into, dtype=torch.int32))
        return moved
    mix_rows(moe, mix, kept, means=merges.router == "mean")
    select_experts(moe, kept, len(fates))
    return moved


def mix_rows(moe: Moe, mix: Float64[Tensor, "left E"], kept: Sequence[int], *, means: bool) -> None:
    """Let the router's row of each expert that stays be so much of every row, in place.

    Biases, and what else it has one number an expert of, are mixed only where the mix is a mean.
    """
    n = mix.shape[1]
    if torch.equal(mix, torch.eye(n, dtype=mix.dtype)[list(kept)]):
        return
    for module, name, axis in by_expert(moe, n):
        tensor = getattr(module, name).data
        if tensor.is_floating_point() and (tensor.dim() > 1 or means):
            first = tensor.movedim(axis, 0)  # a view
            flat = first[:n].flatten(1) if first.dim() > 1 else first[:n, None]
            made = (mix.to(flat.device) @ flat.double()).to(tensor.dtype)
            first[list(kept)] = made.view(len(kept), *first.shape[1:])


def alias(module: Any, into: Int[Tensor, " E"]) -> None:
    """Let an experts module take the router's numbers for experts as `into` says, in place."""
    module.register_buffer("into", into)

    def pick(module: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        given = [*args, *kwargs.values()]
        given[1] = module.into.to(given[1].device)[given[1]].to(given[1].dtype)
        return tuple(given[: len(args)]), dict(zip(kwargs, given[len(args) :], strict=True))

    module.register_forward_pre_hook(pick, with_kwargs=True)


def take_away(
    streamed: Streamed, plan: Plan, moe: Moe, step: Step, aside: torch.device | None
) -> list[Expert] | None:
    """Let experts, or channels of them, go or become part of others, and fit what stays, in place.

    Experts of many widths are returned besides, as `cut_channels` does.
    """
    i, fates = step.index, plan.layers[step.index]
    kept = [e for e, f in enumerate(fates) if isinstance(f, Keep)]
    keeps, narrow = [f for f in fates if isinstance(f, Keep)], None
    fitted = plan.refit and not plan.stays(i)
    hearing = Hearing(streamed, moe, step, aside, outputs=fitted)
    want = hearing.heard.routed if fitted else []
    if len(kept) < len(fates) and plan.merge is not None:
        part = part_of("plan, merge", plan.merge.how, _joins(fates))
        moved = unite(hearing, part, plan.merge, fates)
        step.note["moved"] = {} if moved is None else {str(i): moved}
    elif len(kept) < len(fates):
        put_experts(moe.experts, experts_of(moe.experts).select(kept))
        select_experts(moe, kept, len(fates))
    if plan.top_k is not None:
        set_top_k(moe, plan.top_k)
    if any(k.channels is not None or k.pieces for k in keeps):
        narrow = cut_channels(streamed, moe, keeps, plan.order[i][kept])
    if fitted:
        heard = Hearing(streamed, moe, step, aside).heard
        stay = None if narrow is None else stay_of(keeps, plan.order[i][kept])
        if run_of(keeps, plan.order[i].shape[1] if i in plan.order else 0) is not None:
            stay = [torch.arange(n) for n in widths_of(keeps, plan.order[i].shape[1])]
        refit(streamed, experts_of(moe.experts), heard, want, stay)
        if narrow is not None and stay is not None:
            narrow = [
                replace(expert, down=experts_of(moe.experts)[e].down[:, at.long()])
                for e, (expert, at) in enumerate(zip(narrow, stay, strict=True))
            ]
    return narrow


def _joins(fates: Sequence[Fate]) -> str:
    """What of a method carries these out."""
    return "merge" if any(isinstance(f, Merge) for f in fates) else "recombine"
