"""What a checkpoint is made of and what it weighs: modules to parts, and bytes by part."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import nn

from moecule.budget import Inventory, LayerExperts, Weight
from moecule.cache import caches_of
from moecule.checkpoint import Checkpoint
from moecule.family import Family
from moecule.hf import PACKED, Streamed, skeleton
from moecule.moe import Moe, by_expert, experts_of, find_layers, find_moe
from moecule.names import names_in_memory, sizes_in_memory
from moecule.plan import REST

UNSEEN = "dt_proj"  # Mamba multiplies by its weight and does not call it: it stays as it is
PARTS = ("experts", *REST, "embeddings", "other")


def rest_parts(model: Any, family: Family, i: int) -> dict[str, str]:
    """{module in layer i: attention, shared, dense or router}: its weights but the experts."""
    layers = find_layers(model)[1]
    moe = find_moe(layers[i], family)
    blocks = {m.prefix for layer in layers if (m := find_moe(layer, family))}
    routing = set() if moe is None else set(moe.router.modules())
    out = {}
    for name, module in layers[i].named_modules():
        if module in routing:
            if getattr(module, "weight", None) is not None and module.weight.dim() == 2:
                out[name] = "router"
        elif isinstance(module, nn.Linear) and not name.endswith(UNSEEN):
            # experts may lie in the layer itself, which is the block then
            inside = any(name.startswith(b) and (b or "attn" not in name) for b in blocks)
            part = "shared" if inside and moe is not None else "dense" if inside else "attention"
            # a Linear of one row gates the shared expert: it routes
            out[name] = "router" if module.out_features == 1 else part
    return out


def take_inventory(streamed: Streamed) -> Inventory:
    """Of a checkpoint to compress, from shapes and headers alone."""
    model, family = streamed.model, streamed.family
    config = model.config.get_text_config()
    groups, top_groups = family.n_groups(config), family.top_groups(config)
    places = dict(model.state_dict())
    # decoded, for that is what is written
    on_disk = {n: t.decoded_bytes for n, t in streamed.checkpoint.tensors.items()}
    disk = sizes_in_memory(streamed.disk, on_disk, places)
    experts: dict[int, LayerExperts] = {}
    weights: dict[str, Weight] = {}
    for i in range(len(streamed.layers)):
        prefix = f"{streamed.prefix}{i}."
        for name, part in rest_parts(model, family, i).items():
            full = f"{prefix}{name}.weight"
            rows, columns = places[full].shape
            weights[full] = Weight(part, (rows, columns), streamed.dtypes[full].itemsize, i)
        moe = streamed.moe(i)
        if moe is not None:
            sizes = _layer_experts(moe, f"{prefix}{moe.prefix}", disk, streamed.dtypes)
            experts[i] = LayerExperts(
                **sizes, top_k=moe.top_k, groups=groups, top_groups=top_groups
            )
    part_of = {n: part_of_tensor(n, model, family) for n in disk}
    other = sum(size for n, size in disk.items() if part_of[n] == "other")
    inside = {n for n in disk if part_of[n] == "experts"} | set(weights)
    return Inventory(
        experts=experts,
        weights=weights,
        embedding_bytes=sum(size for n, size in disk.items() if part_of[n] == "embeddings"),
        other_bytes=other,
        other_weights=sum(places[n].numel() for n in disk if n not in inside),
        caches=caches_of(model),
        max_position=int(getattr(config, "max_position_embeddings", 2048)),
    )


def _router_vectors(moe: Moe) -> list[str]:
    """Names, inside the block, of what the router has of each expert besides its row."""
    names = {module: name for name, module in moe.block.named_modules()}
    by = by_expert(moe, moe.experts.num_experts)
    return [f"{names[m]}.{leaf}".lstrip(".") for m, leaf, _ in by if leaf != "weight"]


def _layer_experts(
    moe: Moe, prefix: str, disk: dict[str, int], dtypes: dict[str, torch.dtype]
) -> dict[str, Any]:
    view, n = experts_of(moe.experts), moe.experts.num_experts
    biases = [m for m in disk if m.startswith(f"{prefix}experts.") and m.endswith("_proj_bias")]
    router = [f"{prefix}{name}" for name in _router_vectors(moe)]
    (a, b), (c, d) = view.gate_up.shape[1:], view.down.shape[1:]
    return {
        "n": n,
        "gate_up": (a, b),
        "down": (c, d),
        "bias_bytes": sum(disk[m] for m in biases) // n,
        "router_bytes": sum(disk[m] for m in router) // n,
        "item_bytes": dtypes[f"{prefix}experts.down_proj"].itemsize,
    }


def part_of_tensor(name: str, model: Any, family: Family) -> str:
    """The part, of PARTS, that a tensor belongs to; names are as in memory."""
    prefix = f"{find_layers(model)[0]}."
    module, _, leaf = name.rpartition(".")
    if not name.startswith(prefix):
        ends = (model.get_input_embeddings(), model.get_output_embeddings())
        return "embeddings" if model.get_submodule(module) in ends else "other"
    number, _, inside = module.removeprefix(prefix).partition(".")
    moe = find_moe(find_layers(model)[1][int(number)], family)
    own = "" if moe is None else f"{moe.prefix}experts"
    if moe is not None and (inside == own or inside.startswith(f"{own}.packed.")):
        return "experts"
    if moe is not None and inside == f"{own}.skip":  # a head of learnt masks
        return "router"
    if moe is not None and f"{inside}.{leaf}" in {moe.prefix + v for v in _router_vectors(moe)}:
        return "router"
    part = rest_parts(model, family, int(number)).get(inside, "other")
    return part if leaf.startswith("weight") else "other"


def weigh(checkpoint: Checkpoint) -> dict[str, Any]:
    """Sizes of a checkpoint, original or compressed, counted on the headers of its files."""
    packed = checkpoint.config["model_type"] == PACKED
    model, family = skeleton(checkpoint, torch.bfloat16)
    places = {n: t for n, t in model.state_dict().items()}
    tied = {n for n in getattr(model, "all_tied_weights_keys", {}) if n not in checkpoint.tensors}
    disk = {n: [n] for n in checkpoint.tensors} if packed else names_in_memory(model, checkpoint)
    on_disk = {n: t.size_bytes for n, t in checkpoint.tensors.items()}
    sizes = on_disk if packed else sizes_in_memory(disk, on_disk, places)
    parts = dict.fromkeys(PARTS, 0)
    for name, size in sizes.items():
        parts[part_of_tensor(name, model, family)] += size
    counts = {n: t.numel() for n, t in places.items() if n not in tied}
    matrices = {
        n: c
        for n, c in counts.items()
        if n.endswith("_proj") and part_of_tensor(n, model, family) == "experts"
    }
    expert_weights, total = sum(matrices.values()), checkpoint.size_bytes
    of = [d for n in matrices for d in disk.get(n, [])]
    return {
        "size_bytes": total,
        "expert_bytes": parts["experts"],
        "bits_per_weight": 8 * parts["experts"] / expert_weights,
        "nominal_bits": _nominal(checkpoint, model, family)
        if packed
        else 16 - _saved(checkpoint, of) / expert_weights,
        "model_bits_per_weight": 8 * total / sum(counts.values()),
        "bytes_by_part": parts,
    }


def step_bytes(streamed: Streamed) -> float:
    """Bytes of parameters, as loaded, that decoding a token reads: of experts as many as are picked.

    Experts count by their layer's mean; an embedding counts where it is the head too.
    """
    model, family, total = streamed.model, streamed.family, 0.0
    moes = [find_moe(layer, family) for layer in find_layers(model)[1]]
    shares = [1.0 if m is None else m.top_k / m.experts.num_experts for m in moes]
    prefix = f"{find_layers(model)[0]}."
    head, looked_up = model.get_output_embeddings(), model.get_input_embeddings().weight
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if tensor is looked_up and (head is None or head.weight is not looked_up):
            continue
        share = 1.0
        if part_of_tensor(name, model, family) == "experts":
            share = shares[int(name.removeprefix(prefix).partition(".")[0])]
        total += share * tensor.numel() * tensor.element_size()
    return total


def _saved(checkpoint: Checkpoint, names: list[str]) -> int:
    """Code bits by which tensors of a source are narrower than 16."""
    tensors = [checkpoint.tensors[n] for n in names]
    return sum((16 - t.coded.bits) * int(torch.Size(t.shape).numel()) for t in tensors if t.coded)


def _nominal(checkpoint: Checkpoint, model: Any, family: Family) -> float:
    """Mean code bits over all experts that the original has; dropped ones count as 0."""
    widths = checkpoint.config["quantization_config"]["experts"]
    codes = [re.split("[gc]", w)[0].split("+") for of in widths.values() for w in of.split()]
    bits = sum(sum(map(int, pieces)) / len(pieces) for pieces in codes)
    moes = [m for layer in find_layers(model)[1] if (m := find_moe(layer, family))]
    return float(bits / sum(m.experts.num_experts for m in moes))
