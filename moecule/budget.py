"""Bytes: of a model's parts, of a plan before it is carried out, and of what a user may spend."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from moecule.errors import RecipeError
from moecule.packed import packed_bytes
from moecule.plan import REST, Keep, Masks, Plan
from moecule.runs import ids_bytes, in_runs, run_of
from moecule.skip import head_bytes

ALIAS_BYTES = 4  # int32, of each expert in a layer where experts share weights
UNITS = {"": 1, "b": 1, "kb": 1e3, "mb": 1e6, "gb": 1e9, "tb": 1e12,
         "kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40}  # fmt: skip


@dataclass(frozen=True)
class LayerExperts:
    """The routed experts of a layer."""

    n: int
    gate_up: tuple[int, int]  # rows, columns
    down: tuple[int, int]
    bias_bytes: int  # of one expert besides its matrices
    router_bytes: int  # of what the router holds of one expert besides its row
    item_bytes: int  # of a weight as it is on disk
    top_k: int  # experts that the router picks for a token
    groups: int  # that it picks among first; 1 where it does not
    top_groups: int  # how many of them it picks

    @property
    def is_whole(self) -> bool:
        """Whether the numbers can be those of a layer."""
        return 1 <= self.groups <= self.n and self.n % self.groups == 0 and self.top_k <= self.n

    @property
    def weights(self) -> int:
        """Of one expert."""
        return self.gate_up[0] * self.gate_up[1] + self.down[0] * self.down[1]


@dataclass(frozen=True)
class Weight:
    """A weight in a layer that a plan may pack, but for the experts."""

    part: str  # one of plan.REST
    shape: tuple[int, int]
    item_bytes: int
    layer: int


@dataclass(frozen=True)
class Cache:
    """What decoding one sequence keeps of its past tokens, in layers that do alike."""

    token_bytes: int  # of one token
    window: int | None = None  # tokens kept at most; None: all
    state_bytes: int = 0  # whatever the number of tokens


def cache_bytes(caches: Sequence[Cache], tokens: int) -> int:
    """Of one sequence of `tokens` tokens, at 16 bits, and of recurrent states."""
    return sum(c.state_bytes + c.token_bytes * min(tokens, c.window or tokens) for c in caches)


@dataclass(frozen=True)
class Inventory:
    """What a checkpoint is made of; enough to price a plan without opening it."""

    experts: Mapping[int, LayerExperts]
    weights: Mapping[str, Weight]
    embedding_bytes: int  # embeddings and head
    other_bytes: int  # norms, biases, what no plan touches
    other_weights: int
    caches: tuple[Cache, ...]
    max_position: int

    def as_dict(self) -> dict[str, Any]:
        """For stats/meta.json."""
        return asdict(self)

    @staticmethod
    def from_dict(doc: Mapping[str, Any]) -> Inventory:
        """The inverse of `as_dict`, after JSON made keys of numbers and lists of tuples.

        Raises KeyError, TypeError, AttributeError or ValueError where it is none.
        """
        experts = {int(i): LayerExperts(**_tuples(e)) for i, e in doc["experts"].items()}
        weights = {n: Weight(**_tuples(w)) for n, w in doc["weights"].items()}
        rest = {k: v for k, v in doc.items() if k not in ("experts", "weights", "caches")}
        caches = tuple(Cache(**_tuples(c)) for c in doc["caches"])
        routers = {w.layer for w in weights.values() if w.part == "router" and w.shape[0] > 1}
        if (
            not experts
            or not routers <= set(experts)
            or any(not e.is_whole for e in experts.values())
        ):
            raise ValueError("layers without experts")
        return Inventory(experts=experts, weights=weights, caches=caches, **_tuples(rest))

    def cache_bytes(self, tokens: int) -> int:
        """Of the KV cache of `tokens` tokens, at 16 bits, and of recurrent states."""
        return cache_bytes(self.caches, tokens)

    @property
    def expert_weights(self) -> int:
        """Weights of all routed experts."""
        return sum(e.n * e.weights for e in self.experts.values())

    @property
    def all_weights(self) -> int:
        """Weights of the whole model."""
        rest = sum(w.shape[0] * w.shape[1] for w in self.weights.values())
        return self.expert_weights + rest + self.other_weights

    def untouched(self) -> Plan:
        """The plan that leaves everything as it is; its price is the original's size."""
        return Plan("", "", {i: (Keep(),) * e.n for i, e in self.experts.items()})


def _tuples(doc: Mapping[str, Any]) -> dict[str, Any]:
    """Of whole numbers, pairs of them above 0, and parts of a layer; anything else is refused."""
    for key, value in doc.items():
        numbers = value if isinstance(value, list) else [value]
        least, size = (1, 2) if isinstance(value, list) else (0, 1)
        fits = len(numbers) == size and all(type(n) is int and least <= n < 2**63 for n in numbers)
        none = key == "window" and value is None
        if not fits and not none and not (key == "part" and value in REST):
            raise ValueError(f"{key} is {value!r}")
    return {k: tuple(v) if isinstance(v, list) else v for k, v in doc.items()}


