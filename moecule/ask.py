"""How small: what a user asks for, and the plan of a recipe that meets it.

First experts go (`--drop`), then those that stay get their bits: what the allocation reads of the
others is left out.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache

import torch
from torch import Tensor

from moecule.budget import Inventory, bytes_by_part, format_size, parse_size, within
from moecule.drop import Dropping, Kept, Spread, fates_of, parse_share
from moecule.errors import RecipeError
from moecule.merge import Cluster, Merging, weights_of, with_merges
from moecule.method import Width, load_method
from moecule.narrow import Narrowing
from moecule.order import with_order
from moecule.plan import Masks, Plan, Skip
from moecule.recipe import AS_IT_IS, SKIPPING, Part, Recipe, load_recipe, recipe_names
from moecule.stats import COUNT, Stats, select
from moecule.target import check_plan, check_widths, steered, target_of
from moecule.zeros import Sparse

Make = Callable[[float, float], Plan]  # of a share to drop and a mean of bits
Widths = Callable[[Kept, float], Mapping[int, tuple[Width, ...]]]
Going = Dropping | Narrowing


@dataclass(frozen=True)
class Ask:
    """How small. One of bits, size and fit, or the recipe's bits; and what share of the experts goes."""

    bits: float | None = None  # mean code bits of the experts that stay; 16 leaves them as they are
    size: str | int | None = None  # true bytes of the whole checkpoint
    fit: str | int | None = None  # of the checkpoint and a KV cache of `context` tokens
    context: int = 4096
    drop: str | float | None = None  # "25%" or 0.25; None: as the recipe says
    clamp: bool = False  # where fewer stay than the router picks, let it pick fewer
    target: str | None = None  # one of target.TARGETS, which is to load the checkpoint

    def __post_init__(self) -> None:
        """Raises RecipeError for two wishes at once, and for what is no size, share or target."""
        if sum(x is not None for x in (self.bits, self.size, self.fit)) > 1:
            raise RecipeError("give one of --bits, --size and --fit, not two")
        if self.context < 1:
            raise RecipeError(f"a context of {self.context} tokens; wanted 1 or more")
        for size in (self.size, self.fit):
            if size is not None:
                parse_size(size)
        if self.drop is not None:
            parse_share(self.drop)
        if self.target is not None:
            target_of(self.target)

    def steered(self, recipe: Recipe) -> Recipe:
        """With choices that the target can load. Raises RecipeError for a recipe that has none."""
        return recipe if self.target is None else steered(recipe, self.target)[0]

    def share(self, recipe: Recipe) -> float:
        """Of the experts, that goes, where it is not to be found from a size."""
        return recipe.drop if self.drop is None else parse_share(self.drop)

    def size_bytes(self, inventory: Inventory) -> int | None:
        """The bytes to keep within, if the user gave any."""
        if self.size is not None:
            return parse_size(self.size)
        if self.fit is not None:
            return parse_size(self.fit) - self.cache_bytes(inventory)
        return None

    def cache_bytes(self, inventory: Inventory) -> int:
        """Of the KV cache that `fit` leaves room for."""
        tokens = min(self.context, inventory.max_position)
        return 0 if self.fit is None else inventory.cache_bytes(tokens)

    def check(self, recipe: Recipe, inventory: Inventory) -> None:
        """Raise RecipeError for what no plan of the recipe can meet, before there are statistics."""
        if self.drop is not None and not recipe.drops:
            able = [n for n in recipe_names() if load_recipe(n).drops]
            raise RecipeError(
                f"recipe {recipe.name} does not say which experts to drop; those that do are "
                f"{', '.join(able)}"
            )
        recipe = self.steered(recipe)
        if self.target is not None:
            check_widths(recipe, inventory, self.target)
        size, going = self.size_bytes(inventory), _going(recipe, self, inventory)
        share = 0.0 if _drops_to_fit(recipe, self) else self.share(recipe)
        going.check(share)
        _check_bits(recipe, self)
        if size is None:
            recipe.check_bits(recipe.bits if self.bits is None else self.bits)
        elif size < (least := _least(recipe, self, inventory)):
            cache = self.cache_bytes(inventory)
            room = f" and {format_size(cache)} for the KV cache" if cache else ""
            raise RecipeError(
                f"{self.text(recipe)} cannot be met; the least that recipe {recipe.name} takes is "
                f"{format_size(least)}{room}; ask for more"
            )
        if self.target is not None:
            check_plan(foresee(recipe, self, inventory), self.target)

    def text(self, recipe: Recipe) -> str:
        """For the plan: what was asked for."""
        if self.size is not None:
            asked = f"size {self.size}"
        elif self.fit is not None:
            asked = f"fit {self.fit}, {self.context} tokens"
        else:
            asked = f"{recipe.bits if self.bits is None else self.bits:g} bits"
        if recipe.sparsify is not None:
            asked += f", {100 * recipe.sparsify.options.share:g}% of what stays 0 (no fewer bytes)"
        if not recipe.drops or _drops_to_fit(recipe, self) or not self.share(recipe):
            return asked
        return f"drop {100 * self.share(recipe):g}%, {asked}"


