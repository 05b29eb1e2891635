"""An expert in pieces: runs of as many channels each, every piece with bits of its own.

An expert is a sum over its channels, so pieces are narrower experts that run together with one
coefficient, and their outputs add up to its own. Each token's experts become that many more, and no
kernel knows of it. Channels lie in the order of the pieces by then.

Rows of gate and up do not know of each other. Columns of the down projection do: GPTQ over all of them,
piece after piece, is GPTQ of each piece by the Hessian that is left of it when the columns still to come
make up for it as well as they can, and then letting them:

    S = H_pp - H_pr H_rr^-1 H_rp        W_r += (W_p - W_p_rounded) H_pr H_rr^-1

for the columns p of a piece and r of those still to come. Pieces of fewest bits go first.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Float, Float64, Int
from torch import Tensor

from moecule.packed import Packed
from moecule.plan import Keep
from moecule.width import rows_of

# (weights, gram matrices, what each keeps) -> one for each
Encode = Callable[[Tensor, Tensor | None, Sequence[Keep]], "list[Packed | None]"]
DAMP = 0.01  # share of the mean diagonal added to the diagonal, as GPTQ does


def rows_of_pieces(module: Any, cuts: int, channels: int) -> list[Int[Tensor, " R"]]:
    """The rows of an expert's first matrix that are of each piece."""
    runs = torch.arange(channels).split(channels // cuts)
    return [rows_of(module, of, channels) for of in runs]


def bias_of_pieces(
    module: Any, bias: Float[Tensor, "E N"], cuts: int, *, first: bool
) -> Float[Tensor, "pieces M"]:
    """Of all pieces, of the first matrix's bias or of the down projection's, which the first piece adds."""
    if cuts == 1:
        return bias
    if first:
        rows = torch.cat(rows_of_pieces(module, cuts, channels_of(module, bias[..., None]))).to(
            bias.device
        )
        return bias[:, rows].reshape(len(bias) * cuts, -1)
    none = bias.new_zeros(len(bias), cuts - 1, bias.shape[1])
    return torch.cat([bias[:, None], none], 1).flatten(0, 1)


def rounded(
    encode: Encode,
    module: Any,
    name: str,
    w: Float[Tensor, "E M N"],
    gram: Float[Tensor, "E N N"] | None,
    keeps: Sequence[Keep],
) -> list[list[Packed | None]]:
    """[expert][piece] of gate_up or down; of experts that are not cut, each alone."""
    if not keeps:
        return []
    cuts = len(keeps[0].each)
    if not keeps[0].pieces:
        return [[packed] for packed in encode(w, gram, keeps)]
    found: list[list[Packed | None]]
    if name == "down":
        found = _columns(encode, w.float().clone(), gram, keeps)
    else:
        rows, found = rows_of_pieces(module, cuts, channels_of(module, w)), []
        for p, at in enumerate(rows):
            there = _there(keeps, p)
            own = None if gram is None else gram[there]
            made = encode(w[there][:, at.to(w.device)], own, [keeps[e].each[p] for e in there])
            found.append(_spread(made, there, len(keeps)))
    return [list(of) for of in zip(*found, strict=True)]


def _there(keeps: Sequence[Keep], piece: int) -> list[int]:
    """The experts that have such a piece; of 0 bits it is not there."""
    return [e for e, k in enumerate(keeps) if k.each[piece].bits]


def _spread(made: Sequence[Packed | None], there: Sequence[int], n: int) -> list[Packed | None]:
    """By expert."""
    by = dict(zip(there, made, strict=True))
    return [by.get(e) for e in range(n)]


def put_together(
    module: Any, name: str, pieces: Sequence[Packed | None], weight: Float[Tensor, "M N"]
) -> None:
    """Overwrite one expert's matrix with what its codes stand for, where there are any."""
    full = weight.shape[1] if name == "down" else channels_of(module, weight)
    if name == "down":
        rows = list(torch.arange(full).split(full // len(pieces)))
    else:
        rows = rows_of_pieces(module, len(pieces), full)
    for at, packed in zip(rows, pieces, strict=True):
        if packed is not None:
            there = at.to(weight.device)
            made = packed.dequantize(weight.dtype)
            if name == "down":
                weight[:, there] = made
            else:
                weight[there] = made


def channels_of(module: Any, first: Float[Tensor, "*E R N"]) -> int:
    """Of an expert with such a first matrix."""
    return first.shape[-2] // (2 if module.has_gate else 1)


def _columns(
    encode: Encode,
    left: Float[Tensor, "E M N"],
    gram: Float[Tensor, "E N N"] | None,
    keeps: Sequence[Keep],
) -> list[list[Packed | None]]:
    """[piece][expert] of down projections: those of fewest bits first, the others make up for them."""
    cuts = len(keeps[0].each)
    width, found = left.shape[-1] // cuts, dict[int, list[Packed | None]]()
    runs = [torch.arange(p * width, (p + 1) * width, device=left.device) for p in range(cuts)]
    order = list(reversed(range(cuts)))
    for n, p in enumerate(order):
        own, rest = runs[p], torch.cat([runs[q] for q in order[n + 1 :]] or [runs[p][:0]])
        grams, back, there = None, list[Tensor](), _there(keeps, p)
        if gram is not None and there:
            parted = [_parted(gram[e].double(), own, rest) for e in there]
            grams, back = torch.stack([s.float() for s, _ in parted]), [b for _, b in parted]
        made = encode(left[there][:, :, own], grams, [keeps[e].each[p] for e in there])
        found[p] = _spread(made, there, len(keeps))
        for e, packed, by in zip(there, made, back, strict=False):
            assert packed is not None  # no piece stays at 16 bits
            off = left[e][:, own] - packed.dequantize(torch.float32)
            left[e][:, rest] += (off.double() @ by).float()
    return [found[p] for p in range(cuts)]


def _parted(
    h: Float64[Tensor, "n n"], own: Int[Tensor, " p"], rest: Int[Tensor, " r"]
) -> tuple[Float64[Tensor, "p p"], Float64[Tensor, "p r"]]:
    """(S, H_pr H_rr^-1); nothing makes up for anything where no token came."""
    across, least = h[own][:, rest], h[rest][:, rest]
    if not len(rest) or not least.diagonal().amax() > 0:
        return h[own][:, own], torch.zeros_like(across)
    least.diagonal().add_(DAMP * least.diagonal().mean())
    back = torch.cholesky_solve(across.mT, torch.linalg.cholesky(least)).mT
    return h[own][:, own] - back @ across.mT, back
