"""Training of what lies in host memory, a layer on the device while it runs."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

from moecule import ranks
from moecule.checkpoint import Checkpoint
from moecule.errors import RecipeError
from moecule.hf import skeleton
from moecule.plan import Keep
from moecule.session import Compute, memory_bytes, open_checkpoint, stream
from moecule.train import loop, room
from moecule.train.fit import Fitting, fit, renew_routers
from moecule.train.heal import heal
from moecule.train.lesson import Lesson
from moecule.train.schedule import Schedule
from moecule.train.shards import whole
from moecule.train.slim import check_slimming, slim
from moecule.train.stages import Slimming
from moecule.train.student import check_shared, open_student

COMPUTE = Compute(device="cpu")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
QUICK = Schedule(steps=4, batch=4, every=2, lr=1e-3)


class KilledError(BaseException):
    """Of a process."""


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    """Documents enough to hold some out."""
    file = tmp_path_factory.mktemp("text") / "text.jsonl"
    line = "Of {n} sheep that crossed the ford, {n} were counted twice, and none was lost. "
    file.write_text("\n".join(json.dumps(line.format(n=n) * 6) for n in range(120)))
    return file


@pytest.fixture
def source(request, checkpoint, tmp_path) -> Path:
    """A model to heal, of half of the experts, or in 2 and 16 bits."""
    made = tmp_path / "source"
    if request.param == "stock":
        tiny.save("mixtral", made, vocab_size=tiny.VOCABULARY, num_local_experts=4)
        tiny.save_tokenizer(made)
    else:
        streamed = tiny.stream(checkpoint("mixtral", tokenizer=True))
        fates = tiny.plan(streamed, lambda i, e: Keep(2, 16) if e else Keep())
        tiny.write(streamed, fates, made, tiny.tokens())
    return made


@pytest.fixture
def offloading(monkeypatch) -> Iterator[None]:
    """Where there is no GPU, shards of a CPU's weights lie in host memory as well."""
    if DEVICE == "cpu":
        for module in ("heal", "fit"):
            monkeypatch.setattr(f"moecule.train.{module}.check_offload", lambda *a, **k: None)
    yield
    ranks.leave()


@pytest.mark.parametrize(
    ("source", "parts"),
    [("stock", ("all",)), ("stock", ("lora", "norms")), ("packed", ("all",))],
    indirect=["source"],
)
def test_weights_in_host_memory_learn_what_those_on_the_device_do(
    source, parts, checkpoint, text, tmp_path, monkeypatch, offloading
):
    """And go on where they were killed."""
    teacher = checkpoint("mixtral", tokenizer=True)
    lesson = Lesson(parts, replace(QUICK, micro=2), length=24)
    how = {"data": text, "compute": Compute(device=DEVICE, dtype="float32")}
    heal(source, teacher, tmp_path / "device", lesson=lesson, **how)
    lesson, real = replace(lesson, offload=True), loop.save

    def killed(*args: Any) -> None:
        real(*args)
        raise KilledError

    with monkeypatch.context() as patch, pytest.raises(KilledError):
        patch.setattr(loop, "save", killed)
        heal(source, teacher, tmp_path / "host", lesson=lesson, **how)
    heal(source, teacher, tmp_path / "host", lesson=lesson, **how)
    trained = [json.loads((tmp_path / f / "healing.json").read_text()) for f in ("device", "host")]
    for (_, a, b), (_, c, d) in zip(*(of["all"]["history"] for of in trained), strict=True):
        assert (a, b) == pytest.approx((c, d), abs=1e-5)
    one, other = Checkpoint.open(tmp_path / "device"), Checkpoint.open(tmp_path / "host")
    made, again = one.read(list(one.tensors)), other.read(list(other.tensors))
    before = Checkpoint.open(source).read(list(one.tensors))
    assert any(not torch.equal(before[n], t) for n, t in made.items())
    for name, tensor in made.items():
        if tensor.is_floating_point():
            torch.testing.assert_close(again[name], tensor, atol=1e-5, rtol=1e-4)


