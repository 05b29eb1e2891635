"""First use: what `moecule` alone says works as it stands; names are completed; errors say what to do."""

from __future__ import annotations

import ast
import json
import os
import re
import shlex
import subprocess
import sys

import pytest
import typer
from test_cli import run
from test_house import FILES

from moecule import cli, complete
from moecule.listing import recipe_listing
from moecule.quick import is_quick
from moecule.recipe import load_recipe, recipe_names

ERROR = re.compile(
    r"(MoeculeError|CheckpointError|PlanError|RecipeError|DataError|OutputError|VerifyError)"
)
# after a semicolon, what to do; or what is wanted, what there is, how far one may go
NEXT = re.compile(
    r"; |want(s|ed) |those that|the (least|most) |known are|there are|\bgive |use |pip install|"
    r"runs with moecule alone|: \{e\}.\)$"
)


def test_moecule_alone_says_what_to_do_next():
    code, out, err = run()
    assert (code, err) == (0, "")
    assert all(f"  {command} " in out for command, _ in cli.FIRST) and len(cli.FIRST) == 3
    commands = typer.main.get_command(cli.app).commands
    for words in (shlex.split(command) for command, _ in cli.FIRST):
        assert words[0] == "moecule"
        commands[words[1]].make_context(words[1], words[2:])  # raises for what is no option
    for name in re.findall(r"moecule ([a-z]+)", out.replace("with moecule", "")):
        assert name in commands


@pytest.mark.slow
def test_the_first_commands_work_as_they_stand(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for command, _ in cli.FIRST:
        code, out, err = run(*shlex.split(command)[1:])
        assert code == 0 and out, err


def test_recipes_are_listed_with_what_they_do_and_their_paper():
    found = {r.name: r for r in recipe_listing()}
    assert sorted(found) == recipe_names()
    assert all(re.fullmatch(r"\d{4}\.\d{4,5}", r.paper) and r.about for r in found.values())
    assert found["mc"].default == "2.5 bits" and found["reap"].default == "25% dropped"
    assert found["mc"].methods == ("pmq", "gptq", "odp") and found["reap"].methods[0] == "reap"
    code, out, _ = run("recipes", "--json")
    assert code == 0 and {doc["name"]: doc["about"] for doc in json.loads(out)} == {
        name: load_recipe(name).about for name in recipe_names()
    }
    code, out, _ = run("recipes")
    lines = dict(line.split(maxsplit=1) for line in out.splitlines())  # one each
    assert code == 0 and {*lines} == {*recipe_names(), "recipe"}
    assert re.fullmatch(
        r"2410.06270 +2.5 bits +Mixture Compressor, our best: .*", lines["mc"].strip()
    )


def test_models_and_recipes_are_completed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    hub = tmp_path / "hub"
    (hub / "models--acme--small-moe").mkdir(parents=True)
    monkeypatch.setenv("HF_HUB_CACHE", str(hub))
    for name in ("here", "empty", "embers"):
        (tmp_path / name).mkdir()
    for name in ("here", "embers"):
        (tmp_path / name / "config.json").write_text("{}")
    (tmp_path / "mc_own.toml").write_text("")
    assert complete.models("") == ["embedded", "embers", "here", "acme/small-moe"]
    assert complete.models("emb") == ["embedded", "embers"]
    assert complete.models(str(tmp_path / "he")) == [str(tmp_path / "here")]
    assert complete.models("acme") == ["acme/small-moe"] and complete.models("x") == []
    assert complete.recipes("mc") == ["mc", "mc_paper", "mc_sharp", "mc_own.toml"]
    assert complete.recipes("reap_") == ["reap_mc"]
    assert sorted(complete.recipes("")) == sorted([*recipe_names(), "mc_own.toml"])


def test_a_shell_is_answered_without_torch(tmp_path):
    asked = {"COMP_WORDS": "moecule plan s --recipe unif", "COMP_CWORD": "4"}
    env = {**os.environ, **asked, "_MOECULE_COMPLETE": "complete_bash"}
    command = [sys.executable, "-X", "importtime", "-m", "moecule"]
    ended = subprocess.run(command, capture_output=True, text=True, env=env, cwd=tmp_path)
    assert ended.stdout.split() == ["uniform", "uniform_rtn"], ended.stderr[-500:]
    imported = {line.rpartition("|")[2].strip() for line in ended.stderr.splitlines()}
    assert "moecule.cli" in imported and not imported & {"torch", "transformers", "numpy"}


@pytest.mark.parametrize(
    ("argv", "started", "asked", "quick"),
    [
        (["/bin/moecule"], ["python", "/bin/moecule"], False, True),
        (["moecule.exe", "plan", "--help"], [], False, True),
        (["/bin/moecule", "plan", "stats"], [], False, False),
        (["/bin/moecule", "plan", "stats"], [], True, True),
        (["-m"], ["python", "-m", "moecule"], False, True),
        (["-m"], ["python", "-m", "moecule.verify", "--help"], False, False),
        (["train.py", "--help"], [], False, False),
        (["train.py"], [], True, False),
        ([""], ["python"], False, False),
    ],
)
def test_only_the_command_ends_early(argv, started, asked, quick):
    assert is_quick(argv, started, asked) == quick


def test_every_error_says_what_to_do_next():
    silent = []
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text())):
            if not (isinstance(node, ast.Call) and ERROR.fullmatch(ast.unparse(node.func))):
                continue
            said = " ".join(ast.unparse(node).split())
            texts = [n for n in ast.walk(node) if isinstance(n, ast.Constant)]
            if any(isinstance(n.value, str) for n in texts) and not NEXT.search(said):
                silent.append(f"{path.name}:{node.lineno}: {said}")
    assert silent == []
