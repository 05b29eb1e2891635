"""GEMQ: its cost and its program worked out by hand; who is renamed or never reached."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from moecule.calibrate import collect
from moecule.errors import RecipeError
from moecule.experts import Expert
from moecule.methods import gemq, pmq
from moecule.recipe import load_recipe
from moecule.stats import Seen

TWO = {"bits": (1, 2), "group": 2}
# at 2 bits both matrices are themselves; at 1 bit the first is [2 2], [-1.5 1.5]
EXPERT = Expert(
    torch.tensor([[1.0, 3], [-1, 2]]), torch.tensor([[3.0, 3], [3, -3]]), gate=lambda x: x
)
X, COEF = torch.eye(2), torch.tensor([0.5, 0.25])
GRAD = torch.tensor([[1.0, 0], [2, 4]])


def seen() -> Seen:
    """What the expert saw of two tokens."""
    act, one = EXPERT.act(X), torch.ones(2)
    return Seen(
        x=X, coef=COEF, prob=one, ratio=one, rank=torch.zeros(2).long(), total=one, act=act,
        out=EXPERT.out(act), routed=X, grad=GRAD, turn=None, top_k=1, renormalised=True, expert=EXPERT,
    )  # fmt: skip


@pytest.mark.parametrize(("error", "want"), [("gradient", 7.875), ("fisher", 14.625)])
def test_the_cost_is_the_figure_worked_out_by_hand(error, want):
    # outputs [0 6] and [15 3] become [1.5 10.5] and [10.5 1.5]: off by [1.5 4.5] / 2 and [-4.5 -1.5] / 4;
    # times the gradient [0.75 0] and [-2.25 -1.5]
    trial = gemq.trial(gemq.Options(**TWO, error=error))
    assert trial.of_expert(EXPERT)(seen()).tolist() == [want, 0]


def costs(
    *layers: Sequence[Sequence[float]], options: gemq.Options
) -> dict[int, dict[str, Tensor]]:
    """Statistics with these costs, by layer."""
    name = gemq.trial(options).name
    return {i: {name: torch.tensor(c, dtype=torch.float64)} for i, c in enumerate(layers)}


def test_the_program_is_the_one_worked_out_by_hand():
    mild = [[10, 4, 1], [3, 2, 1], [2.5, 1, 0.5]]
    steep = [[100, 10, 1], [50, 5, 1], [20, 4, 1]]
    free = gemq.Options(floor=0)
    # 4 + 8 bits cost 9.5 + 6; 3 + 9 cost 18.5, 5 + 7 cost 16.5, 6 + 6 cost 24
    assert gemq.allocate(costs(mild, steep, options=free), 2, free) == {0: (2, 1, 1), 1: (3, 3, 2)}
    # with one of 3 and one of 2 bits in each, none has less than 6
    held = gemq.Options()
    assert gemq.allocate(costs(mild, steep, options=held), 2, held) == {0: (3, 1, 2), 1: (3, 2, 1)}
    assert gemq.allocate(costs(mild, steep, options=held), 13 / 6, held)[1] == (3, 2, 2)
    with pytest.raises(RecipeError, match="11 bits for all experts cannot be met; the least is 12"):
        gemq.allocate(costs(mild, steep, options=held), 11 / 6, held)


@given(st.integers(0, 2**32 - 1), st.randoms(use_true_random=False))
def test_renaming_experts_renames_their_bits(seed, lot):
    draw, options = torch.Generator().manual_seed(seed), gemq.Options()
    layers = [torch.rand(5, 3, generator=draw).tolist() for _ in range(2)]
    order = lot.sample(range(5), 5)
    given_bits = gemq.allocate(costs(*layers, options=options), 1.8, options)
    renamed = costs(layers[0], [layers[1][e] for e in order], options=options)
    want = {0: given_bits[0], 1: tuple(given_bits[1][e] for e in order)}
    assert gemq.allocate(renamed, 1.8, options) == want


def test_an_expert_that_no_token_reached_gets_the_least():
    layer = [[3, 2, 1.0], [0, 0, 0], [4, 2, 1]]
    for floor, want in ((0, (3, 1, 3)), (1, (3, 2, 3))):  # one must have 2 bits
        options = gemq.Options(floor=floor)
        assert gemq.allocate(costs(layer, options=options), 3, options) == {0: want}


def test_one_calibration_serves_it_and_pmq(checkpoint):
    mine, theirs = gemq.Options(error="fisher"), pmq.Options(error="fisher")
    needs = dict.fromkeys((*gemq.needs(mine), *pmq.needs(theirs), gemq.trial(gemq.Options())))
    assert len(needs) == 4  # counts, mass, and two kinds of costs
    sums = dict(collect(tiny.stream(checkpoint("qwen3_moe")), tiny.tokens(2), [*needs]))
    for options in (mine, gemq.Options()):
        found = gemq.allocate(sums, 2, options)
        assert sum(map(sum, found.values())) <= 2 * sum(map(len, found.values()))
        assert all({2, 3} <= set(of) for of in found.values())


def test_the_recipe_asks_for_the_gradient():
    assert any(s.backward for s in load_recipe("gemq").needs())
