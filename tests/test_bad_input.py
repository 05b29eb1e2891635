"""Damaged files, and files that are something else: one line, exit code 2, nothing half-written."""

from __future__ import annotations

import json
import lzma
import re
import shutil
import struct
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import yaml
from safetensors.torch import load_file, save_file
from test_cli import SMALL, TEXT, refused, run

from moecule.errors import CheckpointError
from moecule.plan import Drop
from moecule.recipe import load_recipe
from moecule.verbs import calibrate, plan

EXPERT = "model.layers.1.mlp.experts.3.down_proj.weight"
INDEX = "model.safetensors.index.json"
Damage = Callable[[Path], object]


@pytest.fixture(scope="module")
def place(checkpoint, tmp_path_factory) -> Path:
    """model/, text.txt, stats/ and plan.yaml of the recipe uniform_rtn."""
    folder = tmp_path_factory.mktemp("place")
    shutil.copytree(checkpoint("qwen3_moe", tokenizer=True), folder / "model")
    (folder / "text.txt").write_text(TEXT)
    args = (folder / "model", "-o", folder / "stats", "--data", folder / "text.txt", *SMALL)
    assert run("calibrate", *args, "--recipe", "uniform_rtn")[0] == 0
    plan(folder / "stats", folder / "plan.yaml", recipe="uniform_rtn")
    return folder


@pytest.fixture
def here(place, tmp_path) -> Path:
    """A copy of it to damage."""
    shutil.copytree(place, tmp_path, dirs_exist_ok=True)
    return tmp_path


def compress_refused(here: Path) -> str:
    """What compress says of model/."""
    text = here / "text.txt"
    args = (here / "model", "-o", here / "out", "--data", text, "--text", text, *SMALL)
    return refused(here, "compress", *args, "--recipe", "uniform_rtn")


def config(**changes: Any) -> Damage:
    """Other entries in config.json."""

    def damage(model: Path) -> None:
        file = model / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))

    return damage


def weights(change: Callable[[dict[str, torch.Tensor]], object]) -> Damage:
    """Other tensors in model.safetensors."""

    def damage(model: Path) -> None:
        tensors = load_file(model / "model.safetensors")
        change(tensors)
        save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})

    return damage


def fewer_tokens(model: Path) -> None:
    """A model of a smaller vocabulary than its tokenizer's."""
    names = ("model.embed_tokens.weight", "lm_head.weight")
    config(vocab_size=100)(model)
    weights(lambda t: t.update({n: t[n][:100].clone() for n in names}))(model)


def header(doc: Any) -> Damage:
    """A shard that is nothing but this header."""
    text = json.dumps(doc).encode()
    shard = struct.pack("<Q", len(text)) + text
    return lambda model: (model / "model.safetensors").write_bytes(shard)


def bytes_of(change: Callable[[bytes], bytes]) -> Damage:
    """Other bytes in model.safetensors."""
    return lambda m: (m / "model.safetensors").write_bytes(
        change((m / "model.safetensors").read_bytes())
    )


def text(name: str, content: str | bytes) -> Damage:
    """A file of this content."""
    raw = content.encode() if isinstance(content, str) else content
    return lambda folder: (folder / name).write_bytes(raw)


def without(name: str) -> Damage:
    return lambda folder: (folder / name).unlink()


