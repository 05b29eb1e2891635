"""The skip rule, its thresholds, and the attention it reads, against the whole matrix."""

from __future__ import annotations

import pytest
import tiny
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor

from moecule.calibrate import collect
from moecule.errors import RecipeError
from moecule.methods import odp
from moecule.moe import listening
from moecule.stats import BINS
from moecule.walk import walk

seeds = st.integers(0, 2**32 - 1)


def coefficients(seed: int, tokens: int, k: int) -> Tensor:
    """[T, K] positive, in no order, as a router gives them."""
    draw = torch.Generator().manual_seed(seed)
    return torch.rand(tokens, k, generator=draw) ** 3 + 1e-3


@given(seeds, st.integers(2, 8), st.booleans())
def test_thresholds_of_0_keep_every_pair_and_every_bit(seed, k, renormalised):
    coef = coefficients(seed, 20, k)
    run = odp.kept(coef, (0.0,) * (k - 1), None)
    assert run.all()
    assert torch.equal(odp.rescaled(coef, run, renormalised), coef)


@given(seeds, st.integers(2, 8), st.floats(0, 1))
def test_a_pair_runs_unless_its_share_of_the_first_is_below_the_threshold(seed, k, limit):
    coef = coefficients(seed, 20, k)
    limits = torch.linspace(0, limit, k)[1:].tolist()  # another for every rank
    run = odp.kept(coef, tuple(limits), None)
    for row, kept in zip(coef, run, strict=True):
        order = row.argsort(descending=True).tolist()
        assert kept[order[0]]
        for rank, e in enumerate(order[1:]):
            assert kept[e] == (row[e] >= row.new_tensor(limits[rank]) * row[order[0]])


@given(seeds, st.integers(1, 8))
def test_a_tokens_largest_always_runs_alone_at_the_highest_threshold(seed, k):
    coef = coefficients(seed, 20, k)
    run = odp.kept(coef, (1.1,) * (k - 1), None)
    assert torch.equal(run, torch.nn.functional.one_hot(coef.argmax(-1), k).bool())


def test_of_equal_coefficients_one_is_left():
    assert odp.kept(torch.full((3, 4), 0.25), (1.1,) * 3, None).sum(-1).eq(1).all()


@given(seeds, st.integers(2, 8), st.floats(0, 1))
def test_protected_tokens_skip_nothing_and_the_others_as_before(seed, k, limit):
    coef, limits = coefficients(seed, 20, k), (limit,) * (k - 1)
    protected = torch.arange(20) % 3 == 0
    run = odp.kept(coef, limits, protected)
    assert run[protected].all()
    assert torch.equal(run[~protected], odp.kept(coef, limits, None)[~protected])


@given(seeds, st.integers(2, 8), st.floats(0, 1))
def test_renormalised_coefficients_keep_their_sum_and_their_proportions(seed, k, limit):
    coef = coefficients(seed, 20, k)
    run = odp.kept(coef, (limit,) * (k - 1), None)
    new = odp.rescaled(coef, run, True)
    assert (new[~run] == 0).all()
    torch.testing.assert_close(new.sum(-1), coef.sum(-1))
    factor = (coef.sum(-1) / (coef * run).sum(-1))[:, None].expand_as(coef)
    torch.testing.assert_close(new[run], (coef * factor)[run])
    plain = odp.rescaled(coef, run, False)
    assert torch.equal(plain, coef * run)


