"""The loop, what can be thawed, and healing: alone, layer by layer, killed, and by two processes."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from moecule.checkpoint import Checkpoint
from moecule.errors import CheckpointError, DataError, OutputError, RecipeError
from moecule.hf import skeleton
from moecule.plan import Drop, Keep
from moecule.session import Compute, open_checkpoint
from moecule.train import loop, room
from moecule.train.heal import heal
from moecule.train.lesson import Lesson, lesson_windows
from moecule.train.loop import train
from moecule.train.losses import distil, distil_top_k, next_token, top_k_of
from moecule.train.schedule import Schedule, Trained
from moecule.train.student import PARTS, check_shared, open_student
from moecule.train.thaw import freeze, thaw, thawed_names

COMPUTE = Compute(device="cpu")
DEVICE = (
    "cuda" if torch.cuda.is_available() else "cpu"
)  # of what is tested where there is a GPU, too
QUICK = Schedule(steps=4, batch=4, every=2, lr=3e-3)
LINES = "The cat sat on the mat, and {n} more came by; all {n} of them were fed at {n} o'clock. "


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    """Documents enough to hold some out."""
    file = tmp_path_factory.mktemp("text") / "text.jsonl"
    lines = [json.dumps(LINES.format(n=n) * 6) for n in range(120)]
    file.write_text("\n".join(lines))
    return file


@pytest.fixture(scope="module")
def packed(checkpoint, tmp_path_factory) -> Any:
    """packed(name): a tiny model's checkpoint in 1 to 4 bits, one expert at 16; or its experts alone."""
    made: dict[tuple[str, bool], Path] = {}

    def folder(name: str, whole: bool = True) -> Path:
        key = (name, whole)
        if key not in made:
            made[key] = tmp_path_factory.mktemp(name) / "packed"
            streamed = tiny.stream(checkpoint(name, tokenizer=True))
            bits = (1, 2, 3, 4, 2, 2, 16, 1)
            fates = tiny.plan(
                streamed,
                lambda i, e: Keep(bits[e], 16) if bits[e] < 16 else Keep(),
                rest=REST if whole else {},
            )
            tiny.write(streamed, fates, made[key], tiny.tokens())
        return made[key]

    return folder


REST = {"attention": Keep(4, 16), "dense": Keep(4, 16), "shared": Keep(4, 16)}


