"""The plan: what becomes of every expert and of the rest. Plain data, plain text.

A plan is all that `apply` needs besides the model and the text: it can be read, compared with
diff, edited by hand and applied again. One outcome takes one line.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import yaml
from jaxtyping import Int32
from torch import Tensor

from moecule.errors import PlanError
from moecule.packed import WIDTHS
from moecule.skip import Masks as Masks  # part of what a plan says
from moecule.skip import Skip as Skip
from moecule.skip import skip_of
from moecule.zeros import Sparse

REST = ("attention", "shared", "dense", "router")  # everything in a layer but its routed experts


@dataclass(frozen=True)
class Keep:
    """The expert stays, in `bits` a weight; 16 leaves its weights as they are."""

    bits: int = 16  # the most that any piece has, where there are pieces
    group: int = 0  # columns that share a scale; 0 for 16 bits
    channels: int | None = None  # so many stay, the first of the plan's order; None: all
    pieces: tuple[
        int, ...
    ] = ()  # bits of runs of as many channels each, the first of the order first

    @staticmethod
    def in_pieces(bits: tuple[int, ...], group: int, channels: int | None = None) -> Keep:
        """The expert stays, cut into as many pieces as there are `bits`."""
        return Keep(max(bits), group, channels, bits)

    @property
    def each(self) -> tuple[Keep, ...]:
        """What its pieces keep; of one that is not cut, what it keeps."""
        return tuple(Keep(b, self.group) for b in self.pieces) or (self,)

    @property
    def mean_bits(self) -> float:
        """Code bits a weight."""
        return sum(self.pieces) / len(self.pieces) if self.pieces else self.bits

    @property
    def code(self) -> str:
        """Its bits as text: 3, or 3+2+1 in pieces."""
        return "+".join(map(str, self.pieces or (self.bits,)))

    def __str__(self) -> str:
        wide = "" if self.channels is None else f" {self.channels}ch"
        return f"keep{wide}" if self.bits == 16 else f"keep{wide} {self.code}bit g{self.group}"


@dataclass(frozen=True)
class Drop:
    """The expert and its router row go."""

    def __str__(self) -> str:
        return "drop"


@dataclass(frozen=True)
class Merge:
    """The expert becomes part of another of its layer, which stays."""

    into: int

    def __str__(self) -> str:
        return f"merge {self.into}"


Fate = Keep | Drop | Merge
Router = Literal["rows", "mean", "alias"]


@dataclass(frozen=True)
class Merges:
    """How experts become one, and what routers do with those that are no more.

    router: their rows go ("rows"), or the row of the one that stays becomes the mean of all ("mean"), or
    all rows stay, and who picks one of them gets the one that stays ("alias").
    """

    how: Mapping[str, Any]  # the method and its options
    router: Router = "rows"
    # {layer: how much each expert counts in the means}
    weights: Mapping[int, tuple[float, ...]] = field(default_factory=dict)


@dataclass(frozen=True)
class Plan:
    """Fates of all experts, widths of the rest, and how to encode."""

    model: str  # as the user named it
    digest: str  # of the checkpoint
    layers: Mapping[int, tuple[Fate, ...]]  # {MoE layer: fate of expert 0, 1, ...}
    rest: Mapping[str, Keep] = field(default_factory=lambda: dict.fromkeys(REST, Keep()))
    encode: Mapping[str, Any] = field(default_factory=lambda: {"method": "rtn"})
    skip: Skip | Masks | None = None
    merge: Merges | None = None
    refit: bool = False  # down projections are fitted to what the layer gave before
    sparse: Sparse | None = None
    top_k: int | None = None  # experts that routers pick for a token, where fewer than they did
    channels: str | None = None  # digest of `order`, where any expert keeps some channels only
    # {MoE layer: every expert's channels, those that go last first}; in a file beside the plan's
    order: Mapping[int, Int32[Tensor, "E F"]] = field(default_factory=dict, compare=False)
    made_by: Mapping[str, Any] = field(default_factory=dict)

    @property
    def nominal_bits(self) -> float:
        """Mean code bits over the routed experts' weights, dropped experts counted as 0 bits."""
        fates = [f for layer in self.layers.values() for f in layer]
        return sum(f.mean_bits for f in fates if isinstance(f, Keep)) / len(fates)

    @property
    def dropped(self) -> int:
        """How many experts go, into others or altogether."""
        return sum(not isinstance(f, Keep) for layer in self.layers.values() for f in layer)

    @property
    def aliased(self) -> bool:
        """Whether routers keep the rows of experts that became part of others."""
        return self.merge is not None and self.merge.router == "alias"

    def has_aliases(self, layer: int) -> bool:
        """Whether the layer's router picks among more experts than there are."""
        return self.aliased and not all(isinstance(f, Keep) for f in self.layers[layer])

    def stays(self, layer: int) -> bool:
        """Whether all experts of a layer, and all their channels, stay."""
        return all(isinstance(f, Keep) and f.channels is None for f in self.layers[layer])

    @property
    def narrowed(self) -> bool:
        """Whether any expert keeps some of its channels only."""
        fates = [f for layer in self.layers.values() for f in layer]
        return any(isinstance(f, Keep) and f.channels is not None for f in fates)

    @property
    def ordered(self) -> bool:
        """Whether it takes an order of channels to carry it out."""
        fates = [f for layer in self.layers.values() for f in layer]
        return self.narrowed or any(isinstance(f, Keep) and f.pieces for f in fates)

    @property
    def leaves_experts(self) -> bool:
        """Whether the weights that stay of all experts do so as they are."""
        fates = [f for layer in self.layers.values() for f in layer]
        return all(not isinstance(f, Keep) or f.bits == 16 for f in fates)

    @property
    def code_digest(self) -> str:
        """sha256 of the text form, 16 hex digits."""
        return hashlib.sha256(self.dumps().encode()).hexdigest()[:16]

    def dumps(self) -> str:
        """The plan as YAML."""
        doc: dict[str, Any] = {"model": self.model, "digest": self.digest}
        doc["made_by"] = dict(self.made_by)
        doc["encode"] = dict(self.encode)
        doc["rest"] = {part: str(self.rest[part]) for part in REST}
        if self.merge is not None:
            doc["merge"] = {"how": dict(self.merge.how), "router": self.merge.router}
            doc["merge"]["weights"] = _spaced(self.merge.weights)
        if self.refit:
            doc["refit"] = True
        if self.top_k is not None:
            doc["top_k"] = self.top_k
        if self.channels is not None:
            doc["channels"] = self.channels
        if self.skip is not None:
            doc["skip"] = self.skip.as_dict()
        if self.sparse is not None:
            doc["sparse"] = self.sparse.as_dict()
        doc["layers"] = {layer: _lines(fates) for layer, fates in sorted(self.layers.items())}
        return yaml.safe_dump(doc, sort_keys=False, width=100)

    @staticmethod
    def loads(text: str) -> Plan:
        """The plan that `dumps` wrote or a person edited. Raises PlanError, naming the place."""
        try:
            doc = yaml.load(text, _OneKeyOnce)
        except (yaml.YAMLError, ValueError, LookupError, AttributeError, RecursionError) as e:
            if isinstance(e, PlanError):
                raise  # says more
            raise PlanError(
                f"plan: not YAML: {' '.join(str(e).split())}; mend it, or plan again"
            ) from e
        wanted = {"model", "digest", "made_by", "encode", "rest", "layers"}
        more = {"skip", "sparse", "top_k", "channels", "merge", "refit"}
        if not isinstance(doc, dict) or not wanted <= set(doc) <= wanted | more:
            found = sorted(map(str, doc)) if isinstance(doc, dict) else type(doc).__name__
            raise PlanError(
                f"plan: found keys {found}, wanted {sorted(wanted)}, maybe {', '.join(sorted(more))}"
            )
        if not isinstance(doc["rest"], dict) or set(doc["rest"]) != set(REST):
            raise PlanError(f"plan: rest has {doc['rest']!r}, wanted one line each for {REST}")
        rest = {part: _fate(str(verb), f"rest, {part}") for part, verb in doc["rest"].items()}
        if any(
            not isinstance(f, Keep) or f.channels is not None or f.pieces for f in rest.values()
        ):
            raise PlanError("plan: rest, only experts can be dropped; wanted keep or keep 3bit g64")
        for key in ("made_by", "encode"):
            if not isinstance(doc[key], dict):
                raise PlanError(f"plan: {key} has {doc[key]!r}, wanted keys and values")
        if not isinstance(doc["layers"], dict) or not doc["layers"]:
            raise PlanError("plan: there are no layers; plan again")
        made = Plan(
            model=str(doc["model"]),
            digest=str(doc["digest"]),
            layers={_number(k, "layers"): _fates(k, v) for k, v in doc["layers"].items()},
            rest={part: fate for part, fate in rest.items() if isinstance(fate, Keep)},
            encode=doc["encode"],
            skip=skip_of(doc["skip"]) if "skip" in doc else None,
            merge=_merges(doc["merge"]) if "merge" in doc else None,
            refit=_refit(doc["refit"]) if "refit" in doc else False,
            sparse=Sparse.of(doc["sparse"]) if "sparse" in doc else None,
            top_k=_top_k(doc["top_k"]) if "top_k" in doc else None,
            channels=str(doc["channels"]) if "channels" in doc else None,
            made_by=doc["made_by"],
        )
        if made.merge is None and any(
            isinstance(f, Merge) for of in made.layers.values() for f in of
        ):
            raise PlanError("plan: experts are merged, and it does not say how; wanted merge:")
        if made.ordered and made.channels is None:
            what = "keeps some channels" if made.narrowed else "is cut into pieces of its channels"
            raise PlanError(
                f"plan: an expert {what}, and the plan does not name which; wanted channels: and the "
                "digest of their order"
            )
        return made


