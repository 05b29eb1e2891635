"""Heads of learnt masks as tensors of a checkpoint: made when a plan is carried out, replaced when learnt.

All lie in one file: where the checkpoint has several, in one of their own.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from jaxtyping import Int32
from safetensors.torch import load_file
from torch import Tensor

from moecule.checkpoint import Checkpoint
from moecule.errors import CheckpointError, PlanError
from moecule.files import save_whole
from moecule.hf import Streamed
from moecule.method import Method, load_method
from moecule.moe import experts_of
from moecule.plan import Plan
from moecule.recipe import Part, part_of
from moecule.skip import Masks, Skip

HEADS = "skip"  # the part of the checkpoint, and in names of tensors the rule of an experts module
Head = Mapping[str, Tensor]


def learner(masks: Masks) -> tuple[Method, Part]:
    """The method that learns them, and its options. Raises RecipeError for what is none."""
    part = part_of("plan, skip", masks.how, "learn")
    return load_method(part.method, "learn"), part


def check_skip(skip: Skip | Masks, top_k: Mapping[int, int]) -> None:
    """Raise PlanError for a rule that does not fit; `top_k`: {MoE layer: experts a token gets}."""
    if isinstance(skip, Masks):
        learner(skip)
        fewest = len(top_k) / sum(top_k.values())  # a token's first always runs
        if fewest == 1:
            raise PlanError(
                "plan: skip: the router picks one expert a token, and that always runs; plan without [skip]"
            )
        if skip.keep < fewest:
            raise PlanError(
                f"plan: skip: keep is {skip.keep:g}, and a token's first expert always runs, {fewest:.3g} "
                "of the pairs; keep that or more"
            )
        return
    if not set(skip.thresholds) <= set(top_k):
        raise PlanError(
            f"plan: skip names layers {sorted(skip.thresholds)}, wanted some of {sorted(top_k)}"
        )
    for i, limits in skip.thresholds.items():
        if len(limits) != top_k[i] - 1:
            raise PlanError(
                f"plan: skip: layer {i} has {len(limits)} thresholds, wanted {top_k[i] - 1}"
            )


def first_heads(streamed: Streamed, plan: Plan) -> dict[str, Int32[Tensor, " ..."]]:
    """By their names in the checkpoint, heads with which all experts run; {} for a plan without."""
    if not isinstance(plan.skip, Masks):
        return {}
    method, part = learner(plan.skip)
    assert method.learn is not None  # load_method saw to it
    found = dict[str, Tensor]()
    for i in range(len(streamed.layers)):
        moe = streamed.moe(i)
        if moe is None:
            continue
        width = experts_of(moe.experts).gate_up.shape[2]
        head = method.learn(i, width, moe.top_k if plan.top_k is None else plan.top_k, part.options)
        found |= named(f"{streamed.prefix}{i}.{moe.prefix}experts", head)
    return found


def named(experts: str, head: Head) -> dict[str, Int32[Tensor, " ..."]]:
    """A head's tensors by their names in the checkpoint; `experts` is the module's name.

    Float32 seen as int32, so that no cast of a model's dtype touches them.
    """
    return {
        f"{experts}.{HEADS}.{name}": t.detach().float().cpu().contiguous().view(torch.int32)
        for name, t in head.items()
    }


def put_heads(folder: Path, heads: Mapping[str, Int32[Tensor, " ..."]]) -> None:
    """Overwrite the heads in a checkpoint, all or none.

    Raises CheckpointError where it has no place for them, OutputError where it cannot be written.
    """
    known = Checkpoint.open(folder.absolute()).stored
    files = {known[n].file for n in heads if n in known}
    if not set(heads) <= set(known) or len(files) != 1:
        raise CheckpointError(
            f"{folder} has no place for masks; apply a plan with learnt masks (recipe mc_sharp) first"
        )
    (name,) = files
    tensors = load_file(folder / name)
    save_whole({**tensors, **heads}, folder / name)
