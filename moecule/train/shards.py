"""Shards of parameters, by FSDP2 or by expert parallelism: made, whole, here, or clipped together."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor

from moecule.ranks import Ranks, alone


def shard(
    model: nn.Module,
    layers: Iterable[nn.Module],
    device: torch.device,
    ranks: Ranks,
    *,
    offload: bool,
) -> None:
    """Leave every process its shards, in place: layer by layer, then of the rest.

    `offload`: those lie in host memory, with their gradients and what the optimiser keeps, and a layer
    is on the device while it runs.
    """
    if device.type == "cuda":  # where FSDP2 computes
        torch.cuda.set_device(torch.cuda.current_device() if device.index is None else device)
    alone(cuda=device.type == "cuda")
    mesh = init_device_mesh(device.type, (ranks.size,))
    pinned = CPUOffloadPolicy(pin_memory=device.type == "cuda")
    policy = pinned if offload else OffloadPolicy()
    for module in (*layers, model):
        fully_shard(module, mesh=mesh, offload_policy=policy)


def whole(tensor: Any) -> Tensor:
    """A plain tensor of a shard's: what all processes hold together."""
    made: Tensor = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return made


def local(tensor: Any) -> Tensor:
    """What of a tensor this process holds."""
    made: Tensor = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    return made


def give_back(model: nn.Module) -> None:
    """Leave this process its shards alone, whatever a forward has gathered."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def average(parameters: Iterable[nn.Parameter], ranks: Ranks) -> None:
    """Let what lies whole in every process move by the gradient of all processes' windows."""

    @torch.no_grad()
    def mean(parameter: Tensor) -> None:
        assert parameter.grad is not None  # it has just been added to; averages of averages stay
        parameter.grad.copy_(ranks.add_up(parameter.grad) / ranks.size)

    for parameter in parameters:
        parameter.register_post_accumulate_grad_hook(mean)


@torch.no_grad()
def clip(parameters: Iterable[nn.Parameter], most: float) -> float:
    """Scale gradients so that their norm, over all shards, is `most` at most; the norm that it was.

    torch's own refuses parameters that are sharded over different meshes.
    """
    grads = [p.grad for p in parameters if p.grad is not None]
    squares = [whole(torch.linalg.vector_norm(g)).double().square() for g in grads]
    norm = float(torch.stack(squares).sum().sqrt()) if squares else 0.0
    if norm > most:
        torch._foreach_mul_([local(g) for g in grads], most / norm)
    return norm
