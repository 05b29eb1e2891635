"""How long a recipe will take here: the operations it asks for, at rates measured now.

Products of matrices, rounding, calls of small operations, and bytes read and written each have a
rate of their own, measured in a fraction of a second on the device and on the checkpoint's files.
Reading and writing go on beside the computation, so that the longer of the two counts.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from moecule.budget import Inventory
from moecule.experts import Expert
from moecule.hf import Streamed
from moecule.method import load_method
from moecule.needs import Work, toy_seen
from moecule.recipe import AS_IT_IS, Recipe
from moecule.states import free_host_bytes

EFFICIENCY = 0.6  # of the measured rate of products, which attention, norms and gathers never reach
CALLS = 150  # small operations of one layer for one batch, routing and attention together
CALLS_BACK = 350  # with its gradient
CHECK_S = 10.0  # a fresh process imports transformers and opens the output
START_S = 1.5  # reading and cutting the text, embedding it
TIMED_S = 0.05  # that one measurement takes at least
SAMPLE_BYTES = 64 * 2**20  # read from the checkpoint for its rate, at most


@dataclass(frozen=True)
class Rates:
    """Of this device and this disk, now."""

    flop_per_s: float  # products of matrices of the experts' shape, in the dtype of the walk
    factor_flop_per_s: float  # Cholesky factors, float32
    elements_per_s: float  # of an operation element by element
    call_s: float  # of an operation on next to nothing
    rounding_s: float  # a weight, by the recipe's encode method
    column_s: float  # a column of weights that are rounded together, besides
    trial_s: float  # a weight, by what the recipe's statistics make of each expert
    read_bytes_per_s: float


@dataclass(frozen=True)
class Pace:
    """Seconds by verb, and what they are made of."""

    seconds: Mapping[str, float]
    terms: Mapping[str, Mapping[str, float]]  # {verb: {what: seconds}}
    rates: Rates
    efficiency: float = EFFICIENCY


def pace_of(
    streamed: Streamed, inventory: Inventory, recipe: Recipe, work: Work, out_bytes: int
) -> Pace:
    """Measures the rates, which takes about a second, and adds up."""
    rates = measure(streamed, recipe, work)
    calls, elements = _small(recipe)
    terms = {
        "calibrate": _calibrate(work, inventory, rates, calls, elements),
        "apply": _apply(work, inventory, recipe, rates),
    }
    moved = {
        "calibrate": _bytes_read(work, 1 + work.backward) + work.states * work.layers * (1 + work.backward),
        "apply": _bytes_read(work, 1) + work.states * work.layers + 2 * out_bytes,
    }  # fmt: skip
    seconds = {}
    for verb, found in terms.items():
        found["reading and writing"] = moved[verb] / rates.read_bytes_per_s
        computing = sum(s for what, s in found.items() if what != "reading and writing")
        seconds[verb] = max(computing, found["reading and writing"])
    terms["apply"]["check"] = CHECK_S
    seconds = {verb: s + START_S for verb, s in seconds.items()}
    seconds["apply"] += CHECK_S
    return Pace(seconds, terms, rates)


def _bytes_read(work: Work, times: int) -> int:
    """From the disk: what fits in free memory is read from there the second time."""
    cached = work.all_stored < free_host_bytes() // 2
    return work.all_stored * (1 if cached else times)


def _calibrate(
    work: Work, inventory: Inventory, rates: Rates, calls: float, elements: float
) -> dict[str, float]:
    experts = sum(e.n for e in inventory.experts.values())
    batches = -(-work.tokens // work.batch)
    walks = 3 if work.backward else 1  # up; and down, with a gradient of one pass more
    head = 4 * work.tokens * work.vocabulary * work.hidden if work.backward else 0
    flop = walks * _pass_flop(work, inventory) + head
    flop += (1 + work.trials) * _experts_flop(work, inventory)
    small = batches * work.layers * (CALLS + CALLS_BACK * work.backward) + batches * experts * calls
    pairs = work.tokens * work.top_k * len(inventory.experts)
    return {
        "products": flop / (rates.flop_per_s * EFFICIENCY),
        "rounding for trials": inventory.expert_weights * rates.trial_s,
        "element by element": pairs * work.hidden * elements / rates.elements_per_s,
        "small calls": small * rates.call_s,
    }


def _apply(work: Work, inventory: Inventory, recipe: Recipe, rates: Rates) -> dict[str, float]:
    rest = [w.shape for w in inventory.weights.values() if recipe.rest[w.part].bits < 16]
    experts_too = inventory.expert_weights if recipe.bits < AS_IT_IS else 0
    packed = experts_too + sum(m * n for m, n in rest)
    batches = -(-work.tokens // work.batch)
    walks = 3 if work.wants_gram and rest else 2
    flop = walks * _pass_flop(work, inventory)
    factors = gathered = 0.0
    columns = sum(n for _, n in rest)
    for e in inventory.experts.values():
        columns += e.gate_up[1] + e.down[1]
        for m, n in (e.gate_up, e.down) if work.wants_gram else ():
            flop += 2 * work.tokens * work.top_k * n**2 + e.n * m * n**2
            factors += 4 / 3 * e.n * n**3
            gathered += 3 * batches * e.n * n**2  # added up in float64
    for m, n in rest if work.wants_gram else ():
        flop += 2 * work.tokens * n**2 + m * n**2
        factors += 4 / 3 * n**3
        gathered += 3 * batches * n**2
    if work.wants_gram:  # what enters the down projections is made anew
        flop += 2 / 3 * _experts_flop(work, inventory)
    experts = sum(e.n for e in inventory.experts.values())
    small = batches * (walks * work.layers * CALLS + 20 * experts * work.wants_gram)
    return {
        "products": flop / (rates.flop_per_s * EFFICIENCY),
        "factors": factors / rates.factor_flop_per_s,
        "rounding": packed * rates.rounding_s + columns * rates.column_s,
        "element by element": (gathered + 20 * packed) / rates.elements_per_s,
        "small calls": small * rates.call_s,
    }


def _pass_flop(work: Work, inventory: Inventory) -> float:
    """Of all tokens through all layers."""
    rest = sum(w.shape[0] * w.shape[1] for w in inventory.weights.values())
    attention = 2 * work.window * work.hidden * work.layers
    return 2 * work.tokens * (rest + attention) + _experts_flop(work, inventory)


def _experts_flop(work: Work, inventory: Inventory) -> float:
    """Of all tokens through the experts that the router picks for them."""
    return 2 * work.tokens * work.top_k * sum(e.weights for e in inventory.experts.values())


class _Counter(TorchDispatchMode):
    """Counts operations, and the elements of what all but products give."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.calls, self.elements = 0, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.calls += 1
        if isinstance(out, torch.Tensor) and "mm" not in str(func) and not out._is_view():
            self.elements += out.numel()
        return out


