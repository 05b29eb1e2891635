"""GPTQ against plain rounding: better where columns are related, the same where they are not."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from moecule.errors import RecipeError
from moecule.methods import gptq, rtn
from moecule.packed import Packed, unpack

E, M, N, GROUP = 4, 24, 80, 32  # the last group is short
BITS = (1, 2, 3, 4)


def weights(seed: int = 0) -> Tensor:
    """[E, M, N] of no particular kind."""
    return torch.randn(E, M, N, generator=torch.Generator().manual_seed(seed))


def correlated(seed: int = 1, rank: int = 12) -> Tensor:
    """[E, T, N] inputs, most of them in few directions, as activations are."""
    draw = torch.Generator().manual_seed(seed)
    few = torch.randn(E, 400, rank, generator=draw)
    return few @ torch.randn(E, rank, N, generator=draw) + 0.3 * torch.randn(
        E, 400, N, generator=draw
    )


X = correlated()
GRAM = X.mT @ X
EYE = torch.eye(N).expand(E, N, N).contiguous()


def encode(w: Tensor, gram: Tensor, bits: tuple[int, ...], **options: object) -> list[Packed]:
    """By GPTQ."""
    return gptq.encode(w, gram, bits, GROUP, replace(gptq.Options(), **options))


def rounded(w: Tensor, bits: tuple[int, ...], clip: str = "wide") -> list[Packed]:
    """To the nearest level."""
    return rtn.encode(w, None, bits, GROUP, rtn.Options(clip))


def output_error(w: Tensor, packed: list[Packed]) -> Tensor:
    """[E]: what the matrices' outputs miss, squared."""
    made = torch.stack([p.dequantize() for p in packed])
    return (X @ (w - made).mT).square().sum((1, 2))


def same(a: Packed, b: Packed) -> bool:
    """Equal bit for bit."""
    zeros = a.zero is b.zero is None or torch.equal(a.zero, b.zero)
    facts = (a.bits, a.group, a.columns) == (b.bits, b.group, b.columns)
    return facts and zeros and torch.equal(a.codes, b.codes) and torch.equal(a.scale, b.scale)


@pytest.mark.parametrize("clip", ["none", "wide"])
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("act_order", [False, True])
def test_feedback_beats_rounding_at_the_same_clip(bits, clip, act_order):
    w = weights()
    ours = output_error(w, encode(w, GRAM, (bits,) * E, clip=clip, act_order=act_order))
    assert (ours < 0.8 * output_error(w, rounded(w, (bits,) * E, clip))).all()


@pytest.mark.parametrize("clip", ["none", "narrow", "wide"])
@pytest.mark.parametrize("act_order", [False, True])
def test_unrelated_inputs_of_one_size_give_plain_rounding(clip, act_order):
    w = weights()
    ours = encode(w, 7 * EYE, BITS, clip=clip, act_order=act_order)
    assert all(map(same, ours, rounded(w, BITS, clip)))


@pytest.mark.parametrize("act_order", [False, True])
def test_an_expert_that_no_token_reached_is_rounded_and_not_zeroed(act_order):
    w, gram = weights(), GRAM.clone()
    gram[2] = 0.0
    ours, plain = encode(w, gram, BITS, act_order=act_order), rounded(w, BITS)
    assert same(ours[2], plain[2])
    assert (ours[2].dequantize() - w[2]).norm() < 0.5 * w[2].norm()
    assert not same(ours[1], plain[1])  # the others are not touched by that


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("bits", [BITS, (3, 1, 3, 8)])
def test_experts_together_are_experts_one_by_one(bits, act_order):
    w = weights()
    together = encode(w, GRAM, bits, act_order=act_order)
    for e, b in enumerate(bits):
        (alone,) = encode(w[e : e + 1], GRAM[e : e + 1], (b,), act_order=act_order)
        assert same(together[e], alone)


@pytest.mark.parametrize("act_order", [False, True])
def test_an_input_that_is_always_zero_leaves_all_weights_finite_and_its_own_rounded(act_order):
    w, x = weights(), X.clone()
    x[:, :, 5] = x[:, :, 40] = 0.0
    ours = encode(w, x.mT @ x, BITS, act_order=act_order, clip="none")
    made = torch.stack([p.dequantize() for p in ours])
    assert torch.isfinite(made).all()
    for p, have, want in zip(ours[1:], made[1:], w[1:], strict=True):
        step = p.scale.float().repeat_interleave(GROUP, -1)[:, [5, 40]]
        # nothing reads these columns, so they take no feedback: half a step, and fp16's rounding
        assert ((have - want)[:, [5, 40]].abs() <= 0.6 * step).all()


def test_inputs_of_fewer_tokens_than_columns_are_served():
    w, x = weights(), X[:, :3]
    made = torch.stack([p.dequantize() for p in encode(w, x.mT @ x, (4,) * E)])
    assert torch.isfinite(made).all()
    miss = (x @ (w - made).mT).norm()
    plain = torch.stack([p.dequantize() for p in rounded(w, (4,) * E)])
    assert miss < 0.5 * (x @ (w - plain).mT).norm()


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("b", [1, 2, 3, 5, 8])
def test_what_is_packed_has_the_shape_it_says(b, act_order):
    for p in encode(weights(), GRAM, (b,) * E, act_order=act_order):
        assert (p.bits, p.group, p.columns) == (b, GROUP, N)
        assert p.scale.shape == (M, 3)
        assert (p.zero is None) == (b == 1)
        assert unpack(p.codes, b, N).max() == 2**b - 1  # levels are used to the top
        assert p.dequantize().shape == (M, N)


def test_block_feedback_is_weaker_below_4_bits_and_the_same_from_4_on():
    w = weights()
    block, column = (encode(w, GRAM, (2, 3, 4, 5), feedback=f) for f in ("block", "column"))
    weak, strong = output_error(w, block), output_error(w, column)
    assert (weak[:2] > 1.02 * strong[:2]).all()
    assert all(map(same, block[2:], column[2:]))
    assert (weak < output_error(w, rounded(w, (2, 3, 4, 5)))).all()


def test_scaling_all_inputs_changes_nothing():
    w = weights()
    assert all(map(same, encode(w, GRAM, BITS), encode(w, 4096 * GRAM, BITS)))


def test_the_weights_given_are_not_written_to():
    w, gram = weights(), GRAM.clone()
    encode(w, gram, BITS)
    assert torch.equal(w, weights())
    assert torch.equal(gram, GRAM)


def test_without_gram_matrices_it_is_refused():
    with pytest.raises(RecipeError, match="gram matrices"):
        gptq.encode(weights(), None, BITS, GROUP, gptq.Options())
