"""Files that are not what they should be: a typed error of one line, or as if nothing were wrong.

Never another exception, never a file besides, never more than MOST_BYTES of memory. Every example
changes a file that is valid: an entry of a document, or bytes anywhere.
"""

from __future__ import annotations

import copy
import json
import os
import resource
import shutil
import struct
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import yaml
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from test_cli import TEXT

from moecule import journal, verbs
from moecule.apply import check_plan
from moecule.budget import Inventory
from moecule.checkpoint import INDEX, Checkpoint
from moecule.errors import MoeculeError, OutputError
from moecule.inventory import take_inventory
from moecule.plan import Plan
from moecule.recipe import HERE, load_recipe, part_of
from moecule.session import Compute, stream

MOST_BYTES = 500 * 10**6  # that the process may grow by, over all examples
FEW = {"data.samples": 4, "data.length": 16, "bits": 2}
pytestmark = pytest.mark.filterwarnings("ignore")  # of torch, at odd shapes
NUMBERS = [-1, 0, 1, 2, 3, 7, 16, 10**4, 2**31, 2**63, 10**30, 0.5, float("nan"), float("inf")]
TEXTS = [
    "",
    "x",
    "keep",
    "drop",
    "../x",
    "/etc/passwd",
    "\ud800",
    "F32",
    "I64",
    "U8",
    "9" * 5000,
    "a\nb",
]
ODD = [None, True, False, [], {}, [1], [None], {"a": 1}, [[[]]], {"method": "gptq"}, "0-9999"]
odd = st.sampled_from([*NUMBERS, *TEXTS, *ODD])


@pytest.fixture(scope="module")
def place(checkpoint, tmp_path_factory) -> Path:
    """model/, its statistics, plan and recipe, and what is of use beside them."""
    folder = tmp_path_factory.mktemp("place") / "here"
    shutil.copytree(checkpoint("qwen3_moe", tokenizer=True), folder / "model")
    (folder / "text.txt").write_text(TEXT)
    recipe = load_recipe("uniform_rtn", FEW)
    verbs.calibrate(folder / "model", folder / "stats", recipe=recipe, data=folder / "text.txt")
    verbs.plan(folder / "stats", folder / "plan.yaml", recipe=recipe)
    return folder


@pytest.fixture(autouse=True)
def _bounded(place: Path) -> Iterator[None]:
    """No memory beyond the bound, and no file besides those that are there."""
    before, files = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, listed(place)
    above = set(os.listdir(place.parent))
    yield
    grown = 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
    assert grown < MOST_BYTES
    assert listed(place) == files and set(os.listdir(place.parent)) == above


def listed(folder: Path) -> list[str]:
    return sorted(str(p) for p in folder.rglob("*"))


def many(n: int) -> Callable[..., Any]:
    """So many examples, or the share of them that conftest.py asks of all tests for.

    The files are put back after each, so a fixture may be shared.
    """
    most = n * settings.default.max_examples // tiny.EXAMPLES
    return settings(
        max_examples=most, suppress_health_check=list(HealthCheck), phases=[Phase.generate]
    )


