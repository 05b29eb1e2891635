"""Whether there is room to train, reckoned before it begins."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from packaging.version import Version
from torch import nn

from moecule.budget import format_size
from moecule.checkpoint import Checkpoint
from moecule.errors import RecipeError
from moecule.hf import Streamed, skeleton
from moecule.moe import experts_in
from moecule.session import Compute, memory_bytes, stream
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

    numbers = sum(p.numel() for p in model.parameters() if p.requires_grad) / 1e6
    few = format_size(wanted(lambda p: p.dim() == 1))
    more = "" if offload else ", or more processes"
    if device.type == "cuda" and not offload:
        more = f", --offload{more}"
    _check(
        wanted(lambda p: p.requires_grad),
        None if offload else device,
        f"training {numbers:.1f}M numbers beside the weights",
        f"norms alone take {few}: give other --parts, --by-layer{more}",
    )


def check_unpacked(checkpoint: Checkpoint, compute: Compute) -> None:
    """Raise RecipeError where all experts, unpacked for the gradient of masks, have no room."""
    model = skeleton(checkpoint, torch.float32)[0]
    _check(
        sum(4 * p.numel() for _, m in experts_in(model) for p in m.parameters()),
        compute.torch_device(),
        "learning masks with all experts unpacked",
        "use a larger device, or a recipe that skips by thresholds (mc)",
    )


def check_scored(models: Sequence[str | Path], compute: Compute) -> None:
    """Raise RecipeError where the first model, gradients of its size and the others do not fit."""
    sizes = [memory_bytes(stream(m, compute, empty=True)) for m in models]
    _check(
        sum(sizes) + sizes[0],
        compute.torch_device(),
        "scoring by gradients",
        "take a device with more, or --dtype bfloat16; `moecule compress --recipe heapr` cuts channels "
        "layer by layer",
    )


def _check(takes: int, device: torch.device | None, what: str, instead: str) -> None:
    """Raise RecipeError where that is more than is free on the device, or on the host."""
    free = free_host_bytes() if device is None else free_bytes(device)
    if takes > free:
        where = "the host" if device is None else str(device)
        raise RecipeError(
            f"{what} takes {format_size(takes)}, and {where} has {format_size(free)} left; {instead}"
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
def opening(name: str, device: torch.device) -> Iterator[None]:
    """Raises RecipeError where a model that is being opened finds no room."""
    try:
        yield
    except torch.OutOfMemoryError as e:
        raise RecipeError(
            f"{name} finds no room on {device} ({str(e).split('. ')[0]}); take a device with more, or let "
            "moecule heal ask the teacher before (--top-k), or go layer by layer (--by-layer)"
        ) from e
