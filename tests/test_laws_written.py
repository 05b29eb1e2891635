"""What is written is what was decided, in every family: bytes, logits, weights and sizes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import tiny
import torch
from torch import Tensor, nn

from moecule.budget import bytes_by_part
from moecule.checkpoint import Checkpoint
from moecule.family import load_family
from moecule.grid import quantized
from moecule.hf import PACKED
from moecule.inventory import rest_parts, take_inventory, weigh
from moecule.moe import by_expert, experts_of, find_layers, find_moe
from moecule.plan import Drop, Fate, Keep
from moecule.walk import walk

REST = {"attention": Keep(4, 8), "shared": Keep(5, 16), "dense": Keep(3, 32), "router": Keep(8, 16)}


def mixed(layer: int, e: int) -> Fate:
    """All widths, another group in every layer, one expert of each group dropped in layer 1."""
    if layer == 1 and e % 4 == 2:
        return Drop()
    bits = (1, 2, 3, 4, 5, 7, 8, 16)[(e + layer) % 8]
    return Keep() if bits == 16 else Keep(bits, (8, 12, 32)[layer % 3])


def uniform(layer: int, e: int) -> Fate:
    """The same number of experts everywhere, not the same experts."""
    return Drop() if e % 4 == layer % 3 else Keep()


def ragged(layer: int, e: int) -> Fate:
    """Another number of experts in every layer, all as they were."""
    return Drop() if e % 4 < layer % 3 else Keep()


def bytes_of(t: Tensor) -> tuple[torch.dtype, torch.Size, bytes]:
    """All that a file holds of a tensor."""
    return t.dtype, t.shape, t.contiguous().flatten().view(torch.uint8).numpy().tobytes()


def whole(folder: Path) -> dict[str, Tensor]:
    """Every tensor of a checkpoint, by its name in the file."""
    checkpoint = Checkpoint.open(folder)
    return checkpoint.read(list(checkpoint.tensors))


def assert_same_bytes(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    """Equal names, dtypes, shapes and bytes."""
    assert sorted(a) == sorted(b)
    assert [n for n in a if bytes_of(a[n]) != bytes_of(b[n])] == []


@tiny.every_family
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_reading_and_writing_back_gives_the_same_bytes(name, dtype, checkpoint):
    folder = checkpoint(name, dtype=dtype)
    streamed = tiny.stream(folder)
    state = streamed.model.state_dict()
    written = streamed.to_disk({n: state[n] for n in streamed.outer_names()})
    for i in range(len(streamed.layers)):
        layer = streamed.load_layer(i)
        state = {f"{streamed.prefix}{i}.{n}": t for n, t in layer.state_dict().items()}
        written |= streamed.to_disk(state)
        layer.to("meta")
    assert_same_bytes(written, whole(folder))


@tiny.every_family
def test_a_plan_that_keeps_everything_gives_the_same_tensors(name, checkpoint, tmp_path):
    folder, out = checkpoint(name, dtype=torch.bfloat16), tmp_path / "out"
    streamed = tiny.stream(folder)
    tiny.write(streamed, tiny.plan(streamed, lambda i, e: Keep()), out, tiny.tokens())
    assert_same_bytes(whole(out), whole(folder))
    assert Checkpoint.open(out).config == Checkpoint.open(folder).config


@pytest.mark.parametrize("fate", [mixed, uniform])
def test_a_checkpoint_in_many_files_is_the_one_in_a_single_file(fate, checkpoint, tmp_path):
    for out, limit in (("one", 2**30), ("many", 10_000)):
        streamed = tiny.stream(checkpoint("qwen3_moe"))
        plan = tiny.plan(streamed, fate, rest=REST if fate is mixed else None)
        tiny.write(streamed, plan, tmp_path / out, tiny.tokens(), limit)
    files = sorted((tmp_path / "many").glob("*.safetensors"))
    assert len(files) > 6
    assert all(f.stat().st_size < 40_000 for f in files)
    assert_same_bytes(whole(tmp_path / "many"), whole(tmp_path / "one"))
    (batch,) = tiny.tokens()
    one, many = (tiny.logits(tiny.load(tmp_path / out), batch) for out in ("one", "many"))
    assert torch.equal(one, many)


@contextmanager
def masked(model: Any, name: str, dropped: dict[int, list[int]]) -> Iterator[None]:
    """Within, routers give the dropped experts logits of -inf; their weights are known by address.

    Where a bias is added for the choice, after a sigmoid has made 0 of -inf, that is -inf too.
    """
    family, linear, masks = load_family(name), nn.functional.linear, []
    moes = {i: find_moe(find_layers(model)[1][i], family) for i in dropped}
    held = {i: by_expert(moe, moe.experts.num_experts) for i, moe in moes.items()}
    rows = {i: [m.weight for m, leaf, _ in each if leaf == "weight"] for i, each in held.items()}
    ids_of = {w.data_ptr(): dropped[i] for i, weights in rows.items() for w in weights}
    # some keep the bias in the router, some in the block, some below a first axis of one
    biases = {
        i: getattr(m, n).data for i, e in held.items() for m, n, _ in e if n.endswith("_bias")
    }
    before = {i: b.clone() for i, b in biases.items()}

    def masking(x: Tensor, w: Tensor, b: Tensor | None = None) -> Tensor:
        out = linear(x, w, b)
        ids = ids_of.get(w.data_ptr(), [])
        out[..., ids] = -torch.inf
        masks.append(len(ids))
        return out

    for i, bias in biases.items():
        bias[..., dropped[i]] = -torch.inf
    with mock.patch("torch.nn.functional.linear", masking):
        yield
    for i, bias in biases.items():
        bias.copy_(before[i])
    assert sum(masks) == sum(map(len, dropped.values()))  # every router was met once


@tiny.every_family
@pytest.mark.parametrize("fate", [uniform, ragged])
def test_dropping_experts_equals_masking_them_in_the_router(name, fate, checkpoint, tmp_path):
    out, (batch,) = tmp_path / "out", tiny.tokens(seed=3)
    streamed = tiny.stream(checkpoint(name))
    plan = tiny.plan(streamed, fate)
    tiny.write(streamed, plan, out, tiny.tokens())
    packed = Checkpoint.open(out).config["model_type"] == PACKED
    assert packed == (fate is ragged)  # stock transformers loads layers of one size
    dropped = {
        i: [e for e, f in enumerate(fates) if f == Drop()] for i, fates in plan.layers.items()
    }
    model = tiny.load(checkpoint(name), experts="eager")
    with masked(model, name, dropped):
        want = tiny.logits(model, batch)
    assert (want - tiny.logits(model, batch)).abs().max() > 0.1
    torch.testing.assert_close(tiny.logits(tiny.load(out), batch), want, rtol=1e-5, atol=1e-5)


@tiny.every_family
def test_a_packed_checkpoint_loads_as_what_was_walked(name, checkpoint, tmp_path):
    batches = tiny.tokens(2)
    streamed = tiny.stream(checkpoint(name))
    plan = tiny.plan(streamed, mixed, rest=REST, encode="gptq")
    done = tiny.write(streamed, plan, tmp_path / "out", batches)
    model = tiny.load(tmp_path / "out")
    found = [tiny.logits(model, batch) for batch in batches]
    for got, hidden, batch in zip(found, done.last, batches, strict=True):
        with torch.no_grad():
            torch.testing.assert_close(got, streamed.logits(hidden, batch), rtol=1e-4, atol=5e-5)
    model.save_pretrained(tmp_path / "again")
    again = tiny.load(tmp_path / "again")
    assert all(map(torch.equal, found, [tiny.logits(again, batch) for batch in batches]))
    assert_same_bytes(dict(again.state_dict()), dict(model.state_dict()))


@tiny.every_family
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_loaded_weights_are_the_rounded_ones_bit_for_bit(name, dtype, checkpoint, tmp_path):
    streamed = tiny.stream(checkpoint(name), dtype)
    plan = tiny.plan(streamed, mixed, rest=REST)
    tiny.write(streamed, plan, tmp_path / "out", tiny.tokens())
    model, original = tiny.load(tmp_path / "out", dtype), tiny.stream(checkpoint(name), dtype)
    for step in walk(original, []):
        i, moe = step.index, original.moe(step.index)
        for part, kind in rest_parts(original.model, original.family, i).items():
            before = step.layer.get_submodule(part).weight.data
            if kind == "router" and moe is not None and len(before) > 1:
                shared = len(before) - moe.experts.num_experts  # rows of those that always run
                before = before[[isinstance(f, Keep) for f in plan.layers[i]] + [True] * shared]
            after = find_layers(model)[1][i].get_submodule(part).weight
            assert torch.equal(after, quantized(before, REST[kind].bits, REST[kind].group))
        if moe is not None:
            fates, now = plan.layers[i], find_moe(find_layers(model)[1][i], original.family)
            assert now is not None
            check_experts(now.experts, experts_of(moe.experts), fates)


def check_experts(loaded: Any, before: Any, fates: tuple[Fate, ...]) -> None:
    """Each kept expert, rounded by itself, in the order it had."""
    kept = [e for e, f in enumerate(fates) if isinstance(f, Keep)]
    assert loaded.num_experts == len(kept) == len(loaded.slots)
    for e, (kind, row) in zip(kept, loaded.slots, strict=True):
        fate = fates[e]
        assert isinstance(fate, Keep)
        for matrix in ("gate_up", "down"):
            want = getattr(before, matrix)[e]
            if fate.bits < 16:
                want = quantized(want, fate.bits, fate.group)
            assert torch.equal(loaded.packed[kind].weight(matrix, row), want)


@tiny.every_family
@pytest.mark.parametrize("fate", [mixed, uniform, ragged])
def test_a_plans_bytes_are_the_files_bytes(name, fate, checkpoint, tmp_path):
    streamed = tiny.stream(checkpoint(name, dtype=torch.bfloat16))  # counts the files' own dtype
    plan = tiny.plan(streamed, fate, rest=REST if fate is mixed else None)
    foreseen = bytes_by_part(take_inventory(streamed), plan)
    tiny.write(streamed, plan, tmp_path / "out", tiny.tokens())
    weighed = weigh(Checkpoint.open(tmp_path / "out"))
    tensors = whole(tmp_path / "out").values()
    assert foreseen == weighed["bytes_by_part"]
    assert sum(foreseen.values()) == weighed["size_bytes"]
    assert sum(foreseen.values()) == sum(t.numel() * t.element_size() for t in tensors)


@tiny.every_family
def test_leaving_everything_costs_what_the_original_weighs(name, checkpoint):
    folder = checkpoint(name)
    inventory = take_inventory(tiny.stream(folder))
    assert (
        bytes_by_part(inventory, inventory.untouched())
        == weigh(Checkpoint.open(folder))["bytes_by_part"]
    )