def test_new_routers_lie_in_host_memory_as_well(checkpoint, offloading):
    source, found = checkpoint("mixtral", tokenizer=True), []
    for offload in (False, True):
        student = open_student(source, Compute(device=DEVICE), parts=("router",), offload=offload)
        renew_routers(student, 0)
        named = student.model.named_parameters()
        found.append({n: whole(p.detach()).cpu() for n, p in named if "gate.weight" in n})
        assert not offload or all(p.device.type == "cpu" for p in student.model.parameters())
    assert found[0] and found[0].keys() == found[1].keys()
    assert all(torch.equal(found[0][n], t) for n, t in found[1].items())


def test_what_cannot_lie_in_host_memory(checkpoint, text, tmp_path, monkeypatch):
    teacher = checkpoint("mixtral", tokenizer=True)
    lesson = Lesson(("norms",), QUICK, length=24, offload=True)
    both = replace(lesson, experts_over=2)
    with pytest.raises(RecipeError, match="--offload .* trains on cpu; leave it out"):
        heal(teacher, teacher, tmp_path / "out", lesson=lesson, data=text, compute=COMPUTE)
    with pytest.raises(RecipeError, match="--offload .* trains on cpu; leave it out"):
        fit(teacher, tmp_path / "out", fitting=Fitting(lesson), data=text, compute=COMPUTE)
    with pytest.raises(RecipeError, match="--offload .* trains on cpu; leave it out"):
        slim(
            teacher,
            tmp_path / "out",
            Slimming(8, stages=1),
            lesson=lesson,
            data=text,
            compute=COMPUTE,
        )
    with pytest.raises(RecipeError, match="experts over processes .* leave out --offload"):
        check_slimming(open_checkpoint(teacher), Slimming(8, stages=1), both, 2)
    with pytest.raises(RecipeError, match="one by one as it is; leave out --offload"):
        Lesson(by_layer=True, offload=True)
    of = skeleton(open_checkpoint(teacher), torch.float32)
    with pytest.raises(RecipeError, match="experts over processes .* leave out --offload"):
        check_shared(open_checkpoint(teacher), *of, 2, 2, packed=False, offload=True)
    check_shared(open_checkpoint(teacher), *of, 2, 1, packed=False, offload=True)
    monkeypatch.setattr(room, "free_host_bytes", lambda: 40_000)
    with pytest.raises(RecipeError, match=r"the host has 40.00 kB.*other --parts, --by-layer$"):
        open_student(teacher, COMPUTE, offload=True)


def test_what_the_host_must_hold_is_counted():
    model = torch.nn.Sequential(torch.nn.Linear(5, 3), torch.nn.Linear(3, 2, bias=False))
    first = {id(p) for p in model[0].parameters()}
    blocks, numbers = 64 + 16, 15 + 3  # bytes of the first one's matrix and bias, as powers of two
    still = 32  # of the other's
    taken = room.host_bytes(model, lambda p: id(p) in first)
    assert taken == 2 * blocks + still - 4 * (numbers + 6) + room.ON_HOST * numbers
    away = model.to("meta")  # what lies elsewhere comes whole
    assert room.host_bytes(away, lambda p: False) == blocks + still


def test_a_teacher_has_less_room_beside_codes(checkpoint, monkeypatch):
    teacher = stream(checkpoint("mixtral"), Compute(device="cpu", dtype="float32"), empty=True)
    numbers = sum(p.numel() for p in teacher.model.parameters())
    inside = [sum(p.numel() for p in layer.parameters()) for layer in teacher.layers]
    least = memory_bytes(teacher) + 12 * max(inside) + 8 * (numbers - sum(inside))
    for free, offload, packed, fits in (
        (least, True, False, True), (least - 1, True, False, False), (least, False, False, False),
        (least, True, True, False), (least + numbers, True, True, True),
        (memory_bytes(teacher) + 16 * numbers, False, True, True),
    ):  # fmt: skip
        monkeypatch.setattr(room, "free_bytes", lambda device, free=free: free)
        found = room.fits_beside(teacher, COMPUTE, offload=offload, packed=packed)
        assert found is fits


def test_a_model_that_is_opened_and_finds_no_room():
    with (
        pytest.raises(
            RecipeError, match=r"^m finds no room on cuda \(CUDA out.*--top-k.*--by-layer"
        ),
        room.opening("m", torch.device("cuda")),
    ):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 3 GiB.")