class Line(nn.Module):
    """y = w x, of what is wanted y = 3 x."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.zeros(1))

    def error(self, x: Tensor) -> Tensor:
        return ((self.w - 3) * x.float() / 8).square().mean()


def fit(line: Line, schedule: Schedule, **how: Any) -> Trained:
    windows = torch.arange(1, 9)[:, None]
    return train(line, lambda m, x: m.error(x), windows, schedule, **how)


def test_every_window_is_seen_once_before_any_again():
    schedule = Schedule(steps=6, batch=4, seed=3)
    seen = [i for step in range(6) for i in schedule.picks(step, 8)]
    assert sorted(seen[:8]) == sorted(seen[8:16]) == list(range(8)) and seen[:8] != seen[8:16]


def test_the_rate_rises_and_falls():
    rates = [Schedule(steps=100, lr=1.0, warmup=0.1, end=0.1).rate(s) for s in range(100)]
    assert rates[0] == pytest.approx(0.1) and max(rates) == rates[9] == 1.0
    assert rates[9:] == sorted(rates[9:], reverse=True) and rates[-1] == pytest.approx(
        0.1, abs=0.01
    )


def test_the_best_stays_and_never_the_worse():
    line = Line()
    done = fit(
        line,
        Schedule(steps=60, batch=8, every=5, lr=0.3),
        check=lambda: float((line.w.detach() - 3) ** 2),
    )
    assert done.best < 0.01 < done.began and float((line.w.detach() - 3) ** 2) == pytest.approx(
        done.best
    )
    line = Line()  # a figure that only rises
    done = fit(
        line, Schedule(steps=20, batch=8, every=5), check=lambda: float(line.w.detach().abs()) + 1
    )
    assert done.best == done.began and done.best_step == 0 and float(line.w.detach()) == 0


def test_a_loss_that_diverges_ends_it_and_the_best_stays():
    line, told = Line(), []

    def loss(model: Any, x: Tensor) -> Tensor:
        told.append(1)
        return model.error(x) * (float("inf") if len(told) > 12 else 1)

    windows = torch.arange(1, 9)[:, None]
    schedule = Schedule(steps=40, batch=8, every=5, lr=0.1)
    done = train(line, loss, windows, schedule, check=lambda: float((line.w.detach() - 3) ** 2))
    assert "diverged at step 13" in done.stopped and done.steps == 13
    assert float((line.w.detach() - 3) ** 2) == pytest.approx(done.best)
    assert done.best < done.began


def test_micro_batches_add_up_to_the_batch():
    ends = []
    for micro in (0, 3):
        line = Line()
        fit(line, Schedule(steps=5, batch=8, lr=0.1, micro=micro))
        ends.append(float(line.w.detach()))
    assert ends[0] == pytest.approx(ends[1], abs=1e-6)


def test_a_step_that_finds_no_room_says_what_takes_less(tmp_path):
    def grows(model: Any, x: Tensor) -> Tensor:
        if x.shape[0] > 2:
            raise torch.OutOfMemoryError(
                "CUDA out of memory. Tried to allocate 2 GiB. More advice."
            )
        return model.error(x)

    windows = torch.arange(1, 9)[:, None]
    said = r"no room \(CUDA out of memory\); give fewer windows at a time \(--micro\)"
    with pytest.raises(RecipeError, match=said):
        train(Line(), grows, windows, Schedule(steps=2, batch=4), folder=tmp_path)
    assert train(Line(), grows, windows, Schedule(steps=2, batch=4, micro=2)).steps == 2


def test_a_killed_run_goes_on_with_the_same_bits(tmp_path):
    schedule = Schedule(steps=20, batch=4, every=4, lr=0.1)

    class KilledError(Exception):
        pass

    def noisy(model: Any, x: Tensor) -> Tensor:
        return model.error(x) * torch.rand((), device=x.device)  # noise is a step's own, too

    windows = torch.arange(1, 9)[:, None]

    def run(folder: Path, until: int = 99) -> Line:
        line = Line().to(DEVICE)

        def after(step: int) -> None:
            if step == until:
                raise KilledError

        train(line, noisy, windows, schedule, check=lambda: float((line.w.detach() - 3) ** 2),
              folder=folder, after=after)  # fmt: skip
        return line

    whole = run(tmp_path / "whole")
    with pytest.raises(KilledError):
        run(tmp_path / "killed", until=14)
    assert torch.equal(run(tmp_path / "killed").w, whole.w)
    (tmp_path / "whole" / loop.FILE).write_text("{")
    with pytest.raises(OutputError, match="damaged.*begin again"):
        run(tmp_path / "whole")


def test_only_matrices_decay():
    model = nn.Module()
    for name, shape in (
        ("matrix", (2, 2)),
        ("scale", (2, 2)),
        ("down_bias", (2, 2)),
        ("norm", (2,)),
    ):
        model.register_parameter(name, nn.Parameter(torch.ones(shape)))

    def loss(model: Any, x: Tensor) -> Tensor:
        return sum(p.sum() for p in model.parameters()) * 0.0

    schedule = Schedule(steps=3, batch=1, lr=0.1, decay=0.5)
    train(model, loss, torch.ones(2, 1, dtype=torch.long), schedule, rates={"scale": 1.0})
    changed = [n for n, p in model.named_parameters() if not torch.equal(p, torch.ones_like(p))]
    assert changed == ["matrix"]


def test_what_cannot_be_trained_is_refused():
    for wrong in (
        {"steps": 0},
        {"lr": -1.0},
        {"warmup": 2.0},
        {"micro": -1},
        {"clip": float("nan")},
    ):
        with pytest.raises(RecipeError, match="wanted"):
            Schedule(**wrong)
    with pytest.raises(RecipeError, match="nothing"):
        train(
            nn.Linear(2, 2).requires_grad_(False),
            lambda m, x: x.sum(),
            torch.ones(4, 2, dtype=torch.int64),
            QUICK,
        )


def test_likeliest_tokens_and_a_tail_are_less_than_all_and_all_of_all():
    a, b = tiny.normal(2, 5, 30), tiny.normal(5, 2, 30).reshape(2, 5, 30).flip(0)
    whole = distil(a, b)
    parts = [distil_top_k(a, *top_k_of(b, k)) for k in (1, 8, 29)]
    assert 0 < parts[0] < parts[1] < parts[2] < whole * 1.0001
    torch.testing.assert_close(parts[2], whole)  # the tail is one token
    assert distil(a, a) == pytest.approx(0, abs=1e-6)
    ids = tiny.tokens(shape=(2, 5))[0] % 30
    target = nn.functional.one_hot(ids.roll(-1, 1), 30).float().clamp(min=1e-30).log()
    torch.testing.assert_close(next_token(a, ids), distil(a, target))


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
def test_a_thawed_model_computes_what_the_packed_one_does(name, packed):
    model, batch = tiny.load(packed(name)), tiny.tokens()[0]
    want = tiny.logits(model, batch)
    before = {n: t.clone() for n, t in model.state_dict().items()}
    thaw(model)
    torch.testing.assert_close(tiny.logits(model, batch), want, rtol=1e-4, atol=1e-4)
    freeze(model)
    after = model.state_dict()
    assert (
        all(torch.equal(after[n], t) for n, t in before.items()) and after.keys() == before.keys()
    )
    assert torch.equal(tiny.logits(model, batch), want)


def test_gradients_of_scales_are_those_of_the_unpacked_weight(packed):
    model, batch = tiny.load(packed("mixtral")), tiny.tokens()[0]
    thaw(model)
    names = thawed_names(model)
    loss = next_token(model(batch, use_cache=False).logits, batch)
    loss.backward()
    grads = {n: p.grad for n, p in model.named_parameters() if n in names}
    assert all(g is not None and g.isfinite().all() for g in grads.values())
    # a step that fp16 can tell, along one number's gradient
    some = [n for n in names if n.endswith("_scale") and grads[n].abs().max() > 1e-3]
    assert len(some) >= 5
    for name in sorted(some)[:5]:
        parameter, at = model.get_parameter(name), grads[name].abs().argmax()
        scale, slope = parameter.data.flatten(), grads[name].flatten()[at]
        old, step = scale[at].clone(), scale[at].abs() * 2**-6
        ends = []
        for sign in (1, -1):
            scale[at] = old + sign * step
            with torch.no_grad():
                ends.append(next_token(model(batch, use_cache=False).logits, batch).double())
        scale[at] = old
        assert float((ends[0] - ends[1]) / (2 * step)) == pytest.approx(float(slope), rel=0.1)


def test_parts_are_what_they_say(packed, checkpoint):
    def moving(source: Path, *parts: str) -> set[str]:
        student = open_student(source, COMPUTE, parts=parts)
        return {n for n, p in student.model.named_parameters() if p.requires_grad}

    source = packed("mixtral")
    scales, router, norms = (moving(source, p) for p in ("scales", "router", "norms"))
    assert all(n.endswith(("_scale", "_zero")) for n in scales) and scales
    assert all(n.endswith("gate.weight") for n in router) and router
    assert all("norm" in n for n in norms) and norms
    assert moving(source, "scales", "router", "norms") == scales | router | norms
    lora = moving(checkpoint("mixtral", tokenizer=True), "lora")
    assert lora and all(n.endswith((".a", ".b")) and "self_attn" in n for n in lora)
    assert moving(source, "all") >= scales | router | norms
    with pytest.raises(RecipeError, match="no scales.*may name router"):
        moving(checkpoint("mixtral", tokenizer=True), "scales")
    with pytest.raises(RecipeError, match="wanted some of scales"):
        moving(source, "wheels")
    assert set(PARTS) == {"scales", "router", "norms", "lora", "experts", "all"}


def held_out(done: Any) -> Trained:
    (only,) = done.trained.values()
    return only


def test_healing_wins_back_and_is_written_as_it_was_checked(packed, checkpoint, text, tmp_path):
    teacher, source = checkpoint("mixtral", tokenizer=True), packed("mixtral")
    lesson = Lesson(schedule=replace(QUICK, steps=12, every=4, lr=3e-3), length=24)
    done = heal(source, teacher, tmp_path / "out", lesson=lesson, data=text, compute=COMPUTE)
    assert held_out(done).best < 0.97 * held_out(done).began
    a, b = Checkpoint.open(source), Checkpoint.open(tmp_path / "out")
    assert a.tensors.keys() == b.tensors.keys()
    before, after = a.read(list(a.tensors)), b.read(list(b.tensors))
    moved = {n for n, t in after.items() if not torch.equal(t, before[n])}
    assert moved and not any(n.endswith("_codes") for n in moved)
    assert [p.name for p in (tmp_path / "out").glob("*.partial")] == []
    # opened afresh and run by the packed forward, it is as far from its teacher as was said
    ids, wanted = lesson_windows(a, text, lesson, 1)[1], tiny.load(teacher)
    told = [
        float(distil(tiny.logits(tiny.load(f), ids), tiny.logits(wanted, ids)))
        for f in (source, tmp_path / "out")
    ]
    said = held_out(done).began, held_out(done).best
    assert told == pytest.approx(said, rel=0.01)  # dense products and packed ones round otherwise
    again = heal(source, teacher, tmp_path / "out", lesson=lesson, data=text, compute=COMPUTE)
    assert again == done
    with pytest.raises(OutputError, match="already holds"):
        other = replace(lesson, schedule=QUICK)
        heal(source, teacher, tmp_path / "out", lesson=other, data=text, compute=COMPUTE)


def test_a_teacher_may_have_spoken_before_or_layer_by_layer(packed, checkpoint, text, tmp_path):
    teacher, source = checkpoint("mixtral", tokenizer=True), packed("mixtral")
    for name, how in (
        ("said", Lesson(schedule=QUICK, teaching="said", top_k=16, length=24)),
        ("layers", Lesson(schedule=QUICK, by_layer=True, length=24)),
    ):
        done = heal(source, teacher, tmp_path / name, lesson=how, data=text, compute=COMPUTE)
        for trained in done.trained.values():
            assert trained.best <= trained.began and trained.steps == QUICK.steps
        assert sum(t.best < t.began for t in done.trained.values()) >= 1
        tiny.load(tmp_path / name)


@pytest.mark.parametrize("parts", [("all",), ("lora", "norms")])
def test_a_stock_model_stays_stock(parts, checkpoint, text, tmp_path):
    teacher = checkpoint("mixtral", tokenizer=True)
    streamed = tiny.stream(teacher)
    tiny.write(
        streamed,
        tiny.plan(streamed, lambda i, e: Drop() if e % 2 else Keep()),
        tmp_path / "cut",
        tiny.tokens(),
    )
    lesson = Lesson(parts, QUICK, length=24)
    done = heal(
        tmp_path / "cut", teacher, tmp_path / "out", lesson=lesson, data=text, compute=COMPUTE
    )
    assert held_out(done).best < held_out(done).began
    a, b = (Checkpoint.open(tmp_path / n) for n in ("cut", "out"))
    assert a.tensors == b.tensors or a.tensors.keys() == b.tensors.keys()
    assert b.config["model_type"] == "mixtral"
    model, batch = tiny.load(tmp_path / "out"), tiny.tokens()[0]
    assert not torch.equal(
        tiny.logits(model, batch), tiny.logits(tiny.load(tmp_path / "cut"), batch)
    )


class KilledError(Exception):
    """In place of a kill."""


@pytest.mark.parametrize("by_layer", [False, True])
def test_healing_goes_on_where_it_was_killed(
    by_layer, packed, checkpoint, text, tmp_path, monkeypatch
):
    teacher, source = checkpoint("mixtral", tokenizer=True), packed("mixtral")
    lesson = Lesson(schedule=QUICK, by_layer=by_layer, length=24)
    how = {"lesson": lesson, "data": text, "compute": COMPUTE}
    heal(source, teacher, tmp_path / "whole", **how)
    saves, real = [], loop.save

    def save(*args: Any) -> None:
        real(*args)
        saves.append(1)
        if len(saves) == (3 if by_layer else 1):
            raise KilledError

    monkeypatch.setattr(loop, "save", save)
    with pytest.raises(KilledError):
        heal(source, teacher, tmp_path / "killed", **how)
    assert not (tmp_path / "killed").exists()
    heal(source, teacher, tmp_path / "killed", **how)
    files = sorted(p.name for p in (tmp_path / "whole").iterdir())
    assert sorted(p.name for p in (tmp_path / "killed").iterdir()) == files
    for name in files:
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_only_what_has_moved_is_written_and_once_a_precision(checkpoint, text, tmp_path):
    teacher, source = checkpoint("mixtral", tokenizer=True), tmp_path / "source"
    shutil.copytree(teacher, source)
    for name in ("pytorch_model.bin", "consolidated.00.pth", "model.gguf", "README.md"):
        (source / name).write_text("of what it was")
    (source / "pytorch_model.bin.index.json").write_text("{}")
    lesson = Lesson(schedule=replace(QUICK, steps=1), length=24)
    heal(source, teacher, tmp_path / "out", lesson=lesson, data=text, compute=COMPUTE)
    made = {p.name for p in (tmp_path / "out").iterdir()}
    assert made == {p.name for p in teacher.iterdir()} | {"healing.json"}
    other = Compute(device="cpu", dtype="bfloat16")  # the teacher's, which says other things in it
    with pytest.raises(OutputError, match="already holds"):
        heal(source, teacher, tmp_path / "out", lesson=lesson, data=text, compute=other)


def test_what_healing_cannot_take(packed, checkpoint, text, tmp_path):
    teacher, source = checkpoint("mixtral", tokenizer=True), packed("mixtral")
    how = {"lesson": Lesson(schedule=QUICK, length=24), "compute": COMPUTE}
    with pytest.raises(CheckpointError, match="knows 64 tokens.*give the model"):
        heal(source, checkpoint("mixtral"), tmp_path / "out", data=text, **how)
    (tmp_path / "one.txt").write_text(LINES * 100)
    with pytest.raises(DataError, match="give more of them"):
        heal(source, teacher, tmp_path / "out", data=tmp_path / "one.txt", **how)
    others = tmp_path / "others"  # as many tokens, and two of them change places
    shutil.copytree(teacher, others)
    names = json.loads((others / "tokenizer.json").read_text())
    vocab = names["model"]["vocab"]
    vocab["a"], vocab["b"] = vocab["b"], vocab["a"]
    (others / "tokenizer.json").write_text(json.dumps(names))
    with pytest.raises(CheckpointError, match=r"another vocabulary: .*\(2 such\)"):
        heal(source, others, tmp_path / "out", data=text, **how)
    many = replace(how["lesson"], teaching="said", top_k=10**6)
    with pytest.raises(RecipeError, match="the teacher knows 300 tokens; give fewer"):
        heal(source, teacher, tmp_path / "out", data=text, lesson=many, compute=COMPUTE)
    with pytest.raises(RecipeError, match="leave out --top-k"):
        Lesson(by_layer=True, teaching="said")
    assert not (tmp_path / "out").exists()


def test_layers_that_are_all_healed_go_on_to_be_written(
    packed, checkpoint, text, tmp_path, monkeypatch
):
    teacher, source = checkpoint("mixtral", tokenizer=True), packed("mixtral")
    how = {
        "lesson": Lesson(schedule=QUICK, by_layer=True, length=24),
        "data": text,
        "compute": COMPUTE,
    }

    def killed(*args: Any) -> None:
        raise KilledError

    with monkeypatch.context() as patch, pytest.raises(KilledError):
        patch.setattr("moecule.train.heal.write_taught", killed)
        heal(source, teacher, tmp_path / "out", **how)
    done = heal(source, teacher, tmp_path / "out", **how)
    assert all(t.steps == QUICK.steps for t in done.trained.values())
    tiny.load(tmp_path / "out")


def run(out: Path, source: Path, teacher: Path, text: Path, processes: int, *more: str) -> Any:
    """The command, as a user starts it."""
    verb = [
        "heal",
        str(source),
        "--teacher",
        str(teacher),
        "-o",
        str(out),
        "--steps",
        "5",
        "--batch",
        "4",
    ]
    verb += [
        "--every",
        "5",
        "--length",
        "24",
        "--data",
        str(text),
        "--text",
        str(text),
        "--device",
        "cpu",
    ]
    return tiny.start(processes, "-m", "moecule", *verb, *more)


@pytest.mark.parametrize(
    ("kind", "more"), [("packed", ("--top-k", "16")), ("stock", ("--experts-over", "2")),
                       pytest.param("stock", (), marks=pytest.mark.slow),
                       pytest.param("stock", ("--parts", "lora,norms"), marks=pytest.mark.slow),
                       pytest.param("experts", ("--parts", "lora,norms"), marks=pytest.mark.slow)],
)  # fmt: skip
def test_two_processes_train_what_one_trains(kind, more, packed, checkpoint, text, tmp_path):
    teacher = checkpoint("mixtral", tokenizer=True)
    source = tmp_path / "cut" if kind == "stock" else packed("mixtral", kind == "packed")
    if kind == "stock":
        streamed = tiny.stream(teacher)
        fates = tiny.plan(streamed, lambda i, e: Drop() if e % 2 else Keep())
        tiny.write(streamed, fates, source, tiny.tokens())
    one = heal(
        source, teacher, tmp_path / "1", data=text, compute=COMPUTE,
        lesson=Lesson(
            parts=("lora", "norms") if "--parts" in more else (),
            schedule=Schedule(steps=5, batch=4, every=5), length=24, top_k=16,
            teaching="said" if "--top-k" in more else "auto",
        ),
    )  # fmt: skip
    ended = run(tmp_path / "2", source, teacher, text, 2, *more)
    assert ended.returncode == 0, ended.stderr
    two = json.loads((tmp_path / "2" / "healing.json").read_text())["all"]
    assert two["began"] == pytest.approx(held_out(one).began, abs=1e-5)
    for (_, a, b), (_, c, d) in zip(held_out(one).history, two["history"], strict=True):
        assert (a, b) == pytest.approx((c, d), abs=1e-5)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there are no two GPUs")
@pytest.mark.parametrize(
    ("kind", "more"), [("packed", ()), ("packed", ("--offload", "--parts", "all")),
                       ("stock", ("--offload", "--parts", "lora,norms"))],
)  # fmt: skip
def test_two_gpus_train_what_one_trains(kind, more, packed, checkpoint, text, tmp_path):
    teacher, told = checkpoint("mixtral", tokenizer=True), []
    source = packed("mixtral")
    if kind == "stock":
        source = tmp_path / "source"
        tiny.save("mixtral", source, vocab_size=tiny.VOCABULARY, num_local_experts=4)
        tiny.save_tokenizer(source)
    more = ("--device", "cuda", *more)
    for n in (1, 2):
        ended = run(tmp_path / str(n), source, teacher, text, n, *more)
        assert ended.returncode == 0, ended.stderr
        told.append(json.loads((tmp_path / str(n) / "healing.json").read_text())["all"])
    for (_, a, b), (_, c, d) in zip(*(of["history"] for of in told), strict=True):
        assert (a, b) == pytest.approx((c, d), abs=1e-4)  # products are taken in another order


@pytest.mark.parametrize("kind", ["packed", pytest.param("stock", marks=pytest.mark.slow)])
def test_two_processes_keep_the_best_and_not_the_last(kind, packed, checkpoint, text, tmp_path):
    """What a root of shards gathered to be checked is not what is kept."""
    teacher = checkpoint("mixtral", tokenizer=True)
    source = packed("mixtral") if kind == "packed" else teacher
    ended = run(tmp_path / "out", source, teacher, text, 2, "--lr", "0.3", "--parts", "norms")
    assert ended.returncode == 0, ended.stderr
    said = json.loads((tmp_path / "out" / "healing.json").read_text())["all"]
    assert said["best_step"] == 0 and said["steps"] == 5
    a, b = Checkpoint.open(source), Checkpoint.open(tmp_path / "out")
    before, after = a.read(list(a.tensors)), b.read(list(b.tensors))
    assert [n for n, t in before.items() if not torch.equal(t, after[n])] == []


@pytest.mark.slow
def test_processes_refuse_a_model_that_lacks_weights(checkpoint, text, tmp_path):
    teacher, source = checkpoint("mixtral", tokenizer=True), tmp_path / "source"
    shutil.copytree(teacher, source)
    tensors = load_file(source / "model.safetensors")
    del tensors["model.layers.1.self_attn.k_proj.weight"]
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    ended = run(tmp_path / "out", source, teacher, text, 2)
    assert ended.returncode != 0 and "lacks model.layers.1.self_attn.k_proj.weight" in ended.stderr
    assert not (tmp_path / "out").exists()


def test_experts_that_processes_cannot_share(checkpoint, packed):
    of = {}
    for kind, folder in (
        ("stock", checkpoint("mixtral", tokenizer=True)),
        ("packed", packed("mixtral")),
    ):
        found = open_checkpoint(folder)
        of[kind] = (found, *skeleton(found, torch.float32))
    check_shared(*of["stock"], 4, 2, packed=False)
    with pytest.raises(RecipeError, match="3 of 4 processes.*give --experts-over a divisor"):
        check_shared(*of["stock"], 4, 3, packed=False)
    with pytest.raises(
        RecipeError, match="6 processes cannot share 8 experts.*give --experts-over 2"
    ):
        check_shared(*of["stock"], 6, 6, packed=False)
    with pytest.raises(RecipeError, match="leave out --experts-over"):
        check_shared(*of["packed"], 2, 2, packed=True)


def test_too_little_memory_is_told_with_what_would_fit(checkpoint, monkeypatch):
    monkeypatch.setattr(room, "free_bytes", lambda device: 40_000)
    teacher = checkpoint("mixtral", tokenizer=True)
    with pytest.raises(
        RecipeError, match=r"and cpu has 40.00 kB.*norms alone take .* kB.*--by-layer"
    ):
        open_student(teacher, COMPUTE)
    open_student(teacher, COMPUTE, parts=("norms",))


def test_what_is_checked_is_what_is_stored(checkpoint, text, tmp_path):
    """In bfloat16 a step of this size is mostly rounded away."""
    teacher = checkpoint("mixtral", tokenizer=True)
    source = tmp_path / "source"
    tiny.save("mixtral", source, torch.bfloat16, vocab_size=tiny.VOCABULARY, num_local_experts=4)
    tiny.save_tokenizer(source)
    lesson = Lesson(("all",), replace(QUICK, lr=1e-4), length=24)
    done = heal(source, teacher, tmp_path / "out", lesson=lesson, data=text, compute=COMPUTE)
    again = heal(
        tmp_path / "out", teacher, tmp_path / "more", lesson=lesson, data=text, compute=COMPUTE
    )
    assert held_out(again).began == pytest.approx(held_out(done).best, abs=1e-6)


def test_codes_of_another_kind_are_refused(checkpoint, text, tmp_path, monkeypatch):
    teacher = checkpoint("mixtral", tokenizer=True)
    monkeypatch.setattr(Checkpoint, "is_coded", True)
    with pytest.raises(CheckpointError, match="cannot be written back; give a model of 16"):
        heal(teacher, teacher, tmp_path / "out", data=text, compute=COMPUTE)
    assert not (tmp_path / "out").exists()
