"""Dropping experts: the specs' own figures, which experts go, and that what is left is the model."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import every
import pytest
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_cli import SMALL, calibrated, refused, run
from torch import Tensor

from moecule import verbs
from moecule.ask import Ask, decide, foresee, price
from moecule.budget import Inventory, LayerExperts, bytes_by_part
from moecule.calibrate import collect
from moecule.checkpoint import Checkpoint
from moecule.drop import Dropping, n_left, parse_share
from moecule.errors import CheckpointError, PlanError, RecipeError
from moecule.experts import Expert
from moecule.family import TOP_K_KEYS, load_family
from moecule.inventory import take_inventory
from moecule.method import Method, load_all
from moecule.methods import ean, easy_ep, premoe, reap, seer, unified, zcode
from moecule.moe import find_layers, find_moe, listening
from moecule.plan import Drop, Keep
from moecule.recipe import load_recipe, recipe_names
from moecule.stats import DROPPING, Routed, Seen, Statistic
from moecule.walk import walk

few_tokens = pytest.mark.filterwarnings("ignore:.*saw fewer than 32 tokens")
SCORING = {name: m for name, m in load_all().items() if m.score is not None}
RECIPES = [n for n in recipe_names() if (r := load_recipe(n)).score and not r.merge]

# four experts, two a token, three tokens: logits, the lengths of the outputs, the turns
LOGITS = torch.tensor([[2.0, 1, 0, -1], [0, 3, 1, -2], [1, 0.5, 1.5, -3]])
LENGTHS = torch.tensor([[1, 4, 2, 9], [3, 0.5, 8, 9], [2, 6, 1, 9]])
TURNS = torch.tensor([0.5, 0.1, 0.2])
PICKED = torch.tensor([[0, 1], [1, 2], [2, 0]])


def seen_of(e: int, coef: Tensor) -> Seen:
    """What expert e saw; its outputs have the lengths above."""
    t, k = torch.where(e == PICKED)
    out = torch.zeros(len(t), 2)
    out[:, 1] = LENGTHS[t, e]
    blank, ones = torch.zeros(len(t), 2), torch.ones(len(t))
    toy = Expert(torch.zeros(4, 2), torch.zeros(2, 2), lambda x: x[..., :2])
    return Seen(
        x=blank, coef=coef[t, k], prob=ones, ratio=ones, rank=torch.zeros(len(t)).long(), total=ones,
        act=blank, out=out, routed=blank, grad=None, turn=TURNS[t], top_k=2, renormalised=True,
        expert=toy,
    )  # fmt: skip


def sums_of(
    *, renormalised: bool, needs: tuple[Statistic, ...] = ()
) -> dict[int, dict[str, Tensor]]:
    """All that calibrating would count of the three tokens, by the statistics' own functions."""
    prob = LOGITS.softmax(-1)
    coef = prob.gather(1, PICKED)
    if renormalised:
        coef = coef / coef.sum(-1, keepdim=True)
    seens = [seen_of(e, coef) for e in range(4)]
    found = {}
    for s in dict.fromkeys((*DROPPING, *needs)):
        if s.of_router is not None:
            found[s.name] = s.of_router(Routed(LOGITS, prob, PICKED, coef))
        else:
            assert s.of is not None
            found[s.name] = torch.stack([s.of(seen).double() for seen in seens])
    return {0: found}


Scored = tuple[Any, Any, bool, list[float]]


def layer(n: int, top_k: int = 2, groups: int = 1, top_groups: int = 1) -> LayerExperts:
    """A layer of n experts."""
    return LayerExperts(n, (64, 64), (64, 32), 0, 0, 2, top_k, groups, top_groups)


def made_of(*layers: LayerExperts) -> Inventory:
    """A model of nothing else."""
    return Inventory(dict(enumerate(layers)), {}, 0, 0, 0, (), 128)