def entry(**changes: Any) -> dict[str, Any]:
    return {"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]} | changes}


MODELS: dict[str, tuple[Damage, str]] = {
    "no config": (without("config.json"), "is no checkpoint: it has no config.json"),
    "config is no JSON": (text("config.json", "{nope"), "config.json is not JSON"),
    "config is binary": (text("config.json", b"\xff\xfe"), "config.json is not JSON"),
    "config is a list": (text("config.json", "[]"), "names no model_type"),
    "no family": (config(model_type=None), "names no model_type"),
    "dense family": (config(model_type="llama"), "'llama' is not a Mixture-of-Experts family"),
    "unknown family": (config(model_type="zoo"), "'zoo' is not .* knows; `moecule families` lists"),
    "dense layers": (config(mlp_only_layers=[0, 1, 2]), "no MoE layer; there are no experts"),
    "more layers": (config(num_hidden_layers=5), "lacks what makes model.layers.3"),
    "other width": (config(hidden_size=64), "does not fit its config.json"),
    "fewer experts": (config(num_local_experts=4), "does not fit its config.json"),
    "smaller vocabulary": (config(vocab_size=100), "does not fit its config.json"),
    "fewer tokens": (fewer_tokens, "the tokenizer gives token .* knows 100"),
    "quantised": (config(quantization_config={"quant_method": "gptq"}), "quantised by 'gptq'"),
    "quantised oddly": (config(quantization_config="x"), "quantization_config is 'x', wanted"),
    "compressed": (config(model_type="moecule"), "does not say what is packed"),
    "pickled": (
        lambda m: (m / "model.safetensors").rename(m / "pytorch_model.bin"),
        "pickled weights only .*, which run code when opened; convert",
    ),
    "no weights": (without("model.safetensors"), "no \\*.safetensors; fetch the weights"),
    "cut short": (bytes_of(lambda b: b[:-100]), "has \\d+ bytes and its header wants \\d+; fetch"),
    "cut very short": (bytes_of(lambda b: b[:4]), "cut short or no safetensors file"),
    "corrupt header": (bytes_of(lambda b: b[:20] + b"\xff" * 9 + b[29:]), "header is damaged"),
    "header is a list": (header([1]), "header is damaged"),
    "header of numbers": (header({"a": 1}), "header is damaged"),
    "header without shapes": (header(entry(shape=None)), "header is damaged"),
    "header of odd shapes": (header(entry(shape=["x"])), "header is damaged"),
    "header of odd places": (header(entry(data_offsets="xy")), "header is damaged"),
    "header of no tensors": (header({}), "has 3 layers, and the files hold 0 tensors"),
    "unknown dtype": (header(entry(dtype="F4", data_offsets=[0, 0])), "a is F4, which is not dec"),
    "shard missing": (text(INDEX, '{"weight_map": {"a": "b"}}'), "names b, not in .*; fetch what"),
    "index is no JSON": (text(INDEX, "nope"), "index.json is damaged .*; fetch it again"),
    "index is a list": (text(INDEX, "[]"), "index.json is damaged"),
    "index is binary": (text(INDEX, b"\xff\xfe"), "index.json is damaged"),
    "index of numbers": (text(INDEX, '{"weight_map": {"a": 3}}'), "index.json is damaged"),
    "no expert": (weights(lambda t: t.pop(EXPERT)), "does not fit its config.json: .*experts"),
    "no embedding": (weights(lambda t: t.pop("model.embed_tokens.weight")), "lacks what makes mod"),
    "no projection": (
        weights(lambda t: t.pop("model.layers.1.self_attn.q_proj.weight")),
        "lacks what makes model.layers.1.self_attn.q_proj.weight",
    ),
    "NaN": (weights(lambda t: t[EXPERT].view(-1)[5:6].fill_(torch.nan)), f"{EXPERT} holds NaN"),
    "Inf": (weights(lambda t: t[EXPERT].view(-1)[5:6].fill_(torch.inf)), f"{EXPERT} holds NaN or"),
    "overflow": (weights(lambda t: t[EXPERT].fill_(3e38)), "layer 1 gives NaN or Inf on this text"),
    "no tokenizer": (
        lambda m: [f.unlink() for f in m.glob("tokenizer*")],
        "has no tokenizer; fetch its files",
    ),
    "tokenizer is no JSON": (text("tokenizer.json", "{nope"), "has no tokenizer that loads"),
}


@pytest.mark.parametrize("name", MODELS)
def test_a_model_that_cannot_be_compressed_is_refused(here, name):
    damage, said = MODELS[name]
    damage(here / "model")
    assert re.search(said, compress_refused(here))


def test_a_model_that_is_not_there_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for verb in (["inspect"], ["evaluate"], ["generate", "hello"], ["compress", "-o", "out"]):
        args = (verb[0], "./nothing", *verb[1:])
        assert "./nothing: found nothing, wanted a model folder" in refused(tmp_path, *args)
        args = (verb[0], "nobody/nothing", *verb[1:])
        assert "fetch it first: hf download nobody/nothing" in refused(tmp_path, *args)


def test_code_that_comes_with_a_model_runs_only_when_asked(here, monkeypatch):
    model, ran = here / "model", here / "ran"
    own = "from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM\n"
    own += "class Config(Qwen3MoeConfig): 0\n"
    own += "class Model(Qwen3MoeForCausalLM): config_class = Config\n"
    (model / "own.py").write_text(f"{own}open({str(ran)!r}, 'w').close()\n")
    config(auto_map={"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"})(model)
    assert run("inspect", model)[0] == 0  # a family that transformers has needs no code
    assert run("generate", model, "x", "--tokens", "2")[0] == 0
    config(model_type="own")(model)
    assert "'own' is not a Mixture-of-Experts family" in compress_refused(here)
    said = refused(here, "generate", model, "x")
    assert said.endswith("; code that comes with a model runs with --trust-remote-code only")
    assert not ran.exists()
    config(model_type="qwen3_moe")(model)
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(here / "cache"))
    assert run("generate", model, "x", "--tokens", "2", "--trust-remote-code")[0] == 0
    assert ran.exists()


