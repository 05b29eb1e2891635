"""Task patterns: the figures by hand, the first router alone, and a model with one task's experts."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import tiny
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_cli import TEXT, refused, run, tree
from test_drop import LOGITS
from torch import Tensor

import moecule
from moecule.drop import first_of
from moecule.errors import DataError, RecipeError
from moecule.methods import premoe
from moecule.moe import listening
from moecule.pattern import (
    KEY,
    MEAN,
    OUTER,
    Patterns,
    Room,
    Task,
    distances,
    mean_of,
    task_of,
    tcess_of,
)
from moecule.plan import Drop, Keep
from moecule.session import Compute, memory_bytes
from moecule.stats import Routed
from moecule.taer import Wanted, first_logits, retrieve, room_of
from moecule.walk import walk

CPU = Compute(device="cpu")
NUMBERS = "0123456789 98 765 4321 + 11 = 13 * 7 / 24 - 100 ; " * 12
SHORT = ("--samples", "4", "--length", "32")


def seen(logits: Tensor) -> Routed:
    """What a router made of a text, as far as patterns look."""
    picked = logits.topk(2).indices
    return Routed(logits, logits.softmax(-1), picked, logits.gather(1, picked))


def task(name: str, mean: list[float], scatter: list[list[float]], key: list[float]) -> Task:
    """Of three windows and one layer."""
    key_, mean_, scatter_ = (torch.tensor(x, dtype=torch.float64) for x in (key, mean, scatter))
    return Task(name, 3, key_, mean_, scatter_, torch.arange(len(mean)).int()[None])


def store(*tasks: Task) -> Patterns:
    return Patterns("model", "digest", tasks, {})


def test_keys_are_the_figures_worked_out_by_hand():
    # the largest logits: 2 of expert 0, 3 of expert 1, 1.5 of expert 2
    assert tcess_of(LOGITS).tolist() == pytest.approx([2 / 3, 1, 0.5, 0])
    assert mean_of(LOGITS).tolist() == pytest.approx([1, 1.5, 2.5 / 3, -2])
    (statistic,) = premoe.needs(premoe.Options("tcess"))[1:]
    assert torch.allclose(tcess_of(LOGITS), statistic.of_router(seen(LOGITS)) / 3)


def test_distances_are_the_figures_worked_out_by_hand():
    near = task("near", [1.0, 0.0], [[8.0, 0.0], [0.0, 0.02]], [3.0, 0.0])
    far = task("far", [0.0, 1.0], [[8.0, 0.0], [0.0, 0.02]], [0.0, 1.0])
    # four degrees of freedom: variances 4 and 0.01; the prompt's mean is (3, 0.8)
    prompt = torch.tensor([[3.0, 0.8], [3.0, 0.8]])
    assert distances(store(near, far), prompt) == pytest.approx(
        {"far": 9 / 4 + 0.04 / 0.01, "near": 4 / 4 + 0.64 / 0.01}
    )
    # its largest logits: 3 of expert 0, twice, so its key is (3, 0)
    by_key = distances(store(near, far), prompt, "tcess")
    assert by_key == pytest.approx({"near": 0, "far": 10**0.5})
    assert list(by_key) == ["near", "far"]


def test_windows_that_never_differ_give_plain_distances():
    calm = [task(n, m, [[0.0, 0.0], [0.0, 0.0]], [0.0, 0.0]) for n, m in POINTS.items()]
    assert distances(store(*calm), torch.tensor([[1.0, 1.0]])) == pytest.approx({"a": 1, "b": 2})
    # a logit that is the same in all windows does not decide by rounding
    still = [task(n, m, [[4.0, 0.0], [0.0, 0.0]], [0.0, 0.0]) for n, m in POINTS.items()]
    found = distances(store(*still), torch.tensor([[1.0, 1.0]]))
    assert all(0 <= far < 10**7 for far in found.values())


POINTS = {"a": [1.0, 0.0], "b": [0.0, 2.0]}


def random_task(logits: list[Tensor], name: str) -> Task:
    """Of windows of logits, which are the only layer's scores too."""
    sums = {s.name: sum(s.of_router(seen(z)) for z in logits) for s in (KEY, MEAN, OUTER)}
    return task_of(name, len(logits), sums, [sums[MEAN.name]])


def test_permuting_experts_permutes_patterns_and_moves_no_task():
    texts = tiny.normal(2, 5, 40, 8).double()
    texts[1, :, :, 3] += 0.3
    order = torch.tensor([3, 1, 7, 0, 2, 6, 5, 4])
    plain = store(*(random_task([*t], n) for t, n in zip(texts, "ab", strict=True)))
    moved = store(*(random_task([*t[..., order]], n) for t, n in zip(texts, "ab", strict=True)))
    for a, b in zip(plain.tasks, moved.tasks, strict=True):
        assert torch.equal(order[b.ranks.long()], a.ranks.long())
    for by in ("spread", "tcess"):
        prompt = tiny.normal(9, 8).double()
        was, now = (distances(s, z, by) for s, z in ((plain, prompt), (moved, prompt[:, order])))
        assert was == pytest.approx(now) and list(was) == list(now)


