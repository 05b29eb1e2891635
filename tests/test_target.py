"""Targets: what a plan keeps to so that stock transformers, vLLM or llama.cpp loads what it makes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import tiny
from test_cli import calibrated, refused, run
from test_drop import few_tokens, layer, made_of

from moecule import verbs
from moecule.apply import check_target, key_of
from moecule.ask import Ask, foresee
from moecule.budget import Inventory
from moecule.errors import PlanError, RecipeError
from moecule.family import Family
from moecule.plan import Drop, Keep, Plan
from moecule.recipe import load_recipe
from moecule.target import TARGETS, check_plan, steered

ONE = {"channels.budget": "expert"}
WIDE = made_of(layer(8), layer(8))  # 32 channels


def wider(channels: int, *numbers: int) -> Inventory:
    """Layers of so many experts each, of so many channels."""
    return made_of(*(replace(layer(n), down=(64, channels)) for n in numbers))


@pytest.mark.parametrize(
    ("target", "recipe", "changes"),
    [
        ("vllm", load_recipe("heapr"), ONE | {"channels.multiple": 64}),
        ("gguf", load_recipe("camera_p"), ONE | {"channels.multiple": 64}),
        ("transformers", load_recipe("heapr"), ONE),
        ("vllm", load_recipe("heapr", ONE | {"channels.multiple": 96}), {"channels.multiple": 192}),
        ("vllm", load_recipe("heapr", ONE | {"channels.multiple": 128}), {}),
        ("vllm", load_recipe("seer", {"score.budget": "model"}), {"score.budget": "layer"}),
        ("gguf", load_recipe("reap"), {}),
        ("gguf", load_recipe("stun", {"choose.budget": "model"}), {"choose.budget": "layer"}),
        ("vllm", load_recipe("hc_smoe"), {}),
    ],
)  # fmt: skip
def test_a_recipe_is_steered_to_what_the_target_loads(target, recipe, changes):
    made, found = steered(recipe, target)
    assert found == changes
    for key, value in changes.items():
        table, _, option = key.partition(".")
        assert getattr(getattr(made, table).options, option) == value
    assert steered(made, target) == (made, {})


def test_routers_keep_no_rows_of_what_is_merged():
    aliasing = load_recipe("hc_smoe", {"merge.router": "alias"})
    made, found = steered(aliasing, "vllm")
    assert found == {"merge.router": "rows"} and made == load_recipe("hc_smoe")


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("recipe", ["reap", "premoe", "heapr", "camera_p"])
def test_a_steered_plan_has_one_number_and_one_width(target, recipe):
    inventory, ask = wider(256, 8, 8), Ask(drop="50%", target=target)
    ask.check(load_recipe(recipe), inventory)
    fates = foresee(load_recipe(recipe), ask, inventory).layers
    assert {sum(f != Drop() for f in of) for of in fates.values()} in ({4}, {8})
    widths = {f.channels for of in fates.values() for f in of if isinstance(f, Keep)}
    assert widths in ({None}, {128})


REAP, HEAPR = load_recipe("reap"), load_recipe("heapr")
REFUSED = {
    "skips": (load_recipe("mc"), Ask(target="vllm"), WIDE, "recipe mc skips experts online"),
    "rest": (load_recipe("uniform"), Ask(target="vllm"), WIDE, "attention.*vllm loads 16.*rest.att"),
    "wide": (load_recipe("uniform", {"rest.attention": 8}), Ask(target="gguf"), WIDE, "up to 5 bits"),
    "columns": (load_recipe("uniform", {"group": 16}), Ask(target="gguf"), WIDE, "would have 16"),
    "eight": (REAP, Ask(bits=8, target="gguf"), WIDE, "up to 5 bits, and they would have 8"),
    "mixed": (load_recipe("frequency"), Ask(bits=2.5, target="gguf"), WIDE, "several widths .*uniform"),
    "bits": (REAP, Ask(bits=3, target="vllm"), WIDE, "would be rounded, and vllm loads 16 bits"),
    "size": (REAP, Ask(drop="25%", size="60kB", target="vllm"), WIDE, "would be rounded.*vllm"),
    "width": (HEAPR, Ask(target="vllm"), WIDE, "multiples of 64, and .* have 32 channels; drop whole"),
    "runs": (HEAPR, Ask(drop="10%", target="vllm"), wider(256, 8), "of 4 runs of 64 is not one"),
    "unequal": (REAP, Ask(target="vllm"), wider(64, 8, 12), "would keep 6 or 9 experts, and vllm"),
    "many": (REAP, Ask(target="gguf"), wider(64, 1024), "768 experts would stay .* loads 512"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_steered_is_refused(case):
    recipe, ask, inventory, said = REFUSED[case]
    with pytest.raises(RecipeError, match=said):
        ask.check(recipe, inventory)


def test_an_unknown_target_is_refused():
    with pytest.raises(
        RecipeError, match="target 'ollama' is not known; wanted transformers, vllm, gguf"
    ):
        Ask(target="ollama")


@few_tokens
def test_the_command_plans_for_a_target(checkpoint, tmp_path):
    place = calibrated(tmp_path, checkpoint, ["seer"])
    args = ("plan", place / "stats_seer", "--recipe", "seer", "--set", "score.budget=model")
    assert run(*args, "-o", place / "p.yaml", "--target", "vllm")[0] == 0
    made = verbs.read_plan(place / "p.yaml")
    assert made.made_by["target"] == "vllm"
    assert made.made_by["for_target"] == {"score.budget": "layer"}
    assert made.made_by["score"]["budget"] == "layer"
    check_plan(made, "vllm")
    said = refused(place, *args, "-o", place / "q.yaml", "--target", "vllm", "--bits", "3")
    assert "vllm loads 16 bits only" in said


def narrow(folder: Path) -> tuple[Plan, str | None, Family]:
    """A plan for vLLM that gives all experts 8 channels, the config's key for them, and the family."""
    streamed = tiny.stream(folder)
    made = tiny.plan(streamed, lambda i, e: Keep(channels=8))
    return replace(made, made_by={"target": "vllm"}), key_of(streamed, made), streamed.family


