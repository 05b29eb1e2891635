"""What mkdocs puts into pages in place of {{ methods }} and the like: the tables of the command line."""

from __future__ import annotations

from typing import Any

import moecule
from moecule import catalogue, listing
from moecule.recipe import load_recipe, recipe_names


def recipes() -> str:
    """Every recipe with its line and paper."""
    lines = ["| recipe | what | paper |", "|---|---|---|"]
    for name in recipe_names():
        recipe = load_recipe(name)
        arxiv = recipe.paper.removeprefix("arXiv:")
        lines.append(f"| `{name}` | {recipe.about} | [{arxiv}](https://arxiv.org/abs/{arxiv}) |")
    return "\n".join(lines) + "\n"


def functions() -> str:
    """A heading and a docstring for every public name."""
    return "\n".join(f"::: moecule.{name}\n" for name in moecule.__all__)


TABLES = {
    "methods": listing.readme_table,
    "recipes": recipes,
    "families": catalogue.readme_table,
    "functions": functions,
}


def on_page_markdown(markdown: str, **page: Any) -> str:
    """Called by mkdocs with each page's text."""
    for name, table in TABLES.items():
        mark = f"{{{{ {name} }}}}"
        if mark in markdown:
            markdown = markdown.replace(mark, table())
    return markdown
