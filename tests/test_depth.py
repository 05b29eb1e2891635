"""The loss by how many layers are compressed: nothing before the first, all of it after the last."""

from __future__ import annotations

import pytest
import tiny
import torch

from moecule.depth import by_depth, sample_of
from moecule.online import experts_run
from moecule.plan import Keep, Skip
from moecule.session import Compute, stream_any

TWO = Keep(2, 32)


@pytest.fixture(scope="module")
def second(checkpoint, tmp_path_factory):
    """(the original, a model whose layer 1 alone was rounded, which skips in layer 2 alone)."""
    source, out = checkpoint("qwen3_moe"), tmp_path_factory.mktemp("second")
    streamed = tiny.stream(source)
    skip = Skip({2: (0.9,)})
    made = tiny.plan(streamed, lambda i, e: TWO if i == 1 else Keep(), skip=skip)
    tiny.write(streamed, made, out, tiny.tokens(2))
    return source, out


def test_a_layer_costs_where_it_was_changed(second):
    cpu, batches = Compute("cpu"), tiny.tokens(2, seed=1)
    source, out = second
    skipping = stream_any(out, cpu, skip=True)
    found = by_depth(stream_any(out, cpu), tiny.stream(source), batches, skipping=skipping)
    first, *later = found.depths
    assert (first.loss_nats, first.kl_nats, first.error) == (found.loss_nats, 0.0, 0.0)
    assert later[0].kl_nats > 1e-6 and later[0].error > 1e-6
    assert all(d.kl_nats == pytest.approx(later[0].kl_nats, rel=1e-4) for d in later)
    whole = tiny.load(out)
    losses = [torch.nn.functional.cross_entropy(
        tiny.logits(whole, b)[:, :-1].mT, b[:, 1:], reduction="none"
    ) for b in batches]  # fmt: skip
    assert later[-1].loss_nats == pytest.approx(float(torch.cat(losses).mean()), rel=1e-4)
    assert found.tokens == torch.cat(losses).numel()
    assert found.skipped is not None
    shares = found.skipped.experts_run
    assert shares[0] == shares[1] == 1 > shares[2]
    assert sum(shares.values()) / 3 == pytest.approx(experts_run(skipping.model))


def test_a_sample_is_of_all_files_and_costs_no_more_than_the_text():
    a, b = tiny.tokens(3, seed=1), tiny.tokens(1, seed=2)  # batches of 2 x 20
    found = sample_of({"a": a, "b": b}, 4)  # half of 160 tokens
    assert [tuple(row.shape) for row in found] == [(1, 20)] * 4
    assert torch.equal(found[0], a[0][:1]) and torch.equal(found[1], b[0][:1])
    assert torch.equal(found[3], b[0][1:])
    assert len(sample_of({"a": a}, 1000)) == 1
