"""Binary: one bit a weight, the sign, with the mean magnitude of its group.

Rastegari et al., "XNOR-Net", 2016, arXiv:1603.05279; the one-bit class of MC
(Huang et al., 2024, arXiv:2410.06270):

    w_hat = mean|w| * sign(w),  sign(0) = +1,  the mean over a row's group

This is what `rtn` and `gptq` do for experts of one bit; alone it is the 1-bit baseline.

Differences from the paper: MC's text has one scale a matrix, its code one a row and group of
128 columns; here it is one a row and group, of any width.
"""

from __future__ import annotations

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from moecule.errors import RecipeError
from moecule.grid import round_to_nearest
from moecule.method import Method
from moecule.packed import Packed, pack


@dataclass(frozen=True)
class Options:
    """There is nothing to choose."""


def encode(
    w: Float[Tensor, "E M N"],
    gram: Float[Tensor, "E N N"] | None,
    bits: tuple[int, ...],
    group: int,
    options: Options,
) -> list[Packed]:
    """One Packed for each of the E weights. Raises RecipeError for any width but 1."""
    if set(bits) != {1}:
        raise RecipeError(
            f"binary writes 1 bit a weight, and the plan asks for {max(bits)}; use rtn"
        )
    q, scale, _ = round_to_nearest(w, 1, group)
    codes = pack(q, 1)
    return [Packed(codes[e], scale[e].half(), None, 1, group, w.shape[-1]) for e in range(len(w))]


METHOD = Method(paper="Rastegari et al. 2016, arXiv:1603.05279", options=Options, encode=encode)