FIGURES: dict[str, Scored] = {
    "frequency": (zcode, zcode.Options(), True, [1 / 3, 1 / 3, 1 / 3, 0]),
    "SEER hard": (seer, seer.Options(count="hard"), True, [2, 2, 2, 0]),
    "SEER soft": (seer, seer.Options(), True, [0.991164, 1.261189, 0.704341, 0.043307]),
    "EAN": (ean, ean.Options(), True, [3, 4.5, 9, 0]),
    "MAN": (unified, unified.Options(), True, [1.5, 2.25, 4.5, 0]),
    "MSAN": (unified, unified.Options(gamma=2), True, [2.5, 8.125, 32.5, 0]),
    "REAP": (reap, reap.Options(), True, [0.743070, 0.758082, 0.788041, 0]),
    "REAP, plain softmax": (reap, reap.Options(), False, [0.627434, 0.683522, 0.706022, 0]),
    "weighted EAN": (
        unified,
        unified.Options(alpha=1, gamma=1, mean=False),
        True,
        [1.486140, 1.516164, 1.576083, 0],
    ),
    "EASY-EP": (easy_ep, easy_ep.Options(), True, [0.516546, 0.581923, 0.219854, 0]),
    "PEU": (premoe, premoe.Options(), True, [0, 1, 0, 0]),
    "TCESS": (premoe, premoe.Options("tcess"), True, [2, 3, 1.5, 0]),  # of three tokens
}


@pytest.mark.parametrize("case", FIGURES)
def test_scores_are_the_figures_worked_out_by_hand(case):
    method, options, renormalised, want = FIGURES[case]
    sums = sums_of(renormalised=renormalised, needs=method.METHOD.needs(options))
    got = method.score(sums, options)[0]
    torch.testing.assert_close(got, torch.tensor(want).double(), rtol=0, atol=6e-7)


def test_reap_and_easy_ep_drop_other_experts():
    sums, of = sums_of(renormalised=True), made_of(layer(4))
    found = [Dropping(m.score(sums, m.Options()), of).kept(0.5)[0] for m in (reap, easy_ep)]
    assert found == [(1, 2), (0, 1)]


def test_a_power_without_a_sum_is_refused():
    with pytest.raises(RecipeError, match="alpha 1 and gamma 2 have no sum; those that have"):
        load_recipe("man", {"score.alpha": 1, "score.gamma": 2}).needs()


def random_sums(method: Method, n: int, silent: int | None = None) -> dict[int, dict[str, Tensor]]:
    """Of two layers, as if calibrated; to `silent` no token was routed."""
    g, found = torch.Generator().manual_seed(0), {}
    for i in (0, 2):
        logits = torch.randn(200, n, generator=g)
        if silent is not None:
            logits[:, silent] = -9
        prob = logits.softmax(-1)
        coef, idx = prob.topk(2)
        seen = Routed(logits, prob, idx, coef)
        found[i] = {}
        for s in method.needs(method.options()):
            plain = torch.rand(n, generator=g).double() + 1
            plain[silent if silent is not None else []] = 0
            found[i][s.name] = plain if s.of_router is None else s.of_router(seen)
    return found


@pytest.mark.parametrize("name", SCORING)
def test_permuting_experts_permutes_their_scores(name):
    method = SCORING[name]
    sums, order = random_sums(method, 8), torch.randperm(8)
    moved = {i: {n: t[order] for n, t in of.items()} for i, of in sums.items()}
    plain, after = (method.score(s, method.options()) for s in (sums, moved))
    assert sorted(plain) == [0, 2]
    for i in plain:
        assert plain[i].shape == (8,)
        torch.testing.assert_close(after[i], plain[i][order], rtol=1e-14, atol=0)


@pytest.mark.parametrize("name", SCORING)
def test_an_expert_that_no_token_reached_goes_first(name):
    method = SCORING[name]
    sums = random_sums(method, 4, silent=1)
    scores = method.score(sums, method.options())[0]
    assert torch.isfinite(scores).all() and scores.argmin() == 1


def test_lots_differ_by_seed_and_layer_and_are_the_same_again():
    sums = {i: {"count": torch.ones(16).double()} for i in range(2)}
    draws = [zcode.score(sums, zcode.Options(by="random", seed=s)) for s in (0, 0, 1)]
    assert torch.equal(draws[0][0], draws[1][0]) and torch.equal(draws[0][1], draws[1][1])
    assert not torch.equal(draws[0][0], draws[2][0])
    assert not torch.equal(draws[0][0], draws[0][1])


# how many go, and which


@pytest.mark.parametrize(
    ("text", "share"), [("25%", 0.25), (" 12.5 % ", 0.125), ("0.3", 0.3), (0.5, 0.5), (0, 0.0)]
)
def test_a_share_is_read_as_it_is_written(text, share):
    assert parse_share(text) == share


