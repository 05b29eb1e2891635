"""Merging experts: the methods' figures by hand, who goes into whom, and that what is left is the model."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from test_cli import SMALL, calibrated, run
from test_drop import LOGITS, few_tokens, layer, made_of
from torch import Tensor

from moecule.ask import Ask, decide, foresee, price
from moecule.budget import Inventory
from moecule.calibrate import collect
from moecule.checkpoint import Checkpoint
from moecule.errors import PlanError, RecipeError
from moecule.experts import Expert, Experts
from moecule.family import load_family
from moecule.group import Group, kmeans, nearest, permuted, segments, stacked
from moecule.inventory import take_inventory
from moecule.merge import Merging
from moecule.methods import dern, hc_smoe, m_smoe, mergemoe, ream, sub_moe, uncurl
from moecule.moe import experts_of, find_layers, find_moe, listening, put_experts
from moecule.plan import Drop, Keep, Merge, Merges, Plan
from moecule.recipe import load_recipe, recipe_names
from moecule.stats import Block
from moecule.unite import Hearing, take_away
from moecule.walk import walk

RECIPES = [n for n in recipe_names() if load_recipe(n).merge is not None]
CLUSTERING = [n for n in RECIPES if load_recipe(n).cluster is not None]
MODULES: dict[str, Any] = {
    "hc_smoe": hc_smoe, "m_smoe": m_smoe, "mergemoe": mergemoe, "ream": ream, "sub_moe": sub_moe,
    "uncurl": uncurl,
}  # fmt: skip
ALIGNED = ("m_smoe", "ream", "uncurl")


def relu(x: Tensor) -> Tensor:
    """Of experts without a gate."""
    return x.clamp(min=0)


def gated(x: Tensor) -> Tensor:
    """Rows of the gate, then those of up."""
    gate, up = x.chunk(2, -1)
    return torch.nn.functional.silu(gate) * up


def group_of(
    experts: Experts, weights: Sequence[float], x: Sequence[Tensor] | None = None
) -> Group:
    """Some experts; x: what each heard."""
    full, per = experts.down.shape[2], experts.gate_up.shape[1] // experts.down.shape[2]
    rows = torch.arange(full * per).view(per, full).mT
    heard = x or [torch.zeros(0, experts.gate_up.shape[2]) for _ in weights]

    def total(f: Any, members: Sequence[int]) -> Tensor:
        return f(torch.cat([heard[j] for j in members])).double()

    return Group(experts, rows, torch.tensor(weights).double(), total)


def some(n: int = 3, *, hidden: int = 6, full: int = 4, gate: Any = gated) -> Experts:
    """Random experts."""
    g, per = torch.Generator().manual_seed(0), 2 if gate is gated else 1
    up = torch.randn(n, per * full, hidden, generator=g)
    return Experts(up, torch.randn(n, hidden, full, generator=g), gate)


def inputs(n: int, tokens: int = 40, hidden: int = 6) -> list[Tensor]:
    """What n experts heard."""
    g = torch.Generator().manual_seed(1)
    return [torch.randn(tokens, hidden, generator=g) for _ in range(n)]


def same(a: Expert, b: Expert) -> None:
    """To rounding."""
    torch.testing.assert_close(a.gate_up, b.gate_up, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(a.down, b.down, rtol=1e-5, atol=1e-6)


# the methods' figures


def test_hc_smoe_joins_the_nearest_first():
    sums = {"outputs": torch.tensor([[0.0, 0], [3, 4], [9, 0], [9, 1], [0, 2]]).double()}
    score = torch.ones(5).double()
    found = {n: hc_smoe.cluster(sums, score, n, hc_smoe.Options()) for n in (5, 4, 3, 2)}
    # |2 3| = 1, |0 4| = 2, then 1 to {0 4}: (5 + sqrt 13) / 2 = 4.3; to {2 3}: 7
    parts = {n: sorted(map(of.index, of)) for n, of in found.items()}
    assert parts == {5: [0, 1, 2, 3, 4], 4: [0, 1, 2, 2, 4], 3: [0, 0, 1, 2, 2], 2: [0, 0, 0, 2, 2]}


def test_the_mean_is_weighted_by_use_and_plain_where_nobody_is_used():
    up = torch.tensor([[[4.0, 0]], [[0, 8]]])
    experts = Experts(up, torch.tensor([[[1.0], [0]], [[5], [4]]]), relu)
    made = hc_smoe.merge(group_of(experts, [3, 1]), hc_smoe.Options())
    assert made.gate_up.tolist() == [[3, 2]] and made.down.tolist() == [[2], [1]]
    made = hc_smoe.merge(group_of(experts, [0, 0]), hc_smoe.Options())
    assert made.gate_up.tolist() == [[2, 4]]


def test_those_used_most_stay_and_the_rest_go_where_the_logits_are_alike():
    z = LOGITS.double()
    sums = {"logits": z.mT @ z}
    # cosines: 01 .349, 02 .372, 12 .650, 03 -.598, 13 -.710, 23 -.964
    count = torch.tensor([5.0, 9, 2, 1]).double()
    assert m_smoe.cluster(sums, count, 2, m_smoe.Options()) == (0, 1, 1, 0)
    assert m_smoe.cluster(sums, count, 3, m_smoe.Options()) == (0, 1, 2, 0)
    assert m_smoe.cluster(sums, torch.ones(4).double(), 1, m_smoe.Options()) == (0, 0, 0, 0)


def test_uncurls_likeness_is_that_of_the_specs():
    z = LOGITS.double()
    s = uncurl.alike(z.mT @ z)
    want = [0.674608, 0.686052, 0.201193, 0.824861, 0.145217, 0.018188]
    got = s[torch.triu_indices(4, 4, 1).unbind()]
    torch.testing.assert_close(got, torch.tensor(want).double(), rtol=0, atol=6e-7)
    assert torch.allclose(s.diagonal(), torch.ones(4).double())


def test_uncurl_finds_two_blocks():
    z = torch.tensor([[1.0, 0.9, -1, -0.8, 1.1], [0.1, 0, 0.2, 0, -0.1]]).double()
    of = uncurl.cluster({"logits": z.mT @ z}, torch.ones(5).double(), 2, uncurl.Options())
    assert of[0] == of[1] == of[4] != of[2] == of[3]


def test_ream_lets_the_highest_take_those_most_like_it():
    gated_sums = torch.tensor([[1.0, 0], [0, 1], [0, 1], [0, 2], [1, 0]]).double()
    sums = {"gated": gated_sums, "logits": torch.eye(5).double()}
    # cosines of outputs 1 or 0, logits apart: 1/2 * 1 or 1/2, and 1/2 (1 - sqrt 2 / 2) = .146447
    got = ream.alike(sums)[0]
    want = torch.tensor([1, 0.396447, 0.396447, 0.396447, 0.646447]).double()
    torch.testing.assert_close(got, want, rtol=0, atol=6e-7)
    score = torch.tensor([1.0, 9, 0, 2, 0]).double()
    assert ream.cluster(sums, score, 2, ream.Options()) == (1, 1, 1, 3, 1)  # 1 takes all
    assert ream.cluster(sums, score, 2, ream.Options(most=2)) == (3, 1, 1, 3, 1)
    assert ream.cluster(sums, score, 3, ream.Options(most=2)) == (0, 1, 1, 3, 3)


def test_a_score_of_0_counts_as_the_least_above_it():
    experts = some(3, gate=relu)
    made = ream.merge(group_of(experts, [4, 0, 1]), ream.Options())
    lifted = ream.merge(group_of(experts, [4, 0.5, 1]), ream.Options())
    same(made, lifted)


@pytest.mark.parametrize("name", ALIGNED)
def test_channels_in_another_order_are_put_back(name):
    one = some(1)[0]
    order = torch.tensor([2, 0, 3, 1])
    rows = group_of(stacked([one]), [1.0]).rows
    twins = stacked([one, permuted(one, rows, order)])
    x = inputs(2)
    torch.testing.assert_close(twins[1](x[0]), one(x[0]))
    module = MODULES[name]
    same(module.merge(group_of(twins, [2.0, 1.0], x), module.Options()), one)


def test_mergemoe_fits_what_the_mean_cannot_give():
    up, down = torch.tensor([[[1.0]], [[3.0]]]), torch.tensor([[[1.0]], [[4.0]]])
    group = group_of(Experts(up, down, relu), [1, 1], [torch.tensor([[1.0], [2]])] * 2)
    made = mergemoe.merge(group, mergemoe.Options(damp=1e-9))
    # mean up 2, target (1 + 12) / 2 x = 6.5 x: down 3.25, and not 2.5
    assert made.gate_up.item() == 2 and made.down.item() == pytest.approx(3.25, rel=1e-6)
    experts, x = some(3), inputs(3)
    plain, fitted = (
        m.merge(group_of(experts, [3, 2, 1], x), m.Options()) for m in (hc_smoe, mergemoe)
    )
    every = torch.cat(x)
    target = sum(w / 6 * experts[e](every) for e, w in enumerate((3, 2, 1)))
    before, after = ((m(every) - target).square().sum() for m in (plain, fitted))
    assert after < 0.95 * before
    unheard = group_of(experts, [0, 0, 0])
    same(mergemoe.merge(unheard, mergemoe.Options()), hc_smoe.merge(unheard, hc_smoe.Options()))


def test_mergemoe_compares_first_matrices():
    experts = Experts(torch.tensor([[[1.0, 0]], [[0, 1]], [[3, 1]]]), torch.ones(3, 2, 1), relu)
    (of,) = [s.of_block for s in mergemoe.METHOD.needs(mergemoe.Options()) if s.of_block]
    gram = of(Block(experts, torch.zeros(3, 2).double(), 1, {}, lambda kept: 0.0))
    assert gram.tolist() == [[1, 0, 3], [0, 1, 1], [3, 1, 10]]
    score = torch.tensor([2.0, 3, 1]).double()
    assert mergemoe.cluster({"weights": gram}, score, 2, mergemoe.Options()) == (0, 1, 0)


def test_sub_moe_uncut_is_the_mean_weighted_by_use():
    experts, weights = some(3), [3.0, 2, 1]
    for name in ("gate_up", "down"):
        w = getattr(experts, name).double()
        u, s, v = torch.linalg.svd(torch.cat([*w], 1), full_matrices=False)
        v = v.view(len(s), 3, -1).movedim(1, 0)  # of each expert
        mean = sum(f / 6 * of for f, of in zip(weights, v, strict=True))
        made = sub_moe.merge(group_of(experts, weights), sub_moe.Options())
        torch.testing.assert_close(
            getattr(made, name).double(), u @ torch.diag(s) @ mean, rtol=1e-5, atol=1e-6
        )


def test_sub_moe_cut_by_inputs_loses_less_than_cut_plainly():
    experts, scale = some(3), torch.tensor([8.0, 4, 1, 0.5, 0.1, 0.1])
    x = [of * scale for of in inputs(3)]
    wide = sub_moe.merge(group_of(experts, [1, 1, 1], x), sub_moe.Options())
    lost = {}
    for whiten in (True, False):
        cut = sub_moe.merge(group_of(experts, [1, 1, 1], x), sub_moe.Options(0.5, whiten))
        for part in (slice(0, 4), slice(4, 8)):
            assert torch.linalg.matrix_rank(cut.gate_up[part]) == 2
        assert torch.linalg.matrix_rank(cut.down) == 2
        # what the projection loses of the members' own outputs, which is what it is chosen by
        gone = 0.0
        for part in (slice(0, 4), slice(4, 8)):
            basis = torch.linalg.svd(cut.gate_up[part])[0][:, :2]
            for e in range(3):
                y = x[e] @ experts.gate_up[e][part].mT
                gone += float((y - y @ basis @ basis.mT).square().sum())
        lost[whiten] = gone
    assert lost[True] < lost[False]
    assert not torch.equal(wide.gate_up, cut.gate_up)


def test_dern_moves_like_channels_and_their_share_of_the_row():
    up = torch.tensor([[[3.0, 0], [0, 3]], [[1.5, 0], [-1, 1]], [[0, -1], [1, 1]]])
    down = torch.tensor([[[4.0, 0], [0, 1]], [[2, 0], [0, 0]], [[0, 1], [0, 1]]])
    group = group_of(Experts(up, down, relu), [3, 1, 2])
    # channels [up, down]: kept 0: [3 0 4 0], [0 3 0 1]; 2: [0 -1 0 0], [1 1 1 1]; gone 1: [1.5 0 2 0], and
    # [-1 1 0 0], whose best is 3 / sqrt 20 = .67 by [0 3 0 1]
    found = dern.recombine(group, [0, 2], dern.Options(threshold=0.7))
    assert found.moved == 0.5 and found.rows.tolist() == [[1, 0.5, 0], [0, 0, 1]]
    # lengths 5 and 2.5: both to 3.75, in one direction
    one, two = segments(found.experts[0], group.rows)
    torch.testing.assert_close(one, torch.tensor([2.25, 0, 3, 0]))
    torch.testing.assert_close(two, torch.tensor([0.0, 3, 0, 1]))
    assert torch.equal(found.experts.gate_up[1], up[2])
    got = [dern.recombine(group, [0, 2], dern.Options(t)).moved for t in (0, 0.6, 0.7, 1)]
    assert got == [1, 1, 0.5, 0]


def test_dern_at_1_is_dropping():
    experts = stacked([some(3)[0], some(3)[0], some(3)[2]])  # even a twin's channels stay away
    found = dern.recombine(group_of(experts, [1, 1, 1]), [0, 2], dern.Options(1.0))
    assert torch.equal(found.experts.gate_up, experts.gate_up[[0, 2]])
    assert torch.equal(found.experts.down, experts.down[[0, 2]])
    assert found.moved == 0 and torch.equal(found.rows, torch.eye(3).double()[[0, 2]])


def test_dern_of_experts_that_nobody_was_sent_to_is_finite():
    experts = some(4, full=8)
    found = dern.recombine(group_of(experts, [0, 0, 0, 0]), [1, 2], dern.Options(-1.0))
    assert found.moved == 1
    assert torch.isfinite(found.experts.gate_up).all() and torch.isfinite(found.experts.down).all()


# who goes into whom


def test_kmeans_makes_as_many_clusters_as_were_asked_for():
    x = torch.tensor([[0.0], [1], [10], [11], [12], [10]]).double()
    parts = {n: kmeans(x @ x.mT, n) for n in range(1, 7)}
    assert {n: len(set(of)) for n, of in parts.items()} == {n: n for n in range(1, 7)}
    a, b, c, d, e, f = parts[2]
    assert a == b != c == d == e == f
    alike = torch.ones(5, 5).double()
    assert len(set(kmeans(alike, 3))) == 3


def test_of_a_cluster_the_expert_of_the_highest_score_stays():
    score = torch.tensor([1.0, 5, 5, 2, 9, 0, 1, 1]).double()
    of = Merging({0: score}, made_of(layer(8)), cluster=lambda i, ids, n: (0, 0, 0, 1, 2, 2, 3, 3))
    assert of.kept(0.5) == {0: (1, 3, 4, 6)}
    plan = Plan("", "", {0: tuple(Keep() if e in (1, 3, 4, 6) else Drop() for e in range(8))})
    made = of.merged(plan, Merges({"method": "hc_smoe"}))
    keep = Keep()
    assert made.layers[0] == (Merge(1), keep, Merge(1), keep, keep, Merge(4), keep, Merge(6))


def test_every_group_of_a_router_is_clustered_by_itself():
    asked = []

    def cluster(i: int, ids: tuple[int, ...], n: int) -> list[int]:
        asked.append((ids, n))
        return [*range(n), *[0] * (len(ids) - n)]

    of = Merging(
        {0: torch.zeros(8).double()},
        made_of(layer(8, groups=2, top_groups=2)),
        cluster=cluster,
    )
    assert of.kept(0.25) == {0: (0, 1, 2, 4, 5, 6)}
    assert asked == [((0, 1, 2, 3), 3), ((4, 5, 6, 7), 3)]


def test_nearest_takes_the_first_of_equals():
    alike = torch.ones(4, 4).double()
    assert nearest(alike, torch.tensor([0.0, 2, 2, 1]).double(), 2) == (1, 1, 2, 1)


NEEDS = tuple(dict.fromkeys(s for r in RECIPES for s in load_recipe(r).counted()))


def even(recipe: str, **changes: Any) -> Any:
    """The recipe, as many from every layer."""
    known = {"score.budget": "layer"} if recipe == "m_smoe" else {}
    return load_recipe(recipe, {**known, **changes})


@pytest.fixture(scope="module")
def counted(checkpoint):
    """counted(name): (sums of all recipes' statistics, the inventory)."""
    made: dict[str, Any] = {}

    def of(name: str) -> Any:
        if name not in made:
            streamed = tiny.stream(checkpoint(name))
            sums = dict(collect(streamed, tiny.tokens(4), NEEDS))
            made[name] = sums, take_inventory(streamed)
        return made[name]

    return of


@pytest.mark.parametrize("name", ["deepseek_v3", pytest.param("gpt_oss", marks=pytest.mark.slow)])
def test_permuting_a_models_experts_permutes_who_goes_into_whom(
    name, checkpoint, tmp_path, counted
):
    order = [2, 0, 3, 1, 5, 7, 4, 6]  # within the halves, which are the groups where there are any
    tiny.permuted(checkpoint(name), order, tmp_path)
    streamed = tiny.stream(tmp_path)
    moved = dict(collect(streamed, tiny.tokens(4), NEEDS)), take_inventory(streamed)
    place = {e: at for at, e in enumerate(order)}
    for r in RECIPES:
        before, after = (
            decide(even(r), Ask(drop=0.5), sums, inventory)
            for sums, inventory in (counted(name), moved)
        )
        for i, fates in before.layers.items():
            want = [
                Merge(place[f.into]) if isinstance(f, Merge) else f
                for f in (fates[e] for e in order)
            ]
            assert list(after.layers[i]) == want, r


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_share_of_0_merges_nothing(recipe, counted):
    sums, inventory = counted("qwen3_moe")
    plan = decide(load_recipe(recipe), Ask(drop=0), sums, inventory)
    assert plan.merge is None and all(plan.stays(i) for i in plan.layers)
    assert price(inventory, plan) == price(inventory, inventory.untouched())


@pytest.mark.parametrize("name", ["qwen3_moe", "deepseek_v3"])
@pytest.mark.parametrize("recipe", RECIPES)
def test_as_many_go_as_would_be_dropped(recipe, name, counted):
    sums, inventory = counted(name)
    for share in (0.25, 0.5):
        plan = decide(even(recipe), Ask(drop=share), sums, inventory)
        for i, fates in plan.layers.items():
            groups = inventory.experts[i].groups
            halves = [fates[g * 8 // groups : (g + 1) * 8 // groups] for g in range(groups)]
            assert {sum(isinstance(f, Keep) for f in of) for of in halves} == {
                round(8 * (1 - share)) // groups
            }
        foreseen = foresee(even(recipe), Ask(drop=share), inventory)
        assert price(inventory, foreseen) == price(inventory, plan)


@pytest.fixture(scope="module")
def silent(checkpoint, tmp_path_factory):
    """(a model of which no token reaches expert 3, its sums, its inventory)."""
    folder, model = tmp_path_factory.mktemp("silent"), tiny.load(checkpoint("gpt_oss"))
    for one in find_layers(model)[1]:
        find_moe(one, load_family("gpt_oss")).router.bias.data[3] = -1e4
    model.save_pretrained(folder)
    streamed = tiny.stream(folder)
    sums = dict(collect(streamed, tiny.tokens(), NEEDS))
    assert all(of["count"][3] == 0 for of in sums.values())
    return folder, sums, take_inventory(streamed)


@pytest.mark.parametrize("recipe", RECIPES)
def test_an_expert_that_no_token_reached_goes_and_harms_nothing(recipe, silent, tmp_path):
    folder, sums, inventory = silent
    streamed = tiny.stream(folder)
    plan = decide(even(recipe), Ask(drop=0.5), sums, inventory)
    plan = replace(plan, digest=streamed.checkpoint.digest)
    if recipe not in ("hc_smoe", "sub_moe", "uncurl"):  # these may leave it a cluster of its own
        assert all(fates[3] != Keep() for fates in plan.layers.values())
    done = tiny.write(streamed, plan, tmp_path, tiny.tokens())
    assert all(torch.isfinite(hidden).all() for hidden in done.last)


# carried out


@pytest.fixture(scope="module")
def twins(checkpoint, tmp_path_factory) -> dict[bool, Path]:
    """Models of which experts 4 to 7 compute what 0 to 3 do; True: with channels in another order."""
    made = {}
    for shuffled in (False, True):
        model, family = tiny.load(checkpoint("qwen3_moe")), load_family("qwen3_moe")
        for one in find_layers(model)[1]:
            moe = find_moe(one, family)
            experts = experts_of(moe.experts)
            full = experts.down.shape[2]
            rows = torch.arange(2 * full).view(2, full).mT
            order = torch.randperm(full, generator=torch.Generator().manual_seed(1))
            order = order if shuffled else torch.arange(full)
            half = [experts[e] for e in range(4)]
            put_experts(moe.experts, stacked([*half, *(permuted(of, rows, order) for of in half)]))
        made[shuffled] = tmp_path_factory.mktemp("twins")
        model.save_pretrained(made[shuffled])
    return made


@pytest.mark.parametrize("recipe", CLUSTERING)
def test_merging_experts_that_are_one_loses_nothing_with_aliases(recipe, twins, tmp_path):
    folder, batches = twins[recipe in ALIGNED], tiny.tokens(2)
    streamed, part = tiny.stream(folder), load_recipe(recipe).merge
    plan = tiny.plan(streamed, lambda i, e: Keep() if e < 4 else Merge(e - 4))
    weights = {i: tuple(range(1, 9)) for i in plan.layers}
    plan = replace(plan, merge=Merges(part.as_dict(), "alias", weights))
    done, was = tiny.write(streamed, plan, tmp_path, batches), tiny.load(folder)
    for batch, hidden in zip(batches, done.last, strict=True):
        with torch.no_grad():
            now = streamed.logits(hidden, batch)
        torch.testing.assert_close(now, tiny.logits(was, batch), rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("recipe", ["hc_smoe", "sub_moe"])
def test_experts_of_one_output_are_found(recipe, twins):
    streamed, made = tiny.stream(twins[True]), load_recipe(recipe)
    sums = dict(collect(streamed, tiny.tokens(), made.counted()))
    plan = decide(made, Ask(drop=0.5), sums, take_inventory(streamed))
    for fates in plan.layers.values():
        assert all(fates[f.into] == Keep() and (f.into - e) % 4 == 0
                   for e, f in enumerate(fates) if isinstance(f, Merge))  # fmt: skip


def written(
    recipe: Any, name: str, folder: Any, out: Any, found: Any, ask: Ask
) -> tuple[Any, Plan]:
    """What came of it, and the plan."""
    streamed, (sums, inventory) = tiny.stream(folder), found
    plan = replace(decide(recipe, ask, sums, inventory), digest=streamed.checkpoint.digest)
    assert Plan.loads(plan.dumps()) == plan
    batches = tiny.tokens(2)
    done = tiny.write(streamed, plan, out, batches)
    assert Checkpoint.open(out).size_bytes == price(inventory, plan)
    model = tiny.load(out)
    for batch, hidden in zip(batches, done.last, strict=True):
        with torch.no_grad():
            want = streamed.logits(hidden, batch)
        torch.testing.assert_close(tiny.logits(model, batch), want, rtol=1e-4, atol=5e-5)
    return done, plan


@pytest.mark.parametrize("recipe", ["uncurl", "mergemoe", "dern"])
def test_what_is_left_is_a_stock_checkpoint(recipe, checkpoint, tmp_path, counted):
    written(
        even(recipe), "qwen3_moe", checkpoint("qwen3_moe"), tmp_path, counted("qwen3_moe"), Ask()
    )
    config = Checkpoint.open(tmp_path).config
    assert config["model_type"] == "qwen3_moe"
    assert {config[k] for k in load_family("qwen3_moe").count_keys if k in config} == {6}


@pytest.mark.parametrize("ask", [Ask(drop=0.5), Ask(drop=0.5, bits=4)])
def test_aliases_load_with_one_copy_of_the_weights(ask, checkpoint, tmp_path, counted):
    recipe = even("hc_smoe", **{"merge.router": "alias"})
    folder = checkpoint("deepseek_v3")
    _, plan = written(recipe, "deepseek_v3", folder, tmp_path, counted("deepseek_v3"), ask)
    config = Checkpoint.open(tmp_path).config
    assert config["quantization_config"]["aliased"] == {str(i): 8 for i in plan.layers}
    packed = tiny.load(tmp_path).model.layers[1].mlp
    assert packed.experts.num_experts == 4 and len(packed.gate.weight) == 8


@pytest.mark.slow
@tiny.every_family
@pytest.mark.parametrize("recipe", RECIPES)
def test_every_family_is_merged_and_opens(recipe, name, checkpoint, tmp_path, counted):
    for at, changes in enumerate(({}, {"merge.router": "alias"}, {"refit": True})):
        if at != 1 or recipe != "dern":
            written(even(recipe, **changes), name, checkpoint(name), tmp_path / str(at),
                    counted(name), Ask(drop=0.5))  # fmt: skip


def test_layers_of_m_smoe_keep_different_numbers(counted):
    sums, inventory = counted("qwen3_moe")
    sums = {i: {**of, "count": of["count"] ** (i + 1)} for i, of in sums.items()}
    plan = decide(load_recipe("m_smoe"), Ask(drop=0.5), sums, inventory)
    left = [sum(f == Keep() for f in fates) for fates in plan.layers.values()]
    assert sum(left) == 12 and len(set(left)) > 1


def test_a_row_is_the_mean_where_it_is_to_be(checkpoint, tmp_path):
    for router in ("rows", "mean"):
        streamed = tiny.stream(checkpoint("gpt_oss"))
        plan = tiny.plan(streamed, lambda i, e: Merge(2) if e in (0, 5) else Keep())
        weights = {i: (1.0, 0, 2, 0, 0, 5, 0, 0) for i in plan.layers}
        tiny.write(
            streamed,
            replace(plan, merge=Merges({"method": "hc_smoe"}, router, weights)),
            tmp_path / router,
            tiny.tokens(),
        )
    was, rows, mean = (
        tiny.load(f).model.layers[0].mlp.router
        for f in (checkpoint("gpt_oss"), tmp_path / "rows", tmp_path / "mean")
    )
    for name in ("weight", "bias"):
        before, cut, made = (getattr(m, name).data for m in (was, rows, mean))
        assert torch.equal(cut, before[[1, 2, 3, 4, 6, 7]])
        want = (before[0] + 2 * before[2] + 5 * before[5]) / 8
        torch.testing.assert_close(made[1], want)
        assert torch.equal(made[[0, 2, 3, 4, 5]], before[[1, 3, 4, 6, 7]])


# fitting


def narrow(plan: Plan, streamed: Any) -> Plan:
    """Each expert keeps other channels."""
    full = experts_of(streamed.moe(0).experts).down.shape[2]
    order = {i: torch.arange(full).flip(0).int().expand(8, full) for i in plan.layers}
    layers = {i: tuple(Keep(channels=full // (2 + e % 2)) for e in range(8)) for i in plan.layers}
    return replace(plan, layers=layers, order=order, channels="there")


@pytest.mark.parametrize("how", ["drop", "rows", "alias", "all in one", "narrow"])
def test_refitting_never_raises_the_blocks_error(how, checkpoint):
    errors = []
    for refit in (False, True):
        streamed, batches = tiny.stream(checkpoint("gpt_oss")), tiny.tokens(4)
        plan = tiny.plan(streamed, lambda i, e: Keep() if e < 5 else Merge(e - 5))
        if how == "drop":
            plan = tiny.plan(streamed, lambda i, e: Keep() if e < 5 else Drop())
        if how == "narrow":
            plan = narrow(plan, streamed)
        if how == "all in one":  # which a token picks as often as it picks
            plan = tiny.plan(streamed, lambda i, e: Merge(0) if e else Keep())
        weights = {i: tuple(range(8)) for i in plan.layers}
        if how in ("rows", "alias", "all in one"):
            router = "rows" if how == "rows" else "alias"
            plan = replace(plan, merge=Merges({"method": "hc_smoe"}, router, weights))
        step, moe = next(walk(streamed, batches)), streamed.moe(0)
        want = Hearing(streamed, moe, step, None).heard.routed
        ragged = take_away(streamed, replace(plan, refit=refit), moe, step, None)
        got = Hearing(streamed, moe, step, None).heard.routed
        errors.append(float(sum((a - b).square().sum() for a, b in zip(got, want, strict=True))))
        if how == "narrow":
            experts = experts_of(moe.experts)
            for e, of in enumerate(ragged):
                kept = experts.down[e][:, -of.down.shape[1] :]
                assert (
                    torch.equal(kept, of.down)
                    and experts.down[e].count_nonzero() <= of.down.numel()
                )
    assert 0 < errors[1] < 0.97 * errors[0]


def test_experts_that_nothing_was_taken_from_are_not_fitted(checkpoint, tmp_path):
    streamed = tiny.stream(checkpoint("mixtral"))
    plan = replace(tiny.plan(streamed, lambda i, e: Keep()), refit=True)
    tiny.write(streamed, plan, tmp_path, tiny.tokens())
    was, now = tiny.load(checkpoint("mixtral")).state_dict(), tiny.load(tmp_path).state_dict()
    assert all(torch.equal(was[n], now[n]) for n in was)


# refusals


@pytest.mark.parametrize(
    ("fate", "merges", "said"),
    [
        (Merge(4), Merges({"method": "hc_smoe"}, "rows", {}), "has 0 weights, wanted 8"),
        (Merge(1), None, "goes into 1, which does not stay"),
        (Merge(9), None, "goes into 9, which does not stay"),
        (Drop(), Merges({"method": "dern"}, "alias", {i: (1,) * 8 for i in range(3)}), "wanted rows"),
        (Drop(), Merges({"method": "hc_smoe"}, "rows", {i: (1,) * 8 for i in range(3)}), "no recombine"),
    ],
)  # fmt: skip
def test_a_plan_that_cannot_be_is_refused(fate, merges, said, checkpoint, tmp_path):
    streamed = tiny.stream(checkpoint("qwen3_moe"))
    plan = tiny.plan(streamed, lambda i, e: fate if e in (0, 1) else Keep())
    with pytest.raises(PlanError, match=said):
        tiny.write(streamed, replace(plan, merge=merges), tmp_path, [])


@pytest.mark.parametrize(
    ("was", "now", "said"),
    [
        ("router: rows", "router: lots", "router rows, mean, alias"),
        ("0: 1.0 2.0", "0: 1.0 -2.0", "weights, wanted numbers from 0 up"),
        ("0: 1.0 2.0", "0: 1.0 much", "merge wants how, router and weights"),
        ("refit: true", "refit: perhaps", "wanted true or false"),
        ("merge 0", "merge all", "drop, or merge 3"),
    ],
)
def test_merges_that_cannot_be_read_are_refused(was, now, said):
    merges = Merges({"method": "hc_smoe"}, "rows", {0: (1.0, 2.0)})
    plan = Plan("m", "d", {0: (Keep(), Merge(0))}, merge=merges, refit=True)
    text = plan.dumps()
    assert Plan.loads(text) == plan and was in text
    with pytest.raises(PlanError, match=said):
        Plan.loads(text.replace(was, now))
    with pytest.raises(PlanError, match="it does not say how; wanted merge:"):
        Plan.loads(replace(plan, merge=None).dumps())


def test_recipes_that_merge_by_halves_are_refused(tmp_path):
    text = 'drop = 0.5\n[allocate]\nmethod = "uniform"\n[encode]\nmethod = "rtn"\n'
    score, cluster = '[score]\nmethod = "zcode"\n', '[cluster]\nmethod = "hc_smoe"\n'
    file = tmp_path / "own.toml"
    for more, said in (
        (score + cluster, r"there is no \[merge\]"),
        (cluster, "drop = 0.5, wanted a"),
        (score + '[merge]\nmethod = "hc_smoe"\n', "has no recombine; those that have are dern"),
        (score + cluster + '[merge]\nmethod = "hc_smoe"\nrouter = "none"\n', "one of rows, mean, alias"),
    ):  # fmt: skip
        file.write_text(text + more)
        with pytest.raises(RecipeError, match=said):
            load_recipe(file)


def test_a_norm_after_the_experts_cannot_be_refitted(checkpoint, tmp_path):
    streamed = tiny.stream(checkpoint("qwen3_moe"))
    plan = tiny.plan(streamed, lambda i, e: Drop() if e == 0 else Keep())
    moe = streamed.moe(0)
    moe.experts.has_post_expert_norm, moe.experts.post_expert_norm = True, torch.nn.Identity()
    with pytest.raises(PlanError, match="a norm follows"):
        tiny.write(streamed, replace(plan, refit=True), tmp_path, [])
    with listening(streamed.moe(1)):
        pass


# as users do it


@pytest.fixture(scope="module")
def place(checkpoint, tmp_path_factory) -> Path:
    """model/, text.txt and stats_ream/."""
    return calibrated(tmp_path_factory.mktemp("place"), checkpoint, ("ream",))


@few_tokens
def test_a_target_keeps_no_aliases_and_the_plan_says_how(place, tmp_path):
    own = ("--recipe", "ream", "--set", "merge.router=alias", "--set", "refit=true")
    for more, router in (((), "alias"), (("--target", "transformers"), "rows")):
        code, out, err = run("plan", place / "stats_ream", "-o", tmp_path / "p", *own, *more)
        assert code == 0 and "6 experts dropped, " in out, err
        plan = Plan.loads((tmp_path / "p").read_text())
        assert plan.refit and plan.merge.router == router and plan.aliased == (not more)
        merge = {"method": "ream", "most": 16, "components": 64, "router": router, "weigh": "score"}
        assert plan.made_by["merge"] == merge and plan.made_by["refit"]
    assert plan.made_by["for_target"] == {"merge.router": "rows"}


@few_tokens
def test_what_is_merged_is_written_and_weighs_what_was_foreseen(place, here):
    args = ("--recipe", "ream", "--set", "merge.router=alias", "--drop", "50%", "--bits", "4")
    run("plan", here / "stats_ream", "-o", here / "p", *args)
    text = ("--data", here / "text.txt", *SMALL)
    code, _, err = run("apply", place / "model", here / "p", "-o", here / "out", *text)
    assert code == 0, err
    meta = json.loads((here / "stats_ream" / "meta.json").read_text())
    inventory = Inventory.from_dict(meta["inventory"])
    size = price(inventory, Plan.loads((here / "p").read_text()))
    assert Checkpoint.open(here / "out").size_bytes == size
