"""Experts in pieces: what a plan says of them, what is written of them, and what runs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor

from moecule import online, pieces
from moecule.apply import check_plan
from moecule.ask import Ask, decide
from moecule.budget import bytes_by_part
from moecule.calibrate import collect
from moecule.checkpoint import Checkpoint
from moecule.errors import PlanError, RecipeError
from moecule.forward import in_pieces
from moecule.inventory import take_inventory, weigh
from moecule.method import load_method
from moecule.methods import camera
from moecule.moe import experts_of
from moecule.order import with_order
from moecule.pack import Codec, gram_of
from moecule.pieces import bias_of_pieces, put_together, rounded
from moecule.plan import Drop, Keep, Plan, Skip
from moecule.recipe import load_recipe, part_of
from moecule.runtime import keep_from, keep_text
from moecule.walk import walk

THREE = Keep.in_pieces((3, 2, 1), 64)


# the plan


def test_a_plan_says_the_bits_of_pieces():
    plan = Plan("m", "d", {0: (THREE, Drop(), replace(THREE, channels=96))}, channels="x")
    text = plan.dumps()
    assert "keep 3+2+1bit g64: '0'" in text and "keep 96ch 3+2+1bit g64: '2'" in text
    assert Plan.loads(text) == plan and plan.ordered
    assert plan.nominal_bits == pytest.approx(4 / 3)
    assert [keep_from(keep_text(k)) for k in (THREE, Keep(3, 64, 8))] == [THREE, Keep(3, 64, 8)]
    assert keep_text(THREE) == "3+2+1g64"


@pytest.mark.parametrize(
    ("before", "after", "said"),
    [
        ("3+2+1bit", "3+2+bit", r"cannot read 'keep 3\+2\+bit g64'; wanted .* keep 3\+2\+1bit g64"),
        ("3+2+1bit", "3+9bit", "wants 1 to 8 bits"),
        ("shared: keep", "shared: keep 3+2bit g64", "only experts can be dropped"),
        ("channels: x\n", "", "is cut into pieces of its channels, and the plan does not name"),
    ],
)
def test_a_slip_in_it_is_named(before, after, said):
    text = Plan("m", "d", {0: (THREE,)}, channels="x").dumps()
    with pytest.raises(PlanError, match=said):
        Plan.loads(text.replace(before, after))


def cut(streamed: Any, fate: Callable[[int, int], Any], **how: Any) -> Plan:
    """A plan, and an order of channels that is not the one they have."""
    draw = torch.Generator().manual_seed(0)
    order = {
        i: torch.rand(e.n, e.down[1], generator=draw).argsort(dim=1).int()
        for i, e in take_inventory(streamed).experts.items()
    }
    return with_order(tiny.plan(streamed, fate, **how), order)


@pytest.mark.parametrize(
    ("fate", "said"),
    [
        (lambda i, e: THREE, "3 pieces of 16 channels; wanted a number that divides them"),
        (lambda i, e: Keep(2, 8) if e else Keep.in_pieces((2, 1), 8), "in 1 and in 2 pieces"),
    ],
)
def test_pieces_that_do_not_come_out_are_refused(fate, said, checkpoint):
    streamed = tiny.stream(checkpoint("qwen3_moe"))
    with pytest.raises(PlanError, match=said):
        check_plan(cut(streamed, fate), streamed)


# what is written and what runs


def fate_of(layer: int, expert: int) -> Any:
    """One goes, and bits differ."""
    return Drop() if expert == 3 else Keep.in_pieces((3, 1) if expert % 2 else (4, 2), 8)


def of_groups(layer: int, expert: int) -> Any:
    """One goes of each half, which are the router's groups where it has any."""
    return Drop() if expert == 5 else fate_of(layer, expert)


def write_and_load(
    name: str, checkpoint: Any, out: Path, fate: Any = fate_of, **how: Any
) -> tuple[Any, Any, Any]:
    """(what was streamed, what apply says it did, the model that was loaded)."""
    streamed = tiny.stream(checkpoint(name))
    plan, foreseen = cut(streamed, fate, **how), take_inventory(streamed)
    done = tiny.write(streamed, plan, out, tiny.tokens(2))
    assert bytes_by_part(foreseen, plan) == weigh(Checkpoint.open(out))["bytes_by_part"]
    return streamed, done, tiny.load(out)


# a gate of two halves; interleaved and transposed, with biases
@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss"])
@pytest.mark.parametrize("encode", ["rtn", "gptq"])
def test_what_is_loaded_computes_what_was_written(name, encode, checkpoint, tmp_path):
    agrees(*write_and_load(name, checkpoint, tmp_path / "out", encode=encode))
    sizes = weigh(Checkpoint.open(tmp_path / "out"))
    assert sizes["nominal_bits"] == (4 * 3 + 3 * 2 + 0) / 8


@pytest.mark.slow
@tiny.every_family
def test_in_every_family_what_is_loaded_computes_what_was_written(name, checkpoint, tmp_path):
    agrees(*write_and_load(name, checkpoint, tmp_path / "out", of_groups))