@pytest.mark.parametrize("text", ["25", "100%", "-1%", "a quarter", "", "1", "nan", "2 experts"])
def test_what_is_no_share_is_refused(text):
    with pytest.raises(RecipeError, match="wanted a share of the experts, like 25%"):
        Ask(drop=text)


def scores(*rows: list[float]) -> dict[int, Tensor]:
    """By layer."""
    return {i: torch.tensor(row).double() for i, row in enumerate(rows)}


def test_every_layer_loses_as_many_and_ties_keep_the_lower_number():
    of = made_of(layer(4), layer(4))
    kept = Dropping(scores([1, 1, 1, 1], [3, 1, 2, 1]), of).kept(0.5)
    assert kept == {0: (0, 1), 1: (0, 2)}


def test_a_model_loses_the_worst_of_all_layers_down_to_what_routers_pick():
    of = made_of(layer(4), layer(4))
    rows = scores([1, 2, 3, 4], [10, 20, 30, 40])
    assert Dropping(rows, of, "model").kept(0.25) == {0: (2, 3), 1: (0, 1, 2, 3)}
    assert Dropping(rows, of, "model").kept(0.375) == {0: (2, 3), 1: (1, 2, 3)}
    assert Dropping(rows, of, "model").kept(0.5) == {0: (2, 3), 1: (2, 3)}


def test_every_group_of_a_router_keeps_as_many():
    of = made_of(layer(8, 2, groups=2, top_groups=1))
    kept = Dropping(scores([8, 7, 6, 5, 4, 3, 2, 1]), of).kept(0.5)
    assert kept == {0: (0, 1, 4, 5)}


@given(st.integers(1, 64), st.integers(1, 4), st.floats(0, 0.99))
def test_no_more_go_than_were_asked(each, groups, share):
    e = layer(each * groups, 1, groups, 1)
    gone = e.n - n_left(e, share)
    assert gone % groups == 0 and gone <= share * e.n + 1e-6 < gone + groups + 1e-6


@given(st.lists(st.floats(0, 1), min_size=16, max_size=16), st.sampled_from(["layer", "model"]))
def test_what_goes_is_worth_no_more_than_what_stays(values, spread):
    of = made_of(layer(8), layer(8))
    rows = scores(values[:8], values[8:])
    kept = Dropping(rows, of, spread).kept(0.5)
    assert sum(map(len, kept.values())) == 8
    for i, ids in kept.items():
        assert len(ids) >= 2 and sorted(ids) == list(ids)
        gone = set(range(8)) - set(ids)
        assert not gone or max(rows[i][e] for e in gone) <= min(rows[i][e] for e in ids)


REAP = load_recipe("reap")
WIDE = load_recipe("zcode", {"score.budget": "model"})
GROUPED = layer(16, 4, groups=4, top_groups=2)  # 2 of each group are needed


@pytest.mark.parametrize(
    ("recipe", "of", "ask", "said"),
    [
        (REAP, layer(8), Ask(drop="10%"), "which of 8 experts is not one; the least is 0.125"),
        (REAP, layer(8), Ask(drop="87.5%"), "leaves 1 of 8 in a layer, and the router picks 2 a"),
        (REAP, layer(8), Ask(drop="87.5%"), r"the most is 0.75, or let it pick 1 \(--clamp\)"),
        (REAP, layer(8), Ask(drop=0.9999999999, clamp=True), "one must stay; the most is 0.875"),
        (REAP, layer(9), Ask(drop="11.11%"), "which of 9 experts is not one; the least is 0.1112"),
        (REAP, GROUPED, Ask(drop="20%"), "4 experts in each of 4 groups is not one; the least is"),
        (REAP, GROUPED, Ask(drop="75%"), "groups 2 must stay; the most is 0.5"),
        (REAP, layer(16, 6, 4, 2), Ask(drop="50%"), "6 a token from 2 of 4 groups; the most is"),
        (WIDE, layer(8), Ask(drop="90%"), "of 16 experts 1 to 12 can go, for a layer keeps the 2"),
        (WIDE, layer(8), Ask(drop="1%"), "of 16 experts 1 to 12 can go"),
        (WIDE, GROUPED, Ask(drop="25%"), "must keep as many each; set score.budget=layer"),
        (load_recipe("mc"), layer(8), Ask(drop="25%"), "mc does not say which experts to drop; .*"),
        (REAP, layer(8), Ask(drop="25%", bits=9), "9 bits were asked for"),
        (REAP, layer(8), Ask(size=1), "size 1 cannot be met; the least that recipe reap takes is"),
    ],
)
def test_what_cannot_be_dropped_is_refused_in_a_line(recipe, of, ask, said):
    with pytest.raises(RecipeError, match=said) as raised:
        ask.check(recipe, made_of(of, of))
    assert "\n" not in str(raised.value)


