"""The verbs, end to end on a tiny model: the same bytes twice, going on, and nothing half done."""

from __future__ import annotations

import contextlib
import json
import os
import re
import resource
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_cli import SMALL, TEXT, refused, run, tree

import moecule
from moecule.budget import Inventory, bytes_by_part
from moecule.evidence import load_evidence
from moecule.plan import Drop, Keep
from moecule.recipe import load_recipe
from moecule.result import load_result
from moecule.stats import save_meta

SIDE = {"README.md", "generation_config.json", "tokenizer.json", "tokenizer_config.json"}
OWN = {"config.json", "model.safetensors", "moecule_required.py", "plan.yaml"}
MADE = {*SIDE, *OWN, "result.json", "evidence.json", "stats"}
# as if moecule were not installed
WITHOUT = """
import sys
class Nowhere:
    def find_spec(self, name, *args):
        if name == "moecule":
            raise ModuleNotFoundError("No module named 'moecule'")
sys.meta_path.insert(0, Nowhere())
"""
OPEN = """
import torch
from transformers import AutoModelForCausalLM
tokens = torch.arange(20)[None]
for folder, trust in {tries}:
    try:
        model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=trust)
        print("loaded", type(model).__name__, float(model(tokens).logits.detach().sum()))
    except (ImportError, ValueError, OSError) as e:
        print(type(e).__name__, " ".join(str(e).split()))
"""


@pytest.fixture(scope="module")
def place(checkpoint, tmp_path_factory) -> Path:
    """model/, text.txt, and out/, which compress made of them."""
    folder = tmp_path_factory.mktemp("place")
    shutil.copytree(checkpoint("qwen3_moe", tokenizer=True), folder / "model")
    (folder / "text.txt").write_text(TEXT)
    code, _, err = compress(folder, "out")
    assert code == 0, err
    return folder


def compress(here: Path, out: str, *args: str) -> tuple[int, str, str]:
    """As a user does it who stands in `here`."""
    text = ("--data", "text.txt", "--text", "text.txt")
    with contextlib.chdir(here):
        return run("compress", "model", "-o", out, *text, *SMALL, *(args or ("--bits", "2.5")))


def open_in_a_process(code: str, home: Path) -> list[str]:
    """What a fresh Python prints, with a cache of its own for code."""
    env = {**os.environ, "HF_HOME": str(home), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
    assert ended.returncode == 0, ended.stderr
    return ended.stdout.splitlines()


def test_compress_leaves_a_folder_that_says_all_of_itself(place):
    out = place / "out"
    assert {p.name for p in out.iterdir()} == MADE
    assert not list(place.rglob("*.partial"))
    plan = moecule.read_plan(out / "plan.yaml")
    assert plan.nominal_bits <= 2.5 and plan.made_by["recipe"] == "mc"
    assert json.loads((out / "config.json").read_text())["model_type"] == "moecule"
    layers = {f"layer_{i:04d}.safetensors" for i in range(3)}
    assert {p.name for p in (out / "stats").iterdir()} == {*layers, "meta.json"}
    seen, result = load_evidence(out), load_result(out / "result.json")
    typed = "moecule compress model -o out --data text.txt --text text.txt --samples 4 --length 32"
    assert seen is not None and seen.command == f"{typed} --bits 2.5"
    assert all(sum(of.count) == seen.tokens * 2 for of in seen.experts.values())  # top-2
    assert result.sampled is not None and [d.layer for d in result.sampled.depths] == [0, 1, 2]
    assert result.sampled.skipped is not None and set(result.sampled.skipped.experts_run) == {
        0,
        1,
        2,
    }
    assert result.original is not None and result.original.size_bytes > result.size_bytes


def test_the_same_command_gives_the_same_bytes(here):
    assert compress(here, "again")[0] == 0
    first, second = (tree(here / o) for o in ("out", "again"))
    assert first.pop("result.json") != second.pop("result.json")  # it holds the time it took
    made = [json.loads(of.pop("evidence.json")) for of in (first, second)]
    assert made[0].pop("command") != made[1].pop("command")
    assert made[0] == made[1] and first == second


def test_the_same_command_again_does_nothing_anew(here):
    before = tree(here / "out")
    assert compress(here, "out")[0] == 0
    after = tree(here / "out")
    assert {k for k in before if before[k] != after[k]} == {"result.json"}


def test_an_edited_plan_is_applied_when_the_model_is_removed(here):
    out = here / "out"
    plan = moecule.read_plan(out / "plan.yaml")
    other = Keep(8 if plan.layers[1][3] != Keep(8, 64) else 7, 64)
    edited = replace(
        plan, layers={**plan.layers, 1: (*plan.layers[1][:3], other, *plan.layers[1][4:])}
    )
    (out / "plan.yaml").write_text(edited.dumps())
    before = tree(out)
    code, _, err = compress(here, "out")
    assert code == 2 and "was edited after the model beside it was made; remove config.json" in err
    assert tree(out) == before
    (out / "config.json").unlink()
    (out / "model.safetensors").unlink()
    assert compress(here, "out")[0] == 0
    assert {p.name for p in out.iterdir()} == MADE
    widths = json.loads((out / "config.json").read_text())["quantization_config"]["experts"]["1"]
    assert widths.split()[3] == f"{other.bits}g64"
    assert json.loads((out / "result.json").read_text())["plan_digest"] == edited.code_digest
    after = tree(out)
    assert all(after[k] == before[k] for k in before if k.startswith("stats"))


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (("--bits", "3"), "was made for another request \\(mc, 2.5 bits\\); name another folder"),
        (("--set", "encode.damp=0.1", "--bits", "2.5"), "was made for another request"),
        (("--recipe", "uniform"), "holds statistics made with another statistics"),
        (("--samples", "3"), "holds statistics made with another tokens, window; name another"),
    ],
)
def test_another_request_does_not_go_into_the_same_folder(here, args, said):
    before = tree(here)
    code, _, err = compress(here, "out", *args)
    assert code == 2 and re.search(said, err)
    assert tree(here) == before


