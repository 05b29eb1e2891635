"""Packed experts in pinned host memory, with copies of those that are used most on the device.

For models that do not fit. Kernels read weights through tables of addresses, and a GPU reads pinned memory
by the host's own addresses: an expert that is not in the cache is read over the bus by the same kernels,
and gives the same bits. A captured step reads the tables as they are, so it stays valid whatever moves.

Uses are counted on the device as tokens pass. `Offloaded.refresh` reads the counts and brings in what
has become hotter; all that it does is queued on one stream, after the steps before it: first tables leave
what is to be written over, then copies, then tables point to those.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from jaxtyping import Float64, Int32, Int64, UInt8
from torch import Tensor, nn

from moecule import forward
from moecule.budget import format_size
from moecule.errors import RecipeError
from moecule.moe import experts_in

EVERY = 16  # tokens from one look at the counts to the next
DECAY, STAY = 0.9, 1.25  # what a look leaves of older counts; how much hotter a newcomer must be
ALIGN = 128  # bytes: a line of the device's cache
PINNED = 2**30  # bytes pinned at a time: torch rounds each up to a power of two


def _padded(size: int) -> int:
    return -(-size // ALIGN) * ALIGN


@dataclass(frozen=True)
class Held:
    """What the cache did, and holds."""

    share: float  # of the (token, expert) pairs, whose expert was on the device
    device_bytes: int  # of the cache, full or not
    host_bytes: int  # of all packed experts: those in the cache are there too


@dataclass(frozen=True)
class Unit:
    """An expert, which is on the device whole or not at all."""

    parts: tuple[Tensor, ...]  # codes, scale, zero on the host: of gate and up, then of down
    rows: tuple[int, int]  # of both matrices in the tables

    def places(self, start: int = 0) -> list[int]:
        """Where each part begins in bytes, then the end; a zero that is not stored lies at its scale."""
        out: list[int] = []
        for part, before in zip(self.parts, (None, *self.parts), strict=False):
            if part is before:
                out.append(out[-1])
            else:
                out.append(start)
                start += _padded(part.nbytes)
        return [*out, start]


def swaps(
    heat: Float64[Tensor, " n"], sizes: Int64[Tensor, " n"], at: Mapping[int, int], room: int
) -> tuple[list[int], dict[int, int]]:
    """(experts that leave a cache of `room` bytes, {those that come: where they begin}).

    heat: uses. at: where those begin that are held. A use on the device saves an expert's bytes on the bus,
    and holding it takes as many, so the hottest are held whatever their sizes. Nobody is moved: who finds
    no gap, between those that stay, waits; what is lost to gaps is less than one expert between two.
    """
    start = torch.full((len(heat),), -1)
    start[list(at)] = torch.tensor(list(at.values()), dtype=torch.int64)
    held = start >= 0
    worth = torch.where(held, STAY * (heat + 1), heat)  # to bring one in costs a use
    order = worth.argsort(descending=True, stable=True)
    hot = torch.zeros_like(held)
    hot[order[(sizes[order].cumsum(0) <= room) & (worth[order] > 0)]] = True
    begins, who = start[hot & held].sort()
    ends = torch.cat([torch.zeros(1, dtype=torch.int64), begins + sizes[hot & held][who]])
    begins = torch.cat([begins, torch.tensor([room])])
    gaps = torch.stack([ends, begins], 1)[ends < begins].tolist()
    size, into = sizes.tolist(), {}
    newcomers = (hot & ~held).nonzero().flatten().tolist()
    for i in sorted(newcomers, key=lambda i: -size[i]):  # the largest first fill best
        fit = [gap for gap in gaps if gap[1] - gap[0] >= size[i]]
        if fit:
            gap = min(fit, key=lambda gap: gap[1] - gap[0])
            into[i] = gap[0]
            gap[0] += size[i]
    filled = sorted((begin, begin + size[i]) for i, begin in into.items())
    starts = [begin for begin, _ in filled]

    def is_written_over(i: int) -> bool:
        before = bisect_left(starts, at[i] + size[i]) - 1
        return before >= 0 and filled[before][1] > at[i]

    cold = (held & ~hot).nonzero().flatten().tolist()
    return [i for i in cold if is_written_over(i)], into


@dataclass
class Offloaded:
    """The experts of a model, all on the host and some in the cache."""

    units: Sequence[Unit]
    uses: Sequence[Int32[Tensor, " experts_and_nobody"]]  # of every layer since the last look
    tables: Int64[Tensor, "rows four"]  # of all matrices, as the kernels read them
    arena: UInt8[Tensor, " room"]
    at: dict[int, int] = field(default_factory=dict)  # {unit in the cache: where it begins}
    served: int = 0  # pairs whose expert was in the cache
    pairs: int = 0
    steps: int = 0

    def __post_init__(self) -> None:
        self.sizes = torch.tensor([u.places()[-1] for u in self.units])
        self.heat = torch.zeros(len(self.units), dtype=torch.float64)
        self.home = self.tables.to("cpu", copy=True)  # as they were made, with all on the host
        self.now = self.home.clone()

    def fill(self) -> None:
        """Before anything is known: the first expert of every layer, then the second, ..."""
        first = [(e, i) for i, e in enumerate(e for u in self.uses for e in range(len(u) - 1))]
        order = torch.tensor([i for _, i in sorted(first)])
        turn = torch.empty(len(order), dtype=torch.float64)
        turn[order] = torch.arange(len(order), 0, -1, dtype=torch.float64)
        self._move(*swaps(turn, self.sizes, {}, len(self.arena)))

    def step(self) -> None:
        """Called after every forward; looks now and then, after the first one too."""
        if self.steps % EVERY == 0:
            self.refresh()
        self.steps += 1

    def refresh(self) -> None:
        """Bring in what is clearly hotter than what it takes the place of. Waits for the device."""
        self._count()
        self._move(*swaps(self.heat, self.sizes, self.at, len(self.arena)))
        self.heat *= DECAY

    def held(self) -> Held:
        """Since the beginning, or since `forget`. Waits for the device."""
        self._count()
        host = sum(p.nbytes for u in self.units for p in dict.fromkeys(u.parts))
        return Held(self.served / self.pairs if self.pairs else 0.0, len(self.arena), host)

    def forget(self) -> None:
        """Begin the share anew; what is hot stays known."""
        self._count()
        self.served = self.pairs = 0

    def _count(self) -> None:
        counts = torch.cat([u[:-1] for u in self.uses]).cpu()
        torch._foreach_zero_(list(self.uses))
        self.heat += counts
        self.pairs += int(counts.sum())
        self.served += int(counts[list(self.at)].sum())

    def _move(self, leave: Sequence[int], into: Mapping[int, int]) -> None:
        if not into:  # then nobody leaves
            return
        for i in leave:
            del self.at[i]
            self.now[list(self.units[i].rows)] = self.home[list(self.units[i].rows)]
        if leave:
            self.tables.copy_(self.now)
        for i, start in into.items():
            unit, places = self.units[i], self.units[i].places(start)
            for part, place in dict(zip(unit.parts, places, strict=False)).items():
                plain = part.flatten().view(torch.uint8)
                self.arena[place : place + part.nbytes].copy_(plain, non_blocking=True)
            addresses = torch.tensor(places[:-1]).view(2, 3) + self.arena.data_ptr()
            self.now[list(unit.rows), :3] = addresses
        self.at.update(into)
        self.tables.copy_(self.now)


def offload(model: Any, device: torch.device, cache_bytes: int) -> Offloaded:
    """Move a model to the device but for its packed experts, which stay on the host, pinned, in place.

    At most `cache_bytes` of the device hold copies of experts. Call `step` after every forward. The model
    gives no gradients after, and does not leave the device. Steps of more than gpu.FEW_PAIRS pairs an
    expert wait for the device, unless they are compiled.

    Raises RecipeError where the kernels do not serve the experts, or the device has no such room.
    """
    experts = {name: m for name, m in experts_in(model) if "slots" in vars(m)}
    _check(experts)
    stacks = {name: m._modules.pop("packed") for name, m in experts.items()}
    model.to(device).requires_grad_(False)
    for name, packed in stacks.items():
        experts[name].packed = packed
    _pin(list(stacks.values()), pin=device.type == "cuda")
    found = {name: forward.GPU.reached(m, device) for name, m in experts.items()}
    for name, both in found.items():
        if both is None:
            raise RecipeError(
                f"{name} has groups of columns that the GPU's kernels do not serve, and an expert "
                "cache needs them; leave it out"
            )
    matrices = [of for both in found.values() for of in both]
    tables = torch.cat([of.table for of in matrices])
    units, row = [], 0
    for up, down in found.values():
        n = len(up)
        for e in range(n):
            parts = (*up.keeps[3 * e : 3 * e + 3], *down.keeps[3 * e : 3 * e + 3])
            units.append(Unit(parts, (row + e, row + n + e)))
        row += 2 * n
    arena = _arena(device, min(cache_bytes, sum(u.places()[-1] for u in units)))
    views = iter(tables.split([len(of) for of in matrices]))
    for name, both in found.items():
        module = experts[name]
        module.there = tuple(
            replace(of, table=_static(next(views)), keeps=(*of.keeps, arena)) for of in both
        )
        module.uses = _static(torch.zeros(len(both[0]) + 1, dtype=torch.int32, device=device))
    made = Offloaded(units, [m.uses for m in experts.values()], tables, arena)
    made.fill()
    object.__setattr__(model, "moecule_offloaded", made)
    return made


def offloaded(model: Any) -> Offloaded | None:
    """What `offload` made of it."""
    made: Offloaded | None = vars(model).get("moecule_offloaded")
    return made


def _check(experts: Mapping[str, Any]) -> None:
    if forward.GPU is None:
        raise RecipeError(
            "an expert cache needs a GPU and triton, and one of them is not there; leave it out, or "
            "pip install triton"
        )
    if not experts:
        raise RecipeError("the model has no packed experts to cache; leave the expert cache out")
    for name, module in experts.items():
        if "bits16" in module.packed:
            raise RecipeError(
                f"{name} has experts of 16 bits, and an expert cache serves packed ones; leave it "
                "out, or plan 8 bits at most"
            )


def _static(tensor: Tensor) -> Tensor:
    """CUDA graphs need not copy it before every step."""
    torch._dynamo.mark_static_address(tensor)
    return tensor


def _arena(device: torch.device, size: int) -> UInt8[Tensor, " room"]:
    if device.type == "cuda":
        torch.cuda.empty_cache()
        free = torch.cuda.mem_get_info(device)[0]
        if size > free:
            raise RecipeError(
                f"an expert cache of {format_size(size)} was asked for, and {device} has "
                f"{format_size(free)} free; ask for less, and leave room for the KV cache"
            )
    return torch.empty(size, dtype=torch.uint8, device=device)


def _pin(stacks: Sequence[nn.Module], *, pin: bool) -> None:
    """Buffers into shared blocks, one after the other, so that little is there twice at a time."""
    buffers = [
        (module, name)
        for stack in stacks
        for module in stack.modules()
        for name, buffer in module.named_buffers(recurse=False)
        if not (pin and buffer.is_pinned())
    ]
    rest = sum(_padded(module.get_buffer(name).nbytes) for module, name in buffers)
    block, used = torch.empty(0, dtype=torch.uint8), 0
    for module, name in buffers:
        plain = module.get_buffer(name)
        size = _padded(plain.nbytes)
        if used + size > len(block):
            # the last one is no larger than what is left to pin
            least = 1 << (min(rest, max(PINNED, size)) - 1).bit_length()
            block, used = torch.empty(least, dtype=torch.uint8, pin_memory=pin), 0
        mine = block[used : used + plain.nbytes].view(plain.dtype).view(plain.shape)
        setattr(module, name, mine.copy_(plain))
        used, rest = used + size, rest - size