def test_as_many_experts_of_every_group_are_chosen():
    ranks = torch.tensor([7, 6, 0, 5, 4, 1, 3, 2]).int()
    assert first_of(ranks.tolist(), 4, Room(8, 2).groups) == (0, 5, 6, 7)
    assert first_of(ranks.tolist(), 4, Room(8, 2, 2, 1).groups) == (0, 1, 6, 7)


@pytest.mark.parametrize(
    ("room", "left", "said"),
    [
        (Room(32, 4), 3, "3 experts a layer .* picks 4 of 32 for a token, so give 4 to 32"),
        (Room(32, 4), 33, "so give 4 to 32"),
        (Room(8, 2, 2, 1), 5, "2 groups, which must keep as many each: give a multiple of 2, 4 or"),
        (Room(8, 3, 2, 1), 4, "a multiple of 2, 6 or more"),
    ],
)
def test_experts_that_are_too_few_or_too_many_are_refused(room, left, said):
    with pytest.raises(RecipeError, match=said):
        room.check(left)


@pytest.mark.parametrize("name", ["qwen3_moe", "deepseek_v3", "gpt_oss"])
def test_the_first_router_says_what_it_says_in_a_walk(name, checkpoint):
    (batch,) = tiny.tokens()
    streamed = tiny.stream(checkpoint(name))
    for step in walk(streamed, [batch]):
        moe = streamed.moe(step.index)
        if moe is not None:
            break
    with listening(moe) as heard:
        step.run()
    again = tiny.stream(checkpoint(name))
    assert torch.equal(first_logits(again, batch), heard.logits[0])
    assert all(p.is_meta for layer in again.layers for p in layer.parameters())


def anything(folder: Path) -> Patterns:
    """One task that keeps experts in the order of their number, last first."""
    streamed = tiny.stream(folder)
    sizes = tiny.moe_layers(streamed)
    (n,) = set(sizes.values())
    blank = torch.zeros(n, dtype=torch.float64)
    ranks = torch.arange(n).flip(0).int().expand(len(sizes), n).contiguous()
    only = Task("only", 2, blank, blank, blank.outer(blank), ranks)
    return Patterns("tiny", streamed.checkpoint.digest, (only,), {})


@pytest.mark.parametrize("name", ["qwen3_moe", "deepseek_v3", "gpt_oss"])
def test_a_tasks_experts_alone_are_the_model_without_the_others(name, checkpoint, tmp_path):
    folder, (batch,) = checkpoint(name), tiny.tokens(shape=(1, 20))
    found = anything(folder)
    every, of_all = retrieve(folder, batch, Wanted(found, 8), CPU)
    assert torch.allclose(
        tiny.logits(every, batch), tiny.logits(tiny.load(folder), batch), atol=1e-6
    )
    model, got = retrieve(folder, batch, Wanted(found, 4), CPU)
    assert got.task == "only" and (got.experts, got.of) == (4, 8)
    assert got.memory_bytes < of_all.memory_bytes == of_all.whole_bytes == got.whole_bytes
    streamed = tiny.stream(folder)
    room = next(r for i in range(len(streamed.layers)) if (r := room_of(streamed, i)))
    kept = first_of(found.tasks[0].ranks[0].tolist(), 4, room.groups)
    plan = tiny.plan(streamed, lambda i, e: Keep() if e in kept else Drop())
    tiny.write(streamed, plan, tmp_path / "out", [batch])
    want = tiny.logits(tiny.load(tmp_path / "out"), batch)
    assert torch.allclose(tiny.logits(model, batch), want, atol=1e-5)


@pytest.fixture(scope="module")
def place(checkpoint, tmp_path_factory) -> Path:
    """model/, words.txt, numbers.txt and p.safetensors of the two."""
    folder = tmp_path_factory.mktemp("place")
    (folder / "model").symlink_to(checkpoint("qwen3_moe", tokenizer=True))
    (folder / "words.txt").write_text(TEXT)
    (folder / "numbers.txt").write_text(NUMBERS)
    args = [f"--domain={n}={folder / n}.txt" for n in ("words", "numbers")]
    code, out, err = run(
        "patterns", folder / "model", *args, "-o", folder / "p.safetensors", *SHORT
    )
    assert code == 0, err
    assert out.startswith("2 patterns in") and "--experts N, of 8" in out
    return folder


@pytest.mark.parametrize("match", ["spread", "tcess"])
@pytest.mark.parametrize(("prompt", "task"), [(TEXT[:60], "words"), (NUMBERS[:60], "numbers")])
def test_a_prompt_finds_its_task(place, match, prompt, task):
    made = moecule.generate(
        place / "model",
        prompt,
        tokens=3,
        patterns=place / "p.safetensors",
        experts=4,
        match=match,
        compute=CPU,
    )
    assert made.retrieved.task == task and made.tokens == 3
    assert set(made.retrieved.distances) == {"words", "numbers"}
    assert made.retrieved.whole_bytes == memory_bytes(tiny.stream(place / "model"))