def attention(b: int, heads: int, kv: int, q: int, s: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """(query, key), large enough that attention is uneven."""
    draw = torch.Generator().manual_seed(seed)
    query = 2 * torch.randn(b, heads, q, 8, generator=draw)
    return query, torch.randn(b, kv, s, 8, generator=draw)


def whole_matrix(query: Tensor, key: Tensor, sees: Tensor, sinks: Tensor | None) -> Tensor:
    """[B, Q] received from the full softmax in float64; `sees` [Q, S], the last query on the last key."""
    (b, heads, q, _), s = query.shape, key.shape[2]
    key = key.double().repeat_interleave(heads // key.shape[1], 1)
    logits = (query.double() @ key.mT * 0.3).masked_fill(~sees, -torch.inf)
    if sinks is not None:
        column = sinks.double()[None, :, None, None].expand(b, heads, q, 1)
        logits = torch.cat([logits, column], -1)
    given_by_query = logits.softmax(-1)[..., s - q : s].mean(1)  # to this call's own tokens
    return given_by_query.sum(1) / torch.arange(q, 0, -1)


@pytest.mark.parametrize("block", [1, 3, 128])
@pytest.mark.parametrize("sinks", [None, torch.tensor([0.5, -1.0, 2.0, 0.0])])
@pytest.mark.parametrize(("q", "s"), [(10, 10), (1, 1), (6, 10)])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_attention_block_by_block_is_attention_at_once(block, sinks, q, s, kv_heads):
    query, key = attention(2, 4, kv_heads, q, s)
    got, valid = odp.attention_received(query, key, None, 0.3, sinks, block)
    want = whole_matrix(query, key, torch.ones(q, s).tril(s - q).bool(), sinks)
    assert valid.all()
    torch.testing.assert_close(got, want.float(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("window", [10, 3])
def test_without_a_sink_all_that_is_given_is_received(window):
    query, key = attention(2, 4, 2, 10, 10)
    sees = torch.ones(10, 10).tril().triu(1 - window).bool()
    got, _ = odp.attention_received(query, key, sees[None, None], 0.3)
    torch.testing.assert_close((got * torch.arange(10, 0, -1)).sum(-1), torch.full((2,), 10.0))
    torch.testing.assert_close(got, whole_matrix(query, key, sees, None).float())


def padded(t: Tensor, lengths: list[int], side: str) -> Tensor:
    """Every sequence of [B, heads, S, D] cut to its length and moved to one side; the rest is noise."""
    out = torch.randn(t.shape, generator=torch.Generator().manual_seed(9))
    for b, n in enumerate(lengths):
        at = slice(t.shape[2] - n, None) if side == "left" else slice(n)
        out[b, :, at] = t[b, :, :n]
    return out


def padded_mask(lengths: list[int], s: int, side: str) -> Tensor:
    """[B, 1, S, S], as transformers makes it: causal, and no key that is padding."""
    at = torch.arange(s)
    real = [at >= s - n if side == "left" else at < n for n in lengths]
    return (torch.stack(real)[:, None] & (at[:, None] >= at))[:, None]


@pytest.mark.parametrize("additive", [False, True])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("sinks", [None, torch.tensor([0.5, -1.0, 2.0, 0.0])])
def test_padding_changes_nothing_for_the_tokens(side, additive, sinks):
    lengths, s = [7, 12, 1], 12
    query, key = attention(3, 4, 2, s, s)
    mask = padded_mask(lengths, s, side)
    if additive:
        mask = torch.where(mask, 0.0, torch.finfo(torch.float32).min)
    got, valid = odp.attention_received(
        padded(query, lengths, side), padded(key, lengths, side), mask, 0.3, sinks, block=5
    )
    for b, n in enumerate(lengths):
        alone, _ = odp.attention_received(
            query[b, None, :, :n], key[b, None, :, :n], None, 0.3, sinks
        )
        at = slice(s - n, None) if side == "left" else slice(n)
        assert valid[b].sum() == n and valid[b, at].all()
        torch.testing.assert_close(got[b, at], alone[0])


@given(st.integers(1, 2048), st.sampled_from([(2, 100), (1, 10), (1, 4), (1, 2), (1, 1), (0, 1)]))
def test_the_quota_of_protected_tokens_is_the_share_rounded_down(n, share):
    received = torch.rand(1, n, generator=torch.Generator().manual_seed(n))
    valid = torch.ones(1, n, dtype=torch.bool)
    found = odp.protected_tokens(torch.ones(1, n, 4), received, valid, share[0] / share[1])
    assert found.sum() == n * share[0] // share[1]


@given(seeds, st.floats(0, 1))
def test_the_tokens_protected_are_those_of_most_worth_and_never_padding(seed, share):
    draw = torch.Generator().manual_seed(seed)
    x, received = torch.randn(3, 30, 4, generator=draw), torch.rand(3, 30, generator=draw)
    valid = torch.rand(3, 30, generator=draw) > 0.4
    found = odp.protected_tokens(x, received, valid, share)
    assert not (found & ~valid).any()
    worth = x.abs().sum(-1) * received
    for b in range(3):
        assert found[b].sum() == int(valid[b].sum() * share)
        left = worth[b][valid[b] & ~found[b]]
        if found[b].any() and len(left):
            assert worth[b][found[b]].min() > left.max()


def statistics(seed: int, layers: int, k: int) -> dict[int, dict[str, Tensor]]:
    """Histograms as calibration leaves them, [E, K, bins]: rank 0 has ratio 1, damage grows."""
    draw, out = torch.Generator().manual_seed(seed), {}
    for i in range(layers):
        pairs = torch.randint(0, 9, (4, k, BINS), generator=draw).double()
        pairs[:, 0] = 0
        pairs[:, 0, -1] = pairs[:, 1:].sum((1, 2)) / (k - 1)
        harm = pairs * torch.rand(4, k, BINS, generator=draw) * torch.linspace(0, 1, BINS)
        total = torch.tensor(10.0 * (i + 1), dtype=torch.float64)
        out[i] = {"skip_ratio": pairs, "skip_damage": harm, "hidden_sq": total}
    return out


def below(stats: dict[int, dict[str, Tensor]], layer: int, limit: float, name: str) -> float:
    """What of a histogram, rank 0 left out, lies under a threshold."""
    found = float(stats[layer][name][:, 1:, : round(limit * BINS)].sum())
    return found / float(stats[layer]["hidden_sq"]) if name == "skip_damage" else found


@given(seeds, st.integers(2, 4))
def test_a_median_leaves_out_half_of_a_layers_tail(seed, k):
    stats = statistics(seed, 5, k)
    found, protect = odp.thresholds(stats, odp.Options(rule="median", protect=0.125))
    assert protect == 0.125
    for i, limits in found.items():
        assert limits == (limits[0],) * (k - 1)
        half = float(stats[i]["skip_ratio"][:, 1:].sum()) / 2
        assert below(stats, i, limits[0], "skip_ratio") <= half
        assert below(stats, i, limits[0] + 1 / BINS, "skip_ratio") > half


@given(seeds, st.floats(0.01, 0.2))
def test_medians_are_taken_of_the_layers_least_damaged_and_of_no_more_than_needed(seed, rate):
    stats = statistics(seed, 6, 2)
    every, _ = odp.thresholds(stats, odp.Options(rule="median", rate=0.25, protect=0.0))
    found, _ = odp.thresholds(stats, odp.Options(rule="median", rate=rate, protect=0.0))
    harm = {i: below(stats, i, t[0], "skip_damage") for i, t in every.items()}
    assert len(every) == 6
    rising = sorted(harm, key=lambda i: harm[i])
    assert sorted(found) == sorted(rising[: len(found)])
    pairs = sum(float(s["skip_ratio"].sum()) for s in stats.values())
    gone = [below(stats, i, every[i][0], "skip_ratio") / pairs for i in rising]
    assert sum(gone[: len(found) - 1]) < rate <= sum(gone[: len(found)])


@given(seeds, st.floats(0.01, 0.45), st.sampled_from([0.0, 0.02, 0.1]))
def test_the_damage_rule_reaches_the_rate_and_no_other_thresholds_do_with_less(seed, rate, protect):
    stats = statistics(seed, 2, 2)
    assume(rate < 0.5 * (1 - protect))
    found, _ = odp.thresholds(stats, odp.Options(rule="damage", rate=rate, protect=protect))
    pairs = sum(float(s["skip_ratio"].sum()) for s in stats.values())
    limits = [found.get(i, (0.0,))[0] for i in range(2)]
    gone = sum(below(stats, i, t, "skip_ratio") for i, t in enumerate(limits))
    assert gone >= rate * pairs / (1 - protect) * (1 - 1e-9)
    cost = sum(below(stats, i, t, "skip_damage") for i, t in enumerate(limits))
    n, d = (
        [torch.tensor([below(stats, i, b / BINS, name) for b in range(BINS + 1)]) for i in range(2)]
        for name in ("skip_ratio", "skip_damage")
    )
    as_many = n[0][:, None] + n[1] >= gone
    assert cost <= float((d[0][:, None] + d[1])[as_many].min()) * (1 + 1e-5)


@pytest.mark.parametrize("rule", ["damage", "median"])
def test_a_rate_that_needs_first_experts_is_refused_with_the_most_there_is(rule):
    with pytest.raises(RecipeError, match=r"the most is 0\.400"):
        odp.thresholds(statistics(0, 2, 2), odp.Options(rule=rule, rate=0.45, protect=0.2))


def test_thresholds_found_on_a_text_leave_out_that_share_of_its_pairs(checkpoint):
    batches = tiny.tokens(4, shape=(4, 32))
    options = odp.Options(rule="damage", rate=0.2, protect=0.0)
    stats = dict(collect(tiny.stream(checkpoint("mixtral")), batches, odp.needs(options)))
    limits, _ = odp.thresholds(stats, options)
    streamed, skipped, pairs = tiny.stream(checkpoint("mixtral")), 0, 0
    for step in walk(streamed, batches):
        with listening(streamed.moe(step.index)) as heard:
            step.run()
        coef = torch.cat(heard.coef)
        skipped += int((~odp.kept(coef, limits.get(step.index, (0.0,)), None)).sum())
        pairs += coef.numel()
    assert skipped == sum(below(stats, i, t, "skip_ratio") for i, (t,) in limits.items())
    assert 0.2 * pairs <= skipped < 0.25 * pairs  # damage a pair falls in places: they go as one
