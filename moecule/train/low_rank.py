"""Low-rank updates of matrices that stay: W + B A (Hu et al. 2021, arXiv:2106.09685, alpha = rank)."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from moecule.train.shards import whole

RANK = 16
UPDATE = "low_rank"  # the module in a matrix's own that holds it


class LowRank(nn.Module):
    """B A, beginning at 0."""

    def __init__(self, weight: Float[Tensor, "M N"], stored: torch.dtype) -> None:
        """`stored`: W + B A is rounded to it, as it will be; gradients pass the rounding by."""
        super().__init__()
        self.stored = stored
        rows, columns = weight.shape
        lot = torch.Generator().manual_seed(rows * columns)
        a = torch.randn(RANK, columns, generator=lot) / columns**0.5
        self.a = nn.Parameter(a.to(weight.device))
        self.b = nn.Parameter(torch.zeros(rows, RANK, device=weight.device))

    def forward(self, weight: Float[Tensor, "M N"]) -> Float[Tensor, "M N"]:
        """The matrix with its update."""
        made = weight + self.b @ self.a
        return made + (made.to(self.stored).to(made.dtype) - made).detach()


def adapt(matrices: Mapping[str, nn.Linear], dtypes: Mapping[str, torch.dtype]) -> None:
    """Give each Linear an update, in place; `dtypes` are those on disk, by names of weights.

    The weight stays a parameter of its module, where FSDP2 looks for it; a parametrization would move it.
    """
    module: Any
    for name, module in matrices.items():
        module.add_module(UPDATE, LowRank(module.weight, dtypes[f"{name}.weight"]))
        module.forward = partial(_forward, module)


def updates(model: nn.Module) -> dict[str, LowRank]:
    """Those that the model has, by their matrices' names."""
    found = [(n, m) for n, m in model.named_modules() if isinstance(m, LowRank)]
    return {f"{n.removesuffix(f'.{UPDATE}')}.weight": m for n, m in found}


def merged(update: LowRank, weight: Float[Tensor, "M N"]) -> Float[Tensor, "M N"]:
    """A whole matrix with its update, of which processes may hold shards: all must call it."""
    return weight + whole(update.b.detach()) @ whole(update.a.detach())


def _forward(module: nn.Linear, x: Float[Tensor, "*B N"]) -> Float[Tensor, "*B M"]:
    update = module.get_submodule(UPDATE)
    return nn.functional.linear(x, update(module.weight), module.bias)