class _OneKeyOnce(yaml.SafeLoader):
    """YAML that refuses a key given twice; PyYAML lets the last one win without a word.

    Aliases too: a few lines of them can stand for more than memory holds.
    """

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            line = int(parent.start_mark.line) + 1 if parent else 1
            raise PlanError(f"plan: line {line} has an alias (*); write out what it stands for")
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        if not isinstance(node, yaml.MappingNode):  # a list that is said to be a table
            raise PlanError(f"plan: line {node.start_mark.line + 1} has no table; wanted one")
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        twice = sorted({str(k) for k in keys if keys.count(k) > 1})
        if twice:
            line = node.start_mark.line + 1
            raise PlanError(
                f"plan: {twice[0]!r} stands twice in the table of line {line}; keep one"
            )
        return super().construct_mapping(node, deep)


def _spaced(numbers: Mapping[int, tuple[float, ...]]) -> dict[int, str]:
    return {i: " ".join(map(repr, t)) for i, t in sorted(numbers.items())}


def _merges(doc: Any) -> Merges:
    try:
        how, router, weights = (doc[key] for key in ("how", "router", "weights"))
        given = {
            _number(i, "merge"): tuple(float(x) for x in str(t).split()) for i, t in weights.items()
        }
    except (KeyError, TypeError, AttributeError, ValueError) as e:
        raise PlanError(
            f"plan: merge wants how, router and weights per layer, found {doc!r}"
        ) from e
    if not isinstance(how, dict) or router not in get_args(Router) or len(doc) != 3:
        raise PlanError(
            "plan: merge wants a method and its options under how, and router "
            f"{', '.join(get_args(Router))}; found {how!r}, {router!r}"
        )
    if not all(0 <= x < math.inf for t in given.values() for x in t):  # NaN is not, either
        raise PlanError("plan: merge: weights, wanted numbers from 0 up")
    return Merges(how, router, given)


