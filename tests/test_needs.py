"""inspect: caches are those of the model, a budget is what fits, and needs follow what is asked."""

from __future__ import annotations

import json
import weakref
from dataclasses import replace

import every
import pytest
import tiny
import torch
from test_cli import refused, run

from moecule import depth
from moecule.ask import Ask
from moecule.budget import Cache, Inventory, bytes_by_part, parse_size
from moecule.cache import caches_of
from moecule.errors import RecipeError
from moecule.inspect import budget_of, inspect
from moecule.inventory import take_inventory
from moecule.needs import RUNTIME_BYTES, needs_of, passes_of, work_of
from moecule.pace import pace_of
from moecule.pack import chunks
from moecule.recipe import load_recipe
from moecule.session import Compute
from moecule.states import States
from moecule.stats import COUNT

WINDOW = 8
HYBRID = ("jamba", "nemotron_h", "qwen3_next")


def held(model, tokens: int) -> int:
    """Bytes of the real cache after `tokens` tokens, were its dtype one of 16 bits."""
    ids = torch.ones(1, tokens, dtype=torch.long)
    with torch.no_grad():
        layers = model.base_model(ids, use_cache=True).past_key_values.layers
    total = 0
    for layer in layers:
        for value in vars(layer).values():
            inside = [*value.values()] if isinstance(value, dict) else value
            for t in inside if isinstance(inside, list) else [value]:
                total += 2 * t.numel() if isinstance(t, torch.Tensor) and t.dim() else 0
    return total


def priced(model, tokens: int) -> int:
    empty = Inventory({}, {}, 0, 0, 0, caches_of(model), 128)
    return empty.cache_bytes(tokens)


@pytest.mark.parametrize("name", [*tiny.FAMILIES, "mimo_v2_flash"])
def test_a_cache_is_priced_as_the_model_fills_it(name):
    model = every.make(name)
    for tokens in (1, 7, 20):
        # a full window holds one token less than it sees, until the next one comes
        spare = sum(c.token_bytes for c in caches_of(model) if c.window and tokens >= c.window)
        assert priced(model, tokens) - spare == held(model, tokens)
    windows = [c.window for c in caches_of(model)]
    sliding = name in ("gpt_oss", "mimo_v2_flash")
    assert windows == ([None, WINDOW] if sliding else [None])


@pytest.mark.parametrize("name", HYBRID)
def test_recurrent_layers_keep_a_state_and_no_tokens(name):
    model = every.make(name)
    (cache,) = caches_of(model)
    assert cache.state_bytes > 0 and cache.window is None
    assert cache.token_bytes < 2 * 2 * 3 * 2 * 8  # not all layers keep keys and values
    assert [priced(model, n) for n in (2, 20)] == [held(model, n) for n in (2, 20)]


def test_a_model_that_does_not_pass_on_meta_keeps_all_that_it_can(monkeypatch):
    model = every.make("gpt_oss")

    def fail(*args, **kwargs):
        raise RuntimeError("Tensor.item() cannot be called on meta tensors")

    monkeypatch.setattr(type(model.base_model), "forward", fail)
    assert caches_of(model) == (Cache(2 * 2 * 8 * 2 * 3),)


@pytest.fixture
def opened(checkpoint):
    """(streamed, inventory, recipe) of a tiny model."""
    streamed = tiny.stream(checkpoint("qwen3_moe", tokenizer=True))
    return streamed, take_inventory(streamed), load_recipe("mc", {"data.samples": 8})


def test_an_inventory_comes_back_from_json(opened):
    inventory = opened[1]
    assert Inventory.from_dict(json.loads(json.dumps(inventory.as_dict()))) == inventory


@pytest.mark.parametrize("bits", [1, 1.3, 2.5, 4.75, 5])
def test_an_even_plan_has_the_bits_asked_for(opened, bits):
    _, inventory, recipe = opened
    found = recipe.even(inventory, bits).nominal_bits
    assert found == pytest.approx(bits, abs=0.5 / 24) and found <= bits + 1e-6


