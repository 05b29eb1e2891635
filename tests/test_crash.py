"""A run that is killed, or fails, goes on where it was and ends with the same bytes.

A kill is a child process that ends itself, without another instruction, before the n-th time that
it would open a file to write, or rename, cut or remove one.
"""

from __future__ import annotations

import errno
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_cli import TEXT, run

import moecule
from moecule import states, verbs
from moecule.checkpoint import INDEX, Checkpoint
from moecule.errors import CheckpointError, OutputError
from moecule.hf import Streamed
from moecule.journal import FILE, HIDDEN, Trail, journal_of, only_one, partial_of
from moecule.plan import Keep
from moecule.recipe import Recipe, load_recipe
from moecule.result import Result
from moecule.session import Compute
from moecule.text import calibration_batches
from moecule.walk import walk

compress, evaluation = map(import_module, ("moecule.compress", "moecule.evaluate"))
LAYERS, DIED = 3, 9
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT
CHANGES = ("os.rename", "os.remove", "os.rmdir", "os.truncate")
FEW = {"data.samples": 4, "data.length": 16, "data.batch": 2}
FORWARD = load_recipe("uniform_rtn", {**FEW, "bits": 2})
# reads gradients: up through the layers and down again
GRADIENT = replace(load_recipe("mc", {**FEW, "allocate.bits": [2, 3]}), skip=None)
Verb = Callable[[Path], object]
# what says that the output is in place; layers to read
LAST = {"calibrate": "meta.json", "down": "meta.json", "apply": "config.json"}
STEPS = {"calibrate": LAYERS, "down": 2 * LAYERS, "apply": LAYERS}
each = pytest.mark.parametrize("verb", STEPS)


@pytest.fixture(scope="module")
def place(checkpoint, tmp_path_factory) -> Path:
    """model/, text.txt, and a plan for it; nothing but the verb's output comes beside them."""
    folder = tmp_path_factory.mktemp("place")
    shutil.copytree(checkpoint("qwen3_moe", tokenizer=True), folder / "model")
    (folder / "text.txt").write_text(TEXT)
    calibrate(folder, FORWARD, "stats")
    verbs.plan(folder / "stats", folder / "plan.yaml", recipe=FORWARD)
    shutil.rmtree(folder / "stats")
    return folder


def calibrate(here: Path, recipe: Recipe = FORWARD, out: str = "out", **how: object) -> None:
    data, on = here / "text.txt", Compute(states="host")
    verbs.calibrate(
        here / "model", here / out, recipe=recipe, **{"data": data, "compute": on, **how}
    )


def apply(here: Path, plan: Any = None, out: Path | None = None) -> None:
    text, given = here / "text.txt", plan or here / "plan.yaml"
    verbs.apply(here / "model", given, out or here / "out", data=text, sampling=FORWARD.data)


def compress_here(here: Path) -> None:
    text = here / "text.txt"
    compress.compress(here / "model", here / "out", recipe=FORWARD, data=text, text=[text])


