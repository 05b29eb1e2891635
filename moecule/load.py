"""How the experts are used, where to put them, and what a cache of them would serve: expert_load.json."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from moecule.batch import Batch, digest, n_tokens, shape_of, tokens_of
from moecule.budget import Inventory, format_size
from moecule.data import Sampling
from moecule.errors import DataError, OutputError, RecipeError
from moecule.files import write_text
from moecule.hf import Streamed
from moecule.hits import POLICIES, recall, simulate
from moecule.inventory import weigh
from moecule.placement import SUFFIX, Placement, for_engine, in_order, place
from moecule.routes import Routes, routes
from moecule.session import Compute, Progress, silent, stream_any, ticker
from moecule.stats import COUNT, load_stats
from moecule.text import calibration_batches

SAMPLING = Sampling(samples=16)
AUTO = Compute()


@dataclass(frozen=True)
class LayerLoad:
    """One layer's experts, and the placement of it."""

    layer: int
    count: tuple[int, ...]  # (token, expert) pairs of each expert
    hottest: tuple[int, ...]  # the experts, those used most first
    max_over_mean: float  # of the counts
    physical_to_logical: tuple[int, ...]  # the expert in each slot, GPU after GPU
    balance_before: float  # most loaded GPU over the mean, one copy of each expert in their order
    balance_after: float
    balance_unseen: float | None  # planned on every second window and measured on the others


@dataclass(frozen=True)
class Served:
    """What a cache of experts did under one policy."""

    policy: str
    hit_rate: float  # of (token, expert) pairs: the expert was there when the token came
    hit_rate_by_layer: tuple[float, ...]
    loads_per_token: float  # experts brought in, over all layers
    load_bytes_per_token: float


@dataclass(frozen=True)
class Offloading:
    """A cache of as many experts in each layer."""

    cache_experts: int
    guess_recall: (
        float | None
    )  # of needed experts, guessed by the next gate, where there is a guess
    policies: tuple[Served, ...]


@dataclass(frozen=True)
class ExpertLoad:
    """All of it; means over layers count each as much."""

    model: str
    digest: str
    text: Mapping[str, Any]  # digest, windows: [how many, tokens of the longest]
    gpus: int
    replicas: int  # slots a GPU beyond one copy of each expert
    balance_before: float
    balance_after: float
    balance_unseen: float | None
    layers: tuple[LayerLoad, ...]
    offloading: tuple[Offloading, ...] = ()  # none of statistics alone: they have no order

    def dumps(self) -> str:
        """JSON, a layer or a cache a line."""
        doc = asdict(self)
        rows = {
            k: "[\n    " + ",\n    ".join(map(json.dumps, v)) + "\n  ]" if v else "[]"
            for k, v in doc.items()
            if k in ("layers", "offloading")
        }
        lines = [f'  "{k}": {rows.get(k) or json.dumps(v)}' for k, v in doc.items()]
        return "{\n" + ",\n".join(lines) + "\n}\n"


def expert_load(
    source: str | Path,
    out: str | Path | None = None,
    *,
    gpus: int = 8,
    replicas: int = 1,
    cache_experts: Sequence[str | int] = (),
    engines: Sequence[str] = (),
    data: str | Path | None = None,
    sampling: Sampling = SAMPLING,
    compute: Compute = AUTO,
    progress: Progress = silent,
) -> ExpertLoad:
    """Use of every expert, a placement on GPUs, and hit rates of offloading, written to `out` if given.

    `source`: a model, compressed or not, which a few windows of text pass; or a stats folder, which has
    no order of tokens, so nothing is simulated. `cache_experts`: sizes of the cache in experts of a
    layer, "4", or a share of them, "25%"; without any, half of them. `engines`: beside `out`, the
    placement as each of them takes it.
    Raises RecipeError for numbers that cannot be, OutputError where a file cannot be written, DataError
    and CheckpointError as what is read raises.
    """
    for engine in engines:
        if engine not in SUFFIX:
            raise RecipeError(f"engine {engine!r} is not known; wanted {', '.join(SUFFIX)}")
    if engines and out is None:
        raise RecipeError("files for engines go beside the output; name one (--out)")
    if out is not None and Path(out).is_dir():
        raise OutputError(f"{out} is a folder; name a file")
    sizes = [parse_cache(c) for c in cache_experts or ("50%",)]
    if (Path(source) / "meta.json").is_file():
        if cache_experts or data is not None:
            raise DataError(
                f"{source} holds sums, which have no order of tokens, and needs no text; give the model, "
                "or leave out --cache-experts and --data"
            )
        found, n_layers = _of_stats(Path(source), gpus, replicas)
    else:
        streamed = stream_any(source, compute)
        n_layers = len(streamed.layers)
        moes = {i: m for i in range(n_layers) if (m := streamed.moe(i)) is not None}
        for i, moe in moes.items():  # before any work
            n = moe.experts.num_experts
            place([1.0] * n, gpus, replicas)
            for size in sizes:
                room(size, n, moe.top_k, i)
        batches = calibration_batches(streamed, data, sampling)
        heard = routes(streamed, batches, ticker(progress, "listen", n_layers, n_tokens(batches)))
        found = _of_routes(str(source), streamed, batches, heard, (gpus, replicas))
        size_bytes = weigh(streamed.checkpoint)["bytes_by_part"]["experts"]
        one_bytes = size_bytes / sum(m.experts.num_experts for m in moes.values())
        found = replace(
            found, offloading=tuple(_offloading(heard, size, one_bytes) for size in sizes)
        )
    if out is not None and compute.ranks.is_first:
        placed = {x.layer: Placement(gpus, x.physical_to_logical) for x in found.layers}
        texts = {beside(Path(out), e): for_engine(e, placed, n_layers) for e in engines}
        for file, what in {Path(out): found.dumps(), **texts}.items():
            write_text(file, what)
    return found


