"""Walking a model is running it, in every family; and what is counted on the way is what happened."""

from __future__ import annotations

from typing import Any

import pytest
import tiny
import torch
from torch import Tensor, nn

from moecule.calibrate import collect, countable, seen_by
from moecule.methods import hawq, odp, pmq
from moecule.moe import listening
from moecule.stats import COSINE, DROPPING, HIDDEN_SQ, MASS, TOKENS
from moecule.walk import walk, walk_back

NORM, SQUARED, FISHER = (
    pmq.trial(pmq.Options(bits=(1, 3), error=error, group=16))
    for error in ("norm", "squared", "fisher")
)
SUMS = (*DROPPING, MASS, TOKENS, HIDDEN_SQ, COSINE, NORM, odp.RATIO, odp.DAMAGE["hidden"])


def experts_of(streamed: Any) -> str:
    """The implementation of experts that the walk uses: bfloat16 rounds otherwise in another."""
    return str(streamed.model.config.get_text_config()._experts_implementation)


@tiny.every_family
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_walking_equals_calling(name, dtype, checkpoint):
    batches = tiny.tokens(3)
    streamed = tiny.stream(checkpoint(name), dtype)
    hidden = tiny.walked(streamed, batches).last
    model = tiny.load(checkpoint(name), dtype, experts=experts_of(streamed))
    for batch, h in zip(batches, hidden, strict=True):
        with torch.no_grad():
            got = streamed.logits(h, batch)
        want = tiny.logits(model, batch).float()
        if name == "gpt_oss":  # its own forward adds experts up in another order
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
        else:
            assert torch.equal(got, want)


@tiny.every_family
def test_one_layer_at_a_time_holds_weights(name, checkpoint):
    streamed = tiny.stream(checkpoint(name))
    for step in walk(streamed, tiny.tokens(1)):
        held = [i for i, layer in enumerate(streamed.layers) if any_real(layer)]
        assert held == [step.index]
    assert not any(map(any_real, streamed.layers))


def any_real(layer: nn.Module) -> bool:
    """Whether the layer has weights outside the meta device."""
    return any(not p.is_meta for p in layer.parameters())