def test_the_command_says_which_task_it_found(place):
    given = ("--patterns", place / "p.safetensors", "--experts", "4", "--tokens", "2")
    code, _, err = run("generate", place / "model", NUMBERS[:60], *given)
    assert code == 0
    assert "pattern numbers: 4 of 8 experts a layer" in " ".join(err.split())


def test_patterns_are_the_same_again_and_read_back(place, tmp_path):
    files = {n: place / f"{n}.txt" for n in ("words", "numbers")}
    recipe = moecule.load_recipe("premoe", {"data.samples": 4, "data.length": 32})
    made = moecule.patterns(place / "model", tmp_path / "q", files, recipe=recipe, compute=CPU)
    was, now = Patterns.load(place / "p.safetensors"), Patterns.load(tmp_path / "q")
    for a, b, c in zip(was.tasks, now.tasks, made.tasks, strict=True):
        for part in ("key", "mean", "scatter", "ranks"):
            assert torch.equal(getattr(a, part), getattr(b, part))
            assert torch.equal(getattr(a, part), getattr(c, part))
    assert (place / "p.safetensors").read_bytes() == (tmp_path / "q").read_bytes()
    assert [t.windows for t in was.tasks] == [4, 4]
    assert was.made_by["score"] == {"method": "premoe", "metric": "peu", "active": 0, "r": 0.0}


WITH = ("--patterns", "p.safetensors", "--experts")
GENERATE = {
    "no file": (("--patterns", "nope", "--experts", "4"), "nope cannot be read as patterns"),
    "no patterns": (
        ("--patterns", "words.txt", "--experts", "4"),
        "words.txt cannot be read as pat",
    ),
    "too few": ((*WITH, "1"), "1 experts .* picks 2 of 8 for a token, so give 2 to 8"),
    "too many": ((*WITH, "9"), "give 2 to 8"),
    "alone": (WITH[:2], "--patterns and --experts go together"),
    "number alone": (("--experts", "4"), "--patterns and --experts go together"),
    "skip": ((*WITH, "4", "--skip"), "--skip is of a compressed model"),
}


@pytest.mark.parametrize("case", GENERATE)
def test_what_cannot_be_retrieved_is_refused(case, place, monkeypatch):
    args, said = GENERATE[case]
    monkeypatch.chdir(place)
    assert re.search(said, refused(place, "generate", "model", "x", *args))


DOMAIN = "--domain=words=words.txt"
PATTERNS = {
    "no name": (("--domain=words.txt", "-o", "q"), "wanted NAME=FILE"),
    "twice": ((DOMAIN, DOMAIN, "-o", "q"), "--domain words is given twice"),
    "no text": (("--domain=a=nope.txt", "-o", "q"), "nope.txt cannot be read as text"),
    "little text": ((DOMAIN, "-o", "q", "--samples", "1"), "gives 1 windows, and words wants 2 or"),
    "there": ((DOMAIN, "-o", "p.safetensors"), "p.safetensors is there"),
    "no score": ((DOMAIN, "-o", "q", "--recipe", "heapr"), "heapr does not score experts; those"),
}


@pytest.mark.parametrize("case", PATTERNS)
def test_patterns_that_cannot_be_made_are_refused(case, place, monkeypatch):
    args, said = PATTERNS[case]
    monkeypatch.chdir(place)
    before = tree(place)
    assert re.search(said, refused(place, "patterns", "model", *args, "--length", "32"))
    assert tree(place) == before


def test_patterns_of_another_model_are_refused(place, checkpoint):
    with pytest.raises(
        DataError, match="patterns are of .*, and .* is .*; make them of this model"
    ):
        moecule.generate(
            checkpoint("mixtral", tokenizer=True),
            "x",
            patterns=place / "p.safetensors",
            experts=4,
            compute=CPU,
        )


def test_damaged_patterns_are_refused(place, tmp_path):
    with safe_open(place / "p.safetensors", "pt") as file:
        said = file.metadata()
    tensors = load_file(place / "p.safetensors")
    ranks, key = tensors["words.ranks"].clone(), tensors["words.key"]
    ranks[0, 0] = ranks[0, 1]
    changes = ({"ranks": ranks}, {"ranks": ranks[0]}, {"key": key * torch.nan}, {"mean": key[1:]})
    for change in changes:
        wrong = {f"words.{part}": t.clone() for part, t in change.items()}
        save_file(tensors | wrong, tmp_path / "p", said)
        with pytest.raises(DataError, match="is damaged; make them with moecule patterns"):
            Patterns.load(tmp_path / "p")
    save_file(tensors, tmp_path / "p")
    with pytest.raises(DataError, match="holds no patterns of format 1"):
        Patterns.load(tmp_path / "p")
    for doc in ([], {"format": 2}, {"format": 1, "windows": {"a": 1}, "made_by": {}}):
        save_file({"x": torch.zeros(1)}, tmp_path / "p", {"moecule_patterns": json.dumps(doc)})
        with pytest.raises(DataError, match="make them with moecule patterns"):
            Patterns.load(tmp_path / "p")