def _drops_to_fit(recipe: Recipe, ask: Ask) -> bool:
    """Whether experts are dropped until the size is met, instead of rounded."""
    sized = ask.size is not None or ask.fit is not None
    return sized and recipe.bits == AS_IT_IS and ask.drop is None and recipe.drops


def _rounds(recipe: Recipe, ask: Ask) -> bool:
    """Whether experts that stay get fewer than 16 bits."""
    bits = recipe.bits if ask.bits is None else ask.bits
    sized = ask.size is not None or ask.fit is not None
    return bits < AS_IT_IS or (sized and not _drops_to_fit(recipe, ask))


def _going(
    recipe: Recipe, ask: Ask, inventory: Inventory, stats: Stats | None = None
) -> Dropping | Narrowing:
    """What may go: experts, or channels of them. Without statistics all score alike."""
    if recipe.channels is not None:
        method, options = load_method(recipe.channels.method, "channels"), recipe.channels.options
        assert method.channels is not None  # load_method saw to it
        group = recipe.group if _rounds(recipe, ask) else None
        wide = {i: (e.n, e.down[1]) for i, e in inventory.experts.items()}
        scores = _blank(wide) if stats is None else dict(method.channels(stats, options))
        return Narrowing.of(scores, inventory, options, group)
    blank = _blank({i: (e.n,) for i, e in inventory.experts.items()})
    if recipe.choose is not None:
        return _choosing(recipe.choose, ask, inventory, blank, stats)
    if recipe.score is None:
        return Dropping(blank, inventory)
    method, options = load_method(recipe.score.method, "score"), recipe.score.options
    assert method.score is not None  # as above
    scores = blank if stats is None else dict(method.score(stats, options))
    spread: Spread = getattr(options, "budget", "layer")
    if recipe.cluster is None:
        return Dropping(scores, inventory, spread, ask.clamp)
    clusters = None if stats is None else _clusters(recipe, recipe.cluster, stats, scores)
    aliased = recipe.into.router == "alias"
    return Merging(scores, inventory, spread, ask.clamp, cluster=clusters, aliased=aliased)


def _clusters(recipe: Recipe, part: Part, stats: Stats, scores: Mapping[int, Tensor]) -> Cluster:
    """The method's clusters, of the experts of a layer or of a group of its router."""
    of, read = load_method(part.method, "cluster").cluster, recipe.counted()
    assert of is not None  # load_method saw to it

    @cache
    def made(layer: int, ids: tuple[int, ...], n: int) -> Sequence[int]:
        return of(select(stats[layer], read, ids), scores[layer][list(ids)], n, part.options)

    return made


