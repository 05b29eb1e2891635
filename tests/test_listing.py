"""The table of methods is made of their files; what was not measured is not in it."""

from __future__ import annotations

import json
import re

import conform
import pytest
from test_cli import run

from moecule.listing import MEASURED, PARTS, listing, readme_table, rows
from moecule.method import load_all, load_method
from moecule.recipe import load_recipe, recipe_names

ROOT = MEASURED.parents[1]


def test_the_table_in_the_readme_is_that_of_the_methods():
    assert conform.METHODS.search(conform.README.read_text())[0] == readme_table()


def test_every_method_is_listed_once_with_what_it_supplies():
    found = listing()
    assert sorted(m.name for m in found) == sorted(load_all())
    for m in found:
        assert re.fullmatch(r"\d{4}\.\d{4,5}", m.paper) and m.what and m.what[-1] != "."
        assert m.parts and all(load_method(m.name, part) for part in m.parts)
    assert {r for m in found for r in m.recipes} == set(recipe_names())


def test_methods_that_drop_come_first():
    order = [min(map(PARTS.index, m.parts)) for m in listing()]
    assert order == sorted(order) and order[0] == 0


def test_what_was_measured_names_a_recipe_and_where_it_was():
    for doc in json.loads(MEASURED.read_text()):
        assert set(doc) - {"method"} == {"recipe", "at", "added_nats", "source"}
        assert doc["recipe"] == "slim" or load_recipe(doc["recipe"])  # a command
        assert doc["added_nats"] and all(isinstance(x, float) for x in doc["added_nats"].values())
        if ROOT.joinpath("experiments").is_dir():
            assert ROOT.joinpath(doc["source"], "README.md").is_file()


def test_what_was_not_measured_is_left_empty():
    cells = {row[0]: row[4] for row in rows(listing())[1:]}
    for m in listing():
        assert bool(cells[m.name]) == bool(m.measured)


@pytest.mark.parametrize("name", ["reap", "pmq"])
def test_methods_prints_the_table_and_json(name):
    code, out, _ = run("methods")
    assert code == 0 and name in out
    code, out, _ = run("methods", "--json")
    (one,) = [doc for doc in json.loads(out) if doc["name"] == name]
    assert code == 0 and set(one) == {"name", "what", "paper", "parts", "recipes", "measured"}
    assert one["paper"] == {"reap": "2510.13999", "pmq": "2410.06270"}[name]
