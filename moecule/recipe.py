"""A recipe: one TOML file that names a method for each part, and its options.

Recipes come with the package (`moecule/recipes/`) or from the user's own file. Every key is
known or refused.
"""

from __future__ import annotations

import dataclasses
import math
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

from moecule.budget import Inventory
from moecule.data import Sampling
from moecule.errors import RecipeError
from moecule.method import load_method
from moecule.plan import REST, Keep, Merges, Plan, Router
from moecule.stats import COUNT, DROPPING, Statistic

HERE = Path(__file__).parent / "recipes"
AS_IT_IS = 16.0  # bits: experts that stay are not rounded
MERGING = ("cluster", "merge")
SKIPPING = ("thresholds", "learn")  # of a method; [skip] takes either
KINDS = {int: "a whole number", float: "a number", bool: "true or false", str: "text in quotes"}


@dataclass(frozen=True)
class Part:
    """A method and its options."""

    method: str
    options: Any

    def as_dict(self) -> dict[str, Any]:
        """For the plan's text: the method and every option."""
        given = dataclasses.asdict(self.options)
        return {"method": self.method} | {
            k: list(v) if isinstance(v, tuple) else v for k, v in given.items()
        }


@dataclass(frozen=True)
class Into:
    """Keys of [merge] that every method of it has."""

    router: Router = "rows"  # as in plan.Merges
    weigh: Literal["count", "score"] = "count"  # what an expert's weight in a mean is


@dataclass(frozen=True)
class Recipe:
    """The whole pipeline by name."""

    name: str
    about: str
    paper: str
    group: int
    bits: float  # when neither --bits, --size nor --fit is given; 16 leaves experts as they are
    data: Sampling
    allocate: Part
    encode: Part
    rest: Mapping[str, Keep] = field(default_factory=dict)
    skip: Part | None = None
    score: Part | None = None  # says which experts to drop
    choose: Part | None = None  # the same, by sets of them
    sparsify: Part | None = None  # says what share of the weights of experts that stay becomes 0
    mask: Part | None = None  # and which
    channels: Part | None = None  # says which channels of the experts to drop
    cluster: Part | None = None  # says which experts become one, instead of being dropped
    merge: Part | None = None  # makes one of them
    into: Into = field(default_factory=lambda: Into())
    refit: bool = False  # down projections are fitted to what the layer gave before any of it
    drop: float = 0.0  # the share of either when --drop is not given

    def needs(self) -> tuple[Statistic, ...]:
        """The statistics that its methods read, each once."""
        parts: dict[str | tuple[str, ...], Part | None] = {
            "score": self.score,
            "choose": self.choose,
            "channels": self.channels,
            "cluster": self.cluster,
            "densities": self.sparsify,
            "allocate": self.allocate,
            SKIPPING: self.skip,
        }
        given = {what: part for what, part in parts.items() if part is not None}
        found = [
            s for what, p in given.items() for s in load_method(p.method, what).needs(p.options)
        ]
        return tuple(dict.fromkeys(found))

    def counted(self) -> tuple[Statistic, ...]:
        """What calibrating for it counts: how often each expert was used, and what it needs.

        If it drops experts also what all others that do need, so that they can be compared.
        """
        others = () if self.score is None and self.choose is None else DROPPING
        return tuple(dict.fromkeys((COUNT, *self.needs(), *others)))

    @property
    def drops(self) -> bool:
        """Whether it says which experts, or which channels of them, go."""
        return any(part is not None for part in (self.score, self.choose, self.channels))

    @property
    def rounds(self) -> bool:
        """Whether anything is rounded when no bits are asked for."""
        return self.bits < AS_IT_IS or any(keep.bits < 16 for keep in self.rest.values())

    def widths(self) -> tuple[int, int]:
        """The least and the most bits that its allocation can give an expert."""
        given = getattr(self.allocate.options, "bits", (1, 8))
        return min(given), max(given)

    def merges(self, weights: Mapping[int, tuple[float, ...]]) -> Merges | None:
        """How a plan of it merges experts, if it does."""
        if self.merge is None:
            return None
        return Merges(self.merge.as_dict(), self.into.router, weights)

    def joining(self) -> dict[str, Any]:
        """For the plan: how experts become one, and that those that stay are fitted."""
        parts = {"cluster": self.cluster, "merge": self.merge}
        found: dict[str, Any] = {n: part.as_dict() for n, part in parts.items() if part is not None}
        if self.merge is not None:
            found["merge"] |= dataclasses.asdict(self.into)
        return found | ({"refit": True} if self.refit else {})

    def even(self, inventory: Inventory, bits: float) -> Plan:
        """A plan that gives all experts the widths of `even_widths`."""
        widths = self.even_widths({i: e.n for i, e in inventory.experts.items()}, bits)
        layers = {i: tuple(Keep(b, self.group) for b in w) for i, w in widths.items()}
        return Plan("", "", layers, rest=self.rest)

    def even_widths(self, sizes: Mapping[int, int], bits: float) -> dict[int, tuple[int, ...]]:
        """The widths next to `bits` for layers of so many experts, so many each as make the mean.

        It prices a budget before there are statistics. Raises RecipeError as `check_bits` does.
        """
        self.check_bits(bits)
        widths = getattr(self.allocate.options, "bits", tuple(range(1, 9)))
        low = max(b for b in widths if b <= bits)
        high = min((b for b in widths if b > bits), default=low + 1)
        layers, at = {}, 0.0
        for i, n in sizes.items():
            layer = []
            for _ in range(n):  # spread over the layers
                at += (bits - low) / (high - low)
                layer.append(high if at > 1 - 1e-9 else low)
                at -= layer[-1] == high
            layers[i] = tuple(layer)
        return layers

    def check_bits(self, bits: float) -> None:
        """Raise RecipeError for a mean of bits that no allocation of this recipe has."""
        if bits == AS_IT_IS:
            return
        whole = load_method(self.allocate.method, "allocate").whole_bits
        least, most = self.widths()
        if not least <= bits <= most:
            has = hasattr(self.allocate.options, "bits")
            other = "; give it other widths with --set allocate.bits=[...]" if has else ""
            raise RecipeError(
                f"{bits:g} bits were asked for, and the least that recipe {self.name} can is "
                f"{least}, the most {most}{other}"
            )
        if whole and bits != int(bits):
            raise RecipeError(
                f"recipe {self.name} takes whole bits only, not {bits:g}; give --bits {int(bits)} "
                f"or {int(bits) + 1}, or --recipe mc"
            )