def _small(recipe: Recipe) -> tuple[float, float]:
    """(calls for an expert and a batch, elements for a token and a hidden channel) of the statistics."""
    seen = toy_seen()
    # what is made once is not counted
    bound = [s.of for s in recipe.needs() if s.of is not None]
    bound += [s.of_expert(seen.expert) for s in recipe.needs() if s.of_expert is not None]
    with _Counter() as counter, torch.no_grad():
        for of in bound:
            of(seen)
    return 25 + counter.calls, counter.elements / seen.x.numel()


def measure(streamed: Streamed, recipe: Recipe, work: Work) -> Rates:
    """Time a product, a factor, small operations, the recipe's own methods, and a read."""
    device, dtype, e = streamed.device, streamed.model.dtype, work.widest
    g = torch.Generator(device).manual_seed(0)

    def rand(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=g, device=device)

    big = device.type == "cuda"
    most = 4096 if big else 1024
    m = min(2048, max(16, work.batch * work.top_k // e.n))
    rows, columns = min(e.gate_up[0], most), min(e.gate_up[1], most)
    x, w = rand(m, columns).to(dtype), rand(rows, columns).to(dtype)
    wide = rand(2**22 if big else 2**18)
    n = min(e.gate_up[1], most)
    spread = rand(n, n)
    hessian = spread @ spread.mT + n * torch.eye(n, device=device)
    little = wide[:8]
    few, some = _encode(recipe, rand, 1), _encode(recipe, rand, 2048 if not big else 2**15)
    columns_s, sample_s = _timed(few[0], device), _timed(some[0], device)
    return Rates(
        flop_per_s=2 * m * rows * columns / _timed(lambda: x @ w.mT, device),
        factor_flop_per_s=n**3 / 3 / _timed(lambda: torch.linalg.cholesky_ex(hessian), device),
        elements_per_s=wide.numel() / _timed(lambda: wide + 1.0, device),
        call_s=_timed(lambda: little + 1.0, device),
        rounding_s=max(sample_s - columns_s, 0.0) / (some[1] - few[1]),
        column_s=columns_s / some[2],
        trial_s=_trials(recipe, rand, device, e.gate_up, e.down, 2**24 if big else 2**19),
        read_bytes_per_s=_reading(streamed),
    )


Rand = Callable[..., torch.Tensor]


def _encode(recipe: Recipe, rand: Rand, rows: int) -> tuple[Callable[[], Any], int, int]:
    """(rounding two groups of columns, weights, columns)."""
    bits, n = (min(8, max(1, round(recipe.bits))),), 2 * recipe.group
    w, x = rand(1, rows, n), rand(2 * n, n)
    gram = (x.mT @ x)[None]
    encode = load_method(recipe.encode.method, "encode").encode
    assert encode is not None  # load_method saw to it
    return (lambda: encode(w, gram, bits, recipe.group, recipe.encode.options)), w.numel(), n


def _trials(
    recipe: Recipe,
    rand: Rand,
    device: torch.device,
    gate_up: tuple[int, int],
    down: tuple[int, int],
    most: int,
) -> float:
    """Seconds a weight of what statistics make of an expert; of one with fewer rows if it is large."""
    makers = [s.of_expert for s in recipe.needs() if s.of_expert]
    if not makers:
        return 0.0
    whole = gate_up[0] * gate_up[1] + down[0] * down[1]
    part = min(1.0, most / whole)
    shapes = [(max(2, int(m * part)), n) for m, n in (gate_up, down)]
    expert = Expert(rand(*shapes[0]), rand(*shapes[1]), lambda y: y)
    weights = expert.gate_up.numel() + expert.down.numel()
    return _timed(lambda: [make(expert) for make in makers], device) / weights


def _timed(work: Callable[[], Any], device: torch.device) -> float:
    """Seconds that `work` takes, the least of several times; others may be at work here too."""

    def once() -> float:
        start = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - start

    start, best = time.perf_counter(), min(once(), once())  # the first of a kind sets things up
    while time.perf_counter() - start < TIMED_S:
        best = min(best, once())
    return best


def _reading(streamed: Streamed) -> float:
    """Bytes a second of the checkpoint's largest file, from the disk and not from memory."""
    path = streamed.checkpoint.path
    files = {info.file for info in streamed.checkpoint.stored.values()}
    file = max((path / name for name in files), key=lambda f: f.stat().st_size)
    size = min(file.stat().st_size, SAMPLE_BYTES)
    start_at = (file.stat().st_size - size) // 2
    with file.open("rb", buffering=0) as f:
        if sys.platform == "linux":  # others may read from memory, and seem faster than they are
            os.posix_fadvise(f.fileno(), start_at, size, os.POSIX_FADV_DONTNEED)
        f.seek(start_at)
        start, read = time.perf_counter(), 0
        while read < size and time.perf_counter() - start < 4 * TIMED_S:
            read += len(f.read(2**20))
    return read / (time.perf_counter() - start)