@pytest.fixture(scope="module")
def results(place) -> tuple[Result, Result]:
    """What evaluate says of a model."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("moecule.whole.speed", lambda *args: (1.0, 1.0))  # takes seconds
        patch.setattr(verbs, "verify", lambda *args: 0.0)
        apply(place)
        text = [place / "text.txt"]
        before, after = evaluation.evaluate(place / "out", against=place / "model", text=text)
    shutil.rmtree(place / "out")
    return before, after


@pytest.fixture
def measured(monkeypatch, results) -> None:
    """compress does not measure, nor say how long it took."""

    def found(out: Path, **how: object) -> tuple[Result, Result]:
        digest = moecule.read_plan(out / "plan.yaml").code_digest
        return results[0], replace(results[1], plan_digest=digest, seconds={})

    monkeypatch.setattr(compress, "evaluate", found)
    monkeypatch.setattr(compress, "_since", lambda start: 0.0)
    monkeypatch.setattr(compress, "peak_memory", dict)


VERBS: dict[str, Verb] = {
    "calibrate": calibrate,
    "down": lambda here: calibrate(here, GRADIENT),
    "apply": apply,
    "compress": compress_here,
}


def content(here: Path) -> dict[str, object]:
    """All that lies in the folder, hidden files and empty folders too."""
    return {
        str(p.relative_to(here)): p.read_bytes() if p.is_file() else None
        for p in sorted(here.rglob("*"))
    }


def child(work: Verb, here: Path, dies_at: int) -> tuple[int, list[str]]:
    """(exit status, the changes on disk that came to pass) of a copy of this process."""
    log = here.with_name(f"{here.name}.log")
    log.write_text("")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of forks beside threads
        pid = os.fork()
    if pid == 0:
        os._exit(_in_child(work, here, dies_at, log))
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    done = log.read_text().splitlines()
    log.unlink()
    return status, done


def _in_child(work: Verb, here: Path, dies_at: int, log: Path) -> int:
    out, seen, inside = os.open(log, os.O_WRONLY | os.O_APPEND), [0], str(here)

    def hook(event: str, args: tuple[object, ...]) -> None:
        changes = event in CHANGES
        if event == "open":
            changes = str(args[0]).startswith(inside) and bool(int(str(args[2])) & WRITES)
        if changes:
            seen[0] += 1
            if seen[0] == dies_at:
                os._exit(DIED)
            os.write(out, f"{event} {args[0]}\n".encode())

    sys.addaudithook(hook)
    try:
        work(here)
    except BaseException:  # a child must not go on as the tests
        import traceback

        traceback.print_exc()
        return 1
    return 0


class Loads:
    """How many layers were read."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.n, plain = 0, Streamed.load_layer

        def counted(streamed: Streamed, *args: object, **how: object) -> torch.nn.Module:
            self.n += 1
            return plain(streamed, *args, **how)

        monkeypatch.setattr(Streamed, "load_layer", counted)


def steps_done(out: Path) -> int:
    """Layers that the journal of `out` has."""
    file = partial_of(out) / FILE
    lines = file.read_bytes().split(b"\n")[:-1] if file.exists() else []
    return sum(b'"up"' in line or b'"down"' in line for line in lines)


def die_everywhere(
    here: Path, monkeypatch: pytest.MonkeyPatch, verb: str, at: str, every: int = 1
) -> None:
    """Die before each `every`th change that matches `at`; then run again and compare."""
    work, clean, out = VERBS[verb], content(here), here / "out"
    status, changes = child(work, here, 0)
    assert status == 0
    wanted, loads = content(here), Loads(monkeypatch)
    points = [n for n, c in enumerate(changes, 1) if re.search(at, c)][::every]
    assert len(points) >= 4
    for n in points:
        shutil.rmtree(out)
        assert content(here) == clean
        assert child(work, here, n)[0] == DIED, changes[n - 1]
        kept, loads.n = steps_done(out), 0
        whole = verb in LAST and (out / LAST[verb]).exists()
        work(here)
        assert content(here) == wanted, changes[n - 1]
        assert verb == "compress" or loads.n == (0 if whole else STEPS[verb] - kept)


@pytest.mark.parametrize(("verb", "every"), [("calibrate", 3), ("down", 8), ("apply", 6)])
def test_killed_at_a_change_on_disk_it_goes_on_to_the_same_bytes(here, monkeypatch, verb, every):
    die_everywhere(here, monkeypatch, verb, "^(?!.*batch_)", every)


def test_killed_between_its_verbs_compress_goes_on_to_the_same_bytes(here, monkeypatch, measured):
    between = r"(made/|plan.yaml|result.json|meta.json|model-.*)(.partial)?$"
    die_everywhere(here, monkeypatch, "compress", between, 5)


@pytest.mark.slow
@pytest.mark.parametrize("verb", VERBS)
def test_killed_at_any_change_on_disk_it_goes_on_to_the_same_bytes(
    here, monkeypatch, measured, verb
):
    die_everywhere(here, monkeypatch, verb, "")