TEXTS: dict[str, tuple[str, bytes | None, str]] = {
    "missing": ("t.txt", None, "t.txt cannot be read as text .*No such file"),
    "empty": ("t.txt", b"", "holds no text; give a file with"),
    "blank": ("t.txt", b" \n\n", "holds no text"),
    "too short": (
        "t.txt",
        b"the cat",
        r"the text has \d tokens and one window takes 32; give more",
    ),
    "binary": ("t.txt", bytes(range(256)), "cannot be read as text .*; give UTF-8 text"),
    "zeros": ("t.txt", bytes(1000), "holds zero bytes, so it is no text"),
    "no JSON": ("t.jsonl", b'{"text": "a"}\n{nope', "line 2: not JSON"),
    "no text": ("t.jsonl", b'{"text": "a"}\n{"text": 3}', r"line 2: found \"{'text': 3}\", wanted"),
    "no document": ("t.jsonl", b"[]", r"line 1: found '\[\]', wanted"),
    "half a letter": ("t.jsonl", b'"\\ud800"', "line 1 is no Unicode text"),
    "damaged xz": ("t.txt.xz", lzma.compress(TEXT.encode())[:-20], "cannot be read as text"),
    "no xz": ("t.txt.xz", TEXT.encode(), "cannot be read as text"),
}


@pytest.mark.parametrize("name", TEXTS)
def test_text_that_cannot_be_read_is_refused(here, name):
    file, content, said = TEXTS[name]
    if content is not None:
        (here / file).write_bytes(content)
    model, bad = here / "model", here / file
    good = ("--data", here / "text.txt", *SMALL)
    for args in (
        ("calibrate", model, "-o", here / "out", "--data", bad, *SMALL),
        ("apply", model, here / "plan.yaml", "-o", here / "out", "--data", bad, *SMALL),
        ("evaluate", model, "--text", bad, "--length", "32"),
        ("compress", model, "-o", here / "out", *good, "--text", bad, "--recipe", "uniform_rtn"),
    ):
        assert re.search(said, refused(here, *args))


def test_a_json_string_may_hold_any_line_separator(tmp_path, here):
    line = json.dumps({"text": "a\u2028b\u0085c " * 50}, ensure_ascii=False)
    (here / "t.jsonl").write_text(f"{line}\r\n{line}\n")
    args = ("calibrate", here / "model", "-o", here / "out", "--data", here / "t.jsonl", *SMALL)
    assert run(*args, "--recipe", "uniform_rtn")[0] == 0


def test_evaluating_against_a_model_of_another_vocabulary_is_refused(here, checkpoint):
    other = checkpoint("qwen3_moe")
    text = ("--text", here / "text.txt", "--length", "32")
    said = refused(here, "evaluate", here / "model", "--against", other, *text)
    assert "knows 64 tokens and the model 300; give its own original" in said


