"""The house's rules: small files, small functions, papers named, nothing caught by the dozen."""

from __future__ import annotations

import ast
import doctest
import importlib
import importlib.util
import inspect
import re
from pathlib import Path

import every
import jaxtyping
import pytest
import torch

import moecule
from moecule import packed
from moecule.family import family_names, load_family
from moecule.listing import PARTS
from moecule.method import load_all, load_method, method_names
from moecule.recipe import load_recipe, recipe_names

ROOT = Path(moecule.__file__).parent
FILES = sorted(ROOT.rglob("*.py"))
every_file = pytest.mark.parametrize("path", FILES, ids=[str(p.relative_to(ROOT)) for p in FILES])
ARXIV = re.compile(r"arXiv:\d{4}\.\d{4,5}")
Function = ast.FunctionDef | ast.AsyncFunctionDef


def functions(path: Path) -> list[Function]:
    """All functions and methods of a file."""
    return [n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, Function)]


@every_file
def test_a_file_has_at_most_400_lines(path):
    assert len(path.read_text().splitlines()) <= 400


@every_file
def test_a_function_has_at_most_60_lines(path):
    long = {f.name: f.end_lineno - f.lineno + 1 for f in functions(path)}
    assert {name: n for name, n in long.items() if n > 60} == {}


@every_file
def test_a_file_says_what_it_is_for_in_ascii(path):
    tree = ast.parse(path.read_text())
    assert ast.get_docstring(tree)
    assert path.read_text().isascii()


@every_file
def test_nothing_catches_every_error(path):
    tree = ast.parse(path.read_text())
    caught = [n.type for n in ast.walk(tree) if isinstance(n, ast.ExceptHandler)]
    names = [ast.unparse(t) if t is not None else "everything" for t in caught]
    broad = re.compile(r"\b(everything|Exception|BaseException)\b")
    assert [n for n in names if broad.search(n)] == []


@every_file
def test_public_functions_say_what_they_do(path):
    tree = ast.parse(path.read_text())
    classes = [n for n in tree.body if isinstance(n, ast.ClassDef) and n.name[0] != "_"]
    bodies = [tree.body, *(c.body for c in classes if not inherits(c))]
    public = [n for body in bodies for n in body if isinstance(n, Function) and n.name[0] != "_"]
    silent = [n.name for n in public if not ast.get_docstring(n)]
    assert silent + [c.name for c in classes if not ast.get_docstring(c)] == []


def inherits(node: ast.ClassDef) -> bool:
    """Whether the class fills in another's methods, which are documented there."""
    return any(ast.unparse(b) not in ("nn.Module", "BaseStreamer") for b in node.bases)


def test_the_public_names_are_sorted_there_and_all():
    assert list(moecule.__all__) == sorted(moecule.__all__)
    tree = ast.parse((ROOT / "__init__.py").read_text())
    imports = [n for n in tree.body if isinstance(n, ast.ImportFrom)]
    names = [a.asname or a.name for n in imports for a in n.names]
    assert sorted(n for n in names if n[0] != "_" and n != "annotations") == moecule.__all__
    assert all(getattr(moecule, name) is not None for name in moecule.__all__)


@pytest.mark.parametrize("name", method_names())
def test_a_method_names_its_paper_and_supplies_something(name):
    method = load_all()[name]
    assert ARXIV.search(method.paper)
    doc = importlib.import_module(f"moecule.methods.{name}").__doc__
    assert ARXIV.search(method.paper)[0] in doc
    assert any(getattr(method, part) for part in PARTS)
    assert method.options() == method.options()  # every option has a default


@pytest.mark.parametrize("name", method_names())
def test_a_methods_statistics_have_names_of_their_own(name):
    method = load_all()[name]
    needs = method.needs(method.options())
    assert len({s.name for s in needs}) == len(needs)
    kinds = [(s.of, s.of_layer, s.of_expert, s.of_router, s.of_experts, s.of_block) for s in needs]
    assert all(sum(f is not None for f in given) == 1 for given in kinds)


def test_every_statistic_of_one_name_is_one_function():
    found = {}
    for method in load_all().values():
        for s in method.needs(method.options()):
            given = s.of or s.of_layer or s.of_expert or s.of_router or s.of_experts or s.of_block
            code = inspect.getsource(given)
            assert found.setdefault(s.name, code) == code


@pytest.mark.parametrize("name", family_names())
def test_a_familys_file_is_named_as_its_model_type_and_tested(name):
    family = load_family(name)
    assert family.model_type == name
    assert name in every.MODELS


@pytest.mark.parametrize("name", sorted(set(family_names()) & set(every.known())))
def test_a_familys_keys_are_those_of_its_config(name):
    family, config = load_family(name), every.config(name).get_text_config()
    for key in (family.groups, family.renormalise):
        assert not isinstance(key, str) or hasattr(config, key)
    assert family.scores_in(config)
    assert set(family.count_keys) & set(config.to_dict())
    assert {getattr(config, key) for key in family.count_keys if hasattr(config, key)} == {8}


@pytest.mark.parametrize("name", recipe_names())
def test_a_recipe_loads_with_what_it_names(name):
    recipe = load_recipe(name)
    assert recipe.about
    assert re.fullmatch(ARXIV, recipe.paper)
    assert load_method(recipe.allocate.method, "allocate")
    assert load_method(recipe.encode.method, "encode")
    assert 1 <= recipe.bits <= 8 or (recipe.bits == 16 and (recipe.drops or recipe.sparsify))
    cuts = load_method(
        recipe.allocate.method, "allocate"
    ).cuts  # channels are ordered, and all stay
    assert bool(recipe.drop) == (recipe.drops and not cuts)
    assert recipe.needs()


@pytest.mark.parametrize("name", ["mc", "mc_paper"])
def test_the_papers_recipes_skip_online(name):
    assert load_recipe(name).skip.method == "odp"


def test_examples_in_docstrings_are_true():
    names = {p.stem for p in ROOT.glob("[a-z]*.py")}
    if importlib.util.find_spec("triton") is None:  # it is made for Linux
        names -= {"gpu", "dense"}
    if importlib.util.find_spec("lm_eval") is None:  # an extra
        names -= {"exam", "harness"}
    if importlib.util.find_spec("vllm") is None:
        names -= {"vllm_plugin"}
    modules = [importlib.import_module(f"moecule.{name}") for name in sorted(names)]
    found = [doctest.testmod(m) for m in modules]
    assert sum(r.attempted for r in found) > 0
    assert sum(r.failed for r in found) == 0


def test_shapes_are_checked_while_testing():
    with pytest.raises(jaxtyping.TypeCheckError):
        packed.pack(torch.zeros(2, 3), 4)  # floats are no codes