def test_the_recipes_that_drop_are_named_where_one_does_not():
    with pytest.raises(RecipeError) as raised:
        Ask(drop=0.25).check(load_recipe("mc"), made_of(layer(8)))
    assert all(name in str(raised.value) for name in RECIPES)


def test_routers_pick_fewer_only_where_asked():
    of = made_of(layer(8))
    assert foresee(REAP, Ask(drop="75%", clamp=True), of).top_k is None
    assert foresee(REAP, Ask(drop="87.5%", clamp=True), of).top_k == 1
    grouped = made_of(layer(16, 6, 4, 2))
    assert foresee(REAP, Ask(drop="50%", clamp=True), grouped).top_k == 4


def test_to_drop_nothing_leaves_everything():
    of = made_of(layer(8))
    assert foresee(REAP, Ask(drop=0), of).layers == of.untouched().layers


@pytest.mark.parametrize("recipe", [REAP, WIDE])
def test_a_size_is_met_by_dropping_as_few_as_will_do(recipe):
    of = made_of(layer(8), layer(8))
    spread = getattr(recipe.score.options, "budget", "layer")
    found = [foresee(recipe, Ask(drop=s), of) for s in Dropping({}, of, spread).shares()]
    sizes = [price(of, plan) for plan in found]
    assert sizes == sorted(sizes, reverse=True) and len(set(sizes)) == len(sizes)
    for i, size in enumerate(sizes):
        assert price(of, foresee(recipe, Ask(size=size), of)) == size
        if i:
            assert price(of, foresee(recipe, Ask(size=size + 1), of)) == size


def test_a_size_beside_a_share_is_met_by_rounding_those_that_stay():
    of = made_of(layer(8), layer(8))
    dropped = foresee(REAP, Ask(drop="25%"), of)
    assert foresee(REAP, Ask(drop="25%", size=price(of, dropped)), of).layers == dropped.layers
    less = foresee(REAP, Ask(drop="25%", size=price(of, dropped) - 1), of)
    kinds = {f for fates in less.layers.values() for f in fates}
    assert kinds == {Drop(), Keep(8, 64)} and less.dropped == dropped.dropped


# through the model


@tiny.every_family
def test_the_stream_that_experts_turn_is_what_their_block_adds_to(name, checkpoint):
    streamed = tiny.stream(checkpoint(name))
    for step in walk(streamed, tiny.tokens(2)):
        moe = streamed.moe(step.index)
        if moe is None:
            continue
        added: list[Tensor] = []
        handle = moe.block.register_forward_hook(
            lambda m, args, out, to=added: to.append(out[0] if isinstance(out, tuple) else out)
        )
        with listening(moe, turned=True) as heard:
            outs = [out for _, out in step.passes()]
        handle.remove()
        for out, block, routed, turn in zip(outs, added, heard.routed, heard.turn, strict=True):
            before = (out - block).flatten(0, 1).double()
            want = 1 - torch.cosine_similarity(before, before + routed.double())
            assert want.max() > 1e-3
            torch.testing.assert_close(turn.double(), want, rtol=1e-3, atol=1e-5)


def test_a_family_whose_experts_live_in_another_width_says_so(checkpoint):
    if "muse_spark" not in every.known():
        pytest.skip("this transformers does not know muse_spark")
    streamed = tiny.stream(checkpoint("muse_spark"))
    with pytest.raises(CheckpointError, match="residual stream before its experts is not found"):
        list(collect(streamed, tiny.tokens(), easy_ep.METHOD.needs(None)))


