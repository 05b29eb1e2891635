"""Where the levels of a group of weights lie: scales and zero points, in float32.

    level k = (k - zero) * scale,   k = 0 .. 2**bits - 1,   one scale and zero a row and group

Widths of 2 and more fit a range and shrink it to the multiple that loses least; one bit has the
two levels +-scale/2 with scale = 2 * mean|w|.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

TINY = 2.0**-24  # the smallest fp16 above 0: a group of zeros keeps a scale that can be stored


# where zero points may lie: anywhere, at a code, or at the code in the middle, 2**(bits - 1). Other
# engines know the last, some the second; they cost more loss
Zero = Literal["any", "whole", "middle"]


@dataclass(frozen=True)
class Clip:
    """Which multiples of a group's range are tried, and how their loss is measured."""

    low: float = 1.0
    high: float = 1.0
    steps: int = 1
    power: float = 2.0  # loss: sum |w - level|**power
    refine: int = 0  # times the levels are refitted to their weights by least squares
    zero: Zero = "any"

    @property
    def multiples(self) -> list[float]:
        """Tried in this order; the first best wins. 1 is always the first."""
        if self.steps == 1:
            return [1.0]
        spread = torch.linspace(self.high, self.low, self.steps).tolist()
        return [1.0, *(p for p in spread if p != 1.0)]


NONE = Clip()
NARROW = Clip(0.9, 1.1, 101, 2.4)  # the search in the authors' code of MC
WIDE = Clip(0.3, 1.0, 8, 2.0, refine=3)
CLIPS = {"none": NONE, "narrow": NARROW, "wide": WIDE}


def clip_of(name: str, zero: Zero) -> Clip:
    """The clipping of that name, with zero points there."""
    return replace(CLIPS[name], zero=zero)


@lru_cache(maxsize=64)
def on_device(numbers: tuple[float, ...], device: torch.device) -> Float[Tensor, " n"]:
    """A few numbers that are asked for again and again: each time they are sent, a GPU waits."""
    return torch.tensor(numbers, device=device)


def _tops(bits: tuple[int, ...], device: torch.device) -> Float[Tensor, " bits"]:
    """The highest code of each width."""
    return on_device(tuple(2.0**b - 1 for b in bits), device)


def fit(
    w: Float[Tensor, "*E M N"], bits: int, group: int, clip: Clip = WIDE
) -> tuple[Float[Tensor, "*E M G"], Float[Tensor, "*E M G"]]:
    """(scale, zero) of every row and group of `group` columns; the last group may be short."""
    found = fit_each(w.flatten(0, -2)[None], (bits,), group, clip)
    scale, zero = (t.view(*w.shape[:-1], -1) for t in found)
    return scale, zero


def fit_each(
    w: Float[Tensor, "E M N"], bits: tuple[int, ...], group: int, clip: Clip = WIDE
) -> tuple[Float[Tensor, "E M G"], Float[Tensor, "E M G"]]:
    """(scale, zero) of weights of different widths, one each."""
    full = w.shape[-1] // group * group
    pieces = []
    for lo, hi in ((0, full), (full, w.shape[-1])):
        if lo < hi:
            pieces.append(_fit_even(w[..., lo:hi], bits, min(group, hi - lo), clip))
    scale, zero = (torch.cat(t, -1) for t in zip(*pieces, strict=True))
    return scale, zero


def _fit_even(
    w: Float[Tensor, "E M N"], bits: tuple[int, ...], group: int, clip: Clip
) -> tuple[Tensor, Tensor]:
    """Of groups that are all alike."""
    if w.is_cuda and clip.zero == "any":
        from moecule.kernels.rounding import fit_groups

        multiples = on_device(tuple(clip.multiples), w.device)
        return fit_groups(w, _tops(bits, w.device), group, multiples, clip.power, clip.refine)
    part = w.unflatten(-1, (-1, group))
    scale = torch.empty(part.shape[:-1], device=w.device)
    zero = torch.empty_like(scale)
    for b in sorted(set(bits)):
        of = [e for e, have in enumerate(bits) if have == b]
        scale[of], zero[of] = _fit_groups(part[of].float(), b, clip)
    return scale, zero


def _fit_groups(w: Float[Tensor, "E M G n"], bits: int, clip: Clip) -> tuple[Tensor, Tensor]:
    if bits == 1:
        scale = _storable(2 * w.abs().mean(-1))
        return scale, torch.full_like(scale, 0.5)
    top = 2**bits - 1
    low, high = w.amin(-1).clamp(max=0), w.amax(-1).clamp(min=0)
    if clip.zero != "any":
        return _fit_scales(w, bits, clip, low, high)
    best = torch.full_like(low, torch.inf)
    scale, zero = torch.ones_like(low), torch.zeros_like(low)
    for p in clip.multiples:
        s = _storable(p * (high - low) / top)
        z = _storable_zero(-p * low / s)
        best, scale, zero = _better(w, bits, clip.power, (s, z), (best, scale, zero))
    for _ in range(clip.refine):
        s, z = _least_squares(w, nearest(w, scale[..., None], zero[..., None], bits), top)
        best, scale, zero = _better(w, bits, clip.power, (s, z), (best, scale, zero))
    return scale, zero


