"""Learning masks: they come to the share that is asked for, in the folder, and a killed run goes on."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import tiny
import torch
from test_cli import run

import moecule
from moecule import experts_run, verbs
from moecule.checkpoint import Checkpoint
from moecule.data import Sampling
from moecule.errors import CheckpointError, DataError, RecipeError
from moecule.exports.contents import Contents
from moecule.family import load_family
from moecule.methods import otp
from moecule.plan import Keep, Masks, Skip
from moecule.ranks import Ranks
from moecule.recipe import load_recipe
from moecule.result import Result
from moecule.run import read_run
from moecule.sections import skip_section
from moecule.session import Compute, open_checkpoint
from moecule.train import masks
from moecule.train.masked import Pupil, settle, shifted
from moecule.train.masks import Learnt, learn_masks, learning_windows

CPU = Compute("cpu")
SAMPLING = Sampling(length=24)
CHANGES = {"hidden": 8, "samples": 60, "steps": 20, "batch": 6, "lr": 0.02, "keep": 0.8}
HOW = load_recipe("mc_sharp").skip.as_dict() | CHANGES
WORDS = (
    "the",
    "cat",
    "sat",
    "on",
    "a",
    "mat",
    "and",
    "dog",
    "ran",
    "by",
    "7",
    "were",
    "fed",
    "fish",
)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Documents of words in some order."""
    g = torch.Generator().manual_seed(0)
    docs = [
        " ".join(WORDS[i] for i in torch.randint(0, len(WORDS), (40,), generator=g).tolist())
        for _ in range(120)
    ]
    file = tmp_path_factory.mktemp("text") / "docs.jsonl"
    file.write_text("".join(json.dumps({"text": d}) + "\n" for d in docs))
    return file


@pytest.fixture(scope="module")
def prepared(checkpoint, tmp_path_factory) -> Path:
    """A packed model whose heads have not learnt."""
    out = tmp_path_factory.mktemp("prepared") / "out"
    streamed = tiny.stream(checkpoint("mixtral", tokenizer=True))
    plan = tiny.plan(streamed, lambda i, e: Keep(3 + e % 2, 16), skip=Masks(HOW))
    tiny.write(streamed, plan, out, tiny.tokens(1))
    return out


@pytest.fixture(scope="module")
def learnt(prepared, text, tmp_path_factory) -> Learnt:
    """A copy of it, taught."""
    out = tmp_path_factory.mktemp("learnt") / "out"
    shutil.copytree(prepared, out)
    return learn_masks(out, data=text, sampling=SAMPLING, compute=CPU)


def heads(folder: Path) -> dict[str, torch.Tensor]:
    """As the checkpoint has them."""
    found = Checkpoint.open(folder)
    return found.read([n for n in found.tensors if ".experts.skip." in n])


def others(folder: Path) -> dict[str, torch.Tensor]:
    """All that is no head."""
    found = Checkpoint.open(folder)
    return found.read([n for n in found.tensors if ".experts.skip." not in n])


def test_masks_come_to_the_share_asked_for_and_lose_less_than_they_began_with(learnt):
    assert learnt.keep == pytest.approx(0.8 - masks.BELOW, abs=0.005)
    assert learnt.trained.best < 0.8 * learnt.trained.began
    assert learnt.kl_nats == pytest.approx(learnt.trained.best)
    assert learnt.trained.steps == HOW["steps"] and learnt.trained.stopped is None


def test_a_loaded_model_runs_the_share_that_was_learnt(learnt, text):
    checkpoint = open_checkpoint(learnt.folder)
    options = otp.Options(**{k: v for k, v in HOW.items() if k != "method"})
    seen, held = learning_windows(checkpoint, text, options, SAMPLING)
    assert len(seen) == len(held) == (60 + masks.CHECKED) // 2
    model = tiny.load(learnt.folder, expert_skip=True)
    for part in held.split(16):
        tiny.logits(model, part)
    assert experts_run(model) == pytest.approx(learnt.keep, abs=1e-3)


