"""Levels: the search never loses, zero stays zero, and what is fitted can be stored."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from moecule.grid import CLIPS, NARROW, NONE, WIDE, clip_of, fit, quantized, round_to_nearest
from moecule.methods import binary, rtn
from moecule.packed import WIDTHS

seeds = st.integers(0, 2**32 - 1)
magnitudes = st.sampled_from([1e-9, 1e-4, 1.0, 1e4, 1e7])
clips = st.sampled_from(sorted(CLIPS))


def weights(seed: int, *shape: int, size: float = 1.0) -> Tensor:
    """Normal weights with a few large ones, as models have them."""
    draw = torch.Generator().manual_seed(seed)
    w = torch.randn(shape, generator=draw)
    return size * w * (1 + 4 * (torch.rand(shape, generator=draw) > 0.95))


def loss(w: Tensor, bits: int, group: int, clip: str, power: float) -> Tensor:
    """Of each group, as the search counts it."""
    miss = (quantized(w, bits, group, CLIPS[clip]) - w).double().abs()
    return (miss**power).unflatten(-1, (-1, group)).sum(-1)


@given(seeds, st.integers(2, 8))
def test_the_wide_search_loses_no_more_than_no_search(seed, bits):
    w = weights(seed, 3, 64)
    wide, none = (loss(w, bits, 16, c, WIDE.power) for c in ("wide", "none"))
    assert (wide <= none * (1 + 1e-5)).all()  # float32 decides near ties


@given(seeds, st.integers(2, 8))
def test_the_narrow_search_loses_no_more_than_no_search_by_its_own_measure(seed, bits):
    w = weights(seed, 3, 64)
    narrow, none = (loss(w, bits, 16, c, NARROW.power) for c in ("narrow", "none"))
    assert (narrow <= none * (1 + 1e-5)).all()


def test_at_two_bits_the_wide_search_saves_a_third_of_the_loss():
    w = weights(0, 64, 128)
    wide, none = (loss(w, 2, 128, c, 2.0).sum() for c in ("wide", "none"))
    assert wide < 2 / 3 * none


@given(seeds, st.integers(2, 40))
def test_one_bit_means_the_mean_magnitude_with_the_sign(seed, group):
    w = weights(seed, 2, group)
    w[0, 0] = 0.0
    mean = (2 * w.abs().mean(-1, keepdim=True)).half().float() / 2
    want = torch.where(w >= 0, mean, -mean)  # the sign of 0 is +
    assert torch.equal(quantized(w, 1, group), want)
    (packed,) = binary.encode(w[None], None, (1,), group, binary.Options())
    assert torch.equal(packed.dequantize(), want)


@pytest.mark.parametrize("clip", CLIPS.values(), ids=CLIPS)
@pytest.mark.parametrize("bits", WIDTHS)
def test_a_group_of_zeros_stays_zero(bits, clip):
    w = weights(0, 2, 48)
    w[:, 16:32] = 0.0
    got = quantized(w, bits, 16, clip)[:, 16:32]
    # one bit has no level at 0: the least scale that fp16 can store is left
    assert got.abs().max() <= (2.0**-25 if bits == 1 else 0.0)


@given(seeds, st.integers(1, 8), st.integers(1, 31), clips)
def test_a_short_last_group_is_fitted_on_its_own_columns(seed, bits, rest, clip):
    w = weights(seed, 2, 64 + rest)
    scale, zero = fit(w, bits, 32, CLIPS[clip])
    own = fit(w[:, 64:], bits, rest, CLIPS[clip])
    assert scale.shape == zero.shape == (2, 3)
    assert torch.equal(scale[:, 2:], own[0])
    assert torch.equal(zero[:, 2:], own[1])


@given(seeds, st.integers(1, 8), magnitudes, clips)
def test_scales_and_zero_points_survive_fp16_exactly(seed, bits, size, clip):
    w = weights(seed, 3, 40, size=size) + (size if seed % 2 else 0.0)
    for t in fit(w, bits, 16, CLIPS[clip]):
        assert torch.isfinite(t).all()
        assert torch.equal(t.half().float(), t)
    scale, _ = fit(w, bits, 16, CLIPS[clip])
    assert (scale > 0).all()


@given(seeds, st.integers(1, 8), st.integers(1, 50), clips)
def test_what_is_packed_is_what_the_rounded_weights_were(seed, bits, group, clip):
    w = weights(seed, 2, 4, 50)
    packed = rtn.encode(w, None, (bits, bits), group, rtn.Options(clip))
    for have, want in zip(packed, quantized(w, bits, group, CLIPS[clip]), strict=True):
        assert torch.equal(have.dequantize(), want)


@given(seeds, st.integers(2, 8))
def test_without_a_search_no_weight_is_off_by_more_than_a_step(seed, bits):
    w = weights(seed, 3, 32)
    q, scale, zero = round_to_nearest(w, bits, 16, NONE)
    step = scale.repeat_interleave(16, -1)
    assert q.min() >= 0 and q.max() < 2**bits
    # half a step of rounding, and what fp16 takes from scale and zero
    assert ((quantized(w, bits, 16, NONE) - w).abs() <= step * 0.75).all()


@given(seeds, st.integers(1, 8))
def test_rows_do_not_see_each_other(seed, bits):
    w = weights(seed, 5, 40)
    assert torch.equal(quantized(w, bits, 16)[2:3], quantized(w[2:3], bits, 16))


@pytest.mark.parametrize("zero", ["whole", "middle"])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_zero_points_may_be_kept_to_codes(bits, zero):
    w = weights(0, 6, 64) + 0.2
    q, scale, found = round_to_nearest(w, bits, 16, clip_of("wide", zero))
    assert torch.equal(found, found.round()) and 0 <= found.min() <= found.max() < 2**bits
    assert zero == "whole" or bool((found == 2 ** (bits - 1)).all())
    assert q.min() >= 0 and q.max() < 2**bits and bool((scale > 0).all())
    errors = [
        float((quantized(w, bits, 16, clip_of("wide", z)) - w).norm())
        for z in ("any", "whole", zero)
    ]
    assert errors[0] <= 1.001 * errors[1] <= 1.01 * errors[2]  # the freer, the nearer
    assert errors[2] < {2: 0.6, 3: 0.3, 4: 0.15, 8: 0.01}[bits] * float(w.norm())
