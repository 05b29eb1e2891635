"""A recipe: one TOML file that names a method for each part, and its options.

Recipes come with the package (`moecule/recipes/`) or from the user's own file. Every key is
known or refused.
"""

from __future__ import annotations

import dataclasses
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

from moecule.data import Sampling
from moecule.errors import RecipeError
from moecule.method import load_method
from moecule.plan import REST, Keep
from moecule.stats import Statistic

HERE = Path(__file__).parent / "recipes"


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
class Recipe:
    """The whole pipeline by name."""

    name: str
    about: str
    paper: str
    group: int
    bits: float  # when neither --bits, --size nor --fit is given
    data: Sampling
    allocate: Part
    encode: Part
    rest: Mapping[str, Keep] = field(default_factory=dict)
    skip: Part | None = None

    def needs(self) -> tuple[Statistic, ...]:
        """The statistics that its methods read, each once."""
        parts = [("allocate", self.allocate)] + ([("thresholds", self.skip)] if self.skip else [])
        found = [s for what, p in parts for s in load_method(p.method, what).needs(p.options)]
        return tuple(dict.fromkeys(found))


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
        doc = tomllib.loads(path.read_text())
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as e:
        raise RecipeError(f"{path}: not TOML: {e}") from e
    for key, value in (changes or {}).items():
        table, _, last = key.rpartition(".")
        (doc.setdefault(table, {}) if table else doc)[last] = value
    return _recipe(path, doc)


def _recipe(path: Path, doc: dict[str, Any]) -> Recipe:
    known = {"about", "paper", "group", "bits", "data", "allocate", "encode", "rest", "skip"}
    _refuse_unknown(str(path), doc, known)
    for key in ("allocate", "encode"):
        if not isinstance(doc.get(key), dict):
            raise RecipeError(f"{path}: there is no [{key}] table; it must name a method")
    group = doc.get("group", 64)
    if not isinstance(group, int) or group < 1:
        raise RecipeError(f"{path}: group = {group!r}, wanted a whole number of columns")
    rest = doc.get("rest", {})
    _refuse_unknown(f"{path} [rest]", rest, set(REST))
    return Recipe(
        name=path.stem,
        about=doc.get("about", ""),
        paper=doc.get("paper", ""),
        group=group,
        bits=doc.get("bits", 2.5),
        data=_options(Sampling, doc.get("data", {}), f"{path} [data]"),
        allocate=part_of(f"{path} [allocate]", doc["allocate"], "allocate", group),
        encode=part_of(f"{path} [encode]", doc["encode"], "encode", group),
        rest={part: _keep(rest.get(part, 16), group, f"{path} [rest] {part}") for part in REST},
        skip=part_of(f"{path} [skip]", doc["skip"], "thresholds", group) if "skip" in doc else None,
    )


def part_of(where: str, table: Any, what: str, group: int | None = None) -> Part:
    """A table's method, which must supply `what`, and its options; `group` is their default.

    Raises RecipeError, beginning with `where`, for what is unknown.
    """
    given = dict(table) if isinstance(table, dict) else {}
    name = given.pop("method", None)
    if not isinstance(name, str):
        raise RecipeError(f"{where} names no method")
    options = load_method(name, what).options
    if group is not None and "group" in {f.name for f in dataclasses.fields(options)}:
        given.setdefault("group", group)
    return Part(name, _options(options, given, where))


def _keep(bits: Any, group: int, where: str) -> Keep:
    if bits == 16:
        return Keep()
    if not isinstance(bits, int) or not 1 <= bits <= 8:
        raise RecipeError(f"{where} = {bits!r}, wanted 1 to 8 bits, or 16 to leave it as it is")
    return Keep(bits, group)


def _options(kind: Any, given: Mapping[str, Any], where: str) -> Any:
    types = get_type_hints(kind)
    _refuse_unknown(where, given, set(types))
    return kind(**{k: _value(types[k], v, f"{where} {k}") for k, v in given.items()})


def _value(wanted: Any, value: Any, where: str) -> Any:
    if get_origin(wanted) is tuple and isinstance(value, list) and value:
        if all(isinstance(v, int) and 1 <= v <= 8 for v in value) and len(set(value)) == len(value):
            return tuple(sorted(value))
        raise RecipeError(f"{where} = {value!r}, wanted different widths of 1 to 8 bits")
    if get_origin(wanted) is Literal:
        if value in get_args(wanted):
            return value
        raise RecipeError(
            f"{where} = {value!r}, wanted one of {', '.join(map(str, get_args(wanted)))}"
        )
    if wanted is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if (
        isinstance(wanted, type)
        and isinstance(value, wanted)
        and (wanted is bool or value is not True)
    ):
        return value
    raise RecipeError(f"{where} = {value!r}, wanted {getattr(wanted, '__name__', wanted)}")


def _refuse_unknown(where: str, given: Any, known: set[str]) -> None:
    if not isinstance(given, dict):
        raise RecipeError(f"{where}: found {given!r}, wanted a table")
    unknown = sorted(set(given) - known)
    if unknown:
        raise RecipeError(
            f"{where}: unknown key {unknown[0]!r}; known are {', '.join(sorted(known))}"
        )