def layer(lines: dict[str, str]) -> Callable[[dict[str, Any]], object]:
    """Other fates in layer 1."""
    return lambda doc: doc["layers"].update({1: lines})


PLANS: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "another model": (
        lambda d: d.update(digest="0" * 16),
        "the plan is for .*; plan again for this",
    ),
    "missing expert": (layer({"keep": "0-3 5-7"}), "layer 1: experts 4 have no fate"),
    "doubled expert": (layer({"keep": "0-7", "drop": "3"}), "layer 1: expert 3 has two fates"),
    "too many experts": (layer({"keep": "0-9"}), "layer 1 has 10 experts, the model has 8"),
    "far too many experts": (layer({"keep": "0-99999999"}), "layer 1: cannot read '0-99999999'"),
    "too few experts": (layer({"keep": "0-6"}), "layer 1 has 7 experts, the model has 8"),
    "too few are kept": (layer({"keep": "0", "drop": "1-7"}), "layer 1 keeps 1 .* picks 2 a token"),
    "odd width": (layer({"keep 9bit g64": "0-7"}), "'keep 9bit g64' wants 1 to 8 bits"),
    "odd fate": (
        layer({"lose": "0-7"}),
        r"cannot read 'lose'; wanted keep, keep 3bit g64, keep 3\+2\+1bit g64, keep 192ch, drop, or",
    ),
    "missing layer": (lambda d: d["layers"].pop(1), r"layers \[0, 2\], .* are \[0, 1, 2\]"),
    "dropped attention": (lambda d: d["rest"].update(attention="drop"), "only experts can be drop"),
    "unknown method": (
        lambda d: d.update(encode={"method": "x"}),
        "method 'x' has no encode; those that have are .*gptq",
    ),
    "no encoder": (
        lambda d: d.update(encode={"method": "pmq"}),
        "method 'pmq' has no encode; those that have are .*gptq",
    ),
    "unknown option": (
        lambda d: d["encode"].update(x=1),
        "encode: unknown key 'x'; known are clip",
    ),
    "odd option": (
        lambda d: d["encode"].update(clip=1),
        "encode clip = 1, wanted one of none, nar",
    ),
    "odd skip": (
        lambda d: d.update(skip={"protect": 0.0, "thresholds": {0: "nan"}}),
        "skip wants numbers from 0 to 1",
    ),
}


@pytest.mark.parametrize("name", PLANS)
def test_a_plan_that_does_not_fit_is_refused(here, name):
    change, said = PLANS[name]
    doc = yaml.safe_load((here / "plan.yaml").read_text())
    change(doc)
    (here / "plan.yaml").write_text(yaml.safe_dump(doc, sort_keys=False))
    args = (here / "model", here / "plan.yaml", "-o", here / "out", "--data", here / "text.txt")
    assert re.search(said, refused(here, "apply", *args, *SMALL))


def test_groups_of_experts_must_stay_even(checkpoint, here):
    model = checkpoint("deepseek_v3", tokenizer=True)
    recipe = load_recipe("uniform_rtn", {"data.samples": 4, "data.length": 32})
    calibrate(model, here / "groups", recipe=recipe, data=here / "text.txt")
    made = plan(here / "groups", recipe=recipe)
    uneven = {i: (*fates[:6], Drop(), Drop()) for i, fates in made.layers.items()}
    (here / "uneven.yaml").write_text(replace(made, layers=uneven).dumps())
    args = ("apply", model, here / "uneven.yaml", "-o", here / "new", "--data", here / "text.txt")
    assert "each must keep the same number" in refused(here, *args, *SMALL)


def test_a_family_that_lacks_a_package_names_it(checkpoint, monkeypatch):
    folder = checkpoint("inkling_mm_model")
    monkeypatch.setitem(sys.modules, "scipy.optimize", None)  # as if it were not installed
    with pytest.raises(CheckpointError, match="inkling_mm_model cannot be built: .*scipy.*install"):
        tiny.stream(folder)
