"""Packed experts and weights on a GPU: by their codes for few tokens, unpacked on the way to the matrix
units for more, unpacked first for many.

Nothing here waits for the GPU, so all of it can be captured in a CUDA graph.
"""

from __future__ import annotations

from copy import copy
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, _default_apply_gate

from moecule.kernels import gemv, unpack
from moecule.kernels.grouped import Sorted, arranged, grouped
from moecule.kernels.matrices import Matrices
from moecule.moe import activated, end_of, ended, first_matrix
from moecule.packed import packed_of

FEW_PAIRS = 4  # an expert, up to which reading codes anew for every pair is fastest
MANY_PAIRS = 512  # an expert, from which on unpacking once is
FEW_TOKENS = 12  # at a weight that all tokens meet


def experts_there(module: Any) -> tuple[Matrices, Matrices] | None:
    """(gate and up, down) of an experts module, found once; None where the kernels do not serve them."""
    if any(kind == "bits16" for kind, _ in module.slots):
        return None
    stacks = [(module.packed[kind], row) for kind, row in module.slots]
    place, known = stacks[0][0].gate_up_codes.data_ptr(), vars(module).setdefault("there", {})
    if place not in known:  # they have moved
        known.clear()
        up, down = (
            Matrices.of([packed_of(stack, name, row) for stack, row in stacks])
            for name in ("gate_up", "down")
        )
        known[place] = None if up is None or down is None else (up, down)
    found: tuple[Matrices, Matrices] | None = known[place]
    return found


def linear(x: Float[Tensor, "T N"], of: Matrices, *, exact: bool) -> Float[Tensor, "T M"]:
    """x times one transposed weight."""
    if len(x) > FEW_TOKENS:
        return nn.functional.linear(x, unpack.unpacked(of, x.dtype)[0])
    first = torch.zeros(len(x), dtype=torch.int64, device=x.device)
    y = gemv.products(x if exact else gemv.rounded(x, of), of, first, 1)
    return gemv.summed(y, first, 1, 1, x.dtype)


def experts_forward(
    module: Any,
    up: Matrices,
    down: Matrices,
    hidden: Float[Tensor, "T H"],
    idx: Int[Tensor, "T K"],
    coef: Float[Tensor, "T K"],
) -> Float[Tensor, "T H"]:
    """The forward of an experts module; pairs with no expert of its own, skipped, add nothing."""
    each = idx.numel() / len(up)
    if each <= FEW_PAIRS:
        how = _few
    elif each >= MANY_PAIRS or hidden.dtype == torch.float32:  # of 16 bits the matrix units are
        how = _unpacked
    else:
        how = _grouped
    return how(module, up, down, hidden, idx, coef)


def _grouped(
    module: Any, up: Matrices, down: Matrices, hidden: Tensor, idx: Tensor, coef: Tensor
) -> Tensor:
    n, pairs = len(up), idx.flatten()
    by_expert = Sorted.of(pairs, n)
    order, places = by_expert.order, torch.arange(len(pairs), device=idx.device)
    y = grouped(arranged(hidden, up), order // idx.shape[1], up, by_expert)
    if _is_swiglu(module):
        act = arranged(y, down, gated=True)
    else:
        act = arranged(activated(module, y, pairs[order].clamp(max=n - 1)), down)
    out = grouped(act, places, down, by_expert)
    back = torch.empty_like(order).scatter_(0, order, places)
    return _together(module, out[None], pairs, coef, hidden.dtype, n, back)


def _together(
    module: Any,
    out: Float[Tensor, "splits pairs H"],
    pairs: Int[Tensor, " pairs"],
    coef: Float[Tensor, "T K"],
    dtype: torch.dtype,
    n: int,
    places: Int[Tensor, " pairs"] | None = None,
) -> Float[Tensor, "T H"]:
    """Each token's experts added up, of what the down projections gave."""
    top_k = coef.shape[1]
    if not module.has_bias and end_of(module) is None:
        each = coef.flatten().contiguous()
        return gemv.summed(out, pairs, top_k, n, dtype, each, places)
    each = gemv.summed(out, pairs, 1, n, torch.float32, places=places)
    each = ended(module, each.to(dtype), pairs.clamp(max=n - 1))
    each = each * (coef.flatten() * (pairs < n))[:, None]
    return each.view(*coef.shape, -1).sum(1).to(dtype)


def _unpacked(
    module: Any, up: Matrices, down: Matrices, hidden: Tensor, idx: Tensor, coef: Tensor
) -> Tensor:
    """transformers' own grouped product, for as long as this takes on plain weights."""
    plain = copy(module)  # the module stays as it is
    for name, of in {first_matrix(module): up, "down_proj": down}.items():
        weights = unpack.unpacked(of, hidden.dtype)
        vars(plain)[name] = weights.mT if module.is_transposed else weights
    # an expert that is not there means no product, as where others have the other experts
    vars(plain)["_is_expert_parallel"] = True
    made: Tensor = ALL_EXPERTS_FUNCTIONS["grouped_mm"](plain, hidden, idx, coef)
    return made


def _few(
    module: Any, up: Matrices, down: Matrices, hidden: Tensor, idx: Tensor, coef: Tensor
) -> Tensor:
    n, top_k, pairs = len(up), idx.shape[1], idx.flatten()
    y = gemv.products(hidden if module.exact else gemv.rounded(hidden, up), up, pairs, top_k)
    act: gemv.Activations
    if _is_swiglu(module) and not module.exact:
        act = gemv.gated(y, down, pairs, n)
    else:
        plain = activated(
            module, gemv.summed(y, pairs, 1, n, torch.float32), pairs.clamp(max=n - 1)
        )
        act = plain if module.exact else gemv.rounded(plain, down)
    out = gemv.products(act, down, pairs, 1)
    return _together(module, out, pairs, coef, hidden.dtype, n)


def _is_swiglu(module: Any) -> bool:
    """silu(gate) * up, the gate's rows before those of up, and nothing added."""
    plain = type(module)._apply_gate is _default_apply_gate and isinstance(module.act_fn, nn.SiLU)
    return bool(module.has_gate and plain and not module.has_bias)
