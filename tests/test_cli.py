"""The command line: its options are fixed, its output can be read by programs, a mistake is one line."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import subprocess
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
import typer
from safetensors.torch import load_file

from moecule import cli, generate
from moecule.recipe import load_recipe
from moecule.verbs import Ask, calibrate, plan

TEXT = "the cat sat on the mat, and the dog ran up a hill with his red hat. " * 12
SMALL = ("--samples", "4", "--length", "32")
JOURNAL = re.compile(r"\..*\.partial$")
PROGRESS = re.compile(
    r"(calibrate|apply|check|evaluate|speed|listen|by layer) \d+/\d+( layers)?, .*host "
)
OPTIONS = {
    "aggregate": "center dense json out quiet top-k",
    "apply": "data device dtype json length out quiet samples states trust-remote-code",
    "calibrate": "data device dtype json length out quiet recipe samples set states "
    "trust-remote-code",
    "cloze": "items out quiet seed",
    "compare": "json out quiet",
    "compress": "bits clamp context data device drop dtype fit json length out quiet recipe "
    "samples set size states target text trust-remote-code",
    "evaluate": "against context device dtype json length limit memory quiet shots skip "
    "states task-dir tasks text trust-remote-code",
    "export": "json out quiet to type",
    "families": "json quiet",
    "generate": "compile device dtype exact expert-cache experts json match patterns quiet "
    "seed skip temperature tokens trust-remote-code",
    "heal": "batch by-layer checkpointing data device dtype every experts-over json length lr micro "
    "offload out parts precision quiet seed steps teacher text top-k",
    "inspect": "bits cache-experts clamp context data device drop dtype engine fit gpus json "
    "length load out quiet recipe replicas samples set size states time",
    "learn": "data device json length quiet",
    "methods": "json quiet",
    "patterns": "device domain dtype json length out quiet recipe samples set trust-remote-code",
    "plan": "bits clamp context drop fit json out quiet recipe set size target",
    "recipes": "json quiet",
    "report": "out quiet",
    "slim": "batch checkpointing data device dtype early every experts-over full groups json length "
    "lr micro multiple offload out precision quiet samples seed signal stages steps teacher text width",
    "train": "balance batch capacity checkpointing data device every experts-over json length lr micro "
    "new-routers offload out parts precision quiet router-steps seed select steps",
}


def run(*args: str | Path) -> tuple[int, str, str]:
    """(exit code, stdout, stderr) of the command, in this process."""
    out, err, argv, show = io.StringIO(), io.StringIO(), sys.argv, warnings.showwarning
    sys.argv = ["moecule", *map(str, args)]
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            cli.main()
    except SystemExit as end:
        return int(end.code or 0), out.getvalue(), err.getvalue()
    finally:
        sys.argv, warnings.showwarning = argv, show
    return 0, out.getvalue(), err.getvalue()


def tree(folder: Path) -> dict[str, object]:
    """All that lies in a folder, hidden files too, but for what a killed run goes on from."""
    there = {p: p.relative_to(folder) for p in sorted(folder.rglob("*"))}
    kept = {p: name for p, name in there.items() if not any(map(JOURNAL.match, name.parts))}
    return {
        str(name): p.read_bytes() if p.is_file() else None
        for p, name in kept.items()
        if p.is_file() or not any(p in q.parents for q in there if q not in kept)
    }


def calibrated(folder: Path, checkpoint: Callable[..., Path], recipes: Sequence[str]) -> Path:
    """A folder with model/, text.txt, and stats_<recipe>/ of each recipe."""
    (folder / "model").symlink_to(checkpoint("qwen3_moe", tokenizer=True))
    (folder / "text.txt").write_text(TEXT)
    text = ("--data", folder / "text.txt", *SMALL)
    for recipe in recipes:
        stats = folder / f"stats_{recipe}"
        code, _, err = run("calibrate", folder / "model", "-o", stats, "--recipe", recipe, *text)
        assert code == 0, err
    return folder


def refused(folder: Path, *args: str | Path) -> str:
    """The one line with which the command ends; `folder` is as it was before."""
    before = tree(folder)
    code, out, err = run(*args)
    lines = [line for line in err.splitlines() if not PROGRESS.match(line)]
    assert (code, out) == (2, ""), err
    assert len(lines) == 1 and lines[0].startswith("moecule: "), err
    assert tree(folder) == before
    return lines[0]


@pytest.fixture
def model(checkpoint) -> Path:
    return checkpoint("qwen3_moe", tokenizer=True)


@pytest.fixture(scope="module")
def stats(checkpoint, tmp_path_factory) -> Path:
    """Statistics of the recipe uniform_rtn."""
    folder = tmp_path_factory.mktemp("statistics")
    (folder / "text.txt").write_text(TEXT)
    recipe = load_recipe("uniform_rtn", {"data.samples": 4, "data.length": 32})
    model = checkpoint("qwen3_moe", tokenizer=True)
    return calibrate(model, folder / "stats", recipe=recipe, data=folder / "text.txt")


@pytest.fixture
def text(tmp_path) -> Path:
    (tmp_path / "text.txt").write_text(TEXT)
    return tmp_path / "text.txt"


def test_the_options_of_every_command_are_those_that_scripts_rely_on():
    commands = typer.main.get_command(cli.app).commands
    found = {
        name: " ".join(
            sorted(o.removeprefix("--") for p in c.params for o in p.opts if o.startswith("--"))
        )
        for name, c in commands.items()
    }
    assert found == OPTIONS


def test_what_came_with_a_wrong_option_is_a_usage_error():
    for args in (["compress", "x", "-o", "y", "--nope"], ["nope"], ["plan", "x"], ["inspect"]):
        code, out, err = run(*args)
        assert (code, out) == (2, "") and "Usage" in err


def test_a_process_ends_with_code_2_and_one_line(tmp_path):
    command = [sys.executable, "-m", "moecule", "inspect", str(tmp_path)]
    ended = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "LANG": "C"})
    assert (ended.returncode, ended.stdout) == (2, "")
    assert ended.stderr.startswith(f"moecule: {tmp_path} is no checkpoint")
    assert ended.stderr.count("\n") == 1


def test_an_error_of_many_lines_is_put_on_one(monkeypatch, capsys):
    def fail() -> None:
        raise OSError("the disk\n  is [bold]full\n")

    monkeypatch.setattr(cli, "app", fail)
    monkeypatch.setattr(sys, "argv", ["moecule", "inspect"])
    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)
    with pytest.raises(SystemExit, match="2"):
        cli.main()
    assert capsys.readouterr().err == "moecule: the disk is [bold]full\n"


def test_a_bug_keeps_its_traceback(monkeypatch):
    monkeypatch.setattr(cli, "app", lambda: [][0])
    monkeypatch.setattr(sys, "argv", ["moecule", "inspect"])
    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)
    with pytest.raises(IndexError):
        cli.main()


def test_inspect_says_what_an_original_holds(model):
    code, out, _ = run("inspect", model, "--json")
    found = json.loads(out)
    assert (code, found["family"], found["layers"], found["experts"]) == (0, "qwen3_moe", 3, 8)
    tensors = load_file(model / "model.safetensors").values()
    assert found["size_bytes"] == sum(4 * t.numel() for t in tensors)
    sizes = found["sizes_by_bits"]
    assert sizes["1"] < sizes["2"] < sizes["3"] < sizes["4"] < found["size_bytes"]
    code, out, _ = run("inspect", model)
    assert code == 0 and "8 a layer, 2 a token" in out and "at 4 bits" in out


def test_evaluate_needs_no_original(model, text):
    code, out, _ = run("evaluate", model, "--text", text, "--length", "32", "--json")
    found = json.loads(out)
    assert code == 0 and found["loss_nats"] > 0 and found["kl_nats"] is None
    assert list(found["by_file"]) == ["text.txt"]
    code, out, _ = run("evaluate", model, "--text", text, "--length", "32")
    assert code == 0 and f"{found['loss_nats']:.4f}" in out
    assert "no skip rule" in refused(text.parent, "evaluate", model, "--text", text, "--skip")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_compiling_a_step_without_a_gpu_is_refused(model):
    code, _, err = run("generate", model, "the cat", "--compile")
    assert code and "needs a GPU" in err


def test_generate_prints_what_the_function_returns(model):
    code, out, err = run("generate", model, "the cat", "--tokens", "5")
    made = generate(model, "the cat", tokens=5)
    assert code == 0 and out == made.text and err.startswith(f"\n{made.tokens} tokens, ")


def test_generate_stops_where_the_model_knows_no_more_places(model):
    made = generate(model, "x" * 120, tokens=50)
    assert made.tokens <= 8


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["x" * 128], "128 tokens, .* knows 128; give a shorter one"),
        ([""], "the prompt is empty"),
        ([" \n"], "the prompt is empty"),
        (["\ud800"], "the prompt is no Unicode text"),
        (["x", "--tokens", "0"], "0 new tokens .* wanted 1 or more"),
        (["x", "--tokens", "-1"], "-1 new tokens"),
        (["x", "--temperature", "-1"], "temperature -1"),
        (["x", "--temperature", "nan"], "temperature nan"),
        (["x", "--seed", "-1"], "seed -1"),
        (["x", "--seed", str(2**64)], "seed 18446744073709551616"),
        (["x", "--skip"], "no skip rule; compress with a recipe that has a \\[skip\\] table"),
    ],
)
def test_what_cannot_be_generated_is_refused(model, tmp_path, args, said):
    assert re.search(said, refused(tmp_path, "generate", model, *args))


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["--bits", "0.5"], "0.5 bits .* the least that recipe mc can is 1, the most"),
        (["--bits", "9"], "9 bits .* the least that recipe mc can is 1, the most [3-8];"),
        (["--bits", "nan"], "nan bits"),
        (
            ["--recipe", "uniform", "--bits", "9"],
            "the least that recipe uniform can is 1, the most 8",
        ),
        (["--recipe", "uniform", "--bits", "2.5"], "uniform takes whole bits only, not 2.5"),
        (["--size", "1kB"], "size 1kB cannot be met; the least .* is [0-9.]+ kB; ask for more$"),
        (
            ["--fit", "1kB"],
            "fit 1kB, .* the least .* is [0-9.]+ kB and [0-9.]+ kB for the KV cache",
        ),
        (["--size", "huge"], "cannot read the size 'huge'; write it like 20GB"),
        (["--size", "-5"], "cannot read the size '-5'"),
        (["--bits", "2", "--size", "1GB"], "give one of --bits, --size and --fit"),
        (["--fit", "1GB", "--size", "1GB"], "give one of --bits, --size and --fit"),
        (["--fit", "1GB", "--context", "0"], "a context of 0 tokens"),
        (["--samples", "0"], "samples = 0, wanted 1 window or more"),
        (["--samples", "-3"], "samples = -3"),
        (["--length", "129"], "windows of 129 tokens .* knows 2 to 128"),
        (["--length", "-1"], "windows of -1 tokens"),
        (["--device", "meta"], "device 'meta' is not served; wanted cpu or cuda"),
        (["--device", "tpu"], "device 'tpu' is not one; wanted cpu or cuda"),
        (["--dtype", "int8"], "dtype 'int8' is not served; wanted float32"),
        (["--recipe", "nope"], "no recipe 'nope': there are .*mc"),
        (["--set", "foo=1"], "unknown key 'foo'; known are .*bits"),
        (["--set", "encode.foo=1"], "\\[encode\\]: unknown key 'foo'; known are .*damp"),
        (["--set", "encode.damp=x"], "\\[encode\\] damp = 'x', wanted a number"),
        (
            ["--set", "encode.method=nope"],
            "method 'nope' has no encode; those that have are .*gptq",
        ),
        (
            ["--set", "allocate.method=rtn"],
            "method 'rtn' has no allocate; those that have are .*pmq",
        ),
        (["--set", "allocate.bits=[true, 2]"], "wanted different widths of 1 to 8 bits"),
        (["--set", "rest.attention=9"], "attention = 9, wanted 1 to 8 bits, or 16"),
        (["--set", "data.seed=true"], "seed = True, wanted a whole number"),
        (["--set", "data.batch=0"], "batch = 0, wanted 1 window or more"),
        (["--set", "group=0"], "group = 0, wanted 1 column or more"),
        (["--set", "bits=nan"], "bits = nan, wanted a number"),
        (["--set", "bits.x=1"], "bits.x cannot be set; bits = 2.5 is no table"),
        (["--set", "foo"], "--set 'foo': wanted KEY=VALUE"),
    ],
)
def test_what_cannot_be_asked_for_is_refused_before_any_work(model, tmp_path, text, args, said):
    given = [*SMALL, *args]  # the last of two equal options counts
    line = refused(tmp_path, "compress", model, "-o", tmp_path / "o", "--data", text, *given)
    assert re.search(said, line)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_refused(model, tmp_path):
    for args in (["generate", model, "x"], ["inspect", model], ["calibrate", model, "-o", "o"]):
        said = refused(tmp_path, *args, "--device", "cuda")
        assert "device cuda was asked for, and torch finds 0 GPUs; use cpu" in said


@pytest.mark.parametrize(
    ("toml", "said"),
    [
        ("nope", "not TOML"),
        ("foo = 1", "unknown key 'foo'"),
        ("about = 1", "about = 1, wanted text"),
        ("data = 3", r"\[data\]: found 3, wanted a table"),
        ("rest = {zoo = 4}", r"\[rest\]: unknown key 'zoo'; known are attention"),
        ("skip = 3", r"\[skip\] names no method"),
        (
            "skip = {method = 'rtn'}",
            "method 'rtn' has no thresholds or learn; those that have are odp, otp",
        ),
    ],
)
def test_a_slip_in_a_recipe_file_is_named(stats, tmp_path, toml, said):
    file = tmp_path / "own.toml"
    file.write_text(f"{toml}\n[allocate]\nmethod = 'uniform'\n[encode]\nmethod = 'rtn'\n")
    line = refused(tmp_path, "plan", stats, "-o", tmp_path / "plan.yaml", "--recipe", file)
    assert re.search(said, line)


def test_a_plan_is_made_from_statistics_that_are_there_or_not_at_all(stats, tmp_path):
    file = tmp_path / "plan.yaml"
    said = refused(tmp_path, "plan", stats, "-o", file, "--recipe", "mc")
    assert re.search("has no .*, which recipe mc reads; calibrate again with --recipe mc", said)
    said = refused(tmp_path, "plan", stats, "-o", tmp_path, "--recipe", "uniform")
    assert "is a folder; name a file" in said
    code, out, _ = run("plan", stats, "-o", file, "--recipe", "uniform_rtn", "--bits", "3")
    assert code == 0 and "3.000 nominal bits" in out
    assert file.read_text() == plan(stats, recipe="uniform_rtn", ask=Ask(3.0)).dumps()
