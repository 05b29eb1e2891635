"""Who stays where an expert takes so many tokens: what chance gives all, and order gives the first."""

from __future__ import annotations

import math

import pytest
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import chi2, chisquare
from torch import Tensor

from moecule.errors import RecipeError
from moecule.moe import find_moe, listening
from moecule.train.capacity import Capacity, balance, balancing, kept, limiting

E = 4


def routed(tokens: int, k: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """(hidden, idx, coef) of tokens that each pick k of E experts, some oftener than others."""
    lot = torch.Generator().manual_seed(seed)
    logits = torch.randn(tokens, E, generator=lot) + torch.arange(E) / 2
    coef, idx = logits.softmax(-1).topk(k)
    return torch.randn(tokens, 8, generator=lot), idx, coef


def plainly(idx: Tensor, coef: Tensor, room: int, select: str) -> Tensor:
    """What `kept` says, by a loop; of "random" the draw is given as `coef`."""
    keep = torch.zeros_like(idx, dtype=torch.bool)
    for e in range(E):
        pairs = [(t, j) for t, j in idx.eq(e).nonzero().tolist()]
        if select == "probs":
            pairs.sort(key=lambda at: -float(coef[at]))
        for t, j in pairs[:room]:
            keep[t, j] = True
    return keep


@given(
    tokens=st.integers(1, 40),
    k=st.integers(1, E),
    room=st.integers(1, 12),
    select=st.sampled_from(["position", "probs"]),
    seed=st.integers(0, 10**6),
)
def test_a_loop_keeps_the_same(tokens, k, room, select, seed):
    _, idx, coef = routed(tokens, k, seed)
    assert torch.equal(kept(idx, coef, room, select), plainly(idx, coef, room, select))


@given(
    tokens=st.integers(1, 40), k=st.integers(1, E), room=st.integers(1, 12), seed=st.integers(0, 99)
)
def test_each_expert_takes_as_many_as_it_can(tokens, k, room, seed):
    _, idx, coef = routed(tokens, k, seed)
    keep = kept(idx, coef, room, "random")
    came = idx.flatten().bincount(minlength=E)
    assert torch.equal(idx[keep].bincount(minlength=E), came.clamp(max=room))


def times_kept(select: str, calls: int, room: int, tokens: int) -> Tensor:
    """How often each of the tokens, who all want one expert, is kept."""
    torch.manual_seed(0)
    idx, coef = torch.zeros(tokens, 1, dtype=torch.int64), torch.ones(tokens, 1)
    return torch.stack([kept(idx, coef, room, select)[:, 0] for _ in range(calls)]).sum(0)


def test_chance_is_the_same_for_all_places_and_order_starves_the_end():
    tokens, room, calls = 64, 32, 2000
    by_lot = times_kept("random", calls, room, tokens)
    assert by_lot.sum() == calls * room
    # `room` of `tokens` are drawn without putting back: counts vary less than one by one
    less = (1 - room / tokens) * tokens / (tokens - 1)
    assert 0.01 < chi2.sf(chisquare(by_lot.numpy()).statistic / less, tokens - 1) < 0.99
    in_order = times_kept("position", calls, room, tokens)
    assert in_order.tolist() == [calls] * room + [0] * (tokens - room)
    assert chisquare(in_order.numpy()).pvalue < 1e-12


@pytest.mark.parametrize("select", ["random", "position", "probs"])
def test_where_there_is_room_nothing_changes(select):
    hidden, idx, coef = routed(30, 2)
    rule = Capacity(E, factor=E, select=select)
    assert torch.equal(rule(hidden, idx, coef), coef)
    assert (rule.pairs, rule.share_left_out) == (60, 0)


def test_pairs_that_are_left_out_are_0_and_counted_and_pass_no_gradient():
    hidden, idx, coef = routed(200, 2)
    coef.requires_grad_()
    rule = Capacity(E, factor=0.5, select="random")
    assert rule.room(idx.numel()) == math.ceil(200 * 2 / E * 0.5) == 50
    torch.manual_seed(3)
    out = rule(hidden, idx, coef)
    gone = out == 0
    came = idx.flatten().bincount(minlength=E)
    assert int(rule.left_out) == int(gone.sum()) == int((came - 50).clamp(min=0).sum()) > 0
    assert rule.share_left_out == int(gone.sum()) / 400
    out.sum().backward()
    assert torch.equal(coef.grad == 0, gone)
    torch.manual_seed(3)
    assert torch.equal(rule(hidden, idx, coef), out)
    assert not torch.equal(rule(hidden, idx, coef), out)  # anew at each call


def test_an_expert_takes_a_few_in_any_case():
    assert [Capacity(E, least=least).room(8) for least in (1, 4)] == [2, 4]


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ({"factor": 0.0}, "capacity = 0, wanted more than 0"),
        ({"factor": math.nan}, "capacity = nan"),
        ({"least": 0}, "least = 0"),
    ],
)
def test_what_cannot_be_is_refused(how, said):
    with pytest.raises(RecipeError, match=said):
        Capacity(E, **how)


