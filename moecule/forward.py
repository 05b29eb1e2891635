"""How packed weights are run: an experts module's forward, a Linear's, and the weights themselves.

The codes are multiplied as they are: on a CPU by the C kernel, where a compiler has made it, on a GPU by
Triton's. Where there is neither, or a gradient is wanted, weights are unpacked by torch first.
"""

from __future__ import annotations

import importlib
import importlib.util
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float, Int, Int32
from torch import Tensor, nn

from moecule.kernels import cpu
from moecule.moe import activated, ended
from moecule.packed import Packed, packed_of


def _kernels_of_gpu() -> Any:
    """The module `gpu`, which needs Triton; None without either."""
    if not torch.cuda.is_available():
        return None
    if importlib.util.find_spec("triton") is None:
        warnings.warn(
            "packed weights run by plain torch on the GPU: there is no triton; pip install 'moecule[gpu]'",
            stacklevel=2,
        )
        return None
    return importlib.import_module("moecule.gpu")


GPU = _kernels_of_gpu()


def _on_gpu(x: Tensor, *others: Tensor) -> bool:
    """Whether Triton's kernels, which give no gradients, may run."""
    wants = torch.is_grad_enabled() and any(t.requires_grad for t in (x, *others))
    return GPU is not None and x.is_cuda and not wants


def unpacked(weight: Packed, dtype: torch.dtype) -> Float[Tensor, "M N"]:
    """The weights that the codes stand for."""
    return (
        cpu.dequantize(weight).to(dtype) if _is_served(weight.codes) else weight.dequantize(dtype)
    )


def _is_served(tensor: Tensor) -> bool:
    """Whether the C kernel may run: on a CPU, where no gradient is wanted, if it could be compiled."""
    wants = torch.is_grad_enabled() and tensor.requires_grad
    return tensor.device.type == "cpu" and not wants and cpu.library() is not None


def times(x: Float[Tensor, "T N"], weight: Packed, *, exact: bool = True) -> Float[Tensor, "T M"]:
    """x times the transposed weight, in the dtype of x; `exact` as in `kernels.cpu.multiply`."""
    if _is_served(x):
        return cpu.linear(x.float(), weight, exact=exact).to(x.dtype)
    return nn.functional.linear(x, unpacked(weight, x.dtype))


def linear_forward(self: Any, x: Float[Tensor, "*B N"]) -> Float[Tensor, "*B M"]:
    """The forward of a Linear whose weight is packed."""
    of = GPU.dense.weight_there(self) if _on_gpu(x) else None
    y: Tensor
    if of is not None:
        y = GPU.dense.linear(self, x, of)
    else:
        y = times(x.reshape(-1, x.shape[-1]), packed_of(self, "weight"), exact=self.exact)
    y = y.view(*x.shape[:-1], y.shape[-1])
    return y if self.bias is None else y + self.bias


def block_forward(plain: Callable[..., Any]) -> Callable[..., Any]:
    """The forward of a MoE block, of its own: its router is quicker where it is traced for a GPU."""

    def run(self: Any, *args: Any, **kwargs: Any) -> Any:
        hidden = (*args, *kwargs.values())[0]
        if not (torch.compiler.is_compiling() and _on_gpu(hidden, *self.parameters())):
            return plain(self, *args, **kwargs)
        with GPU.dense.QuickRouting():
            return plain(self, *args, **kwargs)

    return run


def packed_forward(
    self: Any, hidden: Float[Tensor, "T H"], idx: Int[Tensor, "T K"], coef: Float[Tensor, "T K"]
) -> Float[Tensor, "T H"]:
    """The forward of an experts module whose weights are packed; only experts that are hit are read."""
    if "into" in self._buffers:  # experts that became part of others
        idx = self.into[idx].to(idx.dtype)
    if self.skip is not None:
        idx, coef = self.skip(hidden, idx, coef, self.whole)
    runs = self._buffers.get("runs")
    if self.cuts > 1 or runs is not None:
        idx, coef = in_pieces(idx, coef, self.cuts, self.num_experts, runs)
    found = GPU.experts_there(self) if _on_gpu(hidden, coef) else None
    if found is not None:
        made: Tensor = GPU.experts_forward(self, *found, hidden, idx, coef)
        return made
    top_k, order = idx.shape[1], idx.flatten().argsort(stable=True)
    counts = idx.flatten().bincount(minlength=self.num_experts + 1).tolist()
    *pairs, skipped = order.split(counts)
    hit = {e: p // top_k for e, p in enumerate(pairs) if len(p)}  # {expert: its tokens}
    few = {e: t for e, t in hit.items() if len(t) <= cpu.FEW and self.slots[e][0] != "bits16"}
    runs = [few] if len(few) > 1 and _is_served(hidden) else []  # one call of the kernel a matrix
    runs += [{e: t} for e, t in hit.items() if not (runs and e in few)]
    outs: dict[int, Tensor] = {}
    for tokens in runs:
        sizes = [len(t) for t in tokens.values()]
        outs |= zip(tokens, _run(self, hidden, tokens).split(sizes), strict=True)
    each = torch.cat([*(outs[e] for e in hit), hidden.new_zeros(len(skipped), hidden.shape[1])])
    # back to the tokens' order by gathering: adding into rows is slow, and not reproducible on GPUs
    back = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
    return (each[back].view(*idx.shape, -1) * coef[..., None]).sum(1).to(hidden.dtype)


def in_pieces(
    idx: Int[Tensor, "T K"],
    coef: Float[Tensor, "T K"],
    cuts: int,
    nobody: int,
    runs: Int32[Tensor, "n cuts"] | None = None,
) -> tuple[Int[Tensor, "T pieces"], Float[Tensor, "T pieces"]]:
    """Every piece of each expert, with the expert's coefficient; past the last is `nobody`.

    `runs` names them where not all experts have as many (runs.ids_of).
    """
    if runs is not None:
        return runs[idx].flatten(1).to(idx.dtype), coef.repeat_interleave(cuts, dim=1)
    at = idx[..., None] * cuts + torch.arange(cuts, device=idx.device)
    return at.clamp(max=nobody).flatten(1), coef.repeat_interleave(cuts, dim=1)


def _run(
    module: Any, hidden: Float[Tensor, "T H"], tokens: Mapping[int, Int[Tensor, " _t"]]
) -> Float[Tensor, "t H"]:
    """Outputs of some experts, each for its own tokens, before the coefficients."""
    counts = [len(t) for t in tokens.values()]
    expert = None
    if module.has_bias:
        of_pairs = [e for e, n in zip(tokens, counts, strict=True) for _ in range(n)]
        expert = torch.tensor(of_pairs, device=hidden.device)
    up = _product(module, "gate_up", hidden[torch.cat([*tokens.values()])], [*tokens], counts)
    act = activated(module, up, expert)
    return ended(module, _product(module, "down", act, [*tokens], counts), expert)


def _product(
    module: Any,
    name: str,
    x: Float[Tensor, "t N"],
    experts: Sequence[int],
    counts: Sequence[int],
) -> Float[Tensor, "t M"]:
    stacks = [(module.packed[kind], row) for kind, row in (module.slots[e] for e in experts)]
    stack, row = stacks[0]
    if len(stacks) == 1:
        made: Tensor = stack.times(x, name, row, exact=module.exact)
        return made
    jobs = [s.job(name, r) for s, r in stacks]
    rows = stack.shapes[name][0]
    return cpu.multiply(jobs, x.float(), counts, rows, exact=module.exact).to(x.dtype)
