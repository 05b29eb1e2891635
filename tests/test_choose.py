"""Choosing the set of experts that stays: NAEE's search against running every cut block."""

from __future__ import annotations

import copy
from itertools import combinations
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_drop import layer, made_of
from torch import Tensor

from moecule.alike import at_most, clustered
from moecule.ask import Ask, decide, foresee
from moecule.calibrate import collect
from moecule.drop import Room
from moecule.errors import RecipeError
from moecule.experts import Experts
from moecule.hf import Streamed
from moecule.inventory import take_inventory
from moecule.methods import naee, odp, stun
from moecule.moe import experts_of, find_layers, find_moe, put_experts, select_experts
from moecule.plan import Drop
from moecule.recipe import load_recipe
from moecule.stats import BINS, COUNT, Block, Routed
from moecule.walk import walk

NAEE = load_recipe("naee")
NAEE_GREEDY = ("naee", {"choose.search": "greedy"})


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
    name, sizes, share, tmp_path
):
    few = {} if name == "deepseek_v3" else {"num_hidden_layers": 1}  # its first has no experts
    tiny.save(name, tmp_path, **few)
    batches, streamed = tiny.tokens(2), tiny.stream(tmp_path, torch.float64)
    want = routed_without(streamed, batches, sizes)
    sums = dict(collect(tiny.stream(tmp_path, torch.float64), batches, NAEE.needs()))
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
    ("name", "of"),
    [
        ("qwen3_moe", NAEE_GREEDY),
        ("deepseek_v3", ("naee", {})),
        ("deepseek_v3", NAEE_GREEDY),
        ("qwen3_moe", ("stun", {"choose.together": 1.0})),
        ("deepseek_v3", ("stun", {"choose.budget": "layer"})),
    ],
)
def test_permuting_a_models_experts_permutes_who_stays(name, of, checkpoint, tmp_path):
    order, recipe = [2, 0, 3, 1, 5, 7, 4, 6], load_recipe(*of)
    tiny.permuted(checkpoint(name), order, tmp_path)
    plans = []
    for folder in (checkpoint(name), tmp_path):
        streamed = tiny.stream(folder, torch.float64)
        sums = dict(collect(streamed, tiny.tokens(2), recipe.needs()))
        plans.append(decide(recipe, Ask(drop=0.5), sums, take_inventory(streamed)).layers)
    before, after = plans
    assert before != after
    assert {i: tuple(fates[e] for e in order) for i, fates in before.items()} == after


def test_a_block_is_as_it_was_after_the_search(checkpoint):
    batches, plain = tiny.tokens(2), tiny.stream(checkpoint("mixtral"))
    searched = tiny.stream(checkpoint("mixtral"))
    greedy = load_recipe(*NAEE_GREEDY).needs()
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


# clusters

POINTS = [0, 1, 1.9, 5, 5.4, 9]
LINE = abs(torch.tensor(POINTS).double()[:, None] - torch.tensor(POINTS).double())


@pytest.mark.parametrize(
    ("threshold", "least", "together"),
    [
        (0.5, 1, [[3, 4]]),
        (1.2, 1, [[1, 2], [3, 4]]),
        (2.0, 1, [[0, 1, 2], [3, 4]]),
        (4.2, 1, [[0, 1, 2], [3, 4, 5]]),
        (100, 1, [[0, 1, 2, 3, 4, 5]]),
        (100, 4, [[1, 2], [3, 4]]),
    ],
)
def test_clusters_are_those_worked_out_by_hand(threshold, least, together):
    found = clustered(LINE.numpy(), threshold, least)
    assert [c for c in found if len(c) > 1] == together
    assert sorted(e for c in found for e in c) == list(range(6))


def by_the_letter(d: np.ndarray, threshold: float, least: int) -> list[list[int]]:
    """The authors' loop: the first least entry of all that are left, again and again."""
    d, of = d.copy(), [{e} for e in range(len(d))]
    np.fill_diagonal(d, np.inf)
    while d.min() < threshold and len({min(c) for c in of}) > least:
        i, j = divmod(int(d.argmin()), len(d))
        links = [d[u, j] for u in of[i]] + [d[u, i] for u in of[j]]
        if max(links) < threshold:
            for u in of[i]:
                d[u, j] = np.inf
            for u in of[j]:
                d[u, i] = np.inf
            for u in (united := of[i] | of[j]):
                of[u] = united
        else:
            d[i, j] = d[j, i] = np.inf
    return [list(c) for c in sorted({tuple(sorted(c)) for c in of})]


@given(st.integers(0, 10**6), st.integers(1, 5), st.booleans())
def test_clusters_are_those_of_the_authors_loop(seed, least, rough):
    draw = np.random.default_rng(seed)
    at = draw.normal(size=(9, 2))
    d = np.sqrt(((at[:, None] - at) ** 2).sum(-1))
    d = np.round(d) if rough else d
    threshold = float(draw.uniform(0, 4))
    assert clustered(d, threshold, least) == by_the_letter(d, threshold, least)