def _fit_scales(
    w: Tensor, bits: int, clip: Clip, low: Tensor, high: Tensor
) -> tuple[Tensor, Tensor]:
    """As `_fit_groups`, where zero points are codes."""
    top, middle = 2**bits - 1, 2.0 ** (bits - 1)
    best = torch.full_like(low, torch.inf)
    scale, zero = torch.ones_like(low), torch.full_like(low, middle)
    for p in clip.multiples:
        if clip.zero == "middle":
            s, z = _storable(p * torch.maximum(-low / middle, high / (top - middle))), zero
        else:
            s = _storable(p * (high - low) / top)
            z = (-p * low / s).round().clamp(0, top)
        best, scale, zero = _better(w, bits, clip.power, (s, z), (best, scale, zero))
    for _ in range(clip.refine):
        q = nearest(w, scale[..., None], zero[..., None], bits) - zero[..., None]
        s = _storable((q * w).sum(-1) / (q * q).sum(-1).clamp(min=TINY))
        best, scale, zero = _better(w, bits, clip.power, (s, zero), (best, scale, zero))
    return scale, zero


def _better(
    w: Tensor,
    bits: int,
    power: float,
    tried: tuple[Tensor, Tensor],
    kept: tuple[Tensor, Tensor, Tensor],
) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, scale, zero), group by group the better of `tried` and `kept`."""
    (s, z), (best, scale, zero) = tried, kept
    level = (nearest(w, s[..., None], z[..., None], bits) - z[..., None]) * s[..., None]
    miss = (level - w).abs_()
    loss = (miss * miss if power == 2 else miss**power).sum(-1)
    won = loss < best
    return torch.where(won, loss, best), torch.where(won, s, scale), torch.where(won, z, zero)


def _least_squares(w: Tensor, q: Tensor, top: int) -> tuple[Tensor, Tensor]:
    """The scale and zero that fit weights best to the codes they have."""
    mean_q, mean_w = q.mean(-1), w.mean(-1)
    dq = q - mean_q[..., None]
    spread = (dq * dq).sum(-1)
    scale = _storable((dq * (w - mean_w[..., None])).sum(-1) / spread.clamp(min=TINY))
    zero = _storable_zero(mean_q - mean_w / scale)
    # codes that are all alike say nothing of the scale; such a try must lose, not be stored
    return scale, torch.where((spread > 0) & (zero.abs() <= 2 * top), zero, 1e4)


def _storable(scale: Tensor) -> Tensor:
    return scale.clamp(min=TINY, max=6e4).half().float()


def _storable_zero(zero: Tensor) -> Tensor:
    return zero.clamp(-6e4, 6e4).half().float()


def nearest(w: Tensor, scale: Tensor, zero: Tensor, bits: int) -> Float[Tensor, " ..."]:
    """The code of the nearest level, as float."""
    if bits == 1:  # round() takes 1/2 to the even 0, and the sign of 0 is +
        return (w >= 0).float()
    return (w / scale + zero).round_().clamp_(0, 2**bits - 1)


def spread(t: Float[Tensor, "*E M G"], group: int, columns: int) -> Float[Tensor, "*E M N"]:
    """A scale or zero for every column."""
    return t.repeat_interleave(min(group, columns), -1)[..., :columns]


def round_to_nearest(
    w: Float[Tensor, "*E M N"], bits: int, group: int, clip: Clip = WIDE
) -> tuple[Int[Tensor, "*E M N"], Float[Tensor, "*E M G"], Float[Tensor, "*E M G"]]:
    """(codes, scale, zero) of plain rounding."""
    scale, zero = fit(w, bits, group, clip)
    n = w.shape[-1]
    q = nearest(w.float(), spread(scale, group, n), spread(zero, group, n), bits)
    return q.int(), scale, zero


def quantized(
    w: Float[Tensor, "*E M N"], bits: int, group: int, clip: Clip = WIDE
) -> Float[Tensor, "*E M N"]:
    """What plain rounding makes of `w`, in its dtype."""
    q, scale, zero = round_to_nearest(w, bits, group, clip)
    n = w.shape[-1]
    return ((q - spread(zero, group, n)) * spread(scale, group, n)).to(w.dtype)


def quantized_at(
    w: Float[Tensor, "M N"], bits: tuple[int, ...], group: int, clip: Clip = WIDE
) -> Float[Tensor, "bits M N"]:
    """As `quantized`, at each of the widths."""
    n = w.shape[-1]
    scale, zero = fit_each(w.expand(len(bits), *w.shape), bits, group, clip)
    if w.is_cuda:
        from moecule.kernels.rounding import levels_at

        return levels_at(w, scale, zero, _tops(bits, w.device), group)
    scale, zero = (spread(t, group, n) for t in (scale, zero))
    q, wide = torch.empty_like(scale), w.float()
    for k, b in enumerate(bits):
        q[k] = nearest(wide, scale[k], zero[k], b)
    return q.sub_(zero).mul_(scale).to(w.dtype)
