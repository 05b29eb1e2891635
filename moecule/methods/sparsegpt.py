"""SparseGPT: make weights 0 column by column, and let the columns after them make up for the error.

Frantar and Alistarh, "SparseGPT: Massive Language Models Can Be Accurately Pruned in One-Shot", 2023,
arXiv:2301.00774.

    H = sum of x x^T over the tokens routed to the expert;  U = upper Cholesky factor of (H + d I)^-1
    of a block of columns, the least  (w_rc / U_cc)^2  go;  e = w_j / U_jj;  w_k -= e U_jk  for k > j

The share that goes is that of each block of a matrix, over all its rows; which is decided when the blocks
before it have been compensated for. Of equals those of the higher row and column go.

Differences from the paper:
- An expert that no token reached has H = I, and the least of its weights go.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from moecule.errors import RecipeError
from moecule.hessian import inverse_factor
from moecule.method import Method


@dataclass(frozen=True)
class Options:
    """Defaults are the paper's."""

    damp: float = 0.01  # share of the mean diagonal added to the diagonal
    block: int = 128  # columns that are decided on at once

    def __post_init__(self) -> None:
        """Raises RecipeError for damping that would make a Hessian worse, and blocks of nothing."""
        if not 0 < self.damp <= 1 or self.block < 1:
            raise RecipeError(
                f"sparsegpt: damp = {self.damp:g} and block = {self.block}, wanted damping above 0 and at "
                "most 1, and blocks of 1 column or more"
            )


def mask(
    w: Float[Tensor, "E M N"], seen: Float[Tensor, "E N N"], density: float, options: Options
) -> Float[Tensor, "E M N"]:
    """The weights that stay, mended, 0 in place of the others; `seen` are gram matrices."""
    dtype, n, w = w.dtype, w.shape[-1], w.float().clone()
    u = inverse_factor(seen.float(), options.damp)
    reached = seen.diagonal(dim1=1, dim2=2)
    dead = (reached == 0) & (reached.amax(-1, keepdim=True) > 0)
    w.masked_fill_(dead[:, None], 0.0)  # nobody reads them
    for start in range(0, n, options.block):
        at = slice(start, min(start + options.block, n))
        stays = _stays(w[:, :, at], u[:, at, at], density)
        errors = torch.empty_like(w[:, :, at])
        for j in range(at.stop - start):
            column = w[:, :, start + j]
            errors[:, :, j] = column * ~stays[:, :, j] / u[:, start + j, start + j, None]
            column *= stays[:, :, j]
            rest = u[:, None, start + j, start + j + 1 : at.stop]
            w[:, :, start + j + 1 : at.stop] -= errors[:, :, j, None] * rest
        w[:, :, at.stop :] -= errors @ u[:, at, at.stop :]
    return w.to(dtype)


def _stays(
    w: Float[Tensor, "E M n"], u: Float[Tensor, "E n n"], density: float
) -> Bool[Tensor, "E M n"]:
    """Which weights of a block stay."""
    metric = (w / u.diagonal(dim1=1, dim2=2)[:, None]).square().flatten(1)
    left = metric.shape[1] - int((1 - density) * metric.shape[1] + 1e-9)
    best = metric.argsort(dim=1, descending=True, stable=True)[:, :left]
    return torch.zeros_like(metric, dtype=torch.bool).scatter_(1, best, True).view(w.shape)


METHOD = Method(
    paper="Frantar and Alistarh 2023, arXiv:2301.00774", options=Options, mask=mask, wants_gram=True
)
