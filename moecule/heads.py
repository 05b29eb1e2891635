"""Cutting groups of attention heads: a key and a value head, and the query heads that read them.

Served are families whose attention has the four projections q_proj, k_proj, v_proj, o_proj with heads
one after another, those of a group together, as transformers' `repeat_kv` has it. That a config says so
few of them and nothing else is tried, on meta.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn

from moecule.errors import RecipeError
from moecule.moe import find_layers
from moecule.width import shapes_with

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")


@dataclass(frozen=True)
class Heads:
    """Of every attention of a model."""

    query: int
    groups: int  # key heads, and value heads
    width: int  # of a head

    def keys(self, groups: int) -> dict[str, int]:
        """What the config says where so many groups stay."""
        return {
            "num_attention_heads": self.query // self.groups * groups,
            "num_key_value_heads": groups,
            "head_dim": self.width,
        }


def attention_in(layer: nn.Module) -> tuple[str, nn.Module] | None:
    """(name, module) of a layer's attention, or None where it has none with these projections."""
    for name, module in layer.named_modules():
        held = dict(module.named_children())
        if all(isinstance(held.get(p), nn.Linear) for p in PROJECTIONS):
            return name, module
    return None


def heads_of(model: Any) -> Heads:
    """Raises RecipeError where groups of heads cannot be told apart."""
    config, family = model.config.get_text_config().to_dict(), model.config.model_type
    query, groups = (config.get(key) for key in ("num_attention_heads", "num_key_value_heads"))
    found = [a for layer in find_layers(model)[1] if (a := attention_in(layer))]
    if not found or not isinstance(query, int) or not isinstance(groups, int):
        raise RecipeError(
            f"groups: {family} has no attention with {', '.join(PROJECTIONS)} and one number of heads for "
            "all layers, so they cannot be cut; leave groups out"
        )
    width = _shape(found[0][1], "k_proj")[0] // groups
    for name, attention in found:
        q, k, v, o = (_shape(attention, leaf) for leaf in PROJECTIONS)
        if not (q[0] == o[1] == query * width and k[0] == v[0] == groups * width):
            raise RecipeError(
                f"groups: {name} of {family} projects to {q[0]}, {k[0]}, {v[0]} and from {o[1]} numbers, "
                f"wanted {query} query and {groups} key heads of {width}; leave groups out"
            )
        for other, p in attention.named_parameters():
            if other.partition(".")[0] not in PROJECTIONS and p.numel() != width:
                raise RecipeError(
                    f"groups: {name} of {family} has {other} of {p.numel()} numbers, which are not of one "
                    f"head of {width}; leave groups out"
                )
    return Heads(query, groups, width)


def _shape(attention: nn.Module, leaf: str) -> tuple[int, ...]:
    return tuple(attention.get_parameter(f"{leaf}.weight").shape)


def group_keys(model: Any, groups: int) -> dict[str, int]:
    """{key of the config: value} with which every attention has so many groups and nothing else changes.

    It is tried, on meta. Raises RecipeError where the model has fewer, or its config cannot say so.
    """
    heads = heads_of(model)
    if not 1 <= groups <= heads.groups:
        raise RecipeError(
            f"groups = {groups}, and the model has {heads.groups} groups of heads; give 1 to "
            f"{heads.groups}"
        )
    if groups == heads.groups:
        return {}
    keys = heads.keys(groups)
    want = {n: t.shape for n, t in model.state_dict().items()}
    prefix, layers = find_layers(model)
    for i, layer in enumerate(layers):
        found = attention_in(layer)
        for leaf in PROJECTIONS if found else ():
            assert found is not None  # or there are no leaves
            above = f"{prefix}.{i}.{found[0]}.{leaf}"
            for name in (f"{above}.weight", f"{above}.bias"):
                if name in want and not (leaf == "o_proj" and name.endswith("bias")):
                    axis = 1 if leaf == "o_proj" else 0
                    size = want[name][axis] // heads.groups * groups
                    want[name] = torch.Size(
                        size if a == axis else n for a, n in enumerate(want[name])
                    )
    if shapes_with(model, keys) != want:
        raise RecipeError(
            f"groups = {groups}: {model.config.model_type} with {keys} makes another model than this one "
            "with fewer heads; leave groups out, or try another number"
        )
    return keys


def cut_heads(attention: nn.Module, stay: Int[Tensor, " g"], heads: Heads) -> None:
    """Let the attention have these groups alone, in place and in their order."""
    for leaf in PROJECTIONS:
        module: Any = attention.get_submodule(leaf)
        axis = 1 if leaf == "o_proj" else 0
        run = module.weight.shape[axis] // heads.groups
        at = (stay[:, None] * run + torch.arange(run)).flatten().to(module.weight.device)
        module.weight = nn.Parameter(module.weight.data.index_select(axis, at), requires_grad=False)
        if axis == 0 and module.bias is not None:
            module.bias = nn.Parameter(module.bias.data[at], requires_grad=False)
        if axis == 0:
            module.out_features = len(at)
        else:
            module.in_features = len(at)