def test_apply_refuses_what_the_target_does_not_load(checkpoint):
    check_target(*narrow(checkpoint("qwen3_moe")))
    made, key, family = narrow(checkpoint("deepseek_v3"))  # its shared experts read the same key
    with pytest.raises(PlanError, match="is for vllm, .* and no key of this family's config"):
        check_target(made, key, family)
    fates = {i: (Drop(), *of[1:]) if i == 1 else of for i, of in made.layers.items()}
    with pytest.raises(PlanError, match="it was edited: .* different numbers"):
        check_target(replace(made, layers=fates), "some_key", family)


def test_gguf_takes_codes_of_one_width_a_layer(checkpoint):
    streamed = tiny.stream(checkpoint("mixtral"))
    made = tiny.plan(streamed, lambda i, e: Keep(4, 32) if i else Keep(2, 64))
    check_target(replace(made, made_by={"target": "gguf"}), None, streamed.family)
    for fate, said in {
        lambda i, e: Keep(2 + e % 2, 64): "of several widths .keep 2bit g64, keep 3bit g64",
        lambda i, e: Keep.in_pieces((3, 2), 32): "knows no experts in pieces",
    }.items():
        made = replace(tiny.plan(streamed, fate), made_by={"target": "gguf"})
        with pytest.raises(RecipeError, match=said):
            check_target(made, None, streamed.family)
    streamed = tiny.stream(checkpoint("deepseek_v3"))
    made = replace(tiny.plan(streamed, lambda i, e: Keep(4, 32)), made_by={"target": "gguf"})
    with pytest.raises(PlanError, match="takes codes of mixtral, .* and this is deepseek_v3"):
        check_target(made, None, streamed.family)


def test_the_families_whose_codes_gguf_takes_are_those_that_export_writes():
    arch = pytest.importorskip("moecule.exports.arch", reason="gguf is not installed")
    assert set(TARGETS["gguf"].families) == set(arch.ARCHES)