def bytes_by_part(inventory: Inventory, plan: Plan) -> dict[str, int]:
    """What `plan` leaves of each part: experts, attention, shared, dense, router, embeddings, other."""
    out = dict.fromkeys(("experts", *REST, "embeddings", "other"), 0)
    for i, e in inventory.experts.items():
        # of many widths, biases of all experts are as long as before
        keeps = [f for f in plan.layers[i] if isinstance(f, Keep)]
        kept, run = {f.channels for f in keeps}, run_of(keeps, e.down[1]) if keeps else None
        if run is not None:
            out["experts"] += ids_bytes(len(keeps), e.down[1], run)
        out["experts"] += sum(
            _expert_bytes(e, f, even=len(kept) == 1) for f in in_runs(keeps, e.down[1])
        )
        for fate in plan.layers[i]:
            if isinstance(fate, Keep) or plan.aliased:
                out["router"] += e.router_bytes
        if plan.has_aliases(i):  # which of those that stay each row is of
            out["experts"] += e.n * ALIAS_BYTES
        if isinstance(plan.skip, Masks):
            top_k = e.top_k if plan.top_k is None else plan.top_k
            out["router"] += head_bytes(e.gate_up[1], top_k, plan.skip.hidden)
    for w in inventory.weights.values():
        rows, columns = w.shape
        if (
            w.part == "router" and rows > 1 and not plan.aliased
        ):  # one row an expert, and maybe of shared ones
            rows -= sum(not isinstance(f, Keep) for f in plan.layers[w.layer])
        out[w.part] += _weight_bytes(rows, columns, plan.rest[w.part], w.item_bytes)
    out["embeddings"] = inventory.embedding_bytes
    out["other"] = inventory.other_bytes
    return out


def weights_left(inventory: Inventory, plan: Plan) -> float:
    """The share of the experts' weights that a plan keeps, in whatever bits."""
    left = 0.0
    for i, e in inventory.experts.items():
        for f in plan.layers[i]:
            if isinstance(f, Keep):
                left += e.weights * (1 if f.channels is None else f.channels / e.down[1])
    return left / inventory.expert_weights


def _expert_bytes(e: LayerExperts, keep: Keep, *, even: bool) -> int:
    (rows, hidden), wide = e.gate_up, e.down[1]
    left = wide if keep.channels is None else keep.channels
    biases = (rows * left // wide if even else rows) + hidden * len(keep.each)
    each = keep.each  # pieces, of as many channels each
    shapes = ((rows * left // wide // len(each), hidden), (hidden, left // len(each)))
    weights = sum(_weight_bytes(*s, piece, e.item_bytes) for s in shapes for piece in each)
    return weights + e.bias_bytes * biases // (rows + hidden)


def _weight_bytes(rows: int, columns: int, keep: Keep, item_bytes: int) -> int:
    if not keep.bits:  # a piece that is not there
        return 0
    if keep.bits == 16:
        return rows * columns * item_bytes
    return packed_bytes(keep.bits, rows, columns, keep.group)


def parse_size(text: str | int | float) -> int:
    """Bytes of "20GB", "16GiB", "500 MB" or a number. Raises RecipeError for anything else."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-z]*)\s*", str(text).lower())
    if not match or match[2] not in UNITS:
        raise RecipeError(f"cannot read the size {text!r}; write it like 20GB or 16GiB")
    return int(float(match[1]) * UNITS[match[2]])


def format_size(n: float) -> str:
    """Bytes for a person."""
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if n >= size:
            return f"{n / size:.2f} {unit}"
    return f"{n:.0f} B"


def within(
    make: Callable[[float], Plan], inventory: Inventory, size_bytes: int, *, whole: bool
) -> Plan:
    """The plan of most bits that weighs at most `size_bytes`.

    `make` plans for a mean of bits (`whole`: it can only do whole ones) and raises RecipeError
    where it cannot. Raises RecipeError where no plan is small enough, saying the least size.
    """
    step = 1 if whole else min(256, sum(e.n for e in inventory.experts.values()))
    plans: dict[int, Plan] = {}

    def works(k: int) -> bool:
        try:
            plans[k] = plans.get(k) or make(k / step)
        except RecipeError:  # outside what the bit set and its floors allow
            return False
        return True

    def size(k: int) -> int:
        return sum(bytes_by_part(inventory, plans[k]).values()) if works(k) else 0

    steps = range(step, 8 * step + 1)
    least = next(filter(works, steps), None)
    if least is None:
        make(8.0)  # says why
        raise RecipeError("no width of 1 to 8 bits works with this recipe; widen its bit set")
    most = next(filter(works, reversed(steps)), least)
    if size(least) > size_bytes:
        raise RecipeError(
            f"{format_size(size_bytes)} cannot be met; the least that this recipe makes is "
            f"{format_size(size(least))}; ask for more"
        )
    low, high = least, most + 1  # the last known to fit, the first known not to
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if size(middle) <= size_bytes else (low, middle)
    return plans[low]
