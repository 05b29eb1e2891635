"""inspect: what a model holds, and what a recipe would need and make, before any work."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import torch

from moecule.budget import Inventory, bytes_by_part, format_size
from moecule.data import window_length
from moecule.hf import PACKED, Streamed, skeleton
from moecule.inventory import take_inventory, weigh
from moecule.moe import experts_of, find_layers, find_moe
from moecule.plan import Keep, Plan
from moecule.recipe import Recipe, load_recipe
from moecule.session import Compute, open_checkpoint, state_bytes, stream


@dataclass(frozen=True)
class Inspection:
    """Facts of a model; the last three are of the chosen recipe, None for a compressed model."""

    model: str
    family: str
    layers: int
    moe_layers: int
    experts: int  # of a MoE layer
    top_k: int
    expert_weights: int
    all_weights: int
    size_bytes: int
    bits_per_weight: float  # true, of the routed experts
    nominal_bits: float
    bytes_by_part: dict[str, int]
    sizes_by_bits: dict[str, int] | None = None  # of the checkpoint at 1, 2, 3 and 4 code bits
    device_bytes: int | None = None  # needed at most for calibrating and applying
    host_bytes: int | None = None


def inspect(
    model: str | Path, *, recipe: str | Recipe = "mc", compute: Compute | None = None
) -> Inspection:
    """Read headers and shapes only. Raises CheckpointError for what is no MoE checkpoint."""
    checkpoint = open_checkpoint(model)
    whole, family = skeleton(checkpoint, torch.bfloat16)
    layers = find_layers(whole)[1]
    moes = [m for layer in layers if (m := find_moe(layer, family))]
    places = {n: t.numel() for n, t in whole.state_dict().items()}
    tied = sum(places[n] for n in getattr(whole, "all_tied_weights_keys", {}))
    facts = Inspection(
        model=str(model),
        family=family.model_type,
        layers=len(layers),
        moe_layers=len(moes),
        experts=max(m.experts.num_experts for m in moes),
        top_k=moes[0].top_k,
        expert_weights=sum(
            m.experts.num_experts * experts_of(m.experts).weights_per_expert for m in moes
        ),
        all_weights=sum(places.values()) - tied,
        **{k: v for k, v in weigh(checkpoint).items() if k in _SIZES},
    )
    if checkpoint.config["model_type"] == PACKED:
        return facts
    chosen = recipe if isinstance(recipe, Recipe) else load_recipe(recipe)
    streamed = stream(model, compute or Compute(), empty=True)
    inventory = take_inventory(streamed)
    needs = memory_needs(inventory, chosen, streamed)
    at = {str(b): _size_at(inventory, chosen, b) for b in (1, 2, 3, 4)}
    return replace(facts, sizes_by_bits=at, device_bytes=needs[0], host_bytes=needs[1])


def table(found: Inspection, recipe: str) -> list[tuple[str, str]]:
    """Rows of (what, how much) for a person."""
    rows = [
        ("family", f"{found.family}, {found.layers} layers, {found.moe_layers} with experts"),
        ("experts", f"{found.experts} a layer, {found.top_k} a token"),
        (
            "weights",
            f"{found.all_weights / 1e6:.1f} M, {found.expert_weights / 1e6:.1f} M in routed experts",
        ),
        ("size", format_size(found.size_bytes)),
        (
            "bits a weight",
            f"{found.nominal_bits:.2f} nominal, {found.bits_per_weight:.2f} true (routed experts)",
        ),
    ]
    rows += [(f"  {p}", format_size(size)) for p, size in found.bytes_by_part.items() if size]
    for bits, size in (found.sizes_by_bits or {}).items():
        rows.append((f"at {bits} bits", f"{format_size(size)} ({recipe})"))
    if found.host_bytes is not None and found.device_bytes is not None:
        host, device = format_size(found.host_bytes), format_size(found.device_bytes)
        rows.append(("peak memory", f"{host} host, {device} device ({recipe})"))
    return rows


_SIZES = ("size_bytes", "bits_per_weight", "nominal_bits", "bytes_by_part")


def _size_at(inventory: Inventory, recipe: Recipe, bits: int) -> int:
    layers = {i: (Keep(bits, recipe.group),) * e.n for i, e in inventory.experts.items()}
    return sum(bytes_by_part(inventory, Plan("", "", layers, rest=recipe.rest)).values())


def memory_needs(inventory: Inventory, recipe: Recipe, streamed: Streamed) -> tuple[int, int]:
    """(device, host) bytes at the peak of calibrating and applying; an estimate from shapes.

    One layer with a rounded copy of its experts, what its block hears, two gram matrices an expert,
    embeddings and head; and the hidden states of the calibration text, a layer's input and output.
    Statistics that read gradients keep every layer's input.
    """
    config, item = streamed.model.config.get_text_config(), streamed.model.dtype.itemsize
    tokens = recipe.data.samples * window_length(streamed.model.config, recipe.data.length)
    state = tokens * state_bytes(streamed)
    backward = any(s.backward for s in recipe.needs())
    kept = len(streamed.layers) + 3 if backward else 4
    widest = max(inventory.experts.values(), key=lambda e: e.n * e.weights)
    grams = 4 * widest.n * (widest.gate_up[1] ** 2 + widest.down[1] ** 2)
    top_k = next(m.top_k for i in range(len(streamed.layers)) if (m := streamed.moe(i)))
    heard = tokens * (2 * config.hidden_size * item + 4 * (widest.n + 2 * top_k))
    layer = 3 * widest.n * widest.weights * item + sum(
        w.shape[0] * w.shape[1] * item
        for w in inventory.weights.values()
        if w.layer == max(inventory.experts)
    )
    outer = inventory.embedding_bytes * item // 2
    device = layer + grams + heard + outer + kept * state
    on_cpu = streamed.device.type == "cpu"
    runtime = 600 * 10**6  # Python, torch and transformers themselves
    shard = inventory.embedding_bytes + 2 * widest.n * widest.weights * item
    return (0, device + shard + runtime) if on_cpu else (device, shard + runtime)
