"""CAMERA: drop the channels of experts of least energy (P), or give them fewer bits than others (Q).

Xu et al., "CAMERA: Multi-Matrix Joint Compression for MoE Models via Micro-Expert Redundancy
Analysis", 2025, arXiv:2508.02322.

    energy_{e,k} = ((1 - alpha) * sum_t (g a_k)^2 + alpha * max_t (g a_k)^2) * |w_k|^2

a_k is what channel k gives the down projection for token t, g the coefficient of the expert, w_k the
channel's column of the down projection. Sums are not divided by counts.

budget = "layer" ranks the channels of each layer (the paper's), "model" those of all layers together,
"expert" those of each expert: all get one width, and the result is a stock checkpoint. Widths are
multiples of `multiple`, if given: channels go in runs of so many, by the sums of energies.

CAMERA-Q lets all channels stay. Every expert's are put in the order of their energies and cut into pieces
of one width, about `pieces` of them; a channel's rows of gate and up and its column of the down projection
have the bits of its piece. The share `low` of the pieces, the last ones, gets the fewest of `bits`; the
others share the rest evenly, the first ones more where it does not come out.

Differences from the paper:
- Of CAMERA-Q neither the text nor code was at hand, only that it has three groups of 3, 2 and 1 bits with
  a mean of 2.25, and GPTQ. Their shares are not known: no group has 1 bit unless `low` asks for it.
- Pieces are as wide as one another, so that kernels take them for experts. Where their bits do not make
  the mean, experts whose next piece has most energy get one more; else all experts are alike.
- All layers are ranked on what the original model gives them. Their code prunes a layer, and ranks the
  next on what the pruned one gives it.
- Shared experts stay; their code ranks them in the same list.
- g is what the model multiplies by; their code renormalises for DeepSeek, whose router does not.
- Numbers are float64; theirs are bfloat16, with ties.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float64
from torch import Tensor

from moecule.errors import RecipeError
from moecule.experts import Expert
from moecule.method import Method, Width
from moecule.packed import BLOCK
from moecule.stats import Seen, Statistic, Stats


@dataclass(frozen=True)
class Options:
    """What a single token counts for; what is ranked together, in which widths (P); of the pieces (Q)."""

    alpha: float = 0.9
    budget: Literal["model", "layer", "expert"] = "layer"
    multiple: int = 0
    bits: tuple[int, ...] = (1, 2, 3)
    pieces: int = 4
    low: float = 0.0
    group: int = 64


def weighed(expert: Expert) -> Callable[[Seen], Float64[Tensor, "t F"]]:
    """Squares of the lengths that channels add to the layer's sum."""
    lengths = expert.down.double().square().sum(0)
    return lambda seen: (seen.coef[:, None].double() * seen.act.double()).square() * lengths


def _sums(expert: Expert) -> Callable[[Seen], Tensor]:
    squares = weighed(expert)
    return lambda seen: squares(seen).sum(0)


def _greatest(expert: Expert) -> Callable[[Seen], Tensor]:
    squares = weighed(expert)
    # one that no token reached has none
    return lambda seen: torch.cat([squares(seen), seen.act.new_zeros(1, seen.act.shape[1])]).amax(0)


ENERGY = Statistic("energy", of_expert=_sums)
ENERGY_MAX = Statistic("energy_max", of_expert=_greatest, greatest=True)


def needs(options: Options) -> tuple[Statistic, ...]:
    """Sums and greatest. Raises RecipeError for an alpha outside of 0 to 1."""
    if not 0 <= options.alpha <= 1:
        raise RecipeError(f"channels alpha = {options.alpha:g}, wanted a number from 0 to 1")
    return (ENERGY, ENERGY_MAX)


def channels(stats: Stats, options: Options) -> dict[int, Float64[Tensor, "E F"]]:
    """{layer: the energy of each channel}."""
    a = options.alpha
    return {i: (1 - a) * s["energy"] + a * s["energy_max"] for i, s in stats.items()}


def cuts_of(channels: int, options: Options) -> int:
    """Into how many pieces: of whole groups if they can be, else of whole blocks of the packed layout."""
    for unit in (options.group, BLOCK):
        n = channels // unit
        fitting = [p for p in range(2, n + 1) if n % p == 0 and channels % unit == 0]
        if fitting:
            return min(fitting, key=lambda p: (abs(p - options.pieces), p))
    return 1


def bits_of_pieces(cuts: int, total: int, options: Options) -> tuple[int, ...]:
    """Of each piece of an expert, falling, `total` together. Raises RecipeError where they cannot be."""
    least, most = min(options.bits), max(options.bits)
    if not least * cuts <= total <= most * cuts:
        raise RecipeError(
            f"{total} bits over {cuts} pieces cannot be met with {options.bits}; wanted {least * cuts} "
            f"to {most * cuts}"
        )
    out = [least] * cuts
    lifted = range(cuts - int(options.low * cuts))
    for _ in range(total - sum(out)):
        among = [p for p in lifted if out[p] < most] or [p for p in range(cuts) if out[p] < most]
        out[min(among, key=lambda p: (out[p], p))] += 1
    return tuple(out)


def allocate(stats: Stats, mean_bits: float, options: Options) -> dict[int, tuple[Width, ...]]:
    """{layer: bits of every expert's pieces}. Raises RecipeError for a mean that cannot be met."""
    out: dict[int, tuple[Width, ...]] = {}
    for i, energy in channels(stats, options).items():
        n, cuts = len(energy), cuts_of(energy.shape[1], options)
        total, more = divmod(int(mean_bits * cuts * n + 1e-9), n)
        found = [bits_of_pieces(cuts, total, options)] * n
        if more:  # for those whose piece that is next has most energy
            lifted = bits_of_pieces(cuts, total + 1, options)
            changed = torch.tensor([a < b for a, b in zip(found[0], lifted, strict=True)])
            by_piece = energy.sort(dim=1, descending=True).values.view(n, cuts, -1).sum(-1)
            worth = by_piece[:, changed].sum(1)
            for e in worth.argsort(descending=True, stable=True)[:more].tolist():
                found[e] = lifted
        out[i] = tuple(of if cuts > 1 else of[0] for of in found)
    return out


METHOD = Method(
    paper="Xu et al. 2025, arXiv:2508.02322",
    options=Options,
    needs=needs,
    channels=channels,
    allocate=allocate,
    cuts=True,
)