def agrees(streamed: Any, done: Any, model: Any) -> None:
    """With the walk, whose experts are whole."""
    for batch, hidden in zip(tiny.tokens(2), done.last, strict=True):
        with torch.no_grad():
            want = streamed.logits(hidden, batch)
        torch.testing.assert_close(tiny.logits(model, batch), want, rtol=1e-4, atol=5e-5)


def test_a_rule_that_skips_experts_skips_all_their_pieces(checkpoint, tmp_path):
    layers = tiny.moe_layers(tiny.stream(checkpoint("qwen3_moe")))
    top_k = tiny.stream(checkpoint("qwen3_moe")).moe(min(layers)).top_k
    skip = Skip(dict.fromkeys(layers, (1.0,) * (top_k - 1)))  # only the first is run
    _, _, model = write_and_load("qwen3_moe", checkpoint, tmp_path / "out", skip=skip)
    batch = tiny.tokens()[0]
    before = tiny.logits(model, batch)
    online.set_skip(model, True)
    after = tiny.logits(model, batch)
    assert online.experts_run(model) == pytest.approx(1 / top_k)
    assert after.isfinite().all() and not torch.equal(before, after)


def test_every_piece_runs_with_the_coefficient_of_its_expert():
    idx, coef = torch.tensor([[1, 0], [2, 2]]), torch.tensor([[0.75, 0.25], [0.5, 0.5]])
    at, each = in_pieces(idx, coef, 2, 4)  # of two experts; 2 is nobody
    assert at.tolist() == [[2, 3, 0, 1], [4, 4, 4, 4]]
    assert each.tolist() == [[0.75, 0.75, 0.25, 0.25], [0.5] * 4]


# rounding


def module_of(streamed: Any) -> Any:
    """An experts module with its weights."""
    step = next(walk(streamed, tiny.tokens()))
    return streamed.moe(step.index).experts


def codec(name: str, **options: Any) -> Codec:
    """With its defaults but for `options`."""
    table = {"method": name, **options}
    return Codec(load_method(name, "encode"), part_of("x", table, "encode").options)


def error(gram: Tensor, off: Tensor) -> float:
    """Of a layer's output over the tokens of the gram matrix."""
    return float((off @ gram * off).sum())


def test_pieces_of_equal_bits_make_the_down_projection_that_gptq_does(checkpoint, monkeypatch):
    monkeypatch.setattr(pieces, "DAMP", 1e-5)  # of parts of a Hessian it is not that of all of it
    gptq = codec("gptq", damp=1e-5)
    module = module_of(tiny.stream(checkpoint("qwen3_moe")))
    w, x = tiny.normal(1, 12, 16), tiny.normal(200, 6) @ tiny.normal(6, 16)  # columns are alike
    gram = gram_of(x)[None] + torch.eye(16)
    keep = Keep.in_pieces((3, 3), 8)  # a group each
    (found,) = rounded(gptq, module, "down", w, gram, [keep])
    back = torch.cat([torch.arange(8, 16), torch.arange(8)])  # the last piece went first
    ((whole,),) = rounded(
        gptq, module, "down", w[..., back], gram[:, back][..., back], [Keep(3, 8)]
    )
    got, want = torch.empty(12, 16), torch.empty(12, 16)
    put_together(module, "down", found, got)
    want[:, back] = whole.dequantize()
    torch.testing.assert_close(got, want, atol=2e-3, rtol=0)  # a scale in fp16, rounded otherwise
    (alone,) = rounded(codec("rtn"), module, "down", w, None, [keep])
    plain = torch.cat([p.dequantize() for p in alone], 1)
    assert error(gram[0], w[0] - got) < 0.5 * error(gram[0], w[0] - plain)


def test_an_expert_that_no_token_reached_is_rounded_to_nearest(checkpoint):
    module = module_of(tiny.stream(checkpoint("qwen3_moe")))
    w, none = tiny.normal(1, 12, 16), torch.zeros(1, 16, 16)
    keep = Keep.in_pieces((3, 1), 8)
    (found,) = rounded(codec("gptq"), module, "down", w, none, [keep])
    (plain,) = rounded(codec("rtn"), module, "down", w, None, [keep])
    for a, b in zip(found, plain, strict=True):
        torch.testing.assert_close(a.dequantize(), b.dequantize())


