"""Expert load: placements and cache policies worked by hand, and what a model's own routers pick."""

from __future__ import annotations

import json
import re
from functools import cache

import pytest
import tiny
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st
from test_cli import SMALL, TEXT, refused, run

import moecule
from moecule.data import Sampling
from moecule.errors import DataError, RecipeError
from moecule.hits import POLICIES, Hits, recall, simulate
from moecule.load import parse_cache, room, tables, unseen, window_of
from moecule.moe import find_layers, find_moe
from moecule.placement import Placement, for_engine, in_order, place
from moecule.recipe import load_recipe
from moecule.routes import Routes, routes
from moecule.session import Compute

CPU = Compute(device="cpu")
FEW = Sampling(samples=4, length=32)


def one_each(experts: str) -> list[list[int]]:
    """The uses of tokens that need one expert each."""
    return [[int(e)] for e in experts]


def test_a_hot_expert_is_held_twice_and_the_rest_is_shared_out():
    placed = place([6, 2, 2, 2], gpus=2, replicas=1)
    # copies: 0 twice (6, then 3 each), then 1 (the first of three with 2 each): 3 + 2 + 1 on either GPU
    assert placed.by_gpu == [(0, 2, 1), (0, 3, 1)]
    assert placed.balance([6, 2, 2, 2]) == 1.0
    assert in_order(4, 2).balance([6, 2, 2, 2]) == 8 / 6


def test_without_replicas_experts_are_packed_by_load():
    placed = place([8, 7, 2, 1], gpus=2, replicas=0)
    assert placed.by_gpu == [(0, 3), (1, 2)] and placed.balance([8, 7, 2, 1]) == 1.0


def test_swaps_mend_what_packing_leaves_uneven():
    # the heaviest first to whoever has least: 8+5+5 and 7+6+4; then 8 for 7 is no better, 5 for 4 is worse
    assert place([8, 7, 6, 5, 5, 4], gpus=2, replicas=0).balance([8, 7, 6, 5, 5, 4]) == 18 / 17.5
    # 5+3+3 and 4+4+2 come out as 11 and 10; no swap of whole numbers can make that even
    assert place([5, 4, 4, 3, 3, 2], gpus=2, replicas=0).balance([5, 4, 4, 3, 3, 2]) == 11 / 10.5


def test_an_expert_that_nobody_used_is_held_all_the_same():
    placed = place([0, 0, 0], gpus=2, replicas=0)
    assert sorted({*placed.experts}) == [0, 1, 2] and placed.balance([0, 0, 0]) == 1.0


