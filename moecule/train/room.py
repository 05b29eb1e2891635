"""Whether there is room to train, reckoned before it begins."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from packaging.version import Version
from torch import nn

from moecule.budget import format_size
from moecule.errors import RecipeError
from moecule.hf import Streamed
from moecule.session import Compute, memory_bytes
from moecule.states import free_bytes, free_host_bytes

PUBLIC = "2.13"  # the torch that says in public how pinned blocks are given back
# Bytes of each number that moves, besides itself, all in float32.
ON_DEVICE = 12  # its gradient, two moments
ON_HOST = 24  # two moments, the best state, and what is saved: it and its moments once more


def check_room(model: nn.Module, compute: Compute, *, offload: bool) -> None:
    """Raise RecipeError where gradients, moments and copies have no room, and say what has.

    `offload`: on the host, where the weights are to lie in pinned blocks, too.
    """
    device, size = compute.torch_device(), compute.ranks.size

    def wanted(moves: Callable[[nn.Parameter], bool]) -> int:
        if offload:  # the processes of a machine share its memory
            return host_bytes(model, moves)
        return ON_DEVICE * sum(p.numel() for p in model.parameters() if moves(p)) // size

    takes = wanted(lambda p: p.requires_grad)
    free = free_host_bytes() if offload else free_bytes(device)
    if takes > free:
        where = "the host" if offload else str(device)
        more = "" if offload else ", or more processes"
        if device.type == "cuda" and not offload:
            more = f", --offload{more}"
        numbers = sum(p.numel() for p in model.parameters() if p.requires_grad) / 1e6
        raise RecipeError(
            f"training {numbers:.1f}M numbers takes {format_size(takes)} beside the weights, and "
            f"{where} has {format_size(free)}; norms alone take "
            f"{format_size(wanted(lambda p: p.dim() == 1))}: give other --parts, --by-layer{more}"
        )


def host_bytes(model: nn.Module, moves: Callable[[nn.Parameter], bool]) -> int:
    """What a model whose parameters are to lie in host memory takes there beyond what is there.

    Weights and gradients are pinned, in blocks of powers of two that torch does not give back.
    """
    total = 0
    for parameter in model.parameters():
        numbers = parameter.numel()
        block = 1 << (4 * numbers - 1).bit_length()
        total += block - (4 * numbers if parameter.device.type == "cpu" else 0)
        if moves(parameter):
            total += block + ON_HOST * numbers
    return total


def forget_pinned() -> None:
    """Give pinned blocks of host memory back that are not in use; torch keeps them otherwise."""
    if Version(torch.__version__) >= Version(PUBLIC):
        torch.accelerator.empty_host_cache()
    else:
        torch._C._host_emptyCache()


def fits_beside(teacher: Streamed, compute: Compute, *, offload: bool, packed: bool) -> bool:
    """Whether a teacher has room beside a float32 student of its size, all of which moves.

    `offload`: of which the device holds two layers and one layer's gradients, embeddings and head with
    theirs, and if it is `packed` its codes, a byte each.
    """
    layers = [sum(p.numel() for p in layer.parameters()) for layer in teacher.layers]
    numbers = sum(p.numel() for p in teacher.model.parameters())
    wanted = (4 + ON_DEVICE) * numbers
    if offload:
        wanted = 4 * (3 * max(layers) + 2 * (numbers - sum(layers))) + numbers * packed
    return bool(memory_bytes(teacher) + wanted <= free_bytes(compute.torch_device()))


@contextmanager
def opening(name: str, device: Any) -> Iterator[None]:
    """Raises RecipeError where a model that is being opened finds no room."""
    try:
        yield
    except torch.OutOfMemoryError as e:
        raise RecipeError(
            f"{name} finds no room on {device} ({str(e).split('. ')[0]}); a teacher need not lie there "
            "(--top-k), nor all layers at once (--by-layer)"
        ) from e
