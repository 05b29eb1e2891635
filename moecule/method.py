"""A method: the parts one paper supplies. A recipe picks a method for each part."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxtyping import Float, Float64
from torch import Tensor

from moecule.drop import Kept, Room
from moecule.errors import RecipeError
from moecule.experts import Expert
from moecule.group import Group, Recombined
from moecule.packed import Packed
from moecule.stats import LayerStats, Statistic, Stats

# what the functions below take as `options` is an instance of the method's own Options
Score = Callable[[Stats, Any], Mapping[int, Float64[Tensor, " E"]]]
Choose = Callable[[Stats, Room, Any], Kept]
Channels = Callable[[Stats, Any], Mapping[int, Float64[Tensor, "E F"]]]
Cluster = Callable[[LayerStats, Float64[Tensor, " E"], int, Any], Sequence[int]]
Join = Callable[[Group, Any], Expert]
Recombine = Callable[[Group, Sequence[int], Any], Recombined]
Width = int | tuple[int, ...]  # bits of an expert, or of each of its pieces
Allocate = Callable[[Stats, float, Any], Mapping[int, tuple[Width, ...]]]
Encode = Callable[
    [Float[Tensor, "E M N"], Float[Tensor, "E N N"] | None, tuple[int, ...], int, Any],
    "list[Packed]",
]
Densities = Callable[[Stats, Any], Mapping[int, float]]
# the last but two: what the columns read, gram matrices where the method wants them, else their diagonals
Mask = Callable[
    [Float[Tensor, "E M N"], "Float[Tensor, 'E N N'] | Float[Tensor, 'E N']", float, Any],
    Float[Tensor, "E M N"],
]
Thresholds = Callable[[Stats, Any], tuple[Mapping[int, tuple[float, ...]], float]]
Learn = Callable[[int, int, int, Any], Mapping[str, Tensor]]


@dataclass(frozen=True)
class Method:
    """What one file of methods/ gives. The functions are pure."""

    paper: str  # authors, year, arXiv id
    options: type  # a frozen dataclass: the keys a recipe may set, with defaults
    needs: Callable[[Any], tuple[Statistic, ...]] = lambda options: ()
    score: Score | None = (
        None  # (stats, options) -> {layer: of each expert}; the lowest are dropped
    )
    choose: Choose | None = (
        None  # (stats, how many stay, options) -> {layer: who stays}, no number being enough
    )
    channels: Channels | None = (
        None  # (stats, options) -> {layer: of each channel}; the lowest of the experts go
    )
    cluster: Cluster | None = (
        None  # (sums of a layer, score, n, options) -> a number for each; n clusters become one each
    )
    merge: Join | None = None  # (experts of a cluster, options) -> one
    recombine: Recombine | None = None  # (a layer's experts, those that stay, options) -> those
    # (stats, mean bits, options) -> {layer: bits of each expert, or of each of its pieces}
    allocate: Allocate | None = None
    cuts: bool = False  # allocate gives bits to pieces, in the order of channels
    whole_bits: bool = False  # allocate takes no mean between two widths
    encode: Encode | None = None  # (W, gram, bits of each, group, options) -> one Packed each
    wants_gram: bool = False  # encode, or mask, reads the gram matrices of the inputs
    densities: Densities | None = None  # (stats, options) -> {layer: share of weights that stay}
    mask: Mask | None = None  # (W, gram or its diagonal, density, options) -> W, the others 0
    thresholds: Thresholds | None = None  # (stats, options) -> ({layer: by rank}, protected share)
    # (layer, width of what experts hear, top_k, options) -> the layer's head before it has learnt
    learn: Learn | None = None


def load_method(name: str, part: str | tuple[str, ...]) -> Method:
    """The METHOD of moecule/methods/<name>.py, which must supply `part`, or one of several.

    Raises RecipeError where there is no such method, naming those there are.
    """
    known, parts = method_names(), (part,) if isinstance(part, str) else part
    if name in known:
        method: Method = importlib.import_module(f"moecule.methods.{name}").METHOD
        if _supplies(method, parts):
            return method
    having = [n for n in known if _supplies(load_all()[n], parts)]
    raise RecipeError(
        f"method {name!r} has no {' or '.join(parts)}; those that have are {', '.join(having)}"
    )


def _supplies(method: Method, parts: Sequence[str]) -> bool:
    return any(getattr(method, part) is not None for part in parts)


def load_all() -> dict[str, Method]:
    """Every method by name."""
    return {n: importlib.import_module(f"moecule.methods.{n}").METHOD for n in method_names()}


def method_names() -> list[str]:
    """Every file of methods/, sorted."""
    return sorted(p.stem for p in (Path(__file__).parent / "methods").glob("[a-z]*.py"))