@given(st.lists(st.integers(0, 50), min_size=1, max_size=9), st.integers(1, 6), st.integers(0, 4))
def test_every_placement_holds_every_expert_and_none_twice_on_a_gpu(load, gpus, replicas):
    slots = -(-len(load) // gpus) + replicas
    if slots > len(load):
        with pytest.raises(RecipeError, match="or fewer"):
            place(load, gpus, replicas)
        return
    placed = place(load, gpus, replicas)
    assert {*placed.experts} == {*range(len(load))}
    assert all(len({*of}) == len(of) == slots for of in placed.by_gpu)
    assert 1 - 1e-9 <= placed.balance(load) <= gpus + 1e-9


@pytest.mark.parametrize(
    ("policy", "experts", "want"),
    [
        ("lru", "00120", Hits(5, 1, 4)),  # 2 comes where 0 was used longest ago
        ("lfu", "00120", Hits(5, 2, 3)),  # 2 comes where 1 was used least often
        ("lru", "001212", Hits(6, 3, 3)),
        ("lfu", "001212", Hits(6, 1, 5)),  # 1 and 2 drive each other out: 0 was used more
        ("optimal", "00120", Hits(5, 2, 3)),
        ("optimal", "001212", Hits(6, 3, 3)),
        ("optimal", "01201", Hits(5, 1, 4)),  # 2 comes where 1 is needed later than 0
        ("lru", "01201", Hits(5, 0, 5)),
    ],
)
def test_a_cache_of_two_by_hand(policy, experts, want):
    assert simulate(policy, one_each(experts), 2) == want


def test_what_a_token_needs_does_not_leave_for_what_it_needs_too():
    uses = [[0, 1], [2, 0], [0, 1], [3, 0]]  # 0 is there three times, and all else is brought in
    assert {simulate(p, uses, 2) for p in POLICIES} == {Hits(8, 3, 5)}


def test_guesses_come_before_the_token():
    uses, guesses = one_each("010"), one_each("000")
    # 0 is guessed; it is guessed, there, and leaves for 1; it is guessed again
    assert simulate("next_gate", uses, 1, guesses) == Hits(3, 2, 3)
    assert simulate("lru", uses, 1, guesses) == Hits(3, 0, 3)
    assert recall(uses, guesses) == 2 / 3


def fewest_loads(uses: list[list[int]], size: int) -> int:
    """By trying all ways."""

    @cache
    def after(t: int, held: frozenset[int]) -> int:
        if t == len(uses):
            return 0
        there = held | {*uses[t]}
        ways = [there]
        while any(len(w) > size for w in ways):
            ways = [w - {e} for w in ways for e in w if e not in uses[t]]
        return len({*uses[t]} - held) + min(after(t + 1, w) for w in {*ways})

    return after(0, frozenset())


tokens = st.lists(st.integers(0, 4), min_size=2, max_size=2, unique=True)


@given(st.lists(tokens, max_size=6), st.integers(2, 4))
def test_no_policy_beats_the_best_of_all_ways(uses, size):
    best = simulate("optimal", uses, size)
    assert best.loads == fewest_loads(uses, size)
    for policy in POLICIES:
        found = simulate(policy, uses, size)
        assert found.uses == 2 * len(uses) == found.hits + found.loads
        assert found.hits <= best.hits


def test_right_guesses_leave_no_misses():
    uses = [[0, 1], [2, 3], [0, 4]]
    assert simulate("next_gate", uses, 2, uses) == Hits(6, 6, 6)


@pytest.mark.parametrize("name", ["qwen3_moe", "deepseek_v3", "mixtral"])
def test_routes_are_those_of_the_whole_model(checkpoint, name):
    """And a guess is what a layer's router makes of what the one before was given."""
    folder, batches = checkpoint(name), tiny.tokens(2)
    streamed = tiny.stream(folder)
    heard = routes(streamed, batches)
    model = tiny.load(folder)
    moes = {i: find_moe(x, streamed.family) for i, x in enumerate(find_layers(model)[1])}
    moes = {i: moe for i, moe in moes.items() if moe is not None}
    assert sorted(heard) == sorted(moes)
    given, picked = ({i: [] for i in moes} for _ in range(2))
    for i, moe in moes.items():
        moe.router.register_forward_pre_hook(lambda m, a, i=i: given[i].append(a[0]))
        moe.experts.register_forward_pre_hook(lambda m, a, i=i: picked[i].append(a[1]))
    for batch in batches:
        tiny.logits(model, batch)
    seen, before = {i: tuple(of) for i, of in given.items()}, None
    for i, moe in moes.items():
        assert torch.equal(heard[i].idx, torch.cat(picked[i]).int())
        assert heard[i].n == 8
        if before is None:
            assert heard[i].guess is None
        else:
            with torch.no_grad():
                scores = torch.cat([moe.router(x)[0].flatten(0, -2) for x in seen[before]])
            if name != "deepseek_v3":  # which picks by groups, and a bias of its own
                want = scores.topk(2).indices.sort().values.int()
                assert torch.equal(heard[i].guess.sort().values, want)
            assert heard[i].guess.shape == heard[i].idx.shape
            assert not torch.equal(heard[i].guess, heard[i].idx)
        before = i


def test_the_balance_on_unseen_text_is_of_the_other_windows():
    batches = [torch.zeros(2, 3, dtype=torch.long), torch.zeros(1, 2, dtype=torch.long)]
    window = window_of(batches)
    assert window.tolist() == [0, 0, 0, 1, 1, 1, 2, 2]
    # even windows use 0 and 1, odd ones 2 and 3: packed for one, all of the other may be on one GPU
    idx = torch.tensor([0, 1, 0, 2, 3, 2, 1, 0]).int()[:, None]
    found = unseen(Routes(4, idx, None), window, gpus=2, replicas=0)
    plans = place([3, 2, 0, 0], 2, 0), place([0, 0, 2, 1], 2, 0)
    assert found == (plans[0].balance([0, 0, 2, 1]) + plans[1].balance([3, 2, 0, 0])) / 2
    assert unseen(Routes(4, idx[:3], None), window[:3], 2, 0) is None


def test_engines_get_the_files_they_take():
    placed = {1: Placement(2, (0, 1, 2, 0)), 2: Placement(2, (2, 1, 0, 1))}
    assert json.loads(for_engine("sglang", placed, 3)) == {
        "physical_to_logical_map": [[0, 1, 2, 0], [0, 1, 2, 0], [2, 1, 0, 1]]
    }
    assert yaml.safe_load(for_engine("tensorrt-llm", placed, 3)) == {
        "num_slots": 4,
        "initial_global_assignments": {1: [0, 1, 2, 0], 2: [2, 1, 0, 1]},
        "layer_updates_per_iter": 0,
    }
    found = json.loads(for_engine("vllm-ascend", placed, 3))
    assert found["moe_layer_count"] == 2
    assert found["layer_list"][1] == {
        "layer_id": 1,
        "device_count": 2,
        "device_list": [
            {"device_id": 0, "device_expert": [2, 1]},
            {"device_id": 1, "device_expert": [0, 1]},
        ],
    }
    uneven = {**placed, 3: Placement(2, (0, 1))}
    with pytest.raises(RecipeError, match="different numbers of experts, and sglang wants as many"):
        for_engine("sglang", uneven, 4)


@pytest.fixture(scope="module")
def place_(checkpoint, tmp_path_factory):
    folder = tmp_path_factory.mktemp("load")
    (folder / "text.txt").write_text(TEXT)
    return checkpoint("qwen3_moe", tokenizer=True), folder


def test_the_file_says_what_the_function_returns(place_):
    model, folder = place_
    out = folder / "expert_load.json"
    args = {"data": folder / "text.txt", "sampling": FEW, "compute": CPU}
    found = moecule.expert_load(
        model, out, gpus=2, cache_experts=("50%", 8), engines=("sglang",), **args
    )
    doc = json.loads(out.read_text())
    assert json.loads(found.dumps()) == doc
    assert doc["text"]["windows"] == [4, 32] and len(doc["layers"]) == 3
    for x in doc["layers"]:
        assert sum(x["count"]) == 4 * 32 * 2
        assert [x["count"][e] for e in x["hottest"]] == sorted(x["count"], reverse=True)
        assert len(x["physical_to_logical"]) == 2 * (4 + 1)
        assert 1 <= x["balance_after"] <= x["balance_before"] <= 2
    half, all_ = doc["offloading"]
    assert (half["cache_experts"], all_["cache_experts"]) == (4, 8)
    assert [p["policy"] for p in half["policies"]] == list(POLICIES)
    for p in all_["policies"]:  # where all have room, each is brought in once at most
        assert p["loads_per_token"] * 4 * 32 <= 3 * 8 + 1e-9
    expert_bytes = 4 * 3 * 32 * 16  # float32: gate, up and down of the tiny model
    p = half["policies"][0]
    assert p["load_bytes_per_token"] == pytest.approx(p["loads_per_token"] * expert_bytes)
    assert json.loads((folder / "expert_load.sglang.json").read_text()) == {
        "physical_to_logical_map": [x["physical_to_logical"] for x in doc["layers"]]
    }
    layers, caches = tables(found)
    assert len(layers) == 4 and len(caches) == 9


def test_statistics_tell_the_same_counts_and_no_order(place_):
    model, folder = place_
    recipe = load_recipe("uniform_rtn", {"data.samples": 4, "data.length": 32})
    stats = moecule.calibrate(
        model, folder / "stats", recipe=recipe, data=folder / "text.txt", compute=CPU
    )
    from_stats = moecule.expert_load(stats, gpus=2)
    given = {"data": folder / "text.txt", "sampling": FEW, "compute": CPU}
    from_model = moecule.expert_load(model, gpus=2, **given)
    assert [x.count for x in from_stats.layers] == [x.count for x in from_model.layers]
    assert from_stats.digest == from_model.digest and from_stats.text == from_model.text
    assert from_stats.offloading == () and from_stats.balance_unseen is None
    out = folder / "of_stats.json"
    moecule.expert_load(stats, out, gpus=2, engines=("sglang",))
    rows = json.loads((folder / "of_stats.sglang.json").read_text())["physical_to_logical_map"]
    assert rows == [[*x.physical_to_logical] for x in from_model.layers]
    for given in ({"cache_experts": (4,)}, {"data": folder / "text.txt"}):
        with pytest.raises(
            DataError, match="no order of tokens, and needs no text; give the model"
        ):
            moecule.expert_load(stats, **given)


def test_the_command_writes_and_prints(place_, tmp_path):
    model, folder = place_
    args = ("inspect", model, "--load", "--data", folder / "text.txt", *SMALL, "--gpus", "2")
    code, out, _ = run(*args, "-o", tmp_path / "load.json", "--engine", "tensorrt-llm", "--json")
    assert code == 0 and json.loads(out) == json.loads((tmp_path / "load.json").read_text())
    assert (tmp_path / "load.tensorrt-llm.yaml").is_file()
    for wrong, said in (
        (("--gpus", "0"), "0 GPUs and 1 replicas a GPU were asked for; wanted 1 GPU"),
        (("--replicas", "9"), "8 experts; give --replicas 4 or fewer"),
        (("--cache-experts", "1"), "layer 0 has 8 and a token needs 2 at once; give --cache-expe"),
        (("--cache-experts", "x"), "a cache of 'x' experts was asked for; wanted a number"),
        (("--engine", "x"), "engine 'x' is not known; wanted sglang, tensorrt-llm, vllm-asc"),
        (("--bits", "2"), "--bits is not of --load; leave one of them out"),
        (("-o", tmp_path), "is a folder; name a file"),
    ):
        assert re.search(said, refused(tmp_path, *args, "-o", tmp_path / "l.json", *wrong))


def test_options_of_load_do_not_go_unheeded(place_, tmp_path):
    model, _ = place_
    for wrong in ("--gpus", "--engine", "--cache-experts"):
        said = refused(tmp_path, "inspect", model, wrong, "2")
        assert f"{wrong} goes with --load; add that, or leave it out" in said


def test_sizes_of_caches():
    assert [parse_cache(x) for x in ("4", 4, "12.5%")] == [4, 4, 0.125]
    assert room(0.25, 8, 2, 0) == 2
    for wrong in ("0", "0%", "101%", "-1", "4.5", ""):
        with pytest.raises(RecipeError, match="wanted a number of them or a share"):
            parse_cache(wrong)


def test_a_damaged_folder_of_statistics_is_named(tmp_path):
    (tmp_path / "meta.json").write_text("{}")
    with pytest.raises(DataError, match="calibrate again"):
        moecule.expert_load(tmp_path)