def test_nothing_but_heads_changes_and_nothing_is_left_behind(learnt, prepared):
    before, after = others(prepared), others(learnt.folder)
    assert before.keys() == after.keys()
    assert all(torch.equal(t, after[n]) for n, t in before.items())
    assert any(not torch.equal(t, heads(learnt.folder)[n]) for n, t in heads(prepared).items())
    assert [p.name for p in learnt.folder.iterdir() if p.name.startswith(".")] == []


def test_what_has_learnt_is_not_taught_again(learnt, text, monkeypatch):
    monkeypatch.setattr(masks, "_taught", None)
    again = learn_masks(learnt.folder, data=text, sampling=SAMPLING, compute=CPU)
    assert again.keep == learnt.keep and again.trained.best == learnt.trained.best


class KilledError(Exception):
    """As if the process had ended."""


def test_the_verb_goes_on_from_a_killed_run_and_ends_with_the_same_bits(
    prepared, learnt, text, tmp_path, monkeypatch
):
    out, asked = tmp_path / "out", 0
    shutil.copytree(prepared, out)

    def dies(*given):
        nonlocal asked
        asked += 1
        if asked == 6:
            raise KilledError
        return settle(*given)

    monkeypatch.setattr(masks, "settle", dies)
    with pytest.raises(KilledError):
        learn_masks(out, data=text, sampling=SAMPLING, compute=CPU)
    assert (out / ".masks.partial" / "steps").is_dir()
    assert all(torch.equal(t, heads(prepared)[n]) for n, t in heads(out).items())
    monkeypatch.setattr(masks, "settle", settle)
    (out / "result.json").write_text("{}")
    args = ("learn", out, "--data", text, "--length", "24", "--device", "cpu")
    code, said, err = run(*args, "--json")
    assert code == 0, err
    assert json.loads(said)["keep"] == learnt.keep
    assert not (out / "result.json").exists()  # of what it was before
    code, said, _ = run(*args)
    assert code == 0 and "of the pairs of token and expert run with --skip" in said
    assert all(torch.equal(t, heads(learnt.folder)[n]) for n, t in heads(out).items())
    assert (out / "config.json").read_bytes() == (learnt.folder / "config.json").read_bytes()


CHILD = """
import sys
from pathlib import Path
from moecule.data import Sampling
from moecule.result import Result
from moecule.run import read_run
from moecule.sections import skip_section
from moecule.session import Compute
from moecule.train.masks import learn_masks
import torch
torch.set_num_threads(1)
folder, text = map(Path, sys.argv[1:])
learn_masks(folder, data=text, sampling=Sampling(length=24), compute=Compute("cpu").joined())
"""


def test_two_processes_learn_what_one_learns(prepared, learnt, text, tmp_path):
    out, child = tmp_path / "out", tmp_path / "child.py"
    shutil.copytree(prepared, out)
    child.write_text(CHILD)
    done = tiny.start(2, child, out, text)
    assert done.returncode == 0, done.stderr
    history = {f: json.loads((f / "config.json").read_text())["moecule"]["masks"]["trained"]["history"]
               for f in (out, learnt.folder)}  # fmt: skip
    for (step, loss, held), (other_step, other, other_held) in zip(*history.values(), strict=True):
        assert step == other_step
        assert (loss, held) == pytest.approx((other, other_held), abs=1e-5)


def test_a_higher_offset_runs_more_and_settling_stays_under_the_aim(prepared, text):
    model = tiny.load(prepared)
    family = load_family("mixtral")
    layers = [i for i, layer in enumerate(model.model.layers)]
    drawn = {i: otp.first_head(i, 32, 2, otp.Options(hidden=8)) for i in layers}
    for i, head in drawn.items():
        head["down"] += torch.randn(head["down"].shape, generator=torch.Generator().manual_seed(i))
    pupil, windows = Pupil(model, family, drawn, 0.7), tiny.tokens(1, shape=(8, 24))[0]
    plain = tiny.logits(tiny.load(prepared), windows)
    torch.testing.assert_close(pupil("all", windows).detach(), plain, rtol=1e-4, atol=1e-4)
    found = settle(pupil, windows, 4)
    assert 0.67 < found.keep <= 0.705 and found.kl_nats > 0
    scores = torch.randn(50, 3)
    run = [int(otp.hard(shifted(scores, o)).sum()) for o in (-9.0, -1.0, 0.0, 1.0, 9.0)]
    assert run == sorted(run) and run[0] == 50 and run[-1] == 150