def spots(doc: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Where there is something in a document, itself not counted."""
    inside = (
        doc.items() if isinstance(doc, dict) else enumerate(doc) if isinstance(doc, list) else ()
    )
    return [p for key, value in inside for p in [(*path, key), *spots(value, (*path, key))]]


@st.composite
def changed(draw: st.DrawFn, doc: Any) -> Any:
    """The document with one to three entries replaced, removed, renamed or doubled."""
    doc = copy.deepcopy(doc)
    for _ in range(draw(st.integers(1, 3))):
        there = spots(doc)
        if not there:
            break
        *above, key = draw(st.sampled_from(there))
        holder = doc
        for step in above:
            holder = holder[step]
        how = draw(st.sampled_from(["replace", "replace", "remove", "rename", "nudge"]))
        if how == "remove":
            del holder[key]
        elif how == "rename" and isinstance(holder, dict):
            holder[draw(st.sampled_from(["x", "", "a\nb", "-1", "999"]))] = holder.pop(key)
        elif how == "nudge" and type(holder[key]) is int:
            holder[key] += draw(st.sampled_from([-1, 1, 4, -64]))
        else:
            holder[key] = copy.deepcopy(draw(odd))
    return doc


@st.composite
def damaged(draw: st.DrawFn, raw: bytes) -> bytes:
    """The bytes cut short, some of them changed, doubled or inserted."""
    at, to = (draw(st.integers(0, len(raw))) for _ in range(2))
    some = draw(st.binary(min_size=1, max_size=8))
    how = draw(st.sampled_from(["cut", "change", "double", "insert", "remove", "deep"]))
    if how == "cut":
        return raw[:at]
    if how == "deep":
        return raw[:at] + draw(st.sampled_from([b"[", b'{"a":', b"(", b"- "])) * 20000 + raw[at:]
    low, high = min(at, to), min(max(at, to), min(at, to) + 64)
    put = {
        "change": some,
        "double": raw[low:high] * 2,
        "insert": some + raw[low:high],
        "remove": b"",
    }
    return raw[:low] + put[how] + raw[high:]


def typed(work: Callable[[], object]) -> MoeculeError | None:
    """The error of one line, or None where the change does no harm. Anything else is raised."""
    try:
        work()
    except MoeculeError as e:
        assert str(e) and len(str(e).splitlines()) == 1
        return e
    return None


def with_file(file: Path, raw: bytes, work: Callable[[], object]) -> MoeculeError | None:
    """`typed` with other bytes in a file that is put back."""
    was = file.read_bytes() if file.exists() else None
    try:
        file.write_bytes(raw)
        return typed(work)
    finally:
        file.unlink() if was is None else file.write_bytes(was)


def dumped(doc: Any) -> bytes:
    return json.dumps(doc).encode()


@pytest.mark.parametrize("name", ["qwen3_moe", "deepseek_v3", "gpt_oss"])
def test_configs(checkpoint, tmp_path_factory, name):
    model = tmp_path_factory.mktemp("fuzz") / "model"
    shutil.copytree(checkpoint(name), model)
    plain = (model / "config.json").read_bytes()

    def opened() -> None:
        inventory = take_inventory(stream(model, Compute("cpu"), empty=True))
        assert Inventory.from_dict(json.loads(json.dumps(inventory.as_dict()))) == inventory

    @many(80)
    @given(changed(json.loads(plain)).map(dumped) | damaged(plain))
    def check(raw: bytes) -> None:
        with_file(model / "config.json", raw, opened)

    check()
    opened()


def test_configs_that_open_are_walked_or_refused(place):
    model, recipe = place / "model", load_recipe("uniform_rtn", FEW)
    plain = (model / "config.json").read_bytes()

    def calibrate() -> None:
        out = place / "new"
        try:
            verbs.calibrate(model, out, recipe=recipe, data=place / "text.txt")
        finally:
            for left in (out, journal.partial_of(out)):
                shutil.rmtree(left, ignore_errors=True)

    @many(60)
    @given(changed(json.loads(plain)).map(dumped))
    def check(raw: bytes) -> None:
        with_file(model / "config.json", raw, calibrate)

    check()


def test_quantised_configs(place):
    doc = json.loads((place / "model" / "config.json").read_text())
    group = {"weights": {"num_bits": 8, "type": "float", "strategy": "block",
                         "block_structure": [16, 16], "symmetric": True}, "format": None}  # fmt: skip
    doc["quantization_config"] = {
        "quant_method": "compressed-tensors", "format": "float-quantized",
        "config_groups": {"group_0": group}, "weight_block_size": [16, 16], "scale_fmt": "ue8m0",
        "sparsity_config": {"format": "dense"}, "expert_dtype": "fp8",
    }  # fmt: skip
    methods = ("fp8", "mxfp4", "compressed-tensors")

    @many(150)
    @given(changed(doc), st.sampled_from(methods))
    def check(changed: Any, method: str) -> None:
        if isinstance(changed.get("quantization_config"), dict) and method != methods[-1]:
            changed["quantization_config"]["quant_method"] = method
        open_it = lambda: Checkpoint.open(place / "model")  # noqa: E731
        with_file(place / "model" / "config.json", dumped(changed), open_it)

    check()


def test_indexes(place):
    model = place / "model"
    names = Checkpoint.open(model).tensors
    doc = {"metadata": {"total_size": 1}, "weight_map": dict.fromkeys(names, "model.safetensors")}
    few = {**doc, "weight_map": dict.fromkeys(list(names)[:3], "model.safetensors")}

    @many(300)
    @given(changed(few).map(dumped) | damaged(dumped(few)))
    def check(raw: bytes) -> None:
        with_file(model / INDEX, raw, lambda: Checkpoint.open(model))

    check()
    for name in ("../model.safetensors", str(model / "model.safetensors"), "a/../../x"):
        doc["weight_map"]["lm_head.weight"] = name
        found = with_file(model / INDEX, dumped(doc), lambda: Checkpoint.open(model))
        assert found is not None and f"names {name!r}, wanted files in its folder" in str(found)


def test_headers(place):
    file = place / "model" / "few.safetensors"
    tensors = {
        "a": torch.ones(4, 6),
        "b": torch.ones(3, dtype=torch.int8),
        "c": torch.ones(2, 2, 2),
    }
    save_file(tensors, file, metadata={"format": "pt"})
    raw = file.read_bytes()
    length = struct.unpack("<Q", raw[:8])[0]
    doc, body = json.loads(raw[8 : 8 + length]), raw[8 + length :]
    folder = place / "few"
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "qwen3_moe"}')
    file.rename(folder / "model.safetensors")

    def read() -> None:
        opened = Checkpoint.open(folder)
        opened.read(list(opened.tensors))

    def shard(header: Any, size: int) -> bytes:
        text = dumped(header)
        return struct.pack("<Q", max(0, len(text) + size)) + text + body

    sizes = st.sampled_from([0, 0, 0, 0, 1, -1, 10**9, 2**62])
    try:

        @many(500)
        @given(st.builds(shard, changed(doc), sizes) | damaged(raw))
        def check(bytes_: bytes) -> None:
            with_file(folder / "model.safetensors", bytes_, read)

        check()
        gaps = [(8, 16), (0, 8), (2**64, 2**64 + 96), (96, 0)]
        for start, stop in gaps:
            wrong = {**doc, "a": {**doc["a"], "data_offsets": [start, stop]}}
            assert with_file(folder / "model.safetensors", shard(wrong, 0), read)
    finally:
        shutil.rmtree(folder)


def test_plans(place):
    streamed, raw = stream(place / "model", Compute("cpu"), empty=True), (place / "plan.yaml")
    doc = yaml.safe_load(raw.read_text())
    doc["skip"] = {"protect": 0.02, "thresholds": {0: "0.25", 2: "0.31"}}
    text = yaml.safe_dump(doc, sort_keys=False).encode()

    def read() -> None:
        plan = verbs.read_plan(raw)
        part_of("plan, encode", plan.encode, "encode")
        check_plan(plan, streamed)
        assert Plan.loads(plan.dumps()) == plan

    def as_yaml(doc: Any) -> bytes:
        return yaml.safe_dump(doc, sort_keys=False).encode("utf-8", "surrogatepass")

    @many(400)
    @given(changed(doc).map(as_yaml) | damaged(text))
    def check(bytes_: bytes) -> None:
        with_file(raw, bytes_, read)

    check()


TAGS = ["!!timestamp x", "!!bool x", "!!int x", "!!float x", "!!binary x", "2001-99-99", "!!map [1]",
        "!!set {a}", "!!omap [a]", "9" * 5000, "&a [*a]", "*a", "<<", "=",
        "!!python/object:os.x"]  # fmt: skip


@pytest.mark.parametrize("tag", TAGS)
def test_plans_with_tags(place, tag):
    text = (place / "plan.yaml").read_text().replace("model: ", f"model: {tag}\nx: ", 1)
    found = with_file(
        place / "plan.yaml", text.encode(), lambda: verbs.read_plan(place / "plan.yaml")
    )
    assert found is not None


def test_a_plan_that_stands_for_more_than_memory_holds_is_refused(place):
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join(9 * [f'*a{i - 1}'])}]" for i in range(1, 12)]
    text = (place / "plan.yaml").read_text() + "\n".join(lines)
    found = with_file(
        place / "plan.yaml", text.encode(), lambda: verbs.read_plan(place / "plan.yaml")
    )
    assert "has an alias" in str(found)


def test_recipes(place):
    file, doc = place / "own.toml", tomllib.loads((HERE / "mc.toml").read_text())
    plain = (HERE / "uniform_rtn.toml").read_bytes()
    doc["data"] = {"samples": 4, "length": 16, "batch": 2, "seed": 0}

    def plan() -> None:
        verbs.plan(place / "stats", recipe=load_recipe(file))

    @many(350)
    @given(
        changed(doc).map(as_toml)
        | changed(tomllib.loads(plain.decode())).map(as_toml)
        | damaged(plain)
    )
    def check(raw: bytes) -> None:
        with_file(file, raw, plan)

    check()


def as_toml(doc: Any) -> bytes:
    """A table of tables, as far as TOML can say it."""
    tables = {k: v for k, v in doc.items() if isinstance(v, dict)}
    lines = [f"{json.dumps(k)} = {toml(v)}" for k, v in doc.items() if k not in tables]
    for name, table in tables.items():
        lines.append(f"[{json.dumps(name)}]")
        lines += [f"{json.dumps(k)} = {toml(v)}" for k, v in table.items()]
    return "\n".join(lines).encode()


def toml(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{json.dumps(k)} = {toml(v)}" for k, v in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(toml, value)) + "]"
    if isinstance(value, float):
        return repr(value)
    return json.dumps(value)


def test_statistics(place):
    stats, recipe = place / "stats", load_recipe("uniform_rtn", FEW)
    meta, layer = stats / "meta.json", stats / "layer_0001.safetensors"
    plain = meta.read_bytes()

    def plan() -> None:
        verbs.plan(stats, recipe=recipe)

    @many(250)
    @given(changed(json.loads(plain)).map(dumped) | damaged(plain))
    def metas(raw: bytes) -> None:
        with_file(meta, raw, plan)

    @many(100)
    @given(damaged(layer.read_bytes()))
    def layers(raw: bytes) -> None:
        assert raw == layer.read_bytes() or with_file(layer, raw, plan)

    metas()
    layers()


def test_journals(tmp_path):
    out, request = tmp_path / "out", {"verb": "x", "digest": "y"}
    file = journal.partial_of(out) / journal.FILE
    steps = [{"up": 0, "weights": {"b": "3g64", "a": "2g64"}}, {"up": 1}, {"down": 1}]
    with journal.journal_of(out, request) as kept:
        for step in steps:
            kept.add(step)
    plain = file.read_bytes()
    docs = [json.loads(line) for line in plain.splitlines()]

    def read() -> None:
        with journal.journal_of(out, request) as found:
            assert found.entries == steps[: len(found.entries)]
            assert list(found.entries[0]["weights"]) == ["b", "a"] if found.entries else True

    def lines(docs: Any) -> bytes:
        return b"".join(dumped(d) + b"\n" for d in docs)

    @many(300)
    @given(changed(docs).map(lines) | damaged(plain))
    def check(raw: bytes) -> None:
        file.parent.mkdir(exist_ok=True)
        file.write_bytes(raw)
        found = typed(read)
        assert found is None or isinstance(found, OutputError)
        assert found is None or file.read_bytes() == raw  # left, to be looked at
        assert not (tmp_path / ".out.lock").exists()

    check()