@tiny.every_family
def test_every_token_counts_for_as_many_experts_as_the_router_picks(name, checkpoint):
    streamed, batches = tiny.stream(checkpoint(name)), tiny.tokens(2)
    n = sum(b.numel() for b in batches)
    for i, sums in collect(streamed, batches, DROPPING):
        moe = streamed.moe(i)
        assert sums["count"].sum() == n * moe.top_k
        if streamed.family.scores == "softmax":
            torch.testing.assert_close(sums["soft"].sum(), torch.tensor(float(n)).double())
        # of two numbers the mean of the squares is no less than the square of the mean
        for plain, squared in (
            ("coef", "coef_sq"),
            ("norm", "norm_sq"),
            ("coef_norm", "coef_norm_sq"),
        ):
            assert (sums[plain] ** 2 <= sums["count"] * sums[squared] * (1 + 1e-9)).all()
        assert (sums["turn_coef_norm"] <= 2 * sums["coef_norm"]).all()


@pytest.mark.parametrize("name", ["qwen3_moe", "deepseek_v3", "gpt_oss"])
def test_permuting_a_models_experts_permutes_what_is_dropped(name, checkpoint, tmp_path):
    # within the halves, which are the groups where there are any
    order = [2, 0, 3, 1, 5, 7, 4, 6]
    tiny.permuted(checkpoint(name), order, tmp_path)
    batches, plans = tiny.tokens(4), []
    needs = tuple(dict.fromkeys(n for r in SUMMED for n in load_recipe(r).needs()))
    for folder in (checkpoint(name), tmp_path):
        streamed = tiny.stream(folder)
        inventory, sums = take_inventory(streamed), dict(collect(streamed, batches, needs))
        plans.append({r: decide(load_recipe(r), Ask(drop=0.5), sums, inventory) for r in SUMMED})
    for r in SUMMED:
        before, after = (p[r].layers for p in plans)
        assert before != after
        assert {i: tuple(fates[e] for e in order) for i, fates in before.items()} == after


def test_ranks_that_are_no_longer_picked_have_no_threshold(checkpoint):
    recipe = replace(load_recipe("reap"), skip=load_recipe("mc").skip)
    streamed = tiny.stream(checkpoint("qwen3_moe"))
    sums = dict(collect(streamed, tiny.tokens(4), recipe.needs()))
    inventory = take_inventory(streamed)
    for share, ranks in (("50%", 1), ("87.5%", 0)):
        plan = decide(recipe, Ask(drop=share, clamp=True), sums, inventory)
        assert plan.skip.thresholds and all(len(t) == ranks for t in plan.skip.thresholds.values())


SUMMED = [
    r for r in RECIPES if r not in ("zcode_random", "reap_mc")
]  # not by lot; not by gradients


