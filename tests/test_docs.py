"""What the docs show is run as it stands there, and the site is built without a broken link."""

from __future__ import annotations

import contextlib
import importlib
import re
import shlex
import subprocess
import sys
from pathlib import Path

import every
import pytest
import test_laws as laws
import torch
from test_cli import TEXT, run

import moecule
from moecule import families, family, method, methods, verbs
from moecule.recipe import load_recipe

DOCS = Path(__file__).parents[1] / "docs"
few_tokens = pytest.mark.filterwarnings("ignore:.*saw fewer than 32 tokens")


def blocks(page: str, language: str) -> list[str]:
    """A page's code in that language, block by block."""
    text = DOCS.joinpath(f"{page}.md").read_text()
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def commands(page: str) -> list[list[str]]:
    """The page's moecule commands, in order."""
    lines = [line for block in blocks(page, "") for line in block.splitlines()]
    return [shlex.split(line[2:])[1:] for line in lines if line.startswith("$ moecule ")]


@pytest.fixture
def there(tmp_path, monkeypatch) -> Path:
    """A folder with text.txt, where the reader stands; nothing is opened afresh, which takes seconds."""
    (tmp_path / "text.txt").write_text(TEXT * 4)
    monkeypatch.setattr(verbs, "verify", lambda *args: 0.0)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def added(package: object, name: str, code: str, folder: Path, monkeypatch) -> None:
    """As if the file of that name lay in the package."""
    folder.joinpath(f"{name}.py").write_text(code)
    whole = f"{package.__name__}.{name}"
    monkeypatch.setattr(package, "__path__", [str(folder), *package.__path__])
    monkeypatch.delitem(sys.modules, whole, raising=False)
    monkeypatch.setattr(package, name, None, raising=False)  # put back what importing sets
    monkeypatch.setitem(sys.modules, whole, importlib.import_module(whole))


@few_tokens
def test_the_method_that_is_added_drops_experts(there, monkeypatch):
    (code,), (recipe,) = blocks("add-a-method", "python")[:1], blocks("add-a-method", "toml")
    added(methods, "least_given", code, there, monkeypatch)
    names = [*method.method_names(), "least_given"]
    monkeypatch.setattr(method, "method_names", lambda: names)
    (there / "least_given.toml").write_text(recipe)
    assert load_recipe("least_given.toml").score.options.power == 0.5
    for args in commands("add-a-method"):
        code, _, err = run(*args)
        assert code == 0, err
    plan = moecule.read_plan("plan.yaml")
    for fates in plan.layers.values():
        assert sum(fate == moecule.Drop() for fate in fates) == len(fates) // 4


def test_the_family_that_is_added_is_walked(there, monkeypatch, checkpoint):
    code, settings = blocks("add-a-family", "python")
    shipped = family.load_family("qwen3_moe")
    added(families, "qwen3_moe", code, there, monkeypatch)
    found = family.load_family("qwen3_moe")
    assert found == shipped and found is not shipped
    monkeypatch.setitem(every.MODELS, "qwen3_moe", eval(settings))
    laws.test_walking_equals_calling("qwen3_moe", torch.float32, checkpoint)


@pytest.mark.slow
@few_tokens
def test_the_tutorial_runs(there, capsys):
    edit, load = blocks("tutorial", "python")
    for args in commands("tutorial"):
        if args[0] == "apply":
            exec(compile(edit, "edit", "exec"), {})
        small = ["--samples", "2", "--length", "32"] if "--samples" in args else []
        small = small or (["--length", "32"] if "--length" in args else [])
        code, _, err = run(*args, *small)  # the last of two equal options counts
        assert code == 0, err
    before, after = (moecule.read_plan(p) for p in ("out/plan.yaml", "edited/plan.yaml"))
    first = min(before.layers)
    assert after.layers[first] == (moecule.Keep(4, 64), *before.layers[first][1:])
    with contextlib.suppress(ModuleNotFoundError):
        exec(compile(load, "load", "exec"), {})
    assert "The president said" in capsys.readouterr().out


@pytest.mark.slow
def test_the_site_is_built_and_has_the_tables(tmp_path):
    pytest.importorskip("material")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    made = subprocess.run(command, cwd=DOCS.parent, capture_output=True, text=True)
    assert made.returncode == 0, made.stderr
    pages = {p.stem: p.read_text() for p in tmp_path.glob("*.html")}
    assert "{{" not in pages["methods"] and "2410.06270" in pages["methods"]
    assert 'id="moecule.compress"' in pages["api"]
    fetched = [u for page in pages.values() for u in re.findall(r'src="(https?:[^"]+)', page)]
    fetched += [
        u for page in pages.values() for u in re.findall(r'<link[^>]*href="(https?:[^"]+)', page)
    ]
    assert fetched == []  # a link that is followed may lead elsewhere


def test_every_page_is_in_the_sites_table_of_contents():
    listed = set(re.findall(r"\b([\w-]+)\.md\b", DOCS.parent.joinpath("mkdocs.yml").read_text()))
    assert listed == {p.stem for p in DOCS.glob("*.md")}
