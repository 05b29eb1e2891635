"""Choosing the set of experts that stays: NAEE's search against running every cut block."""

from __future__ import annotations

import copy
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from test_drop import layer, made_of
from torch import Tensor

from moecule.ask import Ask, decide, foresee
from moecule.calibrate import collect
from moecule.drop import Room
from moecule.errors import RecipeError
from moecule.experts import Experts
from moecule.family import load_family
from moecule.hf import Streamed
from moecule.inventory import take_inventory
from moecule.methods import naee, odp
from moecule.moe import by_expert, experts_of, find_layers, find_moe, put_experts, select_experts
from moecule.plan import Drop
from moecule.recipe import load_recipe
from moecule.stats import BINS, COUNT, Block
from moecule.walk import walk

NAEE = load_recipe("naee")


def routed_without(
    streamed: Streamed, batches: list[Tensor], sizes: range
) -> dict[int, dict[Any, float]]:
    """{layer: {set: squared change of the routed output}}, every cut layer really being run."""
    found: dict[int, dict[Any, float]] = {}
    for step in walk(streamed, batches):
        if streamed.moe(step.index) is None:
            continue
        plain, found[step.index] = step.layer, {}
        config = streamed.model.config.get_text_config()
        groups = streamed.family.n_groups(config)
        for size in (*sizes, 8):
            for kept in combinations(range(8), size):
                if not naee.balanced(kept, 8, groups):
                    continue
                step.layer = copy.deepcopy(plain)
                moe = find_moe(step.layer, streamed.family)
                put_experts(moe.experts, experts_of(moe.experts).select(kept))
                select_experts(moe, kept, 8)
                outs: list[Tensor] = []
                handle = moe.experts.register_forward_hook(
                    lambda m, args, out, to=outs: to.append(out.double())
                )
                step.listen()
                handle.remove()
                found[step.index][kept] = outs
        step.layer = plain
        whole = found[step.index].pop(tuple(range(8)))
        found[step.index] = {
            kept: float(sum((a - b).square().sum() for a, b in zip(outs, whole, strict=True)))
            for kept, outs in found[step.index].items()
        }
    return found


@pytest.mark.parametrize(
    ("name", "sizes", "share"),
    [
        ("mixtral", range(4, 5), "50%"),
        ("deepseek_v3", range(4, 8), "50%"),
        *(
            pytest.param(n, range(2, 8), "25%", marks=pytest.mark.slow)
            for n in ("mixtral", "olmoe", "qwen3_moe")
        ),
    ],
)
def test_all_sets_are_those_that_cutting_and_running_every_block_finds(
    name, sizes, share, checkpoint
):
    batches = tiny.tokens(2)
    streamed = tiny.stream(checkpoint(name), torch.float64)
    want = routed_without(streamed, batches, sizes)
    sums = dict(collect(tiny.stream(checkpoint(name), torch.float64), batches, NAEE.needs()))
    inventory = take_inventory(streamed)
    assert want and set(want) == set(sums)
    for i, errors in want.items():
        assert len(errors) > 1 and min(errors.values()) > 0
        for kept, error in errors.items():
            got = sums[i]["naee"][sum(1 << e for e in kept)]
            torch.testing.assert_close(got, torch.tensor(error).double(), rtol=1e-6, atol=1e-12)
    plan = decide(NAEE, Ask(drop=share), sums, inventory)
    for i, fates in plan.layers.items():
        kept = tuple(e for e, fate in enumerate(fates) if fate != Drop())
        same = {k: v for k, v in want[i].items() if len(k) == len(kept)}
        assert kept == min(same, key=same.get)


def toy(errors: dict[tuple[int, ...], float], n: int, groups: int = 1) -> Block:
    """A block of n experts of which the errors of sets are given; lengths rise with the number."""
    blank = torch.zeros(n, 2, 2)
    worth = {"coef_norm_sq": torch.arange(n).double()}
    rows = torch.zeros(n, 2).double()
    return Block(
        Experts(blank, blank, lambda x: x), rows, groups, worth, lambda kept: errors[tuple(kept)]
    )


def chosen(found: Tensor, left: int, n: int, groups: int = 1) -> tuple[int, ...]:
    """Who stays of a layer's sums."""
    sums = {0: {"naee": found, "count": torch.ones(n)}}
    return naee.choose(sums, Room({0: left}, {0: groups}), naee.Options())[0]


# of three experts 1 alone is best, but the first to go is 1
ERRORS = {(0,): 5.0, (1,): 1.0, (2,): 6.0, (0, 1): 4.0, (0, 2): 2.0, (1, 2): 3.0}


