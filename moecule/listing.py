"""The methods as a table: what each does, its paper, its recipes, and what it was measured to cost.

measured.json beside this file is written by experiments (equal_bytes/tables.py, trained.py); what was not
measured is not in it, and its cell is empty.
"""

from __future__ import annotations

import importlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from moecule.method import load_all
from moecule.recipe import AS_IT_IS, Recipe, load_recipe, recipe_names

MEASURED = Path(__file__).parent / "measured.json"
PARTS = (
    "score", "choose", "channels", "cluster", "merge", "recombine", "densities", "mask", "allocate",
    "encode", "thresholds", "learn",
)  # fmt: skip
DOES = {
    "score": "drops experts",
    "choose": "drops experts",
    "channels": "drops channels",
    "cluster": "says who merges",
    "merge": "merges experts",
    "recombine": "merges channels",
    "densities": "says how many weights go",
    "mask": "makes weights 0",
    "allocate": "gives bits",
    "encode": "rounds",
    "thresholds": "skips online",
    "learn": "learns what to skip online",
}


@dataclass(frozen=True)
class Measured:
    """What a recipe of the method cost."""

    recipe: str  # or the command
    at: str  # the budget: "25% dropped"
    added_nats: Mapping[str, float]  # loss a token over the original's, by model
    source: str  # the folder of the experiment
    method: str | None = None  # whose cost it is, where not what the recipe drops or rounds by


@dataclass(frozen=True)
class Listed:
    """One method."""

    name: str  # as recipes name it
    what: str
    paper: str  # its arXiv id
    parts: tuple[str, ...]  # of PARTS, that it supplies
    recipes: tuple[str, ...]  # those that use it
    measured: tuple[Measured, ...] = ()


@dataclass(frozen=True)
class ListedRecipe:
    """One recipe of the package."""

    name: str
    about: str
    paper: str  # its arXiv id
    methods: tuple[str, ...]  # that it names, in the order of the parts
    default: str  # what it does where nothing else is asked: "2.5 bits", "25% dropped"


def recipe_listing() -> list[ListedRecipe]:
    """Every recipe, by name."""
    found = []
    for name in recipe_names():
        recipe = load_recipe(name)
        bits = [] if recipe.bits >= AS_IT_IS else [f"{recipe.bits:g} bits"]
        dropped = [f"{100 * recipe.drop:g}% dropped"] if recipe.drop else []
        paper, does = recipe.paper.removeprefix("arXiv:"), ", ".join([*dropped, *bits])
        found.append(ListedRecipe(name, recipe.about, paper, _methods(recipe), does))
    return found


def recipe_rows(found: Sequence[ListedRecipe]) -> list[tuple[str, ...]]:
    """The head, and a row for each recipe."""
    rows = [(r.name, r.paper, r.default, r.about) for r in found]
    return [("recipe", "paper", "by default", "what"), *rows]


def _methods(recipe: Recipe) -> tuple[str, ...]:
    """Those that the recipe names, each once."""
    parts = (
        *(recipe.score, recipe.choose, recipe.channels, recipe.cluster, recipe.merge),
        *(recipe.sparsify, recipe.mask, recipe.allocate, recipe.encode, recipe.skip),
    )
    return tuple(dict.fromkeys(p.method for p in parts if p is not None))


def listing() -> list[Listed]:
    """Every method, in the order of the parts they supply and then by name."""
    using: dict[str, list[str]] = {}
    recipes = {name: load_recipe(name) for name in recipe_names()}
    for name in recipes:
        for used in _methods(recipes[name]):
            using.setdefault(used, []).append(name)
    costs = [Measured(**doc) for doc in json.loads(MEASURED.read_text())]
    found = []
    for name, method in load_all().items():
        doc = importlib.import_module(f"moecule.methods.{name}").__doc__ or ""
        title = " ".join(doc.partition("\n\n")[0].split())
        arxiv = re.search(r"arXiv:(\d{4}\.\d{4,5})", method.paper)
        assert arxiv is not None  # tests see to it
        found.append(
            Listed(
                name=name,
                what=title.rstrip("."),
                paper=arxiv[1],
                parts=tuple(p for p in PARTS if getattr(method, p) is not None),
                recipes=tuple(using.get(name, ())),
                measured=tuple(
                    c for c in costs if (c.method or _decides(recipes[c.recipe])) == name
                ),
            )
        )
    return sorted(found, key=lambda m: (min(map(PARTS.index, m.parts)), m.name))


def _decides(recipe: Recipe) -> str:
    """The method whose cost the recipe's is: it decides what to drop, or else how many bits."""
    removes = recipe.merge or recipe.score or recipe.choose or recipe.channels
    return (removes or recipe.sparsify or recipe.allocate).method


def rows(found: Sequence[Listed]) -> list[tuple[str, ...]]:
    """The head, and a row for each method."""
    out: list[tuple[str, ...]] = [
        ("method", "part", "what", "paper", "measured: added nats a token")
    ]
    for m in found:
        costs = [
            f"{c.recipe}, {c.at}: "
            + ", ".join(f"{nats:g} ({model})" for model, nats in c.added_nats.items())
            for c in m.measured
        ]
        part = ", ".join(DOES[p] for p in m.parts)
        out.append((m.name, part, m.what, m.paper, "; ".join(costs)))
    return out


def readme_table() -> str:
    """The methods as README.md lists them."""
    head, *rest = rows(listing())
    lines = [_line(head), "|---" * len(head) + "|"]
    for name, part, what, paper, cost in rest:
        link = f"[{paper}](https://arxiv.org/abs/{paper})"
        lines.append(_line((f"`{name}`", part, what, link, cost)))
    return "\n".join(lines) + "\n"


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