@settings(max_examples=15)
@given(st.integers(0, 10**6), st.booleans())
def test_one_threshold_leaves_no_more_than_wanted_and_a_layers_own_as_many(seed, rough):
    draw = np.random.default_rng(seed)
    parts = []
    for scale in (1, 3):
        at = scale * draw.normal(size=(8, 2))
        d = np.sqrt(((at[:, None] - at) ** 2).sum(-1))
        parts.append(np.round(d) if rough else d)
    for wanted in range(4, 16):
        threshold, found = at_most(wanted, parts, [2, 2])
        total = sum(map(len, found))
        assert total <= wanted and (rough or total >= wanted - 1)
        assert found == [clustered(p, threshold, 2) for p in parts]
    for wanted in range(1, 9):
        assert len(at_most(wanted, parts[:1], [wanted])[1][0]) == wanted


def of_points(points: list[float], count: list[float] | None = None) -> dict[str, Tensor]:
    """Sums of a layer whose experts and router rows are these numbers."""
    at = torch.tensor(points).double()
    ones = torch.ones(len(at)).double() if count is None else torch.tensor(count).double()
    apart = abs(at[:, None] - at)
    return {"count": ones, "router_distance": apart, "weight_products": at[:, None] * at}


def test_the_expert_nearest_to_its_clusters_mean_stays():
    line, far = of_points(POINTS), of_points([100 * p for p in POINTS])
    room = Room({0: 3}, {0: 1})
    # 0, 1 and 1.9 have their mean at 0.97; of 5 and 5.4 the lower number stays
    assert stun.choose({0: line}, room, stun.Options()) == {0: (1, 3, 5)}
    used = of_points(POINTS, [0, 0, 0, 0, 1, 0])
    assert stun.choose({0: used}, room, stun.Options()) == {0: (1, 4, 5)}
    # one threshold: the layer whose rows are far apart keeps all
    room = Room({}, {0: 1, 1: 1}, total=9, least={0: 2, 1: 2})
    assert stun.choose({0: line, 1: far}, room, stun.Options()) == {
        0: (1, 3, 5),
        1: tuple(range(6)),
    }


def test_groups_of_a_router_have_clusters_of_their_own():
    sums = {0: of_points([0, 1, 5, 5.1, 5.2, 5.3, 9, 20])}
    kept = stun.choose(sums, Room({0: 6}, {0: 2}), stun.Options(budget="layer"))[0]
    assert kept == (0, 1, 2, 4, 6, 7)


def test_experts_that_are_chosen_together_are_alike():
    idx = torch.tensor([[0, 1], [1, 0], [2, 1], [3, 0]])
    logits = torch.zeros(4, 4)
    both = stun.together(Routed(logits, logits, idx, torch.ones(4, 2)))
    assert both.tolist() == [[0, 2, 0, 1], [2, 0, 1, 0], [0, 1, 0, 0], [1, 0, 0, 0]]
    sums = of_points([0, 1, 2, 3]) | {"together": both}
    options = stun.Options(router=0, together=1, budget="layer")
    # d = -a / mean(a): 0 and 1 first; then neither is chosen with both of any
    assert stun._apart(sums, options)[0].tolist() == [0, -4, 0, -2]
    kept = stun.choose({0: sums}, Room({0: 3}, {0: 1}), options)[0]
    assert kept == (0, 2, 3)


def test_who_is_alike_is_read_off_the_weights(checkpoint):
    streamed, batches, passes = tiny.stream(checkpoint("qwen3_moe")), tiny.tokens(3), []
    handles = [
        one.register_forward_hook(lambda m, args, out: passes.append(m)) for one in streamed.layers
    ]
    recipe = load_recipe("stun")
    sums = dict(collect(streamed, batches, recipe.needs()))
    assert len(passes) == len(batches) * len(streamed.layers)  # the text passed once
    for handle in handles:
        handle.remove()
    model = tiny.load(checkpoint("qwen3_moe"))
    for i, of in sums.items():
        moe = find_moe(find_layers(model)[1][i], streamed.family)
        rows, experts = moe.router.weight.double(), experts_of(moe.experts)
        flat = torch.cat([experts.gate_up.flatten(1), experts.down.flatten(1)], 1).double()
        torch.testing.assert_close(of["weight_products"], flat @ flat.mT)
        want = (rows[:, None] - rows).norm(dim=-1) / rows.norm()
        torch.testing.assert_close(of["router_distance"], want.detach())
    plan = decide(recipe, Ask(drop="25%"), sums, take_inventory(streamed))
    assert plan.dropped == sum(map(len, plan.layers.values())) // 4


def test_what_makes_nothing_alike_is_refused():
    with pytest.raises(RecipeError, match="router = 0 and together = 0, wanted none below 0"):
        load_recipe("stun", {"choose.router": 0.0})
