"""Packed experts on a GPU: by their codes for few tokens, unpacked on the way to the matrix
units for more, unpacked first for many.

Only where weights are unpacked first does the host wait for the GPU, to know how many tokens each expert
has; all else can be captured in a CUDA graph.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers.activations import ACT2FN
from transformers.integrations.moe import _default_apply_gate

from moecule import dense
from moecule.kernels import grouped, grouped_int8, ops, unpack
from moecule.kernels.matrices import Matrices
from moecule.kernels.sort import Sorted
from moecule.moe import activated, end_of, ended
from moecule.packed import packed_of

# Where ways cross, by bench.kernels on an H100, in pairs an expert: up to which reading codes anew for
# every pair is fastest; and from which on unpacking once is, with activations rounded and as they are,
# where an expert's weights are so many that they are worth launches of their own
FEW_PAIRS, MANY_PAIRS, MANY_EXACT, LARGE = 1, 620, 256, 2**24


def experts_there(module: Any) -> tuple[Matrices, Matrices] | None:
    """(gate and up, down) of an experts module, found once; None where the kernels do not serve them."""
    found: tuple[Matrices, Matrices] | None = dense.found_once(
        module, _place_of_experts, _experts_of
    )
    return found


def reached(module: Any, device: torch.device) -> tuple[Matrices, Matrices] | None:
    """As `experts_there` from now on, for a device that reads the weights where they lie."""
    place = _place_of_experts(module)
    module.there = None if place is None else _experts_of(module, device)
    module.place = place
    there: tuple[Matrices, Matrices] | None = module.there
    return there


def _place_of_experts(module: Any) -> int | None:
    if "bits16" in module.packed:
        return None
    place: int = module.packed[module.slots[0][0]].gate_up_codes.data_ptr()
    return place


def _experts_of(
    module: Any, device: torch.device | None = None
) -> tuple[Matrices, Matrices] | None:
    stacks = [(module.packed[kind], row) for kind, row in module.slots]
    up, down = (
        Matrices.of([packed_of(stack, name, row) for stack, row in stacks], device)
        for name in ("gate_up", "down")
    )
    return None if up is None or down is None else (up, down)


def experts_forward(
    module: Any,
    up: Matrices,
    down: Matrices,
    hidden: Float[Tensor, "T H"],
    idx: Int[Tensor, "T K"],
    coef: Float[Tensor, "T K"],
) -> Float[Tensor, "T H"]:
    """The forward of an experts module; pairs with no expert of its own, skipped, add nothing."""
    if module.uses is not None:
        pairs = idx.flatten()
        module.uses.scatter_add_(0, pairs, torch.ones_like(pairs, dtype=torch.int32))
    each, exact = idx.numel() / len(up), module.exact
    full = exact and hidden.dtype == torch.float32  # the matrix units take 16 bits
    many = each >= (MANY_EXACT if exact else MANY_PAIRS) and up.rows * up.columns >= LARGE
    if each <= FEW_PAIRS and (full or not exact):
        how = _few
    elif full or many or _is_far(module, each):
        how = _unpacked
    else:
        how = _grouped if exact else _grouped_int8
    return how(module, up, down, hidden, idx, coef)


def _is_far(module: Any, each: float) -> bool:
    """Whether weights may come over the bus, and more than once if not unpacked first.

    Grouped products read them for every tile of tokens. What is compiled cannot wait for the GPU.
    """
    return module.uses is not None and each > FEW_PAIRS and not torch.compiler.is_compiling()


def _grouped(
    module: Any, up: Matrices, down: Matrices, hidden: Tensor, idx: Tensor, coef: Tensor
) -> Tensor:
    pairs, top_k = ops.sorted_pairs(idx.flatten(), len(up), grouped.CUTS), idx.shape[1]
    y = ops.exact_products(ops.arranged(hidden, up), pairs.order // top_k, up, pairs)
    if _is_swiglu(module):
        act = ops.arranged(y, down, gated=True)
    else:
        act = ops.arranged(_activated(module, y, pairs, idx), down)
    each = torch.arange(len(y), device=y.device)
    return _added(module, ops.exact_products(act, each, down, pairs), pairs.places, idx, coef)


def _grouped_int8(
    module: Any, up: Matrices, down: Matrices, hidden: Tensor, idx: Tensor, coef: Tensor
) -> Tensor:
    pairs, top_k = ops.sorted_pairs(idx.flatten(), len(up), grouped_int8.CUTS), idx.shape[1]
    x = ops.tiled(hidden, pairs.order // top_k, up, pairs)
    y = ops.tiled_products(x, up, pairs, hidden)
    if _is_swiglu(module):
        act = ops.tiled(y, None, down, pairs, gated=True)
    else:
        act = ops.tiled(_activated(module, y, pairs, idx), None, down, pairs)
    out = ops.tiled_products(act, down, pairs, hidden)
    return _added(module, out, pairs.places, idx, coef)


def _activated(
    module: Any, y: Float[Tensor, "pairs R"], pairs: Sorted, idx: Int[Tensor, "T K"]
) -> Float[Tensor, "pairs F"]:
    return activated(module, y, idx.flatten()[pairs.order].clamp(max=module.num_experts - 1))


def _added(
    module: Any,
    out: Float[Tensor, "pairs H"],
    places: Int[Tensor, " pairs"],
    idx: Int[Tensor, "T K"],
    coef: Float[Tensor, "T K"],
) -> Float[Tensor, "T H"]:
    """Each token's experts added up; places: of the pairs in out."""
    if _ends_plainly(module):
        return ops.combined(out, idx, coef, module.num_experts, out, places)
    return _weighted(module, out[places], idx, coef)


