"""inspect: what a model holds, and what a recipe would need and make, before any work."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from moecule.ask import Ask, at_width, foresee, price
from moecule.budget import Inventory, bytes_by_part, format_size
from moecule.errors import CheckpointError
from moecule.hf import PACKED, skeleton
from moecule.inventory import take_inventory, weigh
from moecule.moe import experts_of, find_layers, find_moe
from moecule.needs import Needs, needs_of, work_of
from moecule.pace import Pace, pace_of
from moecule.recipe import AS_IT_IS, Recipe, load_recipe
from moecule.session import Compute, open_checkpoint, stream

NO_WISH = Ask()


@dataclass(frozen=True)
class Budget:
    """What a recipe can make of what was asked for; bits as an even plan has them."""

    asked: str  # "fit 24GB, 4096 tokens"
    size_bytes: int  # of the checkpoint that comes of it
    weights_bytes: int | None  # that it may take: of --size, or of --fit less the cache
    cache_bytes: int  # of the KV cache, at 16 bits
    nominal_bits: float
    bits_per_weight: float  # true, of the routed experts


@dataclass(frozen=True)
class Inspection:
    """Facts of a model; the last ones are of the chosen recipe, None for a compressed model."""

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
    budget: Budget | None = None
    needs: Needs | None = None
    pace: Pace | None = None  # None too where it was not asked for


def inspect(
    model: str | Path,
    *,
    recipe: str | Recipe = "mc",
    ask: Ask = NO_WISH,
    compute: Compute | None = None,
    time: bool = True,
) -> Inspection:
    """Read headers and shapes only; `time`: and measure rates for about a second.

    Raises CheckpointError for what is no MoE checkpoint, RecipeError for what no plan can meet.
    """
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
        if ask != NO_WISH:
            raise CheckpointError(
                f"{model} is compressed already, and has no budget to be spent; give the original"
            )
        return facts
    chosen = recipe if isinstance(recipe, Recipe) else load_recipe(recipe)
    return _foreseen(facts, chosen, ask, compute or Compute(), time=time)


def _foreseen(
    facts: Inspection, recipe: Recipe, ask: Ask, compute: Compute, *, time: bool
) -> Inspection:
    """With what the recipe will make and take."""
    streamed = stream(facts.model, compute, empty=True)
    inventory = take_inventory(streamed)
    budget = budget_of(inventory, recipe, ask)
    if recipe.bits == AS_IT_IS and not foresee(recipe, ask, inventory).leaves_experts:
        recipe = replace(recipe, bits=1.0)  # what rounding takes is to be foreseen too
    work, size = work_of(streamed, inventory, recipe), budget.size_bytes
    return replace(
        facts,
        sizes_by_bits={
            str(b): price(inventory, at_width(recipe, ask.share(recipe), inventory, b))
            for b in (1, 2, 3, 4)
        },
        budget=budget,
        needs=needs_of(work, size, compute),
        pace=pace_of(streamed, inventory, recipe, work, size) if time else None,
    )


def budget_of(inventory: Inventory, recipe: Recipe, ask: Ask) -> Budget:
    """An even plan that keeps within what was asked. Raises RecipeError where none does."""
    ask.check(recipe, inventory)
    room, plan = ask.size_bytes(inventory), foresee(recipe, ask, inventory)
    sizes = bytes_by_part(inventory, plan)
    return Budget(
        asked=ask.text(recipe),
        size_bytes=sum(sizes.values()),
        weights_bytes=room,
        cache_bytes=inventory.cache_bytes(min(ask.context, inventory.max_position)),
        nominal_bits=plan.nominal_bits,
        bits_per_weight=8 * sizes["experts"] / inventory.expert_weights,
    )


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
    if found.budget is not None:
        rows += _budget_rows(found.budget)
    if found.needs is not None:
        rows += _needs_rows(found.needs)
    if found.pace is not None:
        rows += _pace_rows(found.pace)
    return rows


def _budget_rows(budget: Budget) -> list[tuple[str, str]]:
    bits = f"{budget.nominal_bits:.2f} bits nominal, {budget.bits_per_weight:.2f} true"
    rows = [("KV cache", format_size(budget.cache_bytes))]
    if budget.weights_bytes is not None:
        rows.append(("room for weights", format_size(budget.weights_bytes)))
    return [*rows, (budget.asked, f"{bits}, {format_size(budget.size_bytes)}")]


def _needs_rows(needs: Needs) -> list[tuple[str, str]]:
    device = f", {format_size(needs.device_bytes)} device" if needs.device_bytes else ""
    where = {"device": "on the device", "host": "in host memory", "disk": "on disk"}[needs.states]
    return [
        ("peak memory", f"{format_size(needs.host_bytes)} host{device}"),
        ("  of it most", _largest(needs.device_terms or needs.host_terms)),
        ("disk", f"{format_size(needs.disk_bytes)} ({_largest(needs.disk_terms)})"),
        ("hidden states", f"{where}, {format_size(needs.states_bytes)}"),
    ]


def _largest(terms: Mapping[str, int]) -> str:
    what = max(terms, key=lambda name: terms[name])
    return f"{what}, {format_size(terms[what])}"


def _pace_rows(pace: Pace) -> list[tuple[str, str]]:
    whole = sum(pace.seconds.values())
    parts = ", ".join(f"{verb} {_duration(s)}" for verb, s in pace.seconds.items())
    rates = f"{pace.rates.flop_per_s / 1e12:.2g} TFLOP/s and {pace.rates.read_bytes_per_s / 1e9:.2g} GB/s"
    rows = [("time", f"about {_duration(whole)} ({parts}), at {rates} measured")]
    for verb, terms in pace.terms.items():
        found = sorted(terms.items(), key=lambda item: -item[1])[:3]
        rows.append((f"  {verb}", ", ".join(f"{what} {_duration(s)}" for what, s in found)))
    return rows


def _duration(seconds: float) -> str:
    """Two figures at most: nothing is known better."""
    for unit, size in (("h", 3600.0), ("min", 60.0)):
        if seconds >= 1.5 * size:
            return f"{seconds / size:.2g} {unit}"
    return f"{seconds:.2g} s"


_SIZES = ("size_bytes", "bits_per_weight", "nominal_bits", "bytes_by_part")