def beside(out: Path, engine: str) -> Path:
    """The file of an engine, beside the output.

    >>> beside(Path("expert_load.json"), "sglang").name
    'expert_load.sglang.json'
    """
    return out.with_name(f"{out.stem}.{SUFFIX[engine]}")


def parse_cache(given: str | int) -> int | float:
    """A number of experts, or a share of them. Raises RecipeError for neither.

    >>> parse_cache("4"), parse_cache("25%")
    (4, 0.25)
    """
    match = re.fullmatch(r"(\d+(?:\.\d*)?)%|(\d+)", str(given).strip())
    size = None if match is None else float(match[1]) / 100 if match[1] else int(match[2])
    if not size or (isinstance(size, float) and size > 1):
        raise RecipeError(
            f"a cache of {given!r} experts was asked for; wanted a number of them or a share, like "
            "--cache-experts 4 or 25%"
        )
    return size


def room(size: int | float, n: int, top_k: int, layer: int) -> int:
    """Experts of a layer that the cache holds. Raises RecipeError where that is no cache."""
    wanted = round(size * n) if isinstance(size, float) else size
    if not top_k <= wanted <= n:
        raise RecipeError(
            f"a cache of {wanted} experts was asked for, and layer {layer} has {n} and a token needs "
            f"{top_k} at once; give --cache-experts {top_k} to {n}"
        )
    return wanted


def _of_stats(folder: Path, gpus: int, replicas: int) -> tuple[ExpertLoad, int]:
    """(what the counts say, how many decoder layers the model has)."""
    sums, meta = load_stats(folder)
    if not all(COUNT.name in of for of in sums.values()) or not sums:
        raise DataError(f"{folder} does not say how often experts were used; calibrate again")
    layers = tuple(
        _layer(i, [int(c) for c in of[COUNT.name].tolist()], gpus, replicas)
        for i, of in sorted(sums.items())
    )
    try:
        parts = Inventory.from_dict(meta["inventory"]).weights.values()
        text = {"digest": meta["tokens"], "windows": meta["window"]}
        names = str(meta["model"]), str(meta["digest"])
    except (KeyError, TypeError, AttributeError, ValueError) as e:
        raise DataError(f"{folder} is damaged ({e!r}); remove it and calibrate again") from e
    # every decoder layer has some weights besides experts
    n_layers = 1 + max([*sums, *(w.layer for w in parts)])
    return _whole(*names, text, gpus, replicas, layers), n_layers


def _of_routes(
    model: str,
    streamed: Streamed,
    batches: Sequence[Batch],
    heard: Mapping[int, Routes],
    wished: tuple[int, int],
) -> ExpertLoad:
    numbers, found = window_of(batches), []
    for i, of in sorted(heard.items()):
        layer = _layer(i, counted(of), *wished)
        found.append(replace(layer, balance_unseen=unseen(of, numbers, *wished)))
    text = {"digest": digest(batches), "windows": shape_of(batches)}
    return _whole(model, streamed.checkpoint.digest, text, *wished, tuple(found))