def test_apply_does_nothing_where_its_output_is_there_and_refuses_all_else(here, monkeypatch):
    apply(here)
    wanted, loads, plan = content(here), Loads(monkeypatch), moecule.read_plan(here / "plan.yaml")
    apply(here)
    assert content(here) == wanted and loads.n == 0
    (here / "other.txt").write_text(TEXT[::-1])
    shutil.copytree(here / "model", here / "twin")
    config = json.loads((here / "twin" / "config.json").read_text())
    (here / "twin" / "config.json").write_text(json.dumps(config | {"other": 1}))
    digest, data = Checkpoint.open(here / "twin").digest, FORWARD.data
    others: dict[str, Callable[[], object]] = {
        "text": lambda: applied(here, data=here / "other.txt"),
        "windows": lambda: applied(here, sampling=replace(data, samples=3)),
        "batch": lambda: applied(here, sampling=replace(data, batch=1)),
        "dtype": lambda: applied(here, compute=Compute(dtype="bfloat16")),
        "plan": lambda: applied(here, plan=replace(plan, encode={"method": "gptq"})),
        "model": lambda: applied(here, here / "twin", replace(plan, digest=digest)),
    }
    before = content(here)
    for name, other in others.items():
        with pytest.raises(OutputError, match="already holds .*; name another folder"):
            other()
        assert content(here) == before, name


def applied(here: Path, model: Path | None = None, plan: Any = None, **how: Any) -> Path:
    """apply into the same folder, with something changed."""
    given = {"data": here / "text.txt", "sampling": FORWARD.data, **how}
    return verbs.apply(model or here / "model", plan or here / "plan.yaml", here / "out", **given)


@pytest.mark.parametrize("hurt", ["config.json", "plan.yaml", "model.safetensors"])
def test_apply_refuses_its_output_where_that_is_not_whole(here, hurt):
    apply(here)
    file = here / "out" / hurt
    for wrong in (file.read_bytes()[:-2], None):
        file.write_bytes(wrong) if wrong is not None else file.unlink()
        before = content(here)
        with pytest.raises(OutputError, match="already holds .*; name another folder"):
            apply(here)
        assert content(here) == before


def test_what_has_been_checked_is_not_checked_again(here, monkeypatch):
    seen: list[int] = []
    monkeypatch.setattr(verbs, "verify", lambda *args: seen.append(0))
    status, changes = child(apply, here, 0)
    assert status == 0
    wanted = content(here)
    journal = f"open {partial_of(here / 'out') / FILE}"
    last = [n for n, c in enumerate(changes, 1) if c == journal][
        -1
    ]  # of what there is to put in place
    for dies_at, again in ((last, 1), (last + 1, 0)):
        shutil.rmtree(here / "out")
        assert child(apply, here, dies_at)[0] == DIED
        seen.clear()
        apply(here)
        assert content(here) == wanted and len(seen) == again


@pytest.fixture
def timeless(monkeypatch) -> None:
    """compress evaluates, and says nothing of speed, memory and time."""
    monkeypatch.setattr("moecule.whole.speed", lambda *args, **how: (None, None))
    monkeypatch.setattr(evaluation, "time", SimpleNamespace(perf_counter=lambda: 0.0))
    monkeypatch.setattr(compress, "_since", lambda start: 0.0)
    monkeypatch.setattr(compress, "peak_memory", dict)