def test_evaluate_prints_the_result_that_it_keeps(here):
    text = ("--text", here / "text.txt", "--length", "32")
    code, out, _ = run("evaluate", here / "out", "--against", here / "model", *text, "--json")
    found = json.loads(out)
    assert code == 0 and found == json.loads((here / "out" / "result.json").read_text())
    for name in ("loss_nats", "perplexity", "kl_nats", "size_bytes", "expert_bytes"):
        assert found[name] > 0
    assert found["nominal_bits"] <= 2.5 < found["bits_per_weight"]
    assert list(found["by_file"]) == ["text.txt"]
    tensors = load_file(here / "out" / "model.safetensors").values()
    assert found["size_bytes"] == sum(t.numel() * t.element_size() for t in tensors)
    code, out, _ = run("evaluate", here / "out", *text, "--skip", "--json")
    assert code == 0 and 0 < json.loads(out)["experts_run"] < 1


def test_a_size_is_kept_within_and_the_price_is_what_is_written(here):
    asked = 112_000
    assert compress(here, "sized", "--size", str(asked))[0] == 0
    tensors = load_file(here / "sized" / "model.safetensors").values()
    written = sum(t.numel() * t.element_size() for t in tensors)
    meta = json.loads((here / "sized" / "stats" / "meta.json").read_text())
    plan = moecule.read_plan(here / "sized" / "plan.yaml")
    price = bytes_by_part(Inventory.from_dict(meta["inventory"]), plan)
    assert written == sum(price.values()) <= asked < written + 2000


def test_inspect_says_what_a_compressed_model_holds(place):
    code, out, _ = run("inspect", place / "out", "--json")
    found, result = json.loads(out), json.loads((place / "out" / "result.json").read_text())
    assert code == 0 and found["family"] == "qwen3_moe" and found["sizes_by_bits"] is None
    same = ("size_bytes", "bits_per_weight", "nominal_bits", "bytes_by_part")
    assert [found[name] for name in same] == [result[name] for name in same]


def test_a_compressed_model_generates(place):
    code, _, err = run("generate", place / "out", "the cat", "--tokens", "4", "--skip")
    assert code == 0 and re.search(r"[1-4] tokens, .*\d % of the experts run", err)


def test_a_compressed_model_is_no_source(here):
    assert "is compressed already; give the original model (model)" in refused(
        here, "calibrate", here / "out", "-o", here / "new"
    )


def test_without_moecule_only_a_stock_output_loads(here):
    plan = moecule.read_plan(here / "out" / "plan.yaml")
    even = {i: (Keep(),) * 6 + (Drop(),) * 2 for i in plan.layers}
    as_it_is = dict.fromkeys(plan.rest, Keep())
    plan = replace(plan, layers=even, rest=as_it_is, skip=None)
    text, few = here / "text.txt", load_recipe("mc", {"data.samples": 4, "data.length": 32}).data
    stock = moecule.apply(here / "model", plan, here / "stock", data=text, sampling=few)
    assert not (stock / "moecule_required.py").exists()
    assert json.loads((stock / "config.json").read_text())["model_type"] == "qwen3_moe"
    out = str(here / "out")
    tries = [(out, False), (out, True), (str(stock), False)]
    refused, named, loaded = open_in_a_process(WITHOUT + OPEN.format(tries=tries), here / "home")
    assert refused.startswith("ValueError") and "trust_remote_code" in refused
    assert named.startswith("ImportError") and "pip install moecule" in named
    assert loaded.startswith("loaded Qwen3MoeForCausalLM ")


