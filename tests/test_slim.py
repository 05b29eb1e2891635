"""SlimMoE's stages: what is cut when, going on after a kill, and what is refused."""

from __future__ import annotations

import json
import random
import warnings
from pathlib import Path

import pytest
import tiny
import torch
from test_cli import refused, run, tree

from moecule.checkpoint import Checkpoint
from moecule.errors import CheckpointError, DataError, OutputError, RecipeError
from moecule.train.heal import heal
from moecule.train.lesson import Lesson
from moecule.train.schedule import Schedule
from moecule.train.slim import slim
from moecule.train.stages import Slimming, Stage, stages_of

SHORT = Lesson(schedule=Schedule(steps=6, batch=2, every=1, lr=3e-4), length=16)
TWO = Slimming(width=16, groups=1, early=1 / 3, multiple=8, samples=6, batch=2)


class KillError(Exception):
    """What a test ends a run with."""


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """Experts of 64 channels, 2 groups of heads, and a tokenizer."""
    folder = tmp_path_factory.mktemp("wide")
    tiny.save("mixtral", folder, intermediate_size=64, vocab_size=tiny.VOCABULARY)
    tiny.save_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Documents enough for training and holding out, no two windows alike."""
    file, lot = tmp_path_factory.mktemp("text") / "text.jsonl", random.Random(0)
    texts = ("".join(lot.choices("etaoin shrdlu", k=100)) for _ in range(40))
    file.write_text("".join(json.dumps(text) + "\n" for text in texts))
    return file


@pytest.fixture(scope="module")
def made(model, data, tmp_path_factory) -> Path:
    """Of TWO, in one go."""
    out = tmp_path_factory.mktemp("made") / "out"
    slim(model, out, TWO, lesson=SHORT, data=data)
    return out


def test_the_stages_widths_and_steps():
    assert stages_of(Slimming(width=448, groups=4), 6400, 300) == (
        Stage(1696, None, 30),
        Stage(448, 4, 270),
    )
    assert stages_of(Slimming(width=960, stages=1), 6400, 7) == (Stage(960, None, 7),)
    assert stages_of(Slimming(groups=2, stages=1), 64, 5) == (Stage(64, 2, 5),)
    three = stages_of(Slimming(width=160, stages=3, multiple=16), 640, 100)
    assert three == (Stage(400, None, 10), Stage(256, None, 10), Stage(160, None, 80))


@pytest.mark.parametrize(
    ("slimming", "full", "steps", "said"),
    [
        ({"width": 8}, 16, 90, "2 stages from 16 to 8 channels in multiples of 32 are [16, 0, 8]"),
        ({"groups": 2}, 64, 90, "2 stages from 64 to 64 channels"),
        ({"width": 72, "stages": 1}, 64, 90, "1 stages from 64 to 72 channels"),
        ({"width": 0}, 64, 90, "width = 0, wanted 1 to 64"),
        ({"width": 16, "multiple": 8}, 64, 2, "2 steps are shared [0, 2] by 2 stages"),
    ],
)
def test_stages_that_cannot_be_are_refused(slimming, full, steps, said):
    with pytest.raises(RecipeError) as e:
        stages_of(Slimming(**slimming), full, steps)
    assert said in str(e.value)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({}, "nothing is to go; give --width, --groups, or both"),
        ({"width": 8, "stages": 0}, "stages = 0, wanted 1 or more"),
        (
            {"width": 8, "early": 0.0},
            "early = 0 of the steps for each of 1 stages before the last one",
        ),
        ({"width": 8, "stages": 3, "early": 0.5}, "early = 0.5 of the steps for each of 2 stages"),
        ({"width": 8, "signal": "loss"}, "signal = 'loss', wanted one of topk_ce, lm, noise"),
    ],
)
def test_a_request_that_cannot_be_is_refused(wrong, said):
    with pytest.raises(RecipeError) as e:
        Slimming(**wrong)
    assert said in str(e.value)


def test_every_stage_is_a_stock_checkpoint_that_says_what_it_has(model, made):
    stage, last, before = (tiny.load(f) for f in (made / "stage_1", made, model))
    shapes = [tuple(m.model.layers[0].mlp.experts.down_proj.shape) for m in (before, stage, last)]
    assert shapes == [(8, 32, 64), (8, 32, 32), (8, 32, 16)]
    heads = [m.config.num_key_value_heads for m in (before, stage, last)]
    assert heads == [2, 2, 1]
    config = Checkpoint.open(made).config
    assert config["model_type"] == "mixtral"
    assert (config["num_attention_heads"], config["head_dim"]) == (2, 8)
    assert config["moecule"]["slim"]["stage"] == 2
    for folder in (made / "stage_1", made):
        (said,) = json.loads((folder / "healing.json").read_text()).values()
        assert said["best"] < said["began"]
    assert sorted(p.name for p in made.iterdir() if p.is_dir()) == ["stage_1"]
    assert not [p for p in made.parent.iterdir() if p != made]


def test_each_stage_has_windows_of_its_own_and_the_original_for_a_teacher(
    model, data, tmp_path, monkeypatch
):
    from moecule.train import slim as module

    seen, taught = [], module.teach

    def teach(checkpoint, teacher, out, windows, held, **how):
        seen.append((str(teacher), windows, held, how["lesson"].schedule.steps))
        return taught(checkpoint, teacher, out, windows, held, **how)

    monkeypatch.setattr(module, "teach", teach)
    slim(model, tmp_path / "out", TWO, lesson=SHORT, data=data)
    (one, first, held, few), (two, then, again, more) = seen
    assert one == two == str(model)
    assert (few, more, len(first), len(then)) == (2, 4, 4, 8)
    assert torch.equal(held, again)
    every = torch.cat([first, then, held])
    assert len(every.unique(dim=0)) == len(every)


@pytest.mark.parametrize(
    "at",
    [
        "stage 1: heal 1",
        "stage 2: score 1",
        *(
            pytest.param(at, marks=pytest.mark.slow)
            for at in ("stage 1: score 2", "stage 2: heal 3", "stage 2: heal 4")
        ),
    ],
)
def test_a_killed_run_goes_on_and_ends_with_the_same_bytes(at, model, data, made, tmp_path):
    def killing(what: str, done: int, of: int, tokens: int) -> None:
        if f"{what} {done}" == at:
            raise KillError

    out = tmp_path / "out"
    with pytest.raises(KillError):
        slim(model, out, TWO, lesson=SHORT, data=data, progress=killing)
    assert not (out / "config.json").exists()
    told: list[str] = []
    slim(model, out, TWO, lesson=SHORT, data=data, progress=lambda what, *of: told.append(what))
    assert tree(out) == tree(made)
    assert ("stage 1: heal" in told) == (at.startswith("stage 1"))
    told.clear()
    slim(model, out, TWO, lesson=SHORT, data=data, progress=lambda what, *of: told.append(what))
    assert not told  # all is there


def test_one_killed_while_it_puts_the_last_stage_in_place_goes_on(
    model, data, made, tmp_path, monkeypatch
):
    from moecule.train import slim as module

    out, move = tmp_path / "out", module.move_into

    def cut_short(folder: Path, to: Path) -> None:
        (folder / "model.safetensors").rename(to / "model.safetensors")
        raise KillError

    monkeypatch.setattr(module, "move_into", cut_short)
    with pytest.raises(KillError):
        slim(model, out, TWO, lesson=SHORT, data=data)
    monkeypatch.setattr(module, "move_into", move)
    slim(model, out, TWO, lesson=SHORT, data=data)
    assert tree(out) == tree(made)
    (out / module.MOVING).write_text("[]")  # killed before the last line
    slim(model, out, TWO, lesson=SHORT, data=data)
    assert tree(out) == tree(made) and not (out / module.MOVING).exists()


def test_what_another_request_made_is_left_alone(model, data, made):
    before = tree(made)
    for lesson, slimming in ((Lesson(SHORT.parts, SHORT.schedule, length=24), TWO),):
        with pytest.raises(OutputError, match="holds what another request made"):
            slim(model, made, slimming, lesson=lesson, data=data)
    assert tree(made) == before


def test_a_stage_of_another_request_is_left_alone(model, data, made, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "stage_1").symlink_to(made / "stage_1")
    other = Slimming(width=8, groups=1, early=1 / 3, multiple=8, samples=6, batch=2)
    with pytest.raises(OutputError, match="stage_1 holds what another request made"):
        slim(model, tmp_path / "out", other, lesson=SHORT, data=data)


def test_one_stage_and_two_have_as_many_weights(model, data, made, tmp_path):
    once = Slimming(width=16, groups=1, stages=1, samples=6, batch=2)
    slim(model, tmp_path / "once", once, lesson=SHORT, data=data)
    sizes = [Checkpoint.open(f).size_bytes for f in (tmp_path / "once", made)]
    assert sizes[0] == sizes[1]
    assert not (tmp_path / "once" / "stage_1").exists()


def test_checkpointing_and_no_checkpointing_train_the_same(model, data, tmp_path):
    losses = []
    for again in (False, True):
        lesson = Lesson(
            schedule=Schedule(steps=2, batch=2, lr=1e-3), length=16, checkpointing=again
        )
        found = heal(model, model, tmp_path / str(again), lesson=lesson, data=data)
        losses.append([loss for _, loss, _ in found.trained["all"].history])
    assert losses[0] == losses[1]


@pytest.mark.parametrize("signal", ["lm", "noise"])
def test_the_other_signals_and_all_three_slices(signal, model, data, tmp_path):
    asked = Slimming(width=32, stages=1, signal=signal, full=True, samples=4, batch=2)
    lesson = Lesson(schedule=Schedule(steps=1, batch=2), length=16)
    assert slim(model, tmp_path / "out", asked, lesson=lesson, data=data).stages[0].width == 32


def test_a_teacher_of_another_vocabulary_is_refused(model, data, checkpoint, tmp_path):
    with pytest.raises(CheckpointError, match="knows 64 tokens and .* 300"):
        slim(model, tmp_path / "out", TWO, lesson=SHORT, data=data, teacher=checkpoint("mixtral"))
    assert not (tmp_path / "out").exists()


def test_text_too_short_for_the_stages_is_refused(model, tmp_path):
    file = tmp_path / "few.jsonl"
    file.write_text("".join(json.dumps("the cat sat on the mat") + "\n" for _ in range(32)))
    with pytest.raises(DataError, match="windows for 2 stages; give more text"):
        slim(
            model,
            tmp_path / "out",
            TWO,
            lesson=Lesson(schedule=SHORT.schedule, length=22),
            data=file,
        )


def test_too_little_memory_to_score_in_is_said(model, data, tmp_path, monkeypatch):
    monkeypatch.setattr("moecule.train.room.free_bytes", lambda device: 1000)
    with pytest.raises(RecipeError, match="scoring by gradients takes .* 1.00 kB left"):
        slim(model, tmp_path / "out", TWO, lesson=SHORT, data=data)


def test_experts_that_no_token_reached_are_told_of(model, data, tmp_path):
    net = tiny.load(model)
    for layer in net.model.layers:
        layer.mlp.gate.weight.data[5] = 0
        layer.mlp.gate.weight.data[:5] *= 100
    net.save_pretrained(tmp_path / "starved")
    tiny.save_tokenizer(tmp_path / "starved")
    asked = Slimming(width=32, stages=1, samples=1, batch=1)
    lesson = Lesson(schedule=Schedule(steps=1, batch=2), length=16)
    with pytest.warns(UserWarning, match="no gradient reached .* experts"):
        slim(tmp_path / "starved", tmp_path / "out", asked, lesson=lesson, data=data)


def test_the_command_makes_it_and_says_what_each_stage_gained(model, data, tmp_path):
    args = (
        "slim", model, "-o", tmp_path / "out", "--width", "16", "--multiple", "8", "--steps", "6",
        "--batch", "2", "--every", "2", "--samples", "4", "--length", "16", "--data", data, "--json",
    )  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        code, out, err = run(*args)
    assert code == 0, err
    told = json.loads(out)
    assert [s["width"] for s in told["stages"]] == [32, 16]
    assert (tmp_path / "out" / "result.json").is_file()
    wrong = ("slim", model, "-o", tmp_path / "x", "--width", "20", "--stages", "1", "--data", data)
    said = refused(tmp_path, *wrong)
    assert "width = 20, and this model's experts have 64 channels; wanted a multiple of 8" in said


def test_two_processes_make_what_one_makes(model, data, tmp_path):
    """But for the order in which sums are taken."""
    verb = ["slim", str(model), "-o", "", "--width", "16", "--groups", "1", "--multiple", "8"]
    verb += ["--steps", "6", "--batch", "4", "--every", "2", "--samples", "16", "--length", "16"]
    verb += [
        "--early",
        "0.34",
        "--data",
        str(data),
        "--text",
        str(data),
        "--device",
        "cpu",
        "--json",
    ]
    told = []
    for processes in (1, 2):
        verb[3] = str(tmp_path / str(processes))
        ended = tiny.start(processes, "-m", "moecule", *verb)
        assert ended.returncode == 0, ended.stderr
        told.append(json.loads(ended.stdout)["stages"])
    assert [s["width"] for s in told[1]] == [32, 16]
    for one, two in zip(*told, strict=True):
        for (_, a, b), (_, c, d) in zip(one["all"]["history"], two["all"]["history"], strict=True):
            assert (a, b) == pytest.approx((c, d), abs=1e-5)