@tiny.every_family
def test_listening_changes_nothing_and_hears_what_the_experts_say(name, checkpoint):
    streamed = tiny.stream(checkpoint(name))
    for step in walk(streamed, tiny.tokens(2)):
        moe = streamed.moe(step.index)
        if moe is None:
            continue
        with torch.no_grad():  # as the walk has it: convolutions round otherwise with gradients
            unheard = [
                call[step.index](step.layer, *step.inputs.both(b))[0]
                for b, (call, x) in enumerate(zip(step.calls, step.inputs, strict=True))
            ]
        with listening(moe) as heard:
            step.run()
        assert all(map(torch.equal, step.outputs, unheard))
        told, pairs = [torch.zeros_like(r) for r in heard.routed], 0
        for e, seens in enumerate(seen_by(streamed, moe, heard)):
            batches = [b for b, idx in enumerate(heard.idx) if (idx == e).any()]
            for b, seen in zip(batches or [0], seens, strict=True):
                tokens, _ = torch.where(heard.idx[b] == e)
                told[b].index_add_(0, tokens, seen.coef[:, None] * seen.out)
                pairs += len(tokens)
                torch.testing.assert_close(seen.expert(seen.x), seen.out)
                assert torch.equal(seen.routed, heard.routed[b][tokens])
        assert pairs == sum(idx.numel() for idx in heard.idx)
        for ours, theirs in zip(told, heard.routed, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@tiny.every_family
def test_a_tokens_coefficients_are_its_probabilities_up_to_a_factor(name, checkpoint):
    streamed = tiny.stream(checkpoint(name))
    for step in walk(streamed, tiny.tokens(1)):
        moe = streamed.moe(step.index)
        if moe is None:
            continue
        with listening(moe) as heard:
            step.run()
        (idx,) = heard.idx
        coef, prob, total, ratio, rank = (torch.zeros(idx.shape) for _ in range(5))
        for e, (seen,) in enumerate(seen_by(streamed, moe, heard)):
            at = idx == e
            coef[at], prob[at], total[at] = seen.coef, seen.prob, seen.total
            ratio[at], rank[at] = seen.ratio, seen.rank.float()
            assert seen.top_k == idx.shape[1]
        assert torch.equal(total, coef.sum(-1, keepdim=True).expand_as(coef))
        torch.testing.assert_close(coef / total, prob / prob.sum(-1, keepdim=True))
        assert torch.equal(ratio, coef / coef.amax(-1, keepdim=True))
        order = coef.argsort(dim=-1, descending=True, stable=True)
        assert torch.equal(rank, order.argsort(dim=-1).float())
        constant = (total.max() - total.min()) < 1e-5
        assert constant == seen.renormalised


@tiny.every_family
def test_sums_of_two_shards_add_up_to_those_of_the_whole(name, checkpoint):
    batches = tiny.tokens(4)
    halves = [
        dict(collect(tiny.stream(checkpoint(name)), part, SUMS))
        for part in (batches[:1], batches[1:])
    ]
    whole = dict(collect(tiny.stream(checkpoint(name)), batches, SUMS))
    assert sorted(whole) == sorted(halves[0]) == sorted(halves[1])
    for i, sums in whole.items():
        assert set(sums) == {s.name for s in SUMS}
        for key, total in sums.items():
            added = halves[0][i][key] + halves[1][i][key]
            torch.testing.assert_close(added, total, rtol=1e-14, atol=0)


@tiny.every_family
def test_every_statistic_is_a_finite_float64_sum_by_expert_or_layer(name, checkpoint):
    streamed = tiny.stream(checkpoint(name))
    every = (*SUMS, SQUARED, hawq.sensitivity(hawq.Options(group=16)))
    needs = countable(streamed, every)
    assert needs == every or name == "muse_spark"  # its experts live in another width
    for i, sums in collect(streamed, tiny.tokens(2), needs):
        for statistic in needs:
            value = sums[statistic.name]
            assert value.dtype == torch.float64 and torch.isfinite(value).all()
            assert (value >= 0).all() or statistic is COSINE
            n = streamed.moe(i).experts.num_experts
            assert value.shape[:1] == (() if statistic.of_layer else (n,))


def next_token_loss(logits: Tensor, batch: Tensor) -> Tensor:
    """Nats, summed, of the model's float32 logits as the walk has them."""
    flat = logits.float()[:, :-1].flatten(0, 1)
    return nn.functional.cross_entropy(flat, batch[:, 1:].flatten(), reduction="sum")


def gradients_of_the_whole(model: Any, moes: list[Any], batches: list[Tensor]) -> list[Tensor]:
    """Of the summed loss by each block's routed output, [T, H] a block, by one backward pass."""
    heard: list[list[Tensor]] = [[] for _ in moes]
    handles = [
        moe.experts.register_forward_hook(lambda m, args, out, h=h: h.append(out))
        for moe, h in zip(moes, heard, strict=True)
    ]
    embeddings = model.get_input_embeddings()
    embeddings.weight.requires_grad_()
    loss = sum(next_token_loss(model(b, use_cache=False).logits, b) for b in batches)
    flat = [out for h in heard for out in h]
    found = torch.autograd.grad(loss, flat)
    for handle in handles:
        handle.remove()
    n = len(batches)
    return [torch.cat(found[i * n : (i + 1) * n]) for i in range(len(moes))]


@tiny.every_family
def test_walking_back_gives_the_gradients_of_the_whole_model(name, checkpoint):
    batches = tiny.tokens(2)
    streamed = tiny.stream(checkpoint(name), torch.float64)
    there = tiny.walked(streamed, batches, keep=True)
    got = {}
    for back in walk_back(streamed, there, batches):
        moe = streamed.moe(back.index)
        if moe is None:
            assert all(grad is None for _, _, grad in back.passes([]))
            continue
        with listening(moe) as heard:
            got[back.index] = torch.cat([grad for _, _, grad in back.passes(heard.live)])
    how = experts_of(streamed)
    model = tiny.load(checkpoint(name), torch.float64, experts=how)
    streamed.model = model  # so that streamed.moe finds the blocks of the whole model
    moes = [streamed.moe(i) for i in sorted(got)]
    want = gradients_of_the_whole(model, moes, batches)
    for i, grad in zip(sorted(got), want, strict=True):
        assert grad.abs().max() > 1e-3
        # most norms are in float32, whatever the model is in
        torch.testing.assert_close(got[i], grad, rtol=1e-5, atol=1e-6 * float(grad.abs().max()))


@tiny.every_family
def test_counting_on_the_way_back_counts_the_same(name, checkpoint):
    batches = tiny.tokens(2)
    there = dict(collect(tiny.stream(checkpoint(name)), batches, SUMS))
    back = dict(collect(tiny.stream(checkpoint(name)), batches, (*SUMS, FISHER)))
    assert list(back) == list(there)[::-1]
    for i, sums in there.items():
        assert (back[i][FISHER.name] > 0).any()
        for key, value in sums.items():
            torch.testing.assert_close(back[i][key], value, rtol=1e-4, atol=1e-9)