def test_with_moecule_installed_the_code_in_the_folder_finds_it(here):
    tries = [(str(here / "out"), True)]
    (line,) = open_in_a_process(OPEN.format(tries=tries), here / "home")
    assert line.startswith("loaded Qwen3MoeForCausalLM ")
    model = moecule.session.load(here / "out", moecule.Compute())
    logits = model(torch.arange(20)[None]).logits.detach().sum()
    assert float(line.split()[2]) == pytest.approx(float(logits), rel=1e-4)


@pytest.mark.parametrize("verb", ["calibrate", "apply", "compress"])
def test_what_lies_there_already_is_left_alone(here, verb):
    plan = [here / "out" / "plan.yaml"] if verb == "apply" else []
    for name, said in (("full", "already holds a.txt; name another"), ("text.txt", "is a file")):
        (here / "full").mkdir(exist_ok=True)
        (here / "full" / "a.txt").write_text("mine")
        args = (verb, here / "model", *plan, "-o", here / name, "--data", here / "text.txt")
        assert said in refused(here, *args, *SMALL)
    args = (verb, here / "model", *plan, "-o", here / "text.txt" / "o")
    assert "cannot be made" in refused(here, *args)
    args = (verb, here / "model", *plan, "-o", here / "model")
    assert "already holds config.json" in refused(here, *args)


def test_the_folder_that_one_stands_in_can_take_the_result(here):
    (here / "new").mkdir()
    with contextlib.chdir(here / "new"):
        args = ("../model", "../out/plan.yaml", "-o", ".", "--data", "../text.txt")
        assert run("apply", *args, *SMALL)[0] == 0
    assert {p.name for p in (here / "new").iterdir()} == SIDE | OWN
    assert not list(here.rglob("*.partial"))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_is_not_to_be_written_is_refused_at_once(here):
    locked = here / "locked"
    locked.mkdir(mode=0o500)
    args = ("compress", here / "model", "-o", locked / "out", "--data", here / "text.txt")
    assert "no folder to write in" in refused(here, *args, *SMALL)


def test_a_full_disk_leaves_nothing_half_written(here):
    text, new = ("--data", here / "text.txt", *SMALL), here / "new" / "deep"
    plan, (soft, most) = here / "out" / "plan.yaml", resource.getrlimit(resource.RLIMIT_FSIZE)
    for args in (
        ("calibrate", here / "model", "-o", new, *text),
        ("plan", here / "out" / "stats", "-o", new),
        ("apply", here / "model", plan, "-o", new, *text),
    ):
        resource.setrlimit(resource.RLIMIT_FSIZE, (300, most))  # no file grows beyond
        try:
            assert "File too large" in refused(here, *args)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, most))


@pytest.mark.parametrize(
    ("file", "content", "said"),
    [
        ("meta.json", None, "holds no meta.json, so it is not a stats folder"),
        ("meta.json", b"{nope", "is damaged .*; remove it and calibrate again"),
        ("meta.json", b"\xff\xfe", "is damaged"),
        ("meta.json", b"[]", "is damaged"),
        ("meta.json", b'{"layers": [0, 1, 2]}', "is damaged"),
        ("layer_0001.safetensors", None, r"holds layers \[0, 2\] .* names \[0, 1, 2\]"),
        ("layer_0001.safetensors", b"", "is damaged"),
    ],
)
def test_damaged_statistics_are_refused(here, file, content, said):
    damaged = here / "out" / "stats" / file
    damaged.unlink()
    if content is not None:
        damaged.write_bytes(content)
    assert re.search(said, refused(here, "plan", damaged.parent, "-o", here / "p"))


def test_statistics_without_a_number_are_refused(here):
    file = here / "out" / "stats" / "layer_0001.safetensors"
    whole = load_file(file)
    args = ("plan", file.parent, "-o", here / "p")
    save_file({k: t for k, t in whole.items() if k != "count"}, file)
    save_meta(json.loads((file.parent / "meta.json").read_text()), file.parent)
    assert "lacks statistics of some layer" in refused(here, *args)
    save_file(whole | {"count": whole["count"] * torch.nan}, file)
    assert "is damaged (its layers are not those" in refused(here, *args)
    save_meta(json.loads((file.parent / "meta.json").read_text()), file.parent)
    assert "count of layer 1 is NaN or Inf; remove it" in refused(here, *args)