def _weighted(
    module: Any,
    out: Float[Tensor, "pairs H"],
    idx: Int[Tensor, "T K"],
    coef: Float[Tensor, "T K"],
) -> Float[Tensor, "T H"]:
    """Each token's experts added up, of what the down projections gave."""
    n = module.num_experts
    each = ended(module, out, idx.flatten().clamp(max=n - 1)).view(*idx.shape, -1)
    # what belongs to no expert was perhaps never written
    each = torch.where((idx < n)[..., None], each * coef[..., None], 0)
    return each.sum(1).to(out.dtype)


def _unpacked(
    module: Any, up: Matrices, down: Matrices, hidden: Tensor, idx: Tensor, coef: Tensor
) -> Tensor:
    n, pairs = len(up), idx.flatten()
    counts = pairs.bincount(minlength=n + 1)[:n].tolist()  # waits for the GPU
    order = pairs.argsort(stable=True)
    act = activated(
        module,
        _products(hidden[order // idx.shape[1]], up, counts),
        pairs[order].clamp(max=n - 1) if module.has_bias else None,
    )
    out = _products(act, down, counts)
    places = torch.arange(len(order), device=order.device)
    return _added(module, out, torch.empty_like(order).scatter_(0, order, places), idx, coef)


def _products(
    x: Float[Tensor, "pairs N"], of: Matrices, counts: Sequence[int]
) -> Float[Tensor, "pairs M"]:
    """Of sorted pairs, so many an expert."""
    out = torch.empty(len(x), of.rows, dtype=x.dtype, device=x.device)
    for e, (count, end) in enumerate(zip(counts, accumulate(counts), strict=True)):
        if count:
            its = slice(end - count, end)
            torch.mm(x[its], unpack.unpacked(of, e, x.dtype).T, out=out[its])
    return out


def _few(
    module: Any, up: Matrices, down: Matrices, hidden: Tensor, idx: Tensor, coef: Tensor
) -> Tensor:
    top_k, pairs = idx.shape[1], idx.flatten()
    x = [hidden] if module.exact else ops.rounded(hidden, up, pairs)
    if _is_swiglu(module):
        act = ops.gated(x, up, pairs, top_k, down)
    else:
        y = ops.products(x, up, pairs, top_k)
        plain = activated(module, y, pairs.clamp(max=len(up) - 1))
        act = [plain] if module.exact else ops.rounded(plain, down)
    if _ends_plainly(module):
        out = ops.products(act, down, pairs, 1)
        return ops.combined(out, idx, coef, len(up), hidden)
    return _weighted(module, ops.products(act, down, pairs, 1, hidden), idx, coef)


def _ends_plainly(module: Any) -> bool:
    """Nothing comes after the down projections but the coefficients."""
    return not module.has_bias and end_of(module) is None


def _is_swiglu(module: Any) -> bool:
    """silu(gate) * up, the gate's rows before those of up, and nothing added."""
    plain = type(module)._apply_gate is _default_apply_gate and type(module.act_fn) is type(
        ACT2FN["silu"]
    )
    return bool(module.has_gate and plain and not module.has_bias)
