"""GPTQ: round column by column, and let the columns not yet rounded make up for the error.

Frantar et al., "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained
Transformers", 2022, arXiv:2210.17323.

    H = sum of x x^T over the calibration tokens;  U = upper Cholesky factor of (H + d I)^-1
    for column j:   e_j = (w_j - w_hat_j) / U_jj;   w_k -= e_j U_jk  for all k > j

All experts of a layer go together: one batched Cholesky, and each column step is one operation
over [E, M]. Gate and up read the same input, so they are rows of one matrix with one Hessian.

Differences from the paper:
- Levels come from a wide search over the group's range, refitted by least squares.
- An expert that no token reached has H = 0; it is rounded to nearest (H = I), never zeroed.
- `act_order` visits columns by falling diagonal with levels fixed beforehand, so that the
  stored order stays and no permutation has to be kept.
- `feedback = "block"` is what the authors' code of MC does below 4 bits: no correction inside
  a block, only of later blocks (for comparison; arXiv:2410.06270).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from moecule.errors import RecipeError
from moecule.grid import Clip, Zero, clip_of, fit_each
from moecule.hessian import inverse_factor
from moecule.method import Method
from moecule.packed import Packed, pack


@dataclass(frozen=True)
class Options:
    """Defaults are the paper's but for the clipping."""

    clip: Literal["none", "narrow", "wide"] = "wide"
    damp: float = 0.01  # share of the mean diagonal added to the diagonal
    act_order: bool = False
    feedback: Literal["column", "block"] = "column"
    zero: Zero = "any"  # "middle": what most other engines have (moecule export)

    def __post_init__(self) -> None:
        """Raises RecipeError for damping that would make a Hessian worse."""
        if not 0 < self.damp <= 1:
            raise RecipeError(f"gptq: damp = {self.damp:g}, wanted above 0 and at most 1")


def encode(
    w: Float[Tensor, "E M N"],
    gram: Float[Tensor, "E N N"] | None,
    bits: tuple[int, ...],
    group: int,
    options: Options,
) -> list[Packed]:
    """One Packed for each of the E weights. Raises RecipeError without gram matrices."""
    if gram is None:
        raise RecipeError(
            "gptq needs the calibration text's gram matrices; give --data, or use rtn"
        )
    w, n = w.float().clone(), w.shape[-1]
    u = inverse_factor(gram.float(), options.damp)
    clip = clip_of(options.clip, options.zero)
    if options.act_order:
        order = gram.diagonal(dim1=1, dim2=2).argsort(dim=-1, descending=True, stable=True)
        u = _reordered_factor(gram.float(), order, options.damp)
        levels = fit_each(w, bits, group, clip)
        q = _columns(w, u, bits, group, options, order, levels)
        scale, zero = levels
    else:
        q, scale, zero = _blocks(w, u, bits, group, clip, options)
    out = []
    for e, b in enumerate(bits):
        z = None if b == 1 else zero[e].half()
        out.append(Packed(pack(q[e].int(), b), scale[e].half(), z, b, group, n))
    return out


def _blocks(
    w: Float[Tensor, "E M N"],
    u: Float[Tensor, "E N N"],
    bits: tuple[int, ...],
    group: int,
    clip: Clip,
    options: Options,
) -> tuple[Tensor, Tensor, Tensor]:
    """(codes, scale, zero): group by group, levels fitted to what earlier groups left."""
    n, q = w.shape[-1], torch.empty_like(w)
    tops = torch.tensor([2.0**b - 1 for b in bits], device=w.device)
    inside = torch.tensor(
        [float(options.feedback == "column" or b > 3) for b in bits], device=w.device
    )
    scales, zeros = [], []
    for i in range(0, n, group):
        at = slice(i, min(i + group, n))
        s, z = (t[..., 0] for t in fit_each(w[:, :, at], bits, at.stop - i, clip))
        error = _group(w[:, :, at], u[:, at, at], (s, z), tops, inside, q[:, :, at])
        if at.stop < n:
            w[:, :, at.stop :].baddbmm_(error, u[:, at, at.stop :], alpha=-1)
        scales.append(s)
        zeros.append(z)
    return q, torch.stack(scales, -1), torch.stack(zeros, -1)


def _group(
    w: Float[Tensor, "E M n"],
    u: Float[Tensor, "E n n"],
    levels: tuple[Float[Tensor, "E M"], Float[Tensor, "E M"]],
    tops: Float[Tensor, " E"],
    inside: Float[Tensor, " E"],
    q: Float[Tensor, "E M n"],
) -> Float[Tensor, "E M n"]:
    """Round the columns of one group into `q`; return their errors."""
    s, z = levels
    if w.is_cuda:
        from moecule.kernels.rounding import round_columns

        return round_columns(w, u, s, z, tops, inside, q)
    block, error = w.clone(), torch.empty_like(w)
    for j in range(w.shape[-1]):
        column = block[:, :, j]
        code = (column / s + z).round_().clamp_(min=0).minimum(tops[:, None])
        q[:, :, j] = code
        error[:, :, j] = (column - (code - z) * s) / u[:, j, j, None]
        row = u[:, j, None, j + 1 :] * inside[:, None, None]
        block[:, :, j + 1 :] -= error[:, :, j, None] * row
    return error


def _reordered_factor(gram: Tensor, order: Int[Tensor, "E N"], damp: float) -> Tensor:
    n = gram.shape[-1]
    rows = gram.gather(1, order[:, :, None].expand(-1, n, n))
    return inverse_factor(rows.gather(2, order[:, None, :].expand(-1, n, n)), damp)


def _columns(
    w: Float[Tensor, "E M N"],
    u: Float[Tensor, "E N N"],
    bits: tuple[int, ...],
    group: int,
    options: Options,
    order: Int[Tensor, "E N"],
    levels: tuple[Tensor, Tensor],
) -> Float[Tensor, "E M N"]:
    """Codes, visiting the columns of each expert in its own order, levels given."""
    at = order[:, None, :].expand_as(w)
    w = w.gather(-1, at)
    of = (order // group)[:, None, :].expand_as(w)
    s, z = (t.gather(-1, of) for t in levels)
    q, n, block = torch.empty_like(w), w.shape[-1], 128
    top = torch.tensor([2.0**b - 1 for b in bits], device=w.device)[:, None]
    for i in range(0, n, block):
        end = min(i + block, n)
        error = torch.empty_like(w[:, :, i:end])
        for j in range(i, end):
            code = (w[:, :, j] / s[:, :, j] + z[:, :, j]).round_().clamp_(min=0).minimum(top)
            q[:, :, j] = code
            error[:, :, j - i] = (w[:, :, j] - (code - z[:, :, j]) * s[:, :, j]) / u[:, j, j, None]
            w[:, :, j + 1 : end] -= error[:, :, j - i, None] * u[:, j, None, j + 1 : end]
        w[:, :, end:] -= error @ u[:, i:end, end:]
    return torch.empty_like(q).scatter_(-1, at, q)


METHOD = Method(
    paper="Frantar et al. 2022, arXiv:2210.17323", options=Options, encode=encode, wants_gram=True
)
