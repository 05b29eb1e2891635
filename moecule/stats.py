"""What calibration counts, and the sums it keeps.

A Statistic says what one expert adds for the tokens it served. Only sums are kept (and here and
there the greatest of all), never means, so batches, shards and GPUs add up; whoever reads them divides.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Float64, Int
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from moecule.errors import DataError
from moecule.experts import Expert, Experts
from moecule.files import parse_json, save_whole, write_text

BINS = 256  # of every histogram over [0, 1]


@dataclass(frozen=True)
class Seen:
    """What one expert saw and said in one batch of the calibration text: t of its T tokens."""

    x: Float[Tensor, "t H"]  # its input
    coef: Float[Tensor, " t"]  # the weight its output gets in the layer's sum
    prob: Float[Tensor, " t"]  # its score among all experts, before top-k and renormalisation
    ratio: Float[Tensor, " t"]  # coef over the token's largest coef
    rank: Int[Tensor, " t"]  # place among the token's experts by coef, 0 the first
    total: Float[Tensor, " t"]  # sum of the token's coefs
    act: Float[Tensor, "t F"]  # what enters its down projection
    out: Float[Tensor, "t H"]  # its output, before coef
    routed: Float[Tensor, "t H"]  # the layer's routed output for the token, all experts summed
    grad: Float[Tensor, "t H"] | None  # of the loss by `routed`, where a statistic asks for it
    # 1 - cosine of the residual stream before and after `routed`, where a statistic asks for it
    turn: Float[Tensor, " t"] | None
    top_k: int
    renormalised: bool  # the token's coefs sum to a constant
    expert: Expert

    @cached_property
    def norm(self) -> Float64[Tensor, " t"]:
        """Length of each output; several statistics read it."""
        length: Tensor = torch.linalg.vector_norm(self.out, dim=-1, dtype=torch.float64)
        return length

    @cached_property
    def act_grad(self) -> Float[Tensor, "t F"]:
        """The gradient of the loss by `act`, where a statistic asks for `grad`."""
        assert self.grad is not None  # the statistic says backward
        by_out, expert = self.coef[:, None].to(self.out.dtype) * self.grad, self.expert
        if expert.end is not None:
            with torch.enable_grad():
                plain = (self.act @ expert.down.mT).detach()
                if expert.down_bias is not None:
                    plain = plain + expert.down_bias
                plain.requires_grad_()
                (by_out,) = torch.autograd.grad(expert.end(plain), plain, by_out)
        return by_out @ expert.down


@dataclass(frozen=True)
class Routed:
    """What a layer's router made of one batch of the calibration text, and what was made of that."""

    logits: Float[Tensor, "T E"]
    prob: Float[Tensor, "T E"]  # of all experts, before some were chosen; see family.SCORES
    idx: Int[Tensor, "T K"]  # those chosen
    coef: Float[Tensor, "T K"]


@dataclass(frozen=True)
class LayerSeen:
    """What a decoder layer was given and gave in one batch."""

    hidden: Float[Tensor, "T H"]  # its input
    out: Float[Tensor, "T H"]  # its output, residual included


@dataclass(frozen=True)
class Block:
    """A layer's router and routed experts, once all batches have passed."""

    experts: Experts
    rows: Float64[Tensor, "E N"]  # what the router holds of each expert
    groups: int  # that the router picks among first; 1 where it does not
    sums: Mapping[str, Tensor]  # of the layer, by the other statistics' names
    # of a sample of the text, were these experts alone left: the squared change of the routed output
    error: Callable[[Sequence[int]], float]


@dataclass(frozen=True, eq=False)
class Statistic:
    """A named sum over the tokens of an expert, or of a layer. stats/ knows it by its name.

    One of the six functions is given; each says what one batch adds, but for `of_block`.
    """

    name: str
    of: Callable[[Seen], Tensor] | None = None  # -> [...] for one expert
    of_layer: Callable[[LayerSeen], Tensor] | None = None  # -> [...] for the layer
    # expert -> such an `of`, for what is made of the expert's weights once and read in every batch
    of_expert: Callable[[Expert], Callable[[Seen], Tensor]] | None = None
    of_router: Callable[[Routed], Tensor] | None = (
        None  # -> [E, ...], of tokens routed elsewhere too
    )
    # experts -> (inputs of all tokens, their routing) -> [E, ...]: every expert is run on every token
    of_experts: Callable[[Experts], Callable[[Tensor, Routed], Tensor]] | None = None
    # -> what is made of the whole layer at the end; the same in every process, so not added up
    of_block: Callable[[Block], Tensor] | None = None
    by_expert: bool = False  # `of_block` gives [E, ...]
    pairs: bool = False  # [E, E], of every two experts
    backward: bool = False  # reads Seen.grad
    turned: bool = False  # reads Seen.turn
    greatest: bool = False  # of two batches the greater number is kept, not the sum

    def join(self, a: Tensor, b: Tensor) -> Tensor:
        """Of two batches, or shards, together."""
        return torch.maximum(a, b) if self.greatest else a + b

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Statistic) and other.name == self.name

    def __hash__(self) -> int:
        return hash(self.name)