def test_balance_is_1_where_experts_are_used_evenly_and_rises_to_all_of_them():
    even = torch.arange(8).view(8, 1) % E
    assert balance(torch.full((8, E), 1 / E), even) == 1
    assert balance(torch.full((8, E), 1 / E), torch.cat([even, (even + 1) % E], 1)) == 1
    one = torch.eye(E)[:1].expand(8, E)
    assert balance(one, torch.zeros(8, 1, dtype=torch.int64)) == E
    by_hand = torch.tensor([[0.5, 0.3, 0.1, 0.1], [0.7, 0.1, 0.1, 0.1], [0.1, 0.2, 0.6, 0.1]])
    picks = torch.tensor([[0], [0], [2]])
    want = 4 * ((0.5 + 0.7 + 0.1) / 3 * 2 / 3 + (0.1 + 0.1 + 0.6) / 3 * 1 / 3)
    torch.testing.assert_close(balance(by_hand, picks), torch.tensor(want))


@tiny.every_family
def test_balance_is_read_off_the_routers(name, checkpoint):
    model, streamed = tiny.load(checkpoint(name)), tiny.stream(checkpoint(name))
    moes = [m for layer in tiny.find_layers(model)[1] if (m := find_moe(layer, streamed.family))]
    scores = streamed.family.scores_in(model.config.get_text_config())
    (ids,) = tiny.tokens(1)
    with balancing(moes, 8, scores) as told:
        tiny.logits(model, ids)
        assert told.terms == []  # measuring is not training
        model(ids, use_cache=False)
        assert len(told.terms) == len(moes)
        loss = told.take()
        loss.backward()
    assert told.terms == [] and 1 <= loss.item() < 8
    rows = [moe.router.weight.grad for moe in moes]
    assert all(g is not None and g.abs().sum() > 0 for g in rows)
    model(ids, use_cache=False)
    assert told.terms == []  # and it is over


@tiny.every_family
def test_experts_take_as_many_as_they_may_and_only_while_training(name, checkpoint):
    model, streamed = tiny.load(checkpoint(name)), tiny.stream(checkpoint(name))
    moes = [m for layer in tiny.find_layers(model)[1] if (m := find_moe(layer, streamed.family))]
    (ids,) = tiny.tokens(1)
    want = tiny.logits(model, ids)
    with limiting(moes, 8, 100.0) as rules:
        whole = model(ids, use_cache=False).logits
        torch.testing.assert_close(whole.detach(), want, rtol=1e-6, atol=1e-6)
        assert [r.share_left_out for r in rules] == [0] * len(moes)
    with limiting(moes, 8, 0.25, "position", 1) as rules, listening(moes[-1]) as heard:
        assert torch.equal(tiny.logits(model, ids), want)
        model(ids, use_cache=False)
    assert all(0.5 < r.share_left_out < 1 for r in rules)
    came, stayed = heard.idx[-1], heard.coef[-1] != 0
    room = math.ceil(came.numel() / 8 * 0.25)
    assert came[stayed].bincount(minlength=8).max() == room == rules[-1].room(came.numel())
    assert torch.equal(stayed, kept(came, heard.coef[-1], room, "position"))
    assert torch.equal(model(ids, use_cache=False).logits, whole)
