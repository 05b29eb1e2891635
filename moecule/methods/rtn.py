"""RTN: round every weight to the nearest level of its group; needs no data.

The levels come from a search over the group's range (Frantar et al., "GPTQ", 2022,
arXiv:2210.17323, where this is the baseline; the wide search is ours).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from jaxtyping import Float
from torch import Tensor

from moecule.grid import Zero, clip_of, round_to_nearest
from moecule.method import Method
from moecule.packed import Packed, pack


@dataclass(frozen=True)
class Options:
    """How a group's range is clipped."""

    clip: Literal["none", "narrow", "wide"] = "wide"
    zero: Zero = "any"


def encode(
    w: Float[Tensor, "E M N"],
    gram: Float[Tensor, "E N N"] | None,
    bits: tuple[int, ...],
    group: int,
    options: Options,
) -> list[Packed]:
    """One Packed for each of the E weights; `gram` is not read."""
    out = []
    for e, b in enumerate(bits):
        q, scale, zero = round_to_nearest(w[e], b, group, clip_of(options.clip, options.zero))
        out.append(
            Packed(pack(q, b), scale.half(), None if b == 1 else zero.half(), b, group, w.shape[-1])
        )
    return out


METHOD = Method(paper="Frantar et al. 2022, arXiv:2210.17323", options=Options, encode=encode)