def _layer(i: int, count: Sequence[int], gpus: int, replicas: int) -> LayerLoad:
    placed = place(count, gpus, replicas)
    mean = sum(count) / len(count)
    return LayerLoad(
        layer=i,
        count=tuple(count),
        hottest=tuple(sorted(range(len(count)), key=lambda e: (-count[e], e))),
        max_over_mean=max(count) / mean if mean else 1.0,
        physical_to_logical=placed.experts,
        balance_before=in_order(len(count), gpus).balance(count),
        balance_after=placed.balance(count),
        balance_unseen=None,
    )


def _whole(
    model: str,
    digest: str,
    text: Mapping[str, Any],
    gpus: int,
    replicas: int,
    layers: tuple[LayerLoad, ...],
) -> ExpertLoad:
    before, after, apart = (
        _mean([getattr(x, f"balance_{name}") for x in layers])
        for name in ("before", "after", "unseen")
    )
    assert before is not None and after is not None  # there are layers
    return ExpertLoad(model, digest, text, gpus, replicas, before, after, apart, layers)


def _mean(given: Sequence[float | None]) -> float | None:
    known = [x for x in given if x is not None]
    return sum(known) / len(known) if known else None


def counted(of: Routes, which: Bool[Tensor, " T"] | None = None) -> list[int]:
    """Uses of each expert by all tokens, or by those that `which` says."""
    idx = of.idx if which is None else of.idx[which]
    # with online skipping, an index past the last expert is of nobody
    return idx.flatten().bincount(minlength=of.n)[: of.n].tolist()


def window_of(batches: Sequence[Batch]) -> Int[Tensor, " T"]:
    """Of each token, which window it is in, or conversation."""
    lengths = [tokens_of(b).shape[1] for b in batches for _ in range(len(tokens_of(b)))]
    return torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))


def unseen(of: Routes, window: Int[Tensor, " T"], gpus: int, replicas: int) -> float | None:
    """The balance on windows that a placement was not planned on: odd by even ones, and even by odd."""
    if int(window[-1]) == 0:
        return None
    halves = [counted(of, window % 2 == h) for h in (0, 1)]
    pairs = (halves, halves[::-1])
    return sum(place(mine, gpus, replicas).balance(other) for mine, other in pairs) / 2


def _offloading(heard: Mapping[int, Routes], size: int | float, one_bytes: float) -> Offloading:
    lists = {
        i: (of.idx.tolist(), None if of.guess is None else of.guess.tolist())
        for i, of in sorted(heard.items())
    }
    rooms = {i: room(size, of.n, of.idx.shape[1], i) for i, of in heard.items()}
    served = []
    for policy in POLICIES:
        found = [simulate(policy, u, rooms[i], g) for i, (u, g) in lists.items()]
        loads = sum(h.loads for h in found) / len(next(iter(heard.values())).idx)
        served.append(
            Served(
                policy,
                hit_rate=sum(h.hits for h in found) / sum(h.uses for h in found),
                hit_rate_by_layer=tuple(h.hits / h.uses for h in found),
                loads_per_token=loads,
                load_bytes_per_token=loads * one_bytes,
            )
        )
    recalls = [recall(u, g) for u, g in lists.values() if g is not None]
    return Offloading(max(rooms.values()), _mean(recalls), tuple(served))


def tables(found: ExpertLoad) -> tuple[list[tuple[str, ...]], list[tuple[str, ...]]]:
    """(a row for each layer, a row for each cache and policy) for a person, heads first."""
    some = 4
    layers: list[tuple[str, ...]] = [
        ("layer", "hottest", "coldest", "unused", "max/mean", "before", "after", "unseen")
    ]
    for x in found.layers:
        share = [c / max(sum(x.count), 1) for c in x.count]
        hot, cold = (
            ", ".join(f"{e} ({100 * share[e]:.1f} %)" for e in of)
            for of in (x.hottest[:some], x.hottest[: -some - 1 : -1])
        )
        balances = (x.balance_before, x.balance_after, x.balance_unseen)
        numbers = ("" if b is None else f"{b:.3f}" for b in (x.max_over_mean, *balances))
        layers.append((str(x.layer), hot, cold, str(x.count.count(0)), *numbers))
    caches: list[tuple[str, ...]] = [("cache", "policy", "hits", "loads a token", "bytes a token")]
    for of in found.offloading:
        for s in of.policies:
            rate = f"{100 * s.hit_rate:.1f} %"
            moved = (f"{s.loads_per_token:.2f}", format_size(round(s.load_bytes_per_token)))
            caches.append((f"{of.cache_experts} experts a layer", s.policy, rate, *moved))
    return layers, caches
