"""Hidden states between two layers: on the device, in host memory or on disk, as there is room.

What is kept in a folder besides lets a killed run go on from there.
"""

from __future__ import annotations

import ctypes
import functools
import os
import shutil
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import psutil
import torch
from jaxtyping import Float
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from moecule.errors import OutputError
from moecule.files import save_whole, writing

Place = Literal["device", "host", "disk"]
DEVICE_SHARE, HOST_SHARE = 0.25, 0.6  # of what is free, that hidden states may take


@functools.cache
def _writer() -> ThreadPoolExecutor:
    """A few threads for all: each keeps a stack and a heap of its own for as long as it lives.

    One of them fills the system's cache of the disk at some 1.5 GB/s, less than a GPU computes.
    """
    return ThreadPoolExecutor(4 if torch.cuda.is_available() else 1)


if hasattr(os, "register_at_fork"):  # a forked process has no threads; Windows forks none
    os.register_at_fork(after_in_child=_writer.cache_clear)


@dataclass
class States(Sequence[Tensor]):
    """The hidden states of all batches at one point of the model: [B, S, H], or of some models
    [B, S, streams, H].

    Reading one brings it to `device`. With a folder each is also written there as it comes. What a
    layer hands to the next one besides is kept with them.
    """

    device: torch.device
    place: Place
    folder: Path | None = None  # for "disk" there must be one
    _held: list[dict[str, Tensor] | None] = field(default_factory=list)
    _writes: list[Future[None]] = field(default_factory=list)

    def append(self, hidden: Float[Tensor, "B S *H"], handed: Tensor | None = None) -> None:
        """Take the next batch's."""
        at, given = len(self._held), {"hidden": hidden.detach()}
        if handed is not None:
            given["handed"] = handed.detach()
        held = given
        if self.place != "device" or self.folder is not None:
            held = {name: _to_host(t) for name, t in given.items()}
        if self.folder is not None:
            with writing(self.folder):
                self.folder.mkdir(parents=True, exist_ok=True)
            file = _file(self.folder, at)
            self._writes.append(_writer().submit(save_whole, held, file, sync=False))
        if self.place == "disk":
            self._settle(most=2)  # what waits to be written is in memory
        kept = given if self.place == "device" else held
        self._held.append(None if self.place == "disk" else kept)

    def __len__(self) -> int:
        return len(self._held)

    def __getitem__(self, b: int) -> Float[Tensor, "B S *H"]:  # type: ignore[override]
        return self.both(b)[0]

    def both(self, b: int) -> tuple[Float[Tensor, "B S *H"], Tensor | None]:
        """Batch b's hidden states, and what came with them, if anything."""
        held = self._held[b]
        if held is None:
            assert self.folder is not None  # nothing is on disk without one
            self._settle(most=0)
            held = _load(_file(self.folder, b % len(self)), "run the command again")
        here = {name: t.to(self.device, non_blocking=True) for name, t in held.items()}
        return here["hidden"], here.get("handed")

    def __iter__(self) -> Iterator[Tensor]:
        return (self[b] for b in range(len(self)))

    def _settle(self, most: int) -> None:
        """Wait until at most `most` writes are under way. Raises OutputError where one failed."""
        while len(self._writes) > most:
            self._writes.pop(0).result()

    def settle(self) -> None:
        """Wait until all are written, where there is a folder."""
        self._settle(most=0)

    def drop(self) -> None:
        """Let go of everything, on disk too."""
        self.settle()
        self._held = []
        if self.folder is not None:
            shutil.rmtree(self.folder, ignore_errors=True)

    @staticmethod
    def reopen(folder: Path, n: int, device: torch.device, place: Place) -> States:
        """The states of n batches that an earlier run wrote to `folder`.

        Raises OutputError where they are not there.
        """
        found = States(device, place, folder)
        mend = f"remove {folder.parents[2]} to begin again"  # the journal speaks of them
        for b in range(n):
            held = _load(_file(folder, b), mend)
            if place == "device":
                held = {name: t.to(device) for name, t in held.items()}
            found._held.append(None if place == "disk" else held)
        return found


def _to_host(tensor: Tensor) -> Tensor:
    if not tensor.is_cuda:
        return tensor.contiguous()
    # pinned: the copy there, and the one back, go at the speed of the bus
    held = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return held.copy_(tensor)


def _load(file: Path, mend: str) -> dict[str, Tensor]:
    try:
        held: dict[str, Tensor] = load_file(file)
        return {"hidden": held["hidden"], **held}
    except (OSError, SafetensorError, KeyError) as e:
        raise OutputError(f"{file} cannot be read ({e}); {mend}") from e


def _file(folder: Path, b: int) -> Path:
    return folder / f"batch_{b:05d}.safetensors"


def choose_place(size_bytes: int, copies: int, device: torch.device) -> Place:
    """Where `copies` sets of hidden states of `size_bytes` each fit: the nearest with room."""
    want = size_bytes * copies
    if device.type == "cuda" and want <= DEVICE_SHARE * torch.cuda.mem_get_info(device)[0]:
        return "device"
    return "host" if want <= HOST_SHARE * free_host_bytes() else "disk"


def give_back() -> None:
    """Let the system have freed host memory, which glibc keeps in pieces: more with every layer."""
    trim = None
    if sys.platform == "linux":
        trim = getattr(
            ctypes.CDLL(None), "malloc_trim", None
        )  # other allocators have no such thing
    if trim is not None:
        trim(0)


def free_bytes(device: torch.device) -> int:
    """Memory that can still be taken where the device computes."""
    if device.type == "cuda":
        ours = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0]) + ours  # torch hands out again what it kept
    return free_host_bytes()


def free_host_bytes() -> int:
    """Host memory that can still be taken, as the system and Linux's control groups tell."""
    free = int(psutil.virtual_memory().available)
    limit, used = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")
    if limit.is_file() and used.is_file() and (most := limit.read_text().strip()).isdigit():
        free = min(free, int(most) - int(used.read_text()))
    return free