COUNT = Statistic("count", lambda s: torch.tensor(float(len(s.coef))))
MASS = Statistic("mass", lambda s: s.prob.double().sum())
SOFT = Statistic("soft", of_router=lambda r: r.prob.double().sum(0))
COEF = Statistic("coef", lambda s: s.coef.double().sum())
COEF_SQ = Statistic("coef_sq", lambda s: s.coef.double().square().sum())
NORM = Statistic("norm", lambda s: s.norm.sum())
NORM_SQ = Statistic("norm_sq", lambda s: s.norm.square().sum())
COEF_NORM = Statistic("coef_norm", lambda s: (s.coef * s.norm).sum())
COEF_NORM_SQ = Statistic("coef_norm_sq", lambda s: (s.coef * s.norm).square().sum())
TURN_COEF_NORM = Statistic("turn_coef_norm", lambda s: _turned(s).sum(), turned=True)
# from one pass of these every score for dropping is made
DROPPING = (COUNT, SOFT, COEF, COEF_SQ, NORM, NORM_SQ, COEF_NORM, COEF_NORM_SQ, TURN_COEF_NORM)
IN_SQ = Statistic("in_sq", lambda s: s.x.double().square().sum(0))  # [H], or the experts' width
ACT_SQ = Statistic("act_sq", lambda s: s.act.double().square().sum(0))  # [F]
TOKENS = Statistic("tokens", of_layer=lambda s: torch.tensor(float(len(s.hidden))))
HIDDEN_SQ = Statistic("hidden_sq", of_layer=lambda s: s.out.double().square().sum())
# what two experts' logits have in common, over all tokens
LOGITS = Statistic(
    "logits", of_router=lambda r: r.logits.double().mT @ r.logits.double(), pairs=True
)
COSINE = Statistic(
    "cosine", of_layer=lambda s: torch.cosine_similarity(s.hidden.double(), s.out.double()).sum()
)


def _turned(seen: Seen) -> Float64[Tensor, " t"]:
    assert seen.turn is not None  # the statistic says turned
    return seen.turn * seen.coef * seen.norm


LayerStats = Mapping[
    str, Float64[Tensor, "..."]
]  # [E, ...] of experts, [...] of the layer, by the statistic's name
Stats = Mapping[int, LayerStats]  # by layer


def select(sums: LayerStats, read: Iterable[Statistic], ids: Sequence[int]) -> dict[str, Tensor]:
    """The sums of a layer that `read` names, of the experts `ids` alone; none of whole layers' sets."""
    at, out = list(ids), dict[str, Tensor]()
    for s in read:
        if s.name in sums and (s.of_block is None or s.by_expert):
            of = sums[s.name]
            of = of if s.of_layer is not None else of[at]
            out[s.name] = of[:, at] if s.pairs else of
    return out


def histograms(
    value: Float[Tensor, " t"],
    row: Int[Tensor, " t"],
    n: int,
    weight: Float[Tensor, " t"] | None = None,
) -> Float64[Tensor, "n bins"]:
    """Sums of `weight` (or counts) of values in [0, 1], a histogram for each of the n rows.

    BINS equal bins; 1 falls in the last.
    """
    at = row * BINS + (value * BINS).long().clamp(0, BINS - 1)
    if weight is None:  # whole numbers add up to the same in any order
        counts = torch.zeros(n * BINS, dtype=torch.int64, device=at.device)
        return counts.scatter_add_(0, at, torch.ones_like(at)).double().view(n, BINS)
    # adding up by index_put_ has a fixed order on a GPU too: it sorts there
    sums = torch.zeros(n * BINS, dtype=torch.float64, device=at.device)
    return sums.index_put_((at,), weight.double(), accumulate=True).view(n, BINS)


def save_layer(sums: LayerStats, folder: Path, layer: int) -> None:
    """One safetensors file, all of it or nothing. Raises OutputError where it cannot be written."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: t.double().cpu().contiguous() for name, t in sorted(sums.items())}
    save_whole(tensors, layer_file(folder, layer))


def layer_file(folder: Path, layer: int) -> Path:
    """Where a layer's sums lie."""
    return folder / f"layer_{layer:04d}.safetensors"


def save_meta(meta: Mapping[str, Any], folder: Path) -> None:
    """meta.json: the digests of what went in, and of the layers' files, which are there."""
    doc = {**meta, "sums": stats_digest(folder)}
    write_text(folder / "meta.json", json.dumps(doc, indent=2, sort_keys=True) + "\n")


def load_stats(folder: Path) -> tuple[dict[int, dict[str, Tensor]], dict[str, Any]]:
    """(stats, meta). Raises DataError for a folder that holds none."""
    if not (folder / "meta.json").is_file():
        raise DataError(
            f"{folder} holds no meta.json, so it is not a stats folder; make one with moecule calibrate"
        )
    try:
        meta = parse_json((folder / "meta.json").read_text())
        files = {int(p.stem[6:]): p for p in sorted(folder.glob("layer_*.safetensors"))}
        if not isinstance(meta, dict):
            raise ValueError("meta.json")
        if sorted(files) != meta.get("layers"):
            raise DataError(
                f"{folder} holds layers {sorted(files)} and its meta.json names "
                f"{meta.get('layers')}; remove it and calibrate again"
            )
        if meta.get("sums") != stats_digest(folder):
            raise ValueError("its layers are not those that meta.json was written for")
        layers = {i: load_file(p) for i, p in files.items()}
    except DataError:
        raise
    except (OSError, ValueError, SafetensorError) as e:
        raise DataError(f"{folder} is damaged ({e}); remove it and calibrate again") from e
    return layers, meta


def stats_digest(folder: Path) -> str:
    """sha256 over the layers' files, 16 hex digits."""
    total = hashlib.sha256()
    for path in sorted(folder.glob("layer_*.safetensors")):
        total.update(path.read_bytes())
    return total.hexdigest()[:16]
