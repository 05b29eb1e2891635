"""What a token's experts gave, weighted and added up in a fixed order, on a GPU."""

from __future__ import annotations

from typing import no_type_check

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int
from torch import Tensor

from moecule.kernels.matrices import chained, launching, take_turn


@triton.jit
@no_type_check
def _combine_kernel(
    y_ptr, place_ptr, idx_ptr, coef_ptr, out_ptr, m, experts, share: tl.constexpr,
    moved: tl.constexpr, width: tl.constexpr, chain: tl.constexpr,
):  # fmt: skip
    """Program (token, columns)."""
    if chain:
        take_turn()
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * width + tl.arange(0, width)
    total = tl.zeros((width,), tl.float32)
    for k in tl.static_range(share):
        pair = token * share + k
        here = tl.load(idx_ptr + pair) < experts
        place = pair
        if moved:
            place = tl.load(place_ptr + pair)
        y = tl.load(y_ptr + place * m + column, mask=here & (column < m), other=0.0)
        total += y.to(tl.float32) * tl.load(coef_ptr + pair).to(tl.float32)
    out = total.to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + token * m + column, out, mask=column < m)


def combined(
    y: Float[Tensor, "pairs M"],
    idx: Int[Tensor, "T K"],
    coef: Float[Tensor, "T K"],
    experts: int,
    dtype: torch.dtype,
    places: Int[Tensor, " pairs"] | None = None,
) -> Float[Tensor, "T M"]:
    """Each token's pairs times `coef`, added up. places: of the pairs in y, if not as they come.

    Rows of pairs that no expert serves are not read.
    """
    (tokens, share), m = idx.shape, y.shape[1]
    width = 256 if tokens < 64 else 1024
    out = torch.empty(tokens, m, dtype=dtype, device=y.device)
    idx, coef = idx.contiguous(), coef.contiguous()
    with launching(y):
        _combine_kernel[(tokens, triton.cdiv(m, width))](
            y, idx if places is None else places, idx, coef, out, m, experts, share=share,
            moved=places is not None, width=width, num_warps=width // 256, **chained(y),
        )  # fmt: skip
    return out