@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss"])  # halves; every second row
def test_a_piece_has_the_rows_of_its_channels(name, checkpoint):
    module = module_of(tiny.stream(checkpoint(name)))
    rows = 2 * experts_of(module).down.shape[2]
    w = torch.arange(rows, dtype=torch.float32)[None, :, None].expand(1, rows, 8).contiguous()
    keep = Keep.in_pieces((8, 8), 8)
    (found,) = rounded(codec("rtn"), module, "gate_up", w, None, [keep])
    half = rows // 4
    own = {i: "gate" for i in range(half)} if module.is_concatenated else {}
    got = found[0].dequantize()[:, 0].round().tolist()
    want = [*own, *range(2 * half, 3 * half)] if own else [*range(rows // 2)]
    assert got == [float(i) for i in want]
    again = torch.zeros(rows, 8)
    put_together(module, "gate_up", found, again)
    torch.testing.assert_close(again, w[0], atol=0.02, rtol=0)
    bias = bias_of_pieces(module, w[..., 0], 2, first=True)
    assert bias[0].tolist() == got and len(bias) == 2
    last = bias_of_pieces(module, torch.ones(1, 4), 2, first=False)
    assert last.tolist() == [[1.0] * 4, [0.0] * 4]


# CAMERA-Q


@pytest.mark.parametrize(
    ("cuts", "total", "low", "want"),
    [
        (4, 9, 0.0, (3, 2, 2, 2)),
        (4, 8, 0.25, (3, 2, 2, 1)),
        (
            20,
            45,
            0.15,
            (3,) * 8 + (2,) * 9 + (1,) * 3,
        ),  # 2.25 bits, as the paper's three groups may be
        (4, 12, 0.25, (3, 3, 3, 3)),
        (4, 4, 0.0, (1, 1, 1, 1)),
    ],
)
def test_bits_of_pieces_fall_with_energy(cuts, total, low, want):
    assert camera.bits_of_pieces(cuts, total, camera.Options(low=low)) == want


def test_pieces_are_whole_groups_or_blocks():
    options = camera.Options()
    found = [camera.cuts_of(n, options) for n in (192, 640, 768, 1408, 14336, 96, 48)]
    assert found == [3, 5, 4, 2, 4, 3, 1]
    with pytest.raises(RecipeError, match="13 bits over 3 pieces cannot be met .* wanted 3 to 9"):
        camera.bits_of_pieces(3, 13, options)


def test_an_expert_with_more_energy_in_its_next_piece_gets_one_bit_more():
    options = camera.Options(pieces=2, group=2, alpha=0.0)
    energy = torch.tensor([[9.0, 0, 1, 1], [3, 5, 5, 3], [0, 0, 0, 0]], dtype=torch.float64)
    stats = {0: {"energy": energy, "energy_max": torch.zeros(3, 4, dtype=torch.float64)}}
    # 14 bits for 3 experts: 4 and 4 and 4, and two more; pieces hold 10 1, 10 6 and nothing
    assert camera.allocate(stats, 14 / 6, options) == {0: ((3, 2), (3, 2), (2, 2))}
    # 16: 5 each, and one more, by the second piece
    assert camera.allocate(stats, 16 / 6, options) == {0: ((3, 2), (3, 3), (3, 2))}
    order = [2, 0, 1]
    renamed = {0: {k: v[order] for k, v in stats[0].items()}}
    assert camera.allocate(renamed, 14 / 6, options) == {0: ((2, 2), (3, 2), (3, 2))}


def test_the_recipe_puts_channels_of_high_energy_first(tmp_path):
    tiny.save("qwen3_moe", tmp_path, moe_intermediate_size=64)
    recipe = load_recipe("camera_q", {"allocate.pieces": 2, "group": 32})
    streamed = tiny.stream(tmp_path)
    sums = dict(collect(streamed, tiny.tokens(2), recipe.counted()))
    plan = decide(recipe, Ask(bits=2.5), sums, take_inventory(streamed))
    assert {str(f) for of in plan.layers.values() for f in of} == {"keep 3+2bit g32"}
    energy = camera.channels(sums, camera.Options())
    for i, order in plan.order.items():
        falling = energy[i].gather(1, order.long())
        assert (falling[:, :-1] >= falling[:, 1:]).all()
    check_plan(replace(plan, digest=streamed.checkpoint.digest), streamed)


@pytest.mark.parametrize(("share", "said"), [("25%", None), ("12.5%", "3 pieces of 88 channels")])
def test_channels_may_go_and_the_others_be_in_pieces(share, said, tmp_path):
    tiny.save("qwen3_moe", tmp_path, moe_intermediate_size=96)
    options = {"allocate.pieces": 3, "group": 32, "channels.budget": "expert"}
    recipe = load_recipe("camera_q", options)
    streamed = tiny.stream(tmp_path)
    sums = dict(collect(streamed, tiny.tokens(), recipe.counted()))
    inventory = take_inventory(streamed)
    if said is None:
        plan = decide(recipe, Ask(bits=2, drop=share), sums, inventory)
        assert {str(f) for of in plan.layers.values() for f in of} == {"keep 72ch 2+2+2bit g32"}
        return
    with pytest.raises(RecipeError, match=said):
        decide(recipe, Ask(bits=2, drop=share), sums, inventory)


def test_bits_for_pieces_need_an_order_of_channels(tmp_path):
    file = tmp_path / "own.toml"
    file.write_text('[allocate]\nmethod = "camera"\n[encode]\nmethod = "rtn"\n')
    with pytest.raises(
        RecipeError, match=r"gives bits to pieces of experts; wanted a \[channels\]"
    ):
        load_recipe(file)