def test_what_has_no_masks_is_refused(prepared, checkpoint, text, tmp_path):
    with pytest.raises(CheckpointError, match="is a stock checkpoint"):
        learn_masks(checkpoint("mixtral", tokenizer=True), data=text)
    streamed = tiny.stream(checkpoint("mixtral", tokenizer=True))
    plan = tiny.plan(streamed, lambda i, e: Keep(4, 16), skip=Skip({0: (0.5,)}))
    tiny.write(streamed, plan, tmp_path / "odp", tiny.tokens(1))
    with pytest.raises(CheckpointError, match="without learnt masks"):
        learn_masks(tmp_path / "odp", data=text)


def test_more_processes_than_windows_to_check_on_are_refused(prepared, tmp_path, text):
    few, many = tmp_path / "few.jsonl", Compute("cpu", ranks=Ranks(0, 65))
    few.write_text("\n".join(text.read_text().splitlines()[:60]))
    with pytest.raises(DataError, match="65 processes share .* windows that masks are checked on"):
        learn_masks(prepared, data=few, sampling=SAMPLING, compute=many)


def test_too_little_memory_to_unpack_in_is_said(prepared, tmp_path, text, monkeypatch):
    shutil.copytree(prepared, tmp_path / "out")
    monkeypatch.setattr("moecule.train.room.free_bytes", lambda device: 1000)
    with pytest.raises(
        RecipeError, match=r"all experts unpacked takes .* 1.00 kB left; use a larger"
    ):
        learn_masks(tmp_path / "out", data=text, sampling=SAMPLING, compute=CPU)


def test_conversations_and_too_little_text_are_refused(prepared, tmp_path):
    chats, short = tmp_path / "chats.jsonl", tmp_path / "short.jsonl"
    chats.write_text('{"messages": [{"role": "user", "content": "hi"}]}\n')
    short.write_text('{"text": "a"}\n' * 40)
    with pytest.raises(DataError, match="conversations"):
        learn_masks(prepared, data=chats, sampling=SAMPLING, compute=CPU)
    with pytest.raises(DataError, match="give more"):
        learn_masks(prepared, data=short, sampling=SAMPLING, compute=CPU)


def test_compress_learns_in_one_command_and_once(checkpoint, text, tmp_path, monkeypatch):
    monkeypatch.setattr(verbs, "verify", lambda *args: 0.0)
    small = {"samples": 12, "steps": 10, "batch": 4, "hidden": 4, "lr": 0.02}
    changes = {"data.length": 24, "data.samples": 8, "group": 16}
    recipe = load_recipe("mc_sharp", changes | {f"skip.{k}": v for k, v in small.items()})
    model, out, few = checkpoint("mixtral", tokenizer=True), tmp_path / "out", tmp_path / "few.txt"
    few.write_text(" ".join(WORDS * 8))

    def compress() -> Result:
        return moecule.compress(model, out, recipe=recipe, data=text, text=[few], compute=CPU).after

    after = compress()
    said = json.loads((out / "config.json").read_text())["moecule"]["masks"]
    assert said["request"]["how"] == recipe.skip.as_dict() and "learn" in after.seconds
    assert after.sampled is not None and after.sampled.skipped is not None
    ran = after.sampled.skipped.experts_run
    assert sum(ran.values()) / len(ran) == pytest.approx(said["keep"], abs=0.1)
    section = skip_section(read_run(out))
    assert all(row[-1] == "learnt" for row in section.tables[0].rows)
    _, shown = moecule.evaluate(out, text=[few], length=24, skip=True, compute=CPU)
    assert 0.5 < shown.experts_run < 0.95
    monkeypatch.setattr(masks, "_taught", None)
    before = {p.name: p.read_bytes() for p in out.glob("*.safetensors")}
    compress()
    assert {p.name: p.read_bytes() for p in out.glob("*.safetensors")} == before
    assert [p.name for p in out.iterdir() if p.name.startswith(".")] == []


def test_other_engines_get_no_heads(learnt):
    contents = Contents.open(learnt.folder)
    names = [name for part in contents.parts() for name in part]
    assert contents.skips and names and not any(".skip" in name for name in names)
