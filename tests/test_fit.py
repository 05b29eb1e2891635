"""Training on text: what moves and when, what stays, how it goes on, and as many processes as there are."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from test_cli import refused, run

from moecule.aggregate import aggregate
from moecule.checkpoint import Checkpoint
from moecule.errors import CheckpointError, OutputError, RecipeError
from moecule.plan import Keep
from moecule.session import Compute
from moecule.train import loop
from moecule.train.fit import Fitting, fit, renew_routers
from moecule.train.lesson import Lesson, lesson_windows
from moecule.train.losses import next_token
from moecule.train.schedule import Schedule
from moecule.train.student import open_student

COMPUTE = Compute(device="cpu")
LINES = "The cat sat on the mat, and {n} more came by; all {n} of them were fed at {n} o'clock. "
QUICK = Fitting(Lesson(("all",), Schedule(steps=6, batch=4, every=3, lr=3e-3), length=24))


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    """Documents enough to hold some out."""
    file = tmp_path_factory.mktemp("text") / "text.jsonl"
    file.write_text("\n".join(json.dumps(LINES.format(n=n) * 6) for n in range(120)))
    return file


@pytest.fixture
def model(checkpoint) -> Path:
    return checkpoint("mixtral", tokenizer=True)


def moved(a: Path, b: Path) -> set[str]:
    """Names of the tensors that differ."""
    one, two = Checkpoint.open(a), Checkpoint.open(b)
    assert one.tensors == two.tensors or one.tensors.keys() == two.tensors.keys()
    before, after = one.read(list(one.tensors)), two.read(list(two.tensors))
    return {n for n, t in after.items() if not torch.equal(t, before[n])}


def held_out_loss(folder: Path, text: Path, lesson: Lesson) -> float:
    """As stock transformers runs it."""
    _, held = lesson_windows(Checkpoint.open(folder), text, lesson, 1)
    return float(next_token(tiny.logits(tiny.load(folder), held), held))


@pytest.mark.parametrize("capacity", [None, 0.5])
def test_it_learns_and_is_written_as_it_was_checked(capacity, model, text, tmp_path):
    how = replace(QUICK, capacity=capacity)
    made = fit(model, tmp_path / "out", fitting=how, data=text, compute=COMPUTE)
    (done,) = made.trained.values()
    assert done.best < done.began - 0.1 and done.stopped is None
    found = [held_out_loss(f, text, how.lesson) for f in (model, tmp_path / "out")]
    assert found == pytest.approx([done.began, done.best], abs=1e-4)
    assert (made.left_out > 0.05) == (capacity is not None)
    assert len(moved(model, tmp_path / "out")) == len(Checkpoint.open(model).tensors)
    assert Checkpoint.open(tmp_path / "out").config["model_type"] == "mixtral"
    assert fit(model, tmp_path / "out", fitting=how, data=text, compute=COMPUTE) == made
    with pytest.raises(OutputError, match="already holds"):
        other = replace(how, balance=0.5)
        fit(model, tmp_path / "out", fitting=other, data=text, compute=COMPUTE)


def test_capacity_and_selection_change_what_is_learnt(model, text, tmp_path):
    ends = {}
    for select in ("random", "position", "probs"):
        how = replace(QUICK, capacity=0.5, select=select)
        made = fit(model, tmp_path / select, fitting=how, data=text, compute=COMPUTE)
        ends[select] = made.trained["all"].best
    plain = fit(model, tmp_path / "plain", fitting=QUICK, data=text, compute=COMPUTE)
    wide = replace(QUICK, capacity=8.0)
    room = fit(model, tmp_path / "room", fitting=wide, data=text, compute=COMPUTE)
    assert room.trained == plain.trained and room.left_out == 0  # nothing to leave out
    assert len({*ends.values(), plain.trained["all"].best}) == 4


def test_layers_that_are_computed_again_leave_out_the_same(model, text, tmp_path):
    ends = []
    for again in (False, True):
        lesson = replace(QUICK.lesson, checkpointing=again)
        how = replace(QUICK, lesson=lesson, capacity=0.5)
        made = fit(model, tmp_path / str(again), fitting=how, data=text, compute=COMPUTE)
        ends.append(made.trained["all"])
    assert ends[0].best == pytest.approx(ends[1].best, abs=1e-6)
    assert [v for _, v, _ in ends[0].history] == pytest.approx([v for _, v, _ in ends[1].history])


def test_routers_move_alone_first(model, text, tmp_path):
    how = replace(QUICK, router_steps=3, lesson=replace(QUICK.lesson, parts=("norms",)))
    made = fit(model, tmp_path / "out", fitting=how, data=text, compute=COMPUTE)
    assert [t.steps for t in made.trained.values()] == [3, 6]
    assert made.trained["all"].began == pytest.approx(made.trained["router"].best, abs=1e-6)
    names = moved(model, tmp_path / "out")
    assert names and all("gate.weight" in n or "norm" in n for n in names)
    assert any("gate.weight" in n for n in names) and any("norm" in n for n in names)


def test_routers_at_random_are_the_familys_own(checkpoint):
    source = checkpoint("gpt_oss", tokenizer=True)
    student = open_student(source, COMPUTE, parts=("router",))
    renew_routers(student, 0)
    width = student.model.config.initializer_range
    for layer in student.model.model.layers:
        router = layer.mlp.router
        assert router.bias.abs().sum() == 0
        assert float(router.weight.detach().std()) == pytest.approx(width, rel=0.2)
    first = student.model.model.layers[0].mlp.router.weight.clone()
    renew_routers(student, 0)
    assert torch.equal(student.model.model.layers[0].mlp.router.weight, first)
    renew_routers(student, 1)
    assert not torch.equal(student.model.model.layers[0].mlp.router.weight, first)


def test_routers_at_random_are_as_they_will_be_stored(checkpoint):
    student = open_student(checkpoint("mixtral", dtype=torch.bfloat16, tokenizer=True), COMPUTE)
    renew_routers(student, 0)
    for layer in student.model.model.layers:
        rows = layer.mlp.gate.weight.detach()
        assert rows.abs().sum() > 0 and torch.equal(rows, rows.bfloat16().float())


class KilledError(Exception):
    """In place of a kill."""


def test_it_goes_on_where_it_was_killed(model, text, tmp_path, monkeypatch):
    how = replace(QUICK, router_steps=3, new_routers=True, capacity=0.5)
    given: dict[str, Any] = {"fitting": how, "data": text, "compute": COMPUTE}
    fit(model, tmp_path / "whole", **given)
    saves, real = [], loop.save

    def save(*args: Any) -> None:
        real(*args)
        saves.append(1)
        if len(saves) == 2:  # in the midst of the second part
            raise KilledError

    monkeypatch.setattr(loop, "save", save)
    with pytest.raises(KilledError):
        fit(model, tmp_path / "killed", **given)
    assert not (tmp_path / "killed").exists()
    fit(model, tmp_path / "killed", **given)
    files = sorted(p.name for p in (tmp_path / "whole").iterdir())
    assert sorted(p.name for p in (tmp_path / "killed").iterdir()) == files
    for name in files:
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_what_cannot_be_is_refused(checkpoint, model, text, tmp_path):
    for wrong, said in (
        ({"router_steps": -1}, "router_steps = -1"),
        ({"balance": -0.1}, "balance = -0.1"),
        ({"balance": float("nan")}, "balance = nan"),
        ({"capacity": 0.0}, "capacity = 0, wanted more than 0"),
        ({"lesson": Lesson(by_layer=True)}, "leave out by_layer"),
    ):
        with pytest.raises(RecipeError, match=said):
            replace(QUICK, **wrong)
    streamed = tiny.stream(model)
    tiny.write(
        streamed, tiny.plan(streamed, lambda i, e: Keep(4, 16)), tmp_path / "packed", tiny.tokens()
    )
    with pytest.raises(CheckpointError, match="is packed.*or moecule heal"):
        fit(tmp_path / "packed", tmp_path / "out", fitting=QUICK, data=text, compute=COMPUTE)
    with pytest.raises(RecipeError, match="no scales"):
        of = replace(QUICK, lesson=replace(QUICK.lesson, parts=("scales",)))
        fit(model, tmp_path / "out", fitting=of, data=text, compute=COMPUTE)
    assert not (tmp_path / "out").exists()


COMMAND = ("--steps", "4", "--batch", "4", "--every", "4", "--length", "24", "--device", "cpu")


def test_several_models_then_one_by_command(model, text, tmp_path):
    made = aggregate([model, model], tmp_path / "big", top_k=2)
    given = ("train", made.folder, "-o", tmp_path / "out", "--data", text, *COMMAND)
    code, out, err = run(*given, "--capacity", "1.0", "--json")
    assert code == 0, err
    told = json.loads(out)
    assert told["training"]["all"]["best"] < told["training"]["all"]["began"]
    assert 0 <= told["left_out"] < 1
    with pytest.raises(OutputError, match="already holds"):  # it is no longer what was aggregated
        aggregate([model, model], tmp_path / "out", top_k=2)
    given = ("train", made.folder, "-o", tmp_path / "no")
    assert "capacity = -1" in refused(tmp_path, *given, "--capacity", "-1")
    assert "--select goes with --capacity" in refused(tmp_path, *given, "--select", "probs")


@pytest.mark.parametrize(
    "more", [("--experts-over", "2"), pytest.param((), marks=pytest.mark.slow)]
)
def test_two_processes_train_what_one_trains(more, model, text, tmp_path):
    lesson = replace(QUICK.lesson, schedule=Schedule(steps=4, batch=4, every=4, lr=3e-4))
    how = Fitting(lesson, router_steps=2, new_routers=True, balance=0.0, capacity=100.0)
    one = fit(model, tmp_path / "1", fitting=how, data=text, compute=COMPUTE)
    given = ("-m", "moecule", "train", model, "-o", tmp_path / "2", "--data", text, *COMMAND, *more)
    rest = ("--router-steps", "2", "--new-routers", "--balance", "0", "--capacity", "100")
    ended = tiny.start(2, *given, *rest)
    assert ended.returncode == 0, ended.stderr
    two = json.loads((tmp_path / "2" / "healing.json").read_text())
    for name, of in one.trained.items():
        assert two[name]["began"] == pytest.approx(of.began, abs=1e-5)
        for (_, a, b), (_, c, d) in zip(of.history, two[name]["history"], strict=True):
            assert (a, b) == pytest.approx((c, d), abs=1e-5)
