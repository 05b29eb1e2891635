"""The factor of an inverse Hessian, by which columns make up for what was done to those before them."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from moecule.errors import RecipeError


def inverse_factor(gram: Float[Tensor, "E N N"], damp: float) -> Float[Tensor, "E N N"]:
    """U, upper, with U^T U = (H + damping)^-1; the identity where H is 0.

    Raises RecipeError for a Hessian that stays singular.
    """
    out = torch.empty_like(gram)
    for e, h in enumerate(gram):  # one by one, so that the bits do not depend on the company
        out[e] = _inverse_factor(h, damp)
    return out


def _inverse_factor(gram: Float[Tensor, "N N"], damp: float) -> Float[Tensor, "N N"]:
    # H = R R^T with R upper is the Cholesky factor of H turned about; then U = R^-1
    h = gram.flip(0, 1)
    diag = h.diagonal()
    diag += torch.where(diag.amax() > 0, 0.0, 1.0)  # no token came: H = I
    # a column that is always 0 has no say; any positive value keeps the factor defined
    diag += torch.where(diag == 0, diag.mean(), 0.0)
    mean = diag.mean()
    for extra in (damp, 10 * damp, 100 * damp):
        diag += extra * mean
        low, info = torch.linalg.cholesky_ex(h)
        if not info.any():
            break
    else:
        raise RecipeError(f"a Hessian stays singular with damping {100 * damp:g}; raise damp")
    one = torch.eye(len(h), dtype=h.dtype, device=h.device)
    inverse: Tensor = torch.linalg.solve_triangular(low, one, upper=False)
    return inverse.flip(0, 1)