@pytest.mark.slow
def test_killed_while_it_evaluates_compress_goes_on_there(here, monkeypatch, timeless):
    work, result = VERBS["compress"], here / "out" / "result.json"
    work(here)
    wanted = content(here)
    result.unlink()
    status, changes = child(work, here, 0)
    assert status == 0 and content(here) == wanted
    noted = f"open {partial_of(here / 'out' / 'losses') / FILE}"
    lines = [n for n, c in enumerate(changes, 1) if c == noted]
    batches = len(lines) - 1 - 2 * LAYERS  # besides the request and both models' layers
    assert batches > 2
    loads, plain, summed = Loads(monkeypatch), evaluation.batch_sums, []
    monkeypatch.setattr(evaluation, "batch_sums", lambda *a: summed.append(0) or plain(*a))
    # what is left when all is noted: hidden states away, the result, the rest away
    after = [n for n in range(lines[-1] + 1, len(changes) + 1) if "batch_" not in changes[n - 1]]
    layers = (lines[i] for i in (0, 1, LAYERS, LAYERS + 2))  # each about to be noted
    for n in [
        *layers,
        lines[2 * LAYERS + 1],
        lines[-1],
        after[0],
        after[len(after) // 2],
        after[-1],
    ]:
        result.unlink(missing_ok=True)
        assert child(work, here, n)[0] == DIED
        done, loads.n = max(sum(line < n for line in lines) - 1, 0), 0
        if result.is_file() and not (partial_of(here / "out" / "losses") / FILE).exists():
            done = 0  # it had come to its end, and measures anew
        summed.clear()
        work(here)
        assert content(here) == wanted, changes[n - 1]
        by_layer = 2 * LAYERS  # that pass begins anew
        assert loads.n == max(2 * LAYERS - done, 0) + by_layer
        assert len(summed) == batches - max(done - 2 * LAYERS, 0)


@pytest.mark.parametrize(
    "other",
    ["text", *(pytest.param(o, marks=pytest.mark.slow) for o in ("dtype", "original", "model"))],
)
def test_the_losses_of_another_request_are_thrown_away(here, monkeypatch, timeless, other):
    plan = moecule.read_plan(here / "plan.yaml")
    apply(here)
    apply(here, replace(plan, layers={**plan.layers, 1: (Keep(5, 64),) * 8}), here / "five")
    (here / "other.txt").write_text(TEXT[::-1])
    shutil.copytree(here / "model", here / "twice")
    tensors = load_file(here / "twice" / "model.safetensors")
    save_file({n: 2 * t for n, t in tensors.items()}, here / "twice" / "model.safetensors")

    def evaluate(changed: str = "", **how: Any) -> Result:
        model = here / ("five" if changed == "model" else "out")
        against = here / ("twice" if changed == "original" else "model")
        text = here / ("other.txt" if changed == "text" else "text.txt")
        on = Compute(dtype="bfloat16" if changed == "dtype" else "float32")
        return evaluation.evaluate(model, against=against, text=[text], compute=on, **how)[1]

    plain, wanted = evaluate(), evaluate(other)
    assert plain.by_file["text.txt"] != next(iter(wanted.by_file.values()))
    stopped = Fails(monkeypatch, LAYERS + 1, interrupt)
    with pytest.raises(KeyboardInterrupt):
        evaluate(beside=here / "losses")
    assert steps_done(here / "losses") == LAYERS
    kept = content(partial_of(here / "losses"))
    assert evaluate() == plain  # without a name to write beside what is there stays
    assert content(partial_of(here / "losses")) == kept
    stopped.n = -100
    assert evaluate(other, beside=here / "losses") == wanted
    assert stopped.n == -100 + 4 * LAYERS  # for the losses, and for the sample by layer


def killed(here: Path, verb: str = "calibrate", lines: int = 3) -> dict[str, object]:
    """Kill it when the journal has so many lines; what an uninterrupted run would have left."""
    status, changes = child(VERBS[verb], here, 0)
    assert status == 0
    wanted = content(here)
    shutil.rmtree(here / "out")
    opened = [n for n, c in enumerate(changes, 1) if c.endswith(FILE) and c.startswith("open")]
    assert child(VERBS[verb], here, opened[lines - 1] + 1)[0] == DIED
    assert steps_done(here / "out") == lines - 1
    return wanted


@pytest.mark.parametrize("verb", ["calibrate", "apply"])
def test_a_line_cut_short_counts_as_not_written(here, tmp_path_factory, monkeypatch, verb):
    wanted, half = killed(here, verb), tmp_path_factory.mktemp("half") / "here"
    file = partial_of(here / "out") / FILE
    last = len(file.read_bytes().splitlines(keepends=True)[-1])
    shutil.copytree(here, half)
    loads = Loads(monkeypatch)
    for cut, again in ((1, 1), (last // 2, 1), (0, 0)):
        shutil.rmtree(here)
        shutil.copytree(half, here)
        os.truncate(file, file.stat().st_size - cut)
        loads.n = 0
        VERBS[verb](here)
        assert content(here) == wanted
        assert loads.n == STEPS[verb] - 2 + again


def test_the_journal_of_another_request_is_thrown_away(here):
    (here / "other.txt").write_text(TEXT[::-1])
    others: dict[str, Verb] = {
        "text": lambda h: calibrate(h, data=h / "other.txt"),
        "dtype": lambda h: calibrate(h, compute=Compute(dtype="bfloat16")),
        "recipe": lambda h: calibrate(h, load_recipe("frequency", FEW)),
    }
    for other in others.values():
        other(here)
        wanted = content(here)
        shutil.rmtree(here / "out")
        killed(here)
        other(here)
        assert content(here) == wanted
        shutil.rmtree(here / "out")


def test_the_journal_of_another_plan_is_thrown_away(here):
    plan = moecule.read_plan(here / "plan.yaml")
    other = replace(plan, layers={**plan.layers, 1: (*plan.layers[1][:7], Keep(5, 64))})
    apply(here, other)
    wanted = content(here)
    shutil.rmtree(here / "out")
    killed(here, "apply")
    apply(here, other)
    assert content(here) == wanted


def test_damaged_hidden_states_say_what_to_remove(here):
    wanted, partial = killed(here), partial_of(here / "out")
    for file in (partial / HIDDEN).rglob("*.safetensors"):
        file.write_bytes(b"not tensors")
    assert f"remove {partial} to begin again" in told(here)
    shutil.rmtree(partial)
    calibrate(here)
    assert content(here) == wanted


def test_a_damaged_journal_is_left_and_named(here):
    killed(here)
    file = partial_of(here / "out") / FILE
    file.write_bytes(file.read_bytes().replace(b'"up": 0', b'"up": 1'))
    before = content(here)
    assert re.search("journal.jsonl is damaged .*; remove .* to begin again", told(here))
    assert content(here) == before


def told(here: Path, verb: str = "calibrate") -> str:
    """The one line with which the command ends, and code 2."""
    given = ("--data", here / "text.txt", "--samples", "4", "--length", "16")
    recipe = ("--recipe", "uniform_rtn", "--set", "data.batch=2", "--set", "bits=2.0")
    plan = (here / "plan.yaml",) if verb == "apply" else ()
    more = () if verb == "apply" else recipe
    code, _, err = run(verb, here / "model", *plan, "-o", here / "out", *given, *more)
    lines = [line for line in err.splitlines() if line.startswith("moecule: ")]
    assert code == 2 and len(lines) == 1 and "Traceback" not in err
    return lines[0]


@contextmanager
def another_process(held: Callable[[], AbstractContextManager[object]]) -> Iterator[int]:
    """A process that is within `held` until it is killed; its id."""
    reads, writes = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        pid = os.fork()
    if pid == 0:
        with held():
            os.write(writes, b"x")
            signal.pause()
    try:
        assert os.read(reads, 1) == b"x"
        yield pid
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        os.close(reads)
        os.close(writes)


def test_the_second_of_two_processes_is_refused(here):
    out, before = here / "out", content(here)
    held = {
        "calibrate": lambda: journal_of(out, {"of": "another"}),
        "apply": lambda: only_one(out),
        "compress": lambda: only_one(out, what="compress.lock"),
    }
    for verb, hold in held.items():
        with another_process(hold):
            there = content(here)
            assert f"another process is writing to {out}; wait" in told(here, verb)
            assert content(here) == there
    calibrate(here)  # the locks of the killed do not hold
    after = content(here)
    assert not [name for name in after if name.endswith((".partial", "out.lock"))]
    assert set(before) < set(after)


class Fails:
    """From the load of a layer on, something is wrong; once."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, at: int, wrong: Callable[[], None]) -> None:
        self.n, plain = 0, Streamed.load_layer

        def load(streamed: Streamed, *args: Any, **how: Any) -> torch.nn.Module:
            self.n += 1
            if self.n == at + 1:
                wrong()
            return plain(streamed, *args, **how)

        monkeypatch.setattr(Streamed, "load_layer", load)


def goes_on(here: Path, verb: str, wanted: dict[str, object], loads: Fails) -> None:
    """The journal is intact: the same command reads only the layers that are left."""
    kept, loads.n = steps_done(here / "out"), -100
    assert 0 < kept < STEPS[verb]
    VERBS[verb](here)
    assert content(here) == wanted
    assert loads.n == -100 + STEPS[verb] - kept


def whole(here: Path, verb: str) -> dict[str, object]:
    """What a run leaves that nothing goes wrong with."""
    VERBS[verb](here)
    wanted = content(here)
    shutil.rmtree(here / "out")
    return wanted


@each
def test_a_full_disk_is_one_line_and_the_run_goes_on_when_there_is_room(here, monkeypatch, verb):
    wanted, (soft, most) = whole(here, verb), resource.getrlimit(resource.RLIMIT_FSIZE)
    full = Fails(monkeypatch, 2, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (900, most)))
    try:
        with pytest.raises(OutputError, match="cannot be written: .*; make room and run it again"):
            VERBS[verb](here)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, most))
    goes_on(here, verb, wanted, full)


def test_a_small_disk_that_fills_up_is_one_line(here, tmp_path_factory):
    disk = tmp_path_factory.mktemp("disk")
    mount = ["mount", "-t", "tmpfs", "-o", "size=200k", "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("no disk can be mounted here")
    try:
        with pytest.raises(OutputError, match="No space left on device.*; make room"):
            apply(here, out=disk / "out")
        left = subprocess.run(["mount", "-o", "remount,size=9m", str(disk)], capture_output=True)
        assert left.returncode == 0
        apply(here, out=disk / "out")
        apply(here)
        assert content(disk / "out") == content(here / "out")
    finally:
        subprocess.run(["umount", str(disk)], check=True)


@each
def test_a_shard_that_vanishes_is_one_line_and_the_run_goes_on_when_it_is_back(
    here, monkeypatch, verb
):
    for i, part in enumerate(split(here / "model")):
        assert f"model.layers.{i}." in part or i == LAYERS
    if verb == "apply":
        replan(here)
    shard, away = here / "model" / f"layer_{LAYERS - 1}.safetensors", here / "away"
    wanted = whole(here, verb)
    gone = Fails(monkeypatch, 1, lambda: shard.rename(away))
    with pytest.raises(CheckpointError, match="layer_2.safetensors cannot be read: .*; fetch"):
        VERBS[verb](here)
    kept = content(partial_of(here / "out"))
    assert re.search("names layer_2.safetensors, not in .*; fetch what is missing", told(here))
    assert content(partial_of(here / "out")) == kept
    away.rename(shard)
    goes_on(here, verb, wanted, gone)


def split(model: Path) -> list[str]:
    """A shard a layer, and one for the rest; a name out of each."""
    tensors, parts = load_file(model / "model.safetensors"), dict[str, dict[str, torch.Tensor]]()
    for name, tensor in tensors.items():
        layer = re.match(r"model\.layers\.(\d+)\.", name)
        part = f"layer_{layer[1] if layer else 'x'}.safetensors"
        parts.setdefault(part, {})[name] = tensor
    for part, of in parts.items():
        save_file(of, model / part, metadata={"format": "pt"})
    (model / "model.safetensors").unlink()
    weight_map = {name: part for part, of in parts.items() for name in of}
    (model / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    return [next(iter(parts[p])) for p in sorted(parts)]


def replan(here: Path) -> None:
    """The plan, for the model as it lies there now."""
    plan = moecule.read_plan(here / "plan.yaml")
    digest = Checkpoint.open(here / "model").digest
    (here / "plan.yaml").write_text(replace(plan, digest=digest).dumps())


@each
def test_a_folder_that_turns_read_only_is_one_line_and_the_run_goes_on(here, monkeypatch, verb):
    wanted, plain = whole(here, verb), os.replace

    def refuses(a: object, b: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(a))

    locked = Fails(monkeypatch, 2, lambda: monkeypatch.setattr(os, "replace", refuses))
    with pytest.raises(OutputError, match="cannot be written: .*Read-only file system"):
        VERBS[verb](here)
    monkeypatch.setattr(os, "replace", plain)
    goes_on(here, verb, wanted, locked)


def interrupt() -> None:
    """Ctrl-C."""
    raise KeyboardInterrupt


@each
def test_after_ctrl_c_the_same_command_goes_on(here, monkeypatch, verb):
    wanted = whole(here, verb)
    stopped = Fails(monkeypatch, 4 if verb == "down" else 1, interrupt)
    with pytest.raises(KeyboardInterrupt):
        VERBS[verb](here)
    goes_on(here, verb, wanted, stopped)


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (("calibrate", "embedded", "-o", "x"), "; run the same command to go on"),
        (("apply", "embedded", "plan.yaml", "-o", "x"), "; run the same command to go on"),
        (("plan", "x", "-o", "y"), ""),
    ],
)
def test_ctrl_c_says_in_one_line_whether_the_command_goes_on(monkeypatch, args, said):
    monkeypatch.setattr(verbs, args[0], lambda *args, **how: interrupt())
    assert run(*args) == (130, "", f"moecule: interrupted{said}\n")


def test_a_write_that_fails_beside_the_computation_ends_the_run(here, monkeypatch):
    wanted, plain, seen = whole(here, "down"), states.save_whole, []

    def fails(tensors: object, file: Path, **how: object) -> None:
        seen.append(file)
        if "up_0002" in str(file):
            raise OutputError(f"{file} cannot be written")
        plain(tensors, file, **how)

    monkeypatch.setattr(states, "save_whole", fails)
    with pytest.raises(OutputError, match="up_0002.* cannot be written"):
        VERBS["down"](here)
    assert steps_done(here / "out") == 1
    monkeypatch.setattr(states, "save_whole", plain)
    VERBS["down"](here)
    assert content(here) == wanted


def test_a_walk_that_is_given_up_leaves_what_it_has_done(here):
    wanted = whole(here, "calibrate")
    streamed = verbs.stream(here / "model", Compute())
    batches = calibration_batches(streamed, here / "text.txt", FORWARD.data)
    request = {"of": "another"}
    with journal_of(here / "out", request) as journal:
        trail = Trail("host", journal.folder / HIDDEN / "rank_0", journal)
        up = walk(streamed, batches, trail=trail)
        next(up)
        next(up)
        up.close()
    with journal_of(here / "out", request) as journal:
        assert [e["up"] for e in journal.entries] == [0]
    calibrate(here)
    assert content(here) == wanted


def test_what_a_finished_run_could_not_remove_goes_with_the_next(here, monkeypatch, measured):
    VERBS["compress"](here)
    wanted = content(here)
    for left in (partial_of(here / "out"), partial_of(here / "out" / "stats")):
        (left / HIDDEN / "rank_0").mkdir(parents=True)
        (left / HIDDEN / "rank_0" / "x").write_text("x")
    (here / ".out.lock").write_text("")
    VERBS["compress"](here)
    assert content(here) == wanted


def test_what_someone_else_put_there_meanwhile_is_not_written_over(here):
    killed(here, "apply")
    (here / "out").mkdir(exist_ok=True)
    (here / "out" / "model.safetensors").write_text("mine")
    with pytest.raises(OutputError, match="already holds model.safetensors"):
        apply(here)
    assert content(here / "out") == {"model.safetensors": b"mine"}
    assert steps_done(here / "out") == 2
