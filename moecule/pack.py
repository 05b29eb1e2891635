"""Rounding the weights of one layer in place, experts in chunks that fit the memory.

Gram matrices are float64 sums of float32 products, batch by batch: the order of the batches, and
who had which of them, does not show in the float32 that is made of the sum.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Float64
from torch import Tensor, nn

from moecule.hf import Streamed
from moecule.method import Method
from moecule.moe import Heard, Moe, experts_of
from moecule.packed import Packed
from moecule.pieces import put_together, rounded
from moecule.plan import Keep
from moecule.walk import Step

# bytes of a chunk's gram matrices and weights while they are rounded. Fixed, or a share of all the
# device has: what is free now would make the chunks, and with them the last bits, differ by run.
HOST_CHUNK_BYTES = 2 * 2**30
DEVICE_SHARE = 0.25


@dataclass(frozen=True)
class Codec:
    """An encode method with its options."""

    method: Method
    options: Any

    def __call__(
        self, w: Float[Tensor, "E M N"], gram: Float[Tensor, "E N N"] | None, keeps: Sequence[Keep]
    ) -> list[Packed | None]:
        """One Packed for each weight; None where 16 bits are kept."""
        assert self.method.encode is not None  # load_method saw to it
        out: list[Packed | None] = [None] * len(keeps)
        for group in sorted({k.group for k in keeps if k.bits < 16}):
            of = [e for e, k in enumerate(keeps) if k.bits < 16 and k.group == group]
            grams = None if gram is None else gram[of]
            bits = tuple(keeps[e].bits for e in of)
            found = self.method.encode(w[of], grams, bits, group, self.options)
            for e, packed in zip(of, found, strict=True):
                out[e] = packed
        return out


def pack_weights(
    codec: Codec,
    streamed: Streamed,
    step: Step,
    keeps: Mapping[str, Keep],
    *,
    always_run: bool = False,
) -> dict[str, Packed]:
    """Round the named weights in place, with one pass for the gram matrices if the codec wants them."""
    wanted = list(keeps) if codec.method.wants_gram else []
    grams: dict[str, Tensor] = {}
    if wanted or always_run:
        with _grams(step.layer, wanted) as grams:
            step.listen()
    packed = {}
    for at, (name, keep) in enumerate(keeps.items()):
        module, owner = step.layer.get_submodule(name), streamed.ranks.owner(at)
        weight = module.get_parameter("weight").data
        if name in grams:
            streamed.ranks.sum_to(grams[name], owner)
        code = None
        if owner == streamed.ranks.rank:
            gram = grams[name].float()[None] if name in grams else None
            (code,) = codec(weight[None], gram, [keep])
        grams.pop(name, None)
        packed[name] = streamed.ranks.share(code, owner)
        module.weight = nn.Parameter(packed[name].dequantize(weight.dtype), requires_grad=False)
    return packed


@contextmanager
def _grams(layer: nn.Module, names: Sequence[str]) -> Iterator[dict[str, Float64[Tensor, "N N"]]]:
    """Within, sum x x^T over the inputs of the named modules."""
    grams: dict[str, Tensor] = {}

    def listen(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
            x = [*args, *kwargs.values()][0].flatten(0, -2)
            if name not in grams:
                grams[name] = x.new_zeros(x.shape[1], x.shape[1], dtype=torch.float64)
            grams[name] += gram_of(x)

        return hook

    handles = [
        layer.get_submodule(n).register_forward_pre_hook(listen(n), with_kwargs=True) for n in names
    ]
    try:
        yield grams
    finally:
        for handle in handles:
            handle.remove()


def gram_of(x: Float[Tensor, "t N"]) -> Float[Tensor, "N N"]:
    """x^T x in float32."""
    # 16-bit numbers are exact in TF32, whose sums are float32: the fast product loses nothing
    exact = x.dtype in (torch.bfloat16, torch.float16) and x.is_cuda
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = exact or before
    try:
        wide = x.float()
        return wide.mT @ wide
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def pack_experts(
    codec: Codec, streamed: Streamed, moe: Moe, heard: Heard, keeps: Sequence[Keep]
) -> tuple[dict[str, list[Packed | None]], list[int]]:
    """Round a layer's experts in place: (codes by matrix, the experts that no token reached).

    Of experts in pieces the codes of every piece, of the first expert first. Down projections see what
    the rounded gate and up give them. Each process rounds its experts.
    """
    ranks, experts = streamed.ranks, experts_of(moe.experts)
    pairs, wants = heard.pairs(len(experts)), codec.method.wants_gram
    top_k = heard.idx[0].shape[1] if heard.idx else 1
    codes: dict[str, list[Packed | None]] = {"gate_up": [], "down": []}
    for ids in chunks(experts.gate_up, experts.down, streamed.device):
        for name in codes:
            weights = getattr(experts, name)
            mine = [e for e in ids if ranks.owner(e) == ranks.rank]
            grams: list[Tensor] = []
            for e in ids if wants else ():
                total = weights.new_zeros(weights.shape[-1], weights.shape[-1], dtype=torch.float64)
                for b, at in enumerate(pairs[e]):
                    if len(at):
                        x = heard.x[b][at // top_k].to(streamed.device)
                        total += gram_of(x if name == "gate_up" else experts[e].act(x))
                ranks.sum_to(total, ranks.owner(e))
                if e in mine:
                    grams.append(total.float())
            gram = torch.stack(grams) if grams else None
            own = rounded(codec, moe.experts, name, weights[mine], gram, [keeps[e] for e in mine])
            for e in ids:
                pieces = own[mine.index(e)] if e in mine else None
                pieces = ranks.share(pieces, ranks.owner(e))
                codes[name] += pieces
                put_together(moe.experts, name, pieces, weights[e])
    reached = torch.tensor([sum(map(len, p)) for p in pairs], device=streamed.device)
    starved = (ranks.add_up(reached) == 0).nonzero().flatten().tolist()
    return codes, starved


def chunks(
    gate_up: Float[Tensor, "E R H"], down: Float[Tensor, "E H F"], device: torch.device
) -> list[list[int]]:
    """Experts in runs whose gram matrices and weights fit, all the same whenever it is asked."""
    widest = max(gate_up.shape[-1], down.shape[-1])
    # gram in float64 and float32, factor, its working copy; weights in float32, codes, errors
    each = (8 + 4 * 4) * widest**2 + 5 * 4 * max(gate_up[0].numel(), down[0].numel())
    most = HOST_CHUNK_BYTES
    if device.type == "cuda":
        most = int(DEVICE_SHARE * torch.cuda.get_device_properties(device).total_memory)
    n = max(1, most // each)
    ids = list(range(len(gate_up)))
    return [ids[i : i + n] for i in range(0, len(ids), n)]