def test_all_sets_find_what_one_by_one_does_not():
    every, greedy = naee.search(toy(ERRORS, 3)), naee.one_by_one(toy(ERRORS, 3))
    assert every.tolist() == [0, 5, 1, 4, 6, 2, 3, 0]
    assert greedy.tolist() == [3, 0, 1]
    assert [chosen(every, left, 3) for left in (2, 1)] == [(0, 2), (1,)]
    assert [chosen(greedy, left, 3) for left in (2, 1)] == [(0, 2), (0,)]


def test_of_equals_the_lower_numbers_stay():
    same = dict.fromkeys(ERRORS, 1.0)
    for found in (naee.search(toy(same, 3)), naee.one_by_one(toy(same, 3))):
        assert [chosen(found, left, 3) for left in (2, 1)] == [(0, 1), (0,)]


def test_one_by_one_every_group_loses_one_at_a_time():
    def error(kept: tuple[int, ...]) -> float:  # 2 and 3 go best, and 1 with 5
        gone = frozenset(range(6)) - set(kept)
        return {frozenset({2, 3}): 0.0, frozenset({1, 5}): 1.0}.get(gone, 2.0)

    block = toy({}, 6, groups=2)
    block = Block(block.experts, block.rows, 2, block.sums, error)
    order = naee.one_by_one(block)
    # it begins with 0 and 3, the shortest; then 2 is better than 0
    assert order.tolist() == [6, 6, 0, 0, 6, 6]
    assert chosen(order, 4, 6, groups=2) == (0, 1, 4, 5)


@pytest.mark.parametrize(
    ("name", "search"),
    [("qwen3_moe", "greedy"), ("deepseek_v3", "auto"), ("deepseek_v3", "greedy")],
)
def test_permuting_a_models_experts_permutes_who_stays(name, search, checkpoint, tmp_path):
    order, recipe = [2, 0, 3, 1, 5, 7, 4, 6], load_recipe("naee", {"choose.search": search})
    permuted(checkpoint(name), name, order, tmp_path)
    plans = []
    for folder in (checkpoint(name), tmp_path):
        streamed = tiny.stream(folder, torch.float64)
        sums = dict(collect(streamed, tiny.tokens(2), recipe.needs()))
        plans.append(decide(recipe, Ask(drop=0.5), sums, take_inventory(streamed)).layers)
    before, after = plans
    assert before != after
    assert {i: tuple(fates[e] for e in order) for i, fates in before.items()} == after


def permuted(source: Path, name: str, order: list[int], out: Path) -> None:
    """The model with its experts in another order, of 8; within the halves, which may be groups."""
    model, family = tiny.load(source), load_family(name)
    for one in find_layers(model)[1]:
        moe = find_moe(one, family)
        if moe is not None:
            put_experts(moe.experts, experts_of(moe.experts).select(order))
            for module, leaf, axis in by_expert(moe, 8):
                getattr(module, leaf).data = getattr(module, leaf).data.index_select(
                    axis, torch.tensor(order)
                )
    model.save_pretrained(out)


def test_a_block_is_as_it_was_after_the_search(checkpoint):
    batches, plain = tiny.tokens(2), tiny.stream(checkpoint("mixtral"))
    searched = tiny.stream(checkpoint("mixtral"))
    greedy = load_recipe("naee", {"choose.search": "greedy"}).needs()
    sums = [dict(collect(s, batches, n)) for s, n in ((plain, (COUNT,)), (searched, greedy))]
    assert all(torch.equal(sums[0][i]["count"], sums[1][i]["count"]) for i in sums[0])
    (last,) = (tiny.walked(s, batches).last for s in (searched,))
    want = tiny.walked(plain, batches).last
    assert all(torch.equal(a, b) for a, b in zip(last, want, strict=True))


def test_what_cannot_be_chosen_is_refused_and_a_size_is_met():
    of = made_of(layer(8), layer(8))
    with pytest.raises(RecipeError, match="the router picks 2 a token"):
        Ask(drop="87.5%").check(NAEE, of)
    with pytest.raises(RecipeError, match=r"both \[score\] and \[choose\]"):
        load_recipe("naee", {"score.method": "reap"})
    half = foresee(NAEE, Ask(drop="50%"), of)
    assert half.dropped == 8


def test_skipping_is_below_the_median_of_every_layer(checkpoint):
    recipe, streamed = load_recipe("naee_skip"), tiny.stream(checkpoint("mixtral"))
    needs = (COUNT, *odp.needs(recipe.skip.options))
    sums = dict(collect(streamed, tiny.tokens(4), needs))
    limits, protect = odp.thresholds(sums, recipe.skip.options)
    assert protect == 0 and set(limits) == set(sums)
    for i, of in sums.items():
        second = of["skip_ratio"].sum(0)[1]
        below = second.cumsum(0)
        (limit,) = limits[i]
        at = round(limit * BINS)
        assert below[at - 1] <= second.sum() / 2 < below[at]
