"""Several processes on one job: who does what, and how their parts come together.

`torchrun --nproc-per-node N -m moecule ...` starts N. Batches are shared out in runs, experts in
turn; sums are added in float64, and one process writes. Files lie on a disk that all can see.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")
CUDA = "cpu:gloo,cuda:nccl"  # shards of a model on GPUs may lie in host memory


@dataclass(frozen=True)
class Ranks:
    """This process among all."""

    rank: int = 0
    size: int = 1

    @property
    def is_first(self) -> bool:
        """Whether this is the one that writes."""
        return self.rank == 0

    def mine(self, items: Sequence[T]) -> list[T]:
        """This process's run of `items`; the runs of all, in order, are the whole."""
        n = len(items)
        return list(items[self.rank * n // self.size : (self.rank + 1) * n // self.size])

    def owner(self, e: int) -> int:
        """The process that rounds expert e."""
        return e % self.size

    def add_up(self, tensor: Tensor, *, greatest: bool = False) -> Tensor:
        """The sum over all processes, or the greatest of each number, for all of them."""
        if self.size == 1:
            return tensor
        moved = tensor.to(_device()).contiguous()
        dist.all_reduce(moved, dist.ReduceOp.MAX if greatest else dist.ReduceOp.SUM)
        return moved.to(tensor.device)

    def sum_to(self, tensor: Tensor, owner: int) -> None:
        """Add up into the owner's `tensor`, in place; what the others hold then is undefined."""
        if self.size > 1:
            dist.reduce(tensor, owner)

    def share(self, thing: Any, owner: int) -> Any:
        """The owner's `thing`, made of plain data and tensors, for all."""
        if self.size == 1:
            return thing
        box = [thing]
        dist.broadcast_object_list(box, owner, device=_device())
        return box[0]

    def send_all(self, tensor: Tensor, owner: int) -> None:
        """Overwrite everybody's `tensor` with the owner's."""
        if self.size > 1:
            dist.broadcast(tensor, owner)

    def wait(self) -> None:
        """Until all are here."""
        if self.size > 1:
            dist.barrier()


SOLO = Ranks()


def _device() -> torch.device:
    """Where the processes' messages must lie."""
    cuda = "nccl" in dist.get_backend_config()
    return torch.device("cuda", torch.cuda.current_device()) if cuda else torch.device("cpu")


def join(*, cuda: bool) -> Ranks:
    """This process among those that torchrun started, or alone."""
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        return SOLO
    if cuda:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    if not dist.is_initialized():
        # one process may be at work alone for long: writing, opening what was written afresh
        dist.init_process_group(CUDA if cuda else "gloo", timeout=timedelta(hours=12))
    return Ranks(dist.get_rank(), size)


def alone(*, cuda: bool) -> None:
    """Let one process be a group of one, where nothing else has begun: FSDP2 shards over a group."""
    if not dist.is_initialized():
        from torch.distributed import HashStore  # type: ignore[attr-defined]  # not on Windows

        how = CUDA if cuda else "gloo"
        dist.init_process_group(how, store=HashStore(), rank=0, world_size=1)


def leave() -> None:
    """The end of `join`, and of `alone`."""
    if dist.is_initialized():
        dist.destroy_process_group()
