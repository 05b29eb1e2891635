"""The rounding kernels against the plain torch that they stand for. Needs a GPU; CI has none."""

from __future__ import annotations

import pytest
import torch

from moecule.grid import CLIPS, Clip, fit_each, nearest, quantized, quantized_at
from moecule.methods import gptq

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")


def weights(e: int, m: int, n: int) -> torch.Tensor:
    """Rows of different spread, one all 0, one all alike."""
    g = torch.Generator().manual_seed(0)
    w = torch.randn(e, m, n, generator=g) * torch.rand(e, m, 1, generator=g)
    w[0, 0], w[0, 1] = 0.0, 0.3
    return w


@pytest.mark.parametrize("group", [32, 64, 128, 40])
@pytest.mark.parametrize("clip", CLIPS)
def test_levels_are_those_of_the_reference(clip, group):
    w, bits = weights(6, 24, 2 * group + 8), (1, 2, 3, 4, 5, 8)
    want = fit_each(w, bits, group, CLIPS[clip])
    got = fit_each(w.cuda(), bits, group, CLIPS[clip])
    # where two tries lose the same but for rounding, either may win
    for ours, theirs in zip(got, want, strict=True):
        assert (ours.cpu() != theirs).float().mean() < 0.01
    for e, b in enumerate(bits):
        losses = [loss(w[e], b, group, CLIPS[clip], device) for device in ("cuda", "cpu")]
        torch.testing.assert_close(*losses, rtol=1e-4, atol=1e-9)


def loss(w: torch.Tensor, bits: int, group: int, clip: Clip, device: str) -> torch.Tensor:
    """Of each row, by the clip's own measure."""
    rounded = quantized(w.to(device), bits, group, clip).cpu()
    return (rounded - w).abs().double().pow(clip.power).sum(-1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("m", "n", "group"), [(24, 264, 64), (5, 40, 128), (33, 768, 32)])
def test_trial_levels_are_the_nearest(m, n, group, dtype):
    from moecule.kernels.rounding import levels_at  # triton is there with a GPU only

    w, bits = weights(1, m, n)[0].to("cuda", dtype), (1, 2, 3, 4, 8)
    scale, zero = fit_each(w.expand(len(bits), m, n), bits, group, CLIPS["wide"])
    tops = torch.tensor([2.0**b - 1 for b in bits], device="cuda")
    got = levels_at(w, scale, zero, tops, group)
    assert torch.equal(got, quantized_at(w, bits, group, CLIPS["wide"]))
    scale, zero = (t.repeat_interleave(min(group, n), -1)[..., :n] for t in (scale, zero))
    for k, b in enumerate(bits):
        codes = nearest(w.float(), scale[k], zero[k], b)
        assert torch.equal(got[k], ((codes - zero[k]) * scale[k]).to(dtype))


@pytest.mark.parametrize("feedback", ["column", "block"])
@pytest.mark.parametrize(("m", "n", "group"), [(48, 256, 64), (33, 136, 32), (64, 128, 128)])
def test_columns_are_rounded_as_by_the_reference(m, n, group, feedback):
    bits = (1, 2, 3, 4)
    w = weights(len(bits), m, n)
    x = torch.randn(len(bits), 3 * n, n, generator=torch.Generator().manual_seed(1))
    gram, options = x.mT @ x, gptq.Options(feedback=feedback)
    want = gptq.encode(w, gram, bits, group, options)
    got = gptq.encode(w.cuda(), gram.cuda(), bits, group, options)
    for e, (ours, theirs) in enumerate(zip(got, want, strict=True)):
        losses = []
        for packed in (ours, theirs):
            miss = packed.dequantize().cpu() - w[e]
            losses.append(((miss @ gram[e]) * miss).sum())
        torch.testing.assert_close(*losses, rtol=0.02, atol=0.0)
        same = (ours.dequantize().cpu() - theirs.dequantize()).abs() < 1e-6
        assert same[2:, :group].float().mean() > 0.99  # before small differences have added up