def _refit(value: Any) -> bool:
    if type(value) is bool:
        return value
    raise PlanError(f"plan: refit has {value!r}, wanted true or false")


def _top_k(value: Any) -> int:
    if type(value) is int and 0 < value < 10**4:  # True is an int
        return value
    raise PlanError(f"plan: top_k has {value!r}, wanted how many experts a token gets")


def _number(key: Any, where: str) -> int:
    if type(key) is int and 0 <= key < 10**6:  # True is an int
        return key
    raise PlanError(f"plan: {where} names {key!r}, wanted a layer's number")


def _lines(fates: Iterable[Fate]) -> dict[str, str]:
    ids: dict[str, list[int]] = {}
    for e, fate in enumerate(fates):
        ids.setdefault(str(fate), []).append(e)
    return {verb: _ranges(ids[verb]) for verb in sorted(ids, key=lambda v: (len(v), v))}


def _ranges(ids: list[int]) -> str:
    out, start = [], ids[0]
    for a, b in zip(ids, [*ids[1:], -2], strict=True):
        if b != a + 1:
            out.append(str(a) if a == start else f"{start}-{a}")
            start = b
    return " ".join(out)


def _fate(verb: str, where: str) -> Fate:
    if verb == "drop":
        return Drop()
    if verb == "keep":
        return Keep()
    if match := re.fullmatch(r"merge (\d{1,4})", verb):
        return Merge(int(match[1]))
    match = re.fullmatch(r"keep(?: (\d{1,9})ch)?(?: (\d{1,9}(?:\+\d{1,9})*)bit g(\d{1,9}))?", verb)
    if not match:
        raise PlanError(
            f"plan: {where}: cannot read {verb!r}; wanted keep, keep 3bit g64, keep 3+2+1bit g64, "
            "keep 192ch, drop, or merge 3"
        )
    channels = None if match[1] is None else int(match[1])
    if match[2] is None:
        return Keep(channels=channels)
    bits, group = tuple(map(int, match[2].split("+"))), int(match[3])
    if not set(bits) <= {*WIDTHS} or group < 1:
        raise PlanError(f"plan: {where}: {verb!r} wants 1 to 8 bits and a group of 1 or more")
    return (
        Keep(bits[0], group, channels) if len(bits) == 1 else Keep.in_pieces(bits, group, channels)
    )


def _fates(layer: Any, lines: Any) -> tuple[Fate, ...]:
    where = f"layer {layer}"
    if not isinstance(lines, dict) or not lines:
        raise PlanError(f"plan: {where} has no fates; give its experts some, like keep: 0-7")
    found: dict[int, Fate] = {}
    for verb, ids in lines.items():
        fate = _fate(str(verb), where)
        for part in str(ids).split():
            # four digits: a slip such as 0-99999999 would fill the memory
            match = re.fullmatch(r"(\d{1,4})(?:-(\d{1,4}))?", part)
            if not match:
                raise PlanError(
                    f"plan: {where}: cannot read {part!r}; wanted experts like 3 or 5-7"
                )
            for e in range(int(match[1]), int(match[2] or match[1]) + 1):
                if e in found:
                    raise PlanError(f"plan: {where}: expert {e} has two fates; leave it one")
                found[e] = fate
    missing = sorted(set(range(max(found, default=-1) + 1)) - set(found))
    if missing or not found:
        raise PlanError(
            f"plan: {where}: experts {_ranges(missing or [0])} have no fate; give them one, like keep"
        )
    return tuple(found[e] for e in range(len(found)))