def test_an_even_plan_keeps_to_the_widths_of_the_recipe(opened):
    inventory = opened[1]
    recipe = load_recipe("mc_paper", {"allocate.bits": [2, 6]})
    plan = recipe.even(inventory, 3)
    assert {k.bits for layer in plan.layers.values() for k in layer} == {2, 6}
    assert plan.nominal_bits == 3
    with pytest.raises(RecipeError, match="the most 6"):
        recipe.even(inventory, 7)


def test_a_fit_leaves_room_for_the_cache(opened):
    _, inventory, recipe = opened
    cache = inventory.cache_bytes(100)
    size = budget_of(inventory, recipe, Ask(bits=3)).size_bytes
    found = budget_of(inventory, recipe, Ask(fit=size + cache, context=100))
    assert (found.weights_bytes, found.cache_bytes) == (size, cache)
    assert found.size_bytes <= size and found.nominal_bits == pytest.approx(3, abs=0.1)
    sized = budget_of(inventory, recipe, Ask(size=size))
    assert (sized.nominal_bits, sized.size_bytes) == (found.nominal_bits, found.size_bytes)
    longer = budget_of(inventory, recipe, Ask(fit=size + cache, context=128))
    assert longer.size_bytes <= size - inventory.cache_bytes(28)


def test_a_recipe_of_whole_bits_gets_whole_bits(opened):
    inventory, recipe = opened[1], load_recipe("uniform")
    sizes = [sum(bytes_by_part(inventory, recipe.even(inventory, b)).values()) for b in (3, 4)]
    found = budget_of(inventory, recipe, Ask(size=sum(sizes) // 2))
    assert found.nominal_bits == 3 and found.size_bytes == sizes[0]


def test_inspect_prints_the_budget_and_the_needs(checkpoint):
    model = checkpoint("qwen3_moe", tokenizer=True)
    args = ("inspect", model, "--fit", "150kB", "--context", "100", "--no-time")
    code, out, _ = run(*args)
    assert code == 0 and "fit 150kB, 100 tokens" in out and "room for weights" in out
    assert "in host memory" in out and "time" not in out
    found = json.loads(run(*args, "--json")[1])
    budget = found["budget"]
    assert budget["size_bytes"] <= budget["weights_bytes"]
    assert budget["weights_bytes"] + budget["cache_bytes"] == parse_size("150kB")
    assert 1 <= budget["nominal_bits"] <= 5 and found["pace"] is None
    assert found["needs"]["host_bytes"] == sum(found["needs"]["host_terms"].values())
    assert found["needs"]["device_bytes"] == 0


def test_what_does_not_fit_is_refused_with_the_least(checkpoint, tmp_path):
    model = checkpoint("qwen3_moe", tokenizer=True)
    said = refused(tmp_path, "inspect", model, "--fit", "60kB")
    assert "fit 60kB, 4096 tokens cannot be met; the least that recipe mc takes is" in said
    assert "for the KV cache" in said
    assert "give one of --bits, --size" in refused(
        tmp_path, "inspect", model, "--fit", "1MB", "--bits", "2"
    )


def test_the_time_is_in_seconds_by_verb_with_its_rates(opened):
    streamed, inventory, recipe = opened
    work = work_of(streamed, inventory, recipe)
    pace = pace_of(streamed, inventory, recipe, work, 10**6)
    assert set(pace.seconds) == set(pace.terms) == {"calibrate", "apply"}
    assert all(s > 0 for s in pace.seconds.values())
    assert all(r > 0 for r in vars(pace.rates).values())
    less = load_recipe("uniform_rtn", {"data.samples": 8})
    cheap = pace_of(streamed, inventory, less, work_of(streamed, inventory, less), 10**6)
    assert cheap.terms["calibrate"]["rounding for trials"] == 0
    assert cheap.terms["apply"]["factors"] == 0


def test_time_grows_with_the_text(opened):
    streamed, inventory, recipe = opened
    found = []
    for samples in (8, 4096):
        more = replace(recipe, data=replace(recipe.data, samples=samples))
        work = work_of(streamed, inventory, more)
        found.append(pace_of(streamed, inventory, more, work, 10**6).seconds["calibrate"])
    assert found[1] > 4 * found[0]


def test_trials_are_counted_by_their_products():
    assert passes_of((COUNT,)) == 0
    assert passes_of(load_recipe("mc").needs()) == 5
    assert passes_of(load_recipe("mc_paper").needs()) == 3
    assert passes_of(load_recipe("hessian").needs()) < 0.1


def test_needs_follow_the_text_and_the_gradient(opened):
    streamed, inventory, recipe = opened
    work = work_of(streamed, inventory, recipe)
    assert work.tokens == 8 * 128 and work.states == 8 * 128 * 32 * 4
    assert (work.copies, work.backward) == (6, True)
    plain = work_of(streamed, inventory, load_recipe("uniform", {"data.samples": 8}))
    assert (plain.copies, plain.backward, plain.trials) == (3, False, 0)
    on_host, on_disk = (
        needs_of(replace(work, tokens=10**7), 10**6, Compute("cpu", states=p))
        for p in ("host", "disk")
    )
    states = 6 * 10**7 * 32 * 4
    assert on_host.states_bytes == on_disk.states_bytes == states
    assert on_host.host_bytes - on_disk.host_bytes >= states
    assert on_host.disk_terms["hidden states to go on from"] == states


def test_what_evaluating_by_layer_holds_is_foreseen(opened, monkeypatch):
    streamed, inventory, recipe = opened
    alive: list[weakref.ref[States]] = []
    most, plain = [0], depth._kept

    def counted(*args: object) -> States:
        made = plain(*args)
        alive.append(weakref.ref(made))
        held = [s for s in (ref() for ref in alive) if s is not None]
        most[0] = max(most[0], sum(t.nbytes for s in held for t in s))
        return made

    monkeypatch.setattr(depth, "_kept", counted)
    sample = tiny.tokens(3, shape=(1, 20))
    depth.by_depth(tiny.stream(streamed.checkpoint.path), streamed, sample)
    of_sample = 3 * 20 * 32 * 4
    assert most[0] <= (3 + depth.BESIDE) * of_sample < 2 * most[0]  # of 3 layers
    work = work_of(streamed, inventory, recipe)
    deep = replace(work, layers=10**6)
    terms = needs_of(deep, 10**6, Compute("cpu")).host_terms
    assert work.skips and terms["embeddings and head of each model"] == 3 * work.outer_weights * 4
    assert terms["a sample for every number of layers"] == (10**6 + depth.BESIDE) * 4096 * 32 * 4


def test_states_that_have_no_room_are_foreseen_on_disk(opened, monkeypatch):
    streamed, inventory, recipe = opened
    monkeypatch.setattr("moecule.states.free_host_bytes", lambda: 10**5)
    work = work_of(streamed, inventory, recipe)
    assert needs_of(work, 10**6, Compute("cpu")).states == "disk"


def test_experts_are_rounded_in_the_chunks_that_are_priced(opened):
    streamed, inventory, recipe = opened
    work = work_of(streamed, inventory, recipe)
    e = work.widest
    shapes = torch.empty(e.n, *e.gate_up), torch.empty(e.n, *e.down)
    assert len(chunks(*shapes, torch.device("cpu"))) == 1
    needs = needs_of(work, 10**6, Compute("cpu"))
    assert needs.host_bytes > RUNTIME_BYTES


def test_inspect_as_a_function_measures_where_it_is_asked(checkpoint):
    model = checkpoint("mixtral", tokenizer=True)
    assert inspect(model, time=False).pace is None


def test_a_router_that_names_its_top_k_otherwise_is_foreseen_too(tmp_path):
    every.make("gemma4").save_pretrained(tmp_path)
    found = inspect(tmp_path, time=False, compute=Compute("cpu"))
    assert found.needs is not None and found.needs.host_bytes > RUNTIME_BYTES
