"""What a consumer of checkpoints can load, and a recipe's choices that keep to it.

All three load stock checkpoints: the same number of experts in every layer (and in every group of its
router), one width, nothing skipped online. transformers and vLLM load 16 bits. llama.cpp rounds a stock
checkpoint itself, or takes the codes that `moecule export --to gguf` keeps: of one width for a layer's
experts, which are one tensor there, and of up to 5 bits, for the type of 8 bits has no minimum.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from moecule.budget import Inventory
from moecule.errors import RecipeError
from moecule.narrow import ALIGNED
from moecule.plan import Keep, Plan
from moecule.recipe import AS_IT_IS, Part, Recipe

Name = Literal["transformers", "vllm", "gguf"]


@dataclass(frozen=True)
class Target:
    """What differs between them."""

    multiple: int  # of channels, that an expert's width is
    most_experts: int | None = None  # in a layer
    most_bits: int = 0  # of codes that it takes; 0: it takes none
    families: tuple[str, ...] = ()  # whose codes it takes


BLOCK = 32  # columns that share a scale in all of ggml's types that hold codes
TARGETS: dict[str, Target] = {
    "transformers": Target(ALIGNED),  # torch's grouped product
    "vllm": Target(64),  # its fused kernels' tiles
    # LLAMA_MAX_EXPERTS; Q5_1; those of exports.arch
    "gguf": Target(64, 512, 5, ("mixtral", "olmoe", "qwen2_moe", "qwen3_moe")),
}


def target_of(name: str) -> Target:
    """Raises RecipeError for one that is not known."""
    if name not in TARGETS:
        raise RecipeError(f"target {name!r} is not known; wanted {', '.join(TARGETS)}")
    return TARGETS[name]


def steered(recipe: Recipe, name: str) -> tuple[Recipe, dict[str, Any]]:
    """(the recipe with choices that the target can load, those of them that it did not make itself).

    Raises RecipeError for a recipe that cannot be had so.
    """
    target, changes = target_of(name), dict[str, Any]()
    if recipe.skip is not None:
        raise RecipeError(
            f"recipe {recipe.name} skips experts online, which {name} does not; use a recipe that drops "
            "experts, or leave out --target"
        )
    _check_rest(recipe.rest, name)
    for table, part in (("score", recipe.score), ("choose", recipe.choose)):
        if part is not None and getattr(part.options, "budget", "layer") != "layer":
            changes[f"{table}.budget"] = "layer"
    if recipe.merge is not None and recipe.into.router == "alias":
        changes["merge.router"] = "rows"
    if recipe.channels is not None:
        options = recipe.channels.options
        if options.budget != "expert":
            changes["channels.budget"] = "expert"
        if (options.multiple or ALIGNED) % target.multiple:
            changes["channels.multiple"] = math.lcm(options.multiple or 1, target.multiple)
    return _changed(recipe, changes), changes


def _check_rest(rest: Mapping[str, Keep], name: str) -> None:
    for what, keep in rest.items():
        if (why := _unfit(keep, target_of(name), name)) is not None:
            raise RecipeError(
                f"{what} would be rounded, and {why}; --set rest.{what}=16, or leave out --target"
            )


def _unfit(keep: Keep, target: Target, name: str) -> str | None:
    """Why the target does not take codes like these; None: it does, or they are none."""
    if keep.bits == AS_IT_IS:
        return None
    if not target.most_bits:
        return f"{name} loads 16 bits only: moecule's packed experts load with moecule"
    if keep.pieces:
        return f"{name} knows no experts in pieces"
    if keep.bits > target.most_bits:
        return f"{name} keeps all codes of up to {target.most_bits} bits, and they would have {keep.bits}"
    if keep.group % BLOCK:
        return f"a scale is of {BLOCK} columns in {name}, and groups would have {keep.group}"
    return None


def _changed(recipe: Recipe, changes: dict[str, Any]) -> Recipe:
    for key, value in changes.items():
        table, _, option = key.partition(".")
        if table == "merge":  # how is the method's, into what is the recipe's
            recipe = replace(recipe, into=replace(recipe.into, **{option: value}))
            continue
        part: Part = getattr(recipe, table)
        made: Any = {table: replace(part, options=replace(part.options, **{option: value}))}
        recipe = replace(recipe, **made)
    return recipe


def check_widths(recipe: Recipe, inventory: Inventory, name: str) -> None:
    """Raise RecipeError where channels are to go and experts are not made of whole runs of them."""
    multiple = target_of(name).multiple
    odd = {e.down[1] for e in inventory.experts.values() if e.down[1] % multiple}
    if recipe.channels is not None and odd:
        raise RecipeError(
            f"{name} loads widths that are multiples of {multiple}, and experts of this model have "
            f"{min(odd)} channels; drop whole experts instead (--recipe reap)"
        )


def check_plan(plan: Plan, name: str) -> None:
    """Raise RecipeError for a plan that makes what the target does not load."""
    target = target_of(name)
    kept = {sum(isinstance(f, Keep) for f in fates) for fates in plan.layers.values()}
    if plan.aliased:
        raise RecipeError(
            f"routers would keep rows of experts that are no more, which {name} does not load; set "
            "merge.router=rows"
        )
    _check_rest(plan.rest, name)
    for fates in plan.layers.values():
        keeps = sorted({f for f in fates if isinstance(f, Keep)}, key=str)
        for why in (_unfit(keep, target, name) for keep in keeps):
            if why is not None:
                raise RecipeError(
                    f"experts would be rounded, and {why}; give --drop, --bits 16 and a recipe that drops, "
                    "or leave out --target"
                )
        if len(keeps) > 1 and not plan.leaves_experts:
            raise RecipeError(
                f"experts of a layer would be of several widths ({keeps[0]}, {keeps[1]}), and {name} gives "
                "them one type; take --recipe uniform with whole --bits, or leave out --target"
            )
    if len(kept) > 1:
        raise RecipeError(
            f"layers would keep {' or '.join(map(str, sorted(kept)))} experts, and {name} loads one number "
            "for all; give another --drop, or leave out --target"
        )
    if target.most_experts is not None and max(kept) > target.most_experts:
        raise RecipeError(
            f"{max(kept)} experts would stay in a layer, and {name} loads {target.most_experts}; drop "
            "more, or leave out --target"
        )