def recipe_names() -> list[str]:
    """The recipes that come with the package."""
    return sorted(p.stem for p in HERE.glob("*.toml"))


def load_recipe(name: str | Path, changes: Mapping[str, Any] | None = None) -> Recipe:
    """A recipe of the package by name, or a file. `changes` overrides keys: {"encode.damp": 0.05}.

    Raises RecipeError for an unknown recipe, key, method or kind of value.
    """
    path = HERE / f"{name}.toml"
    if not path.is_file():
        path = Path(name)
    if not path.is_file():
        raise RecipeError(
            f"no recipe {str(name)!r}: there are {', '.join(recipe_names())}, or give a .toml file"
        )
    try:
        doc = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as e:
        raise RecipeError(f"{path}: not TOML: {e}; mend that line") from e
    for key, value in (changes or {}).items():
        table, _, last = key.rpartition(".")
        inside = doc.setdefault(table, {}) if table else doc
        if not isinstance(inside, dict):
            raise RecipeError(f"{path}: {key} cannot be set; {table} = {inside!r} is no table")
        inside[last] = value
    return _recipe(path, doc)


def _recipe(path: Path, doc: dict[str, Any]) -> Recipe:
    known = {"about", "paper", "group", "bits", "drop", "data", "allocate", "encode", "rest"}
    able_to = {"score", "choose", "channels", "skip", "sparsify", "mask", "refit", *MERGING}
    _refuse_unknown(str(path), doc, known | able_to)
    for key in ("allocate", "encode"):
        if not isinstance(doc.get(key), dict):
            raise RecipeError(f"{path}: there is no [{key}] table; it must name a method")
    group = _value(int, doc.get("group", 64), f"{path}: group")
    if not 1 <= group < 10**9:
        raise RecipeError(f"{path}: group = {group}, wanted 1 column or more")
    drop = _value(float, doc.get("drop", 0.0), f"{path}: drop")
    able = [key for key in ("score", "choose", "channels") if key in doc]
    if len(able) > 1:
        raise RecipeError(
            f"{path}: both [{able[0]}] and [{able[1]}]; one recipe drops one or the other"
        )
    if not 0 <= drop < 1 or (drop and not able):
        wanted = (
            "a share of the experts, from 0 to 1"
            if able
            else "a [score], [choose] or [channels] table with it"
        )
        raise RecipeError(f"{path}: drop = {drop:g}, wanted {wanted}")
    allocate = part_of(f"{path} [allocate]", doc["allocate"], "allocate", group)
    if load_method(allocate.method, "allocate").cuts and "channels" not in doc:
        raise RecipeError(
            f"{path}: {allocate.method} gives bits to pieces of experts; wanted a [channels] table, which "
            "says in which order channels lie"
        )
    given: dict[str, Any] = {key: part_of(f"{path} [{key}]", doc[key], key, group) for key in able}
    if ("sparsify" in doc) != ("mask" in doc):
        raise RecipeError(f"{path}: [sparsify] and [mask] go together; wanted both or none")
    if "sparsify" in doc and "channels" in doc:
        raise RecipeError(
            f"{path}: both [sparsify] and [channels]; weights become 0 in whole experts only"
        )
    rest = doc.get("rest", {})
    _refuse_unknown(f"{path} [rest]", rest, set(REST))
    given |= {
        key: part_of(f"{path} [{key}]", doc[key], what, group)
        for key, what in (("skip", SKIPPING), ("sparsify", "densities"), ("mask", "mask"))
        if key in doc
    }
    given |= _merging(path, doc)
    return Recipe(
        name=path.stem,
        about=_value(str, doc.get("about", ""), f"{path}: about"),
        paper=_value(str, doc.get("paper", ""), f"{path}: paper"),
        group=group,
        bits=_value(float, doc.get("bits", 2.5), f"{path}: bits"),
        data=_options(Sampling, doc.get("data", {}), f"{path} [data]"),
        allocate=allocate,
        encode=part_of(f"{path} [encode]", doc["encode"], "encode", group),
        rest={part: _keep(rest.get(part, 16), group, f"{path} [rest] {part}") for part in REST},
        drop=drop,
        refit=_value(bool, doc.get("refit", False), f"{path}: refit"),
        **given,
    )


