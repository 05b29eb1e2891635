"""Packed experts of many widths: what a plan says of them, what is written, and what runs."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import tiny
import torch

from moecule.apply import check_plan
from moecule.ask import Ask, decide
from moecule.budget import bytes_by_part
from moecule.calibrate import collect
from moecule.checkpoint import Checkpoint
from moecule.errors import PlanError, RecipeError
from moecule.inventory import take_inventory, weigh
from moecule.order import with_order
from moecule.plan import Drop, Keep, Plan, Skip
from moecule.recipe import load_recipe
from moecule.runs import ids_of, in_runs, run_of

FULL = 96
WIDE = {"moe_intermediate_size": FULL, "hidden_size": 64}


@pytest.fixture(scope="module")
def wide(tmp_path_factory) -> Any:
    """A tiny model whose experts have FULL channels."""
    source = tmp_path_factory.mktemp("wide") / "source"
    tiny.save("qwen3_moe", source, **WIDE)
    return source


def ragged(streamed: Any, keep: Any, **how: Any) -> Plan:
    """Experts of 32, 64, all and no channels, in an order that is not the one they have.

    In layer 1 of all or none.
    """
    some, none = (32, 64, None, 0, None, 32, 96, 64), (None, 0, None, None, 0, 96, None, None)
    draw = torch.Generator().manual_seed(0)
    order = {
        i: torch.rand(e.n, e.down[1], generator=draw).argsort(dim=1).int()
        for i, e in take_inventory(streamed).experts.items()
    }
    fates = tiny.plan(
        streamed, lambda i, e: replace(keep(e), channels=(none if i == 1 else some)[e]), **how
    )
    return with_order(fates, order)


def test_runs_are_as_long_as_widths_allow():
    keeps = [Keep(2, 32, 64), Keep(3, 32), Keep(2, 32, 0), Keep(1, 32, 32)]
    assert run_of(keeps, 96) == 32 and run_of(keeps[:1], 96) is None
    assert run_of([Keep(channels=8), Keep()], 96) is None  # at 16 bits
    assert [k.pieces for k in in_runs(keeps, 96)] == [(2, 2, 0), (3, 3, 3), (0, 0, 0), (1, 0, 0)]
    # 2 + 3 + 0 + 1 runs; nobody is 6
    assert ids_of(keeps, 96, 32).tolist() == [[0, 1, 6], [2, 3, 4], [6, 6, 6], [5, 6, 6], [6, 6, 6]]


@pytest.mark.parametrize("skip", [None, Skip({0: (0.5,), 1: (0.5,), 2: (0.5,)})])
def test_they_are_written_weighed_and_run(wide, skip, tmp_path):
    """8 bits of narrow experts compute what the same narrow experts at 16 bits do, nearly."""
    batches = tiny.tokens(2)
    out, whole = tmp_path / "out", tmp_path / "whole"
    for folder, keep in ((out, lambda e: Keep(8 - e % 2, 32)), (whole, lambda e: Keep())):
        streamed = tiny.stream(wide)
        plan = ragged(streamed, keep, skip=skip)
        assert Plan.loads(plan.dumps()) == plan
        inventory = take_inventory(streamed)
        done = tiny.write(streamed, plan, folder, batches)
        assert weigh(Checkpoint.open(folder))["bytes_by_part"] == bytes_by_part(inventory, plan)
        model = tiny.load(folder)
        for batch, hidden in zip(batches, done.last, strict=True):
            with torch.no_grad():
                want = streamed.logits(hidden, batch)
            torch.testing.assert_close(tiny.logits(model, batch), want, rtol=1e-4, atol=5e-5)
    of = [tiny.logits(tiny.load(folder), batches[0]) for folder in (out, whole)]
    whole_model = tiny.logits(tiny.load(wide), batches[0])
    off, far = ((of[1] - other).norm() / of[1].norm() for other in (of[0], whole_model))
    assert off < 0.1 < 0.3 < far  # and they are not the whole experts


def test_an_expert_is_rounded_as_if_all_were_as_wide(wide, tmp_path):
    """Experts of 64 channels in two runs beside one of 32 have the codes they have as two pieces each."""
    down = []
    for n, keep in ((64, Keep.in_pieces((2, 2), 32, 64)), (32, Keep(2, 32, 64))):
        streamed, out = tiny.stream(wide), tmp_path / str(n)
        plan = ragged(streamed, lambda e: Keep(2, 32), encode="gptq")
        first = tuple(keep if e else replace(keep, channels=n) for e in range(8))
        plan = replace(plan, layers={**plan.layers, 0: first})
        tiny.write(streamed, plan, out, tiny.tokens(4))
        experts = tiny.load(out).model.layers[0].mlp.experts
        down.append(
            [experts.packed["bits2g32"].weight("down", r) for r in range(experts.num_experts)]
        )
    two_each, fewer = down
    assert len(two_each) == 16 and len(fewer) == 15
    for want, got in zip(two_each[2:], fewer[1:], strict=True):
        assert torch.equal(want, got)


@pytest.mark.parametrize(
    ("keep", "said"),
    [
        (lambda e: Keep(2, 32) if e else Keep(), "bits from 2 to 16"),
        (lambda e: Keep.in_pieces((2, 1), 32), "2 pieces"),
    ],
)
def test_what_runs_are_not_made_of_is_refused(wide, keep, said):
    streamed = tiny.stream(wide)
    with pytest.raises(PlanError, match=said):
        check_plan(ragged(streamed, keep), streamed)


def test_a_recipe_gives_bits_to_experts_of_many_widths(wide, checkpoint):
    streamed = tiny.stream(wide)
    inventory, recipe = take_inventory(streamed), load_recipe("heapr_mc")
    sums = dict(collect(streamed, tiny.tokens(4), recipe.needs()))
    plan = decide(recipe, Ask(drop="40%", bits=2.5), sums, inventory)
    keeps = [f for of in plan.layers.values() for f in of]
    assert len({k.channels for k in keeps}) > 1 and len({k.bits for k in keeps}) > 1
    assert all((k.channels or 0) % 32 == 0 for k in keeps) and Drop() not in keeps
    assert plan.skip is not None
    check_plan(replace(plan, digest=streamed.checkpoint.digest), streamed)
    with pytest.raises(RecipeError, match="they have 96, and widths in multiples of 8 were asked"):
        odd = load_recipe("heapr_mc", {"channels.multiple": 8})
        Ask(drop="40%", bits=2.5).check(odd, inventory)