@tiny.every_family
@pytest.mark.parametrize("keep", [Keep(), Keep(8, 16)])
def test_a_router_that_picks_fewer_does_so_in_the_file_too(name, keep, tmp_path):
    known = every.config(name).get_text_config().to_dict()
    changes = {key: 4 for key in TOP_K_KEYS if key in known or key in every.BASE}
    source, out, batches = tmp_path / "source", tmp_path / "out", tiny.tokens(2)
    tiny.save(name, source, **changes)
    streamed = tiny.stream(source)
    groups = streamed.family.n_groups(streamed.model.config.get_text_config())
    left = 4 // groups if groups > 1 else 3
    plan = tiny.plan(streamed, lambda i, e: keep if e % (8 // groups) < left else Drop())
    with pytest.raises(PlanError, match="give the plan a smaller top_k"):
        tiny.write(streamed, plan, out, batches)
    picked = left if groups == 1 else 2
    done = tiny.write(streamed, replace(plan, top_k=picked), out, batches)
    assert Checkpoint.open(out).config["model_type"] == (name if keep == Keep() else "moecule")
    model = tiny.load(out)
    for batch, hidden in zip(batches, done.last, strict=True):
        with torch.no_grad():
            want = streamed.logits(hidden, batch)
        torch.testing.assert_close(tiny.logits(model, batch), want, rtol=1e-4, atol=5e-5)
    moes = [m for one in find_layers(model)[1] if (m := find_moe(one, streamed.family))]
    assert {m.top_k for m in moes} == {picked}


@pytest.mark.parametrize("top_k", [0, 3, True, "two"])
def test_a_number_of_experts_that_no_router_picks_is_refused(top_k, checkpoint, tmp_path):
    streamed = tiny.stream(checkpoint("qwen3_moe"))
    plan = tiny.plan(streamed, lambda i, e: Keep())
    with pytest.raises(PlanError, match="top_k has"):
        text = replace(plan, top_k=9).dumps().replace("top_k: 9", f"top_k: {json.dumps(top_k)}")
        tiny.write(streamed, replace(plan, top_k=type(plan).loads(text).top_k), tmp_path, [])


# as users do it

OWN_SUMS = ("reap_mc", "premoe", "premoe_tcess")


@pytest.fixture(scope="module")
def place(checkpoint, tmp_path_factory) -> Path:
    """model/, text.txt and stats/: one for every recipe that drops, but those with sums of their own."""
    return calibrated(tmp_path_factory.mktemp("place"), checkpoint, ("reap", *OWN_SUMS))


@pytest.mark.parametrize("recipe", RECIPES)
@few_tokens
def test_one_pass_serves_every_recipe_that_drops(recipe, place, tmp_path):
    stats = place / f"stats_{recipe if recipe in OWN_SUMS else 'reap'}"
    code, out, err = run("plan", stats, "-o", tmp_path / "p", "--recipe", recipe, "--drop", "25%")
    assert code == 0 and "6 experts dropped, " in out, err
    plan = verbs.read_plan(tmp_path / "p")
    assert plan.made_by["budget"].startswith("drop 25%, ")
    for fates in plan.layers.values():
        assert fates.count(Drop()) == 2
        assert recipe == "reap_mc" or set(fates) == {Drop(), Keep()}


@pytest.mark.parametrize(("ask", "stock"), [(Ask(drop="50%"), True), (Ask(bits=2), False)])
def test_what_is_left_loads_and_weighs_what_was_foreseen(ask, stock, place, here):
    stats = place / "stats_reap"
    with pytest.warns(UserWarning, match="of the experts that stay saw fewer than 32 tokens"):
        plan = verbs.plan(stats, here / "p", recipe="reap", ask=ask)
    text = ("--data", place / "text.txt", *SMALL)
    code, _, err = run("apply", place / "model", here / "p", "-o", here / "out", *text)
    assert code == 0, err
    checkpoint = Checkpoint.open(here / "out")
    assert checkpoint.config["model_type"] == ("qwen3_moe" if stock else "moecule")
    meta = json.loads((stats / "meta.json").read_text())
    inventory = Inventory.from_dict(meta["inventory"])
    assert checkpoint.size_bytes == sum(bytes_by_part(inventory, plan).values())
    (batch,) = tiny.tokens()
    assert torch.isfinite(tiny.logits(tiny.load(here / "out"), batch)).all()


@few_tokens
def test_compress_drops_and_measures(place, here):
    text = ("--data", place / "text.txt", "--text", place / "text.txt", *SMALL)
    args = ("--recipe", "reap", "--drop", "87.5%")
    said = refused(here, "compress", place / "model", "-o", here / "out", *args, *text)
    assert "the router picks 2 a token" in said and said.endswith("(--clamp)")
    args = (*args, "--clamp", "--json")
    code, out, err = run("compress", place / "model", "-o", here / "out", *args, *text)
    assert code == 0, err
    assert json.loads(out)["nominal_bits"] == 16
    config = json.loads((here / "out" / "config.json").read_text())
    assert (config["model_type"], config["num_experts_per_tok"]) == ("qwen3_moe", 1)
    assert {config[key] for key in load_family("qwen3_moe").count_keys if key in config} == {1}
    assert "top_k: 1\n" in (here / "out" / "plan.yaml").read_text()


def test_inspect_foresees_what_dropping_makes(place):
    args = ("inspect", place / "model", "--recipe", "reap", "--no-time", "--json")
    found = {s: json.loads(run(*args, "--drop", s)[1]) for s in ("0%", "50%")}
    whole, half = (found[s]["budget"] for s in ("0%", "50%"))
    assert whole["size_bytes"] == found["0%"]["size_bytes"]
    assert half["nominal_bits"] == 8 and half["asked"] == "drop 50%, 16 bits"
    assert half["size_bytes"] < whole["size_bytes"]
    assert found["50%"]["sizes_by_bits"]["4"] < found["0%"]["sizes_by_bits"]["4"]


def test_statistics_without_what_a_recipe_reads_are_refused(place, tmp_path):
    said = refused(tmp_path, "plan", place / "stats_reap", "-o", tmp_path / "p")
    assert "which recipe mc reads; calibrate again with --recipe mc" in said
    args = ("plan", place / "stats_reap", "-o", tmp_path / "p", "--recipe", "mc", "--drop", "25%")
    assert "recipe mc does not say which experts to drop" in refused(tmp_path, *args)