def _merging(path: Path, doc: dict[str, Any]) -> dict[str, Any]:
    """The parts that make one of several experts; with [cluster] there must be [merge]."""
    if not {*MERGING} & {*doc}:
        return {}
    if not {"score", "merge"} <= {*doc}:
        raise RecipeError(
            f"{path}: experts are merged by [score], of which the highest stays, [cluster] and [merge]; "
            f"there is no [{'merge' if 'score' in doc else 'score'}]"
        )
    table = dict(doc["merge"]) if isinstance(doc["merge"], dict) else {}
    common = {f.name for f in dataclasses.fields(Into)} & {*table}
    into = _options(Into, {k: table.pop(k) for k in sorted(common)}, f"{path} [merge]")
    if "cluster" not in doc:  # of experts that are dropped, parts go into others
        if into.router != "rows":
            raise RecipeError(
                f"{path} [merge] router = {into.router!r}: rows of experts that are dropped go; wanted rows"
            )
        return {"merge": part_of(f"{path} [merge]", table, "recombine"), "into": into}
    cluster = part_of(f"{path} [cluster]", doc["cluster"], "cluster")
    return {"cluster": cluster, "merge": part_of(f"{path} [merge]", table, "merge"), "into": into}


def part_of(where: str, table: Any, what: str | tuple[str, ...], group: int | None = None) -> Part:
    """A table's method, which must supply `what` (one of them), and its options; `group` is their default.

    Raises RecipeError, beginning with `where`, for what is unknown.
    """
    given = dict(table) if isinstance(table, dict) else {}
    name = given.pop("method", None)
    if not isinstance(name, str):
        raise RecipeError(f'{where} names no method; wanted method = "..."')
    options = load_method(name, what).options
    if group is not None and "group" in {f.name for f in dataclasses.fields(options)}:
        given.setdefault("group", group)
    return Part(name, _options(options, given, where))


def _keep(bits: Any, group: int, where: str) -> Keep:
    if bits == 16:
        return Keep()
    if type(bits) is not int or not 1 <= bits <= 8:  # True is an int
        raise RecipeError(f"{where} = {bits!r}, wanted 1 to 8 bits, or 16 to leave it as it is")
    return Keep(bits, group)


def _options(kind: Any, given: Any, where: str) -> Any:
    types = get_type_hints(kind)
    _refuse_unknown(where, given, set(types))
    return kind(**{k: _value(types[k], v, f"{where} {k}") for k, v in given.items()})


def _value(wanted: Any, value: Any, where: str) -> Any:
    if get_origin(wanted) is tuple and isinstance(value, list) and value:
        if all(type(v) is int and 1 <= v <= 8 for v in value) and len(set(value)) == len(value):
            return tuple(sorted(value))
        raise RecipeError(f"{where} = {value!r}, wanted different widths of 1 to 8 bits")
    if get_origin(wanted) is Literal:
        if value in get_args(wanted):
            return value
        raise RecipeError(
            f"{where} = {value!r}, wanted one of {', '.join(map(str, get_args(wanted)))}"
        )
    if wanted is float and type(value) is int and abs(value) < 2**63:
        return float(value)
    if type(value) is wanted and (wanted is not float or math.isfinite(value)):
        return value
    raise RecipeError(f"{where} = {value!r}, wanted {KINDS.get(wanted, 'a list of widths')}")


def _refuse_unknown(where: str, given: Any, known: set[str]) -> None:
    if not isinstance(given, dict):
        raise RecipeError(f"{where}: found {given!r}, wanted a table")
    unknown = sorted(set(given) - known, key=str)  # those of a plan may be numbers
    if unknown:
        raise RecipeError(
            f"{where}: unknown key {unknown[0]!r}; known are {', '.join(sorted(known))}"
        )