def _choosing(
    part: Part, ask: Ask, inventory: Inventory, blank: Mapping[int, Tensor], stats: Stats | None
) -> Dropping:
    """As `_going`, where sets of experts are chosen."""
    choose = load_method(part.method, "choose").choose
    assert choose is not None  # load_method saw to it
    spread: Spread = getattr(part.options, "budget", "layer")
    by_set = None if stats is None else lambda room: choose(stats, room, part.options)
    return Dropping(blank, inventory, spread, ask.clamp, by_set, part="choose")


def _check_bits(recipe: Recipe, ask: Ask) -> None:
    """Raise RecipeError where zeros are to be rounded."""
    if recipe.sparsify is not None and _rounds(recipe, ask):
        raise RecipeError(
            f"recipe {recipe.name} makes weights 0, and rounding, which has no 0, would undo it; give "
            "--bits 16, or a recipe without [sparsify]"
        )


def decide(recipe: Recipe, ask: Ask, stats: Stats, inventory: Inventory) -> Plan:
    """The recipe's plan, but for the model's name. Raises RecipeError where none meets the request."""
    method = load_method(recipe.allocate.method, "allocate")
    allocate = method.allocate
    assert allocate is not None  # load_method saw to it
    recipe = ask.steered(recipe)
    going = _going(recipe, ask, inventory, stats)

    def widths(kept: Kept, bits: float) -> Mapping[int, tuple[Width, ...]]:
        return allocate(survivors(recipe, stats, kept), bits, recipe.allocate.options)

    made, kept = _met(recipe, ask, inventory, going, widths)
    if recipe.merge is not None:
        made = _merging(recipe, stats, going, made)
    if made.ordered and isinstance(going, Narrowing):
        made = with_order(made, going.order())
    if ask.target is not None:
        check_plan(made, ask.target)
    left = survivors(recipe, stats, kept)
    return _skipping(_sparse(made, recipe, left), recipe.skip, left)


def _merging(recipe: Recipe, stats: Stats, going: Going, plan: Plan) -> Plan:
    """The plan, in which those that went go into others."""
    assert isinstance(going, Dropping)  # a recipe that merges has a score
    score = {i: s.clamp(min=0) for i, s in going.scores.items()}
    count = {i: of[COUNT.name] for i, of in stats.items()}
    merges = recipe.merges(weights_of(count if recipe.into.weigh == "count" else score))
    assert merges is not None  # as above
    plan = replace(plan, merge=None)
    return going.merged(plan, merges) if isinstance(going, Merging) else with_merges(plan, merges)


def foresee(recipe: Recipe, ask: Ask, inventory: Inventory) -> Plan:
    """An even plan that meets the request, to be priced before there are statistics.

    Raises RecipeError where none does.
    """
    recipe = ask.steered(recipe)

    def widths(kept: Kept, bits: float) -> Mapping[int, tuple[Width, ...]]:
        return recipe.even_widths({i: len(ids) for i, ids in kept.items()}, bits)

    return _met(recipe, ask, inventory, _going(recipe, ask, inventory), widths)[0]


def _blank(shapes: Mapping[int, tuple[int, ...]]) -> dict[int, Tensor]:
    return {i: torch.zeros(shape, dtype=torch.float64) for i, shape in shapes.items()}


def _met(
    recipe: Recipe, ask: Ask, inventory: Inventory, going: Going, widths: Widths
) -> tuple[Plan, Kept]:
    """(the plan that meets the request, the experts that it keeps)."""
    keep, counts = cache(going.kept), cache(going.counts)

    def make(share: float, bits: float) -> Plan:
        kept, top_k = keep(share), going.check(share)
        if bits == AS_IT_IS:
            given: Mapping[int, tuple[Width, ...]] = {i: (16,) * len(k) for i, k in kept.items()}
        else:
            given = widths(kept, bits)
        layers = fates_of(kept, given, inventory, recipe.group, counts(share))
        merge = recipe.merges({})
        return Plan("", "", layers, rest=recipe.rest, top_k=top_k, merge=merge, refit=recipe.refit)

    share, size = ask.share(recipe), ask.size_bytes(inventory)
    if size is None:
        return make(share, recipe.bits if ask.bits is None else ask.bits), keep(share)
    if _drops_to_fit(recipe, ask):
        share = _least_drop(make, going.shares(), inventory, size)
        return make(share, AS_IT_IS), keep(share)
    if recipe.bits == AS_IT_IS and price(inventory, make(share, AS_IT_IS)) <= size:
        return make(share, AS_IT_IS), keep(share)
    whole = load_method(recipe.allocate.method, "allocate").whole_bits
    return within(lambda bits: make(share, bits), inventory, size, whole=whole), keep(share)


def _least_drop(make: Make, among: list[float], inventory: Inventory, size: int) -> float:
    """The least share with which the checkpoint weighs no more than `size`."""
    low, high = 0, len(among) - 1
    least = price(inventory, make(among[high], AS_IT_IS))
    if least > size:
        raise RecipeError(
            f"{format_size(size)} cannot be met; the least that this recipe makes is "
            f"{format_size(least)}; ask for more"
        )
    while low < high:
        middle = (low + high) // 2
        if price(inventory, make(among[middle], AS_IT_IS)) <= size:
            high = middle
        else:
            low = middle + 1
    return among[high]


def _least(recipe: Recipe, ask: Ask, inventory: Inventory) -> int:
    """Bytes that no plan of this recipe is smaller than."""
    bits, share = recipe.widths()[0], ask.share(recipe)
    if _drops_to_fit(recipe, ask):
        bits, share = 16, _going(recipe, ask, inventory).shares()[-1]
    return price(inventory, at_width(recipe, share, inventory, bits))


def at_width(recipe: Recipe, share: float, inventory: Inventory, bits: int) -> Plan:
    """A plan that drops a share and gives all others `bits`, whether the recipe itself would or not."""
    going = _going(recipe, Ask(), inventory)
    kept = going.kept(share)
    given = {i: (bits,) * len(ids) for i, ids in kept.items()}
    layers = fates_of(kept, given, inventory, recipe.group, going.counts(share))
    return Plan("", "", layers, rest=recipe.rest, merge=recipe.merges({}))


def price(inventory: Inventory, plan: Plan) -> int:
    """Bytes of the checkpoint that a plan makes."""
    return sum(bytes_by_part(inventory, plan).values())


def survivors(recipe: Recipe, stats: Stats, kept: Kept) -> dict[int, dict[str, Tensor]]:
    """The sums that the recipe reads, of the experts that stay."""
    return {i: select(of, recipe.counted(), kept[i]) for i, of in stats.items()}


def _sparse(plan: Plan, recipe: Recipe, stats: Stats) -> Plan:
    if recipe.sparsify is None or recipe.mask is None:
        return plan
    method = load_method(recipe.sparsify.method, "densities")
    assert method.densities is not None  # load_method saw to it
    density = method.densities(stats, recipe.sparsify.options)
    rounded = {i: round(d, 4) for i, d in sorted(density.items())}
    return replace(plan, sparse=Sparse(rounded, recipe.mask.as_dict()))


def _skipping(plan: Plan, skip: Part | None, stats: Stats) -> Plan:
    if skip is None:
        return plan
    method = load_method(skip.method, SKIPPING)
    if method.thresholds is None:  # learnt when the plan has been carried out
        return replace(plan, skip=Masks(skip.as_dict()))
    thresholds, protect = method.thresholds(stats, skip.options)
    if plan.top_k is not None:  # ranks that the router no longer picks have none
        thresholds = {i: of[: plan.top_k - 1] for i, of in thresholds.items()}
    return replace(plan, skip=Skip(thresholds, protect))
