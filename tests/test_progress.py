"""Progress: rates by hand, few plain lines, a bar on a terminal, nothing where nothing is wanted."""

from __future__ import annotations

import io
import json
import os
import re
import threading
from itertools import count

import pytest
from rich.console import Console
from test_cli import SMALL, TEXT, run

from moecule import progress, show
from moecule.progress import Track, device_bytes, host_bytes, lines, live
from moecule.session import ticker


@pytest.fixture
def clock(monkeypatch):
    """A clock that the test sets."""
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


@pytest.fixture
def text(tmp_path):
    (tmp_path / "text.txt").write_text(TEXT)
    return tmp_path / "text.txt"


def plain() -> tuple[Console, io.StringIO]:
    """As where stderr goes to a file."""
    out = io.StringIO()
    return Console(file=out, markup=False), out


def test_rates_are_of_the_latest_layers():
    track = Track("apply", of=10, tokens=5000)
    assert track.done == 0 and track.step_s is None and track.left_s(0.0) is None
    for done in range(7):  # a second each, then two
        track.add(done, float(done))
    assert track.step_s == 1.0 and track.left_s(6.0) == 4.0
    assert track.left_s(7.5) == 2.5 and track.left_s(99.0) == 0.0
    assert track.says(6.0)[:2] == ["6/10 layers", "500 tokens/s"]  # 5000 tokens in 10 seconds
    assert track.says(6.0)[-1] == "0:04 left"
    for done, at in ((7, 8.0), (8, 10.0), (9, 12.0), (10, 14.0)):
        track.add(done, at)
    assert track.step_s == (14.0 - 2.0) / 8  # of eight steps, the first ones forgotten
    assert "left" not in " ".join(track.says(14.0))


def test_memory_is_that_of_this_process():
    assert 50e6 < host_bytes() < 100e9
    assert device_bytes() >= 0
    held = bytearray(80 * 2**20)
    assert host_bytes() > len(held)


def test_plain_lines_are_few(clock):
    console, out = plain()
    told = lines(console)
    tick = ticker(told, "calibrate", 1280, 10)
    for _ in range(1280):  # 20 s in all
        clock[0] += 1 / 64
        tick()
    said = out.getvalue().splitlines()
    done = [re.match(r"calibrate (\d+)/1280 layers", x)[1] for x in said]
    assert done == ["320", "640", "960", "1280"]
    assert all(re.search(r", \d+ tokens/s, host [\d.]+ [kMG]B", x) for x in said)
    assert said[0].endswith("0:15 left") and "left" not in said[-1]


def test_slow_layers_have_a_line_each_and_quick_verbs_one(clock):
    console, out = plain()
    told = lines(console)
    slow, quick = ticker(told, "apply", 3, 10), ticker(told, "check", 1)
    for _ in range(3):
        clock[0] += 60
        slow()
    quick()
    said = [x.split(",")[0] for x in out.getvalue().splitlines()]
    assert said == ["apply 1/3 layers", "apply 2/3 layers", "apply 3/3 layers", "check 1/1"]


def test_a_verb_that_begins_again_counts_anew(clock):
    console, out = plain()
    told = lines(console)
    for _ in range(2):
        tick = ticker(told, "evaluate", 1, 7)
        clock[0] += 2
        tick()
    assert [x[:34] for x in out.getvalue().splitlines()] == [
        "evaluate 1/1 layers, 4 tokens/s, h"
    ] * 2


def drawn(columns: int) -> str:
    """What a pseudo-terminal of so many columns receives of a bar."""
    pty = pytest.importorskip("pty")  # not on Windows
    ours, theirs = pty.openpty()
    got: list[bytes] = []

    def read() -> None:
        for _ in count():
            try:
                piece = os.read(ours, 65536)
            except OSError:  # closed at the other end
                return
            if not piece:
                return
            got.append(piece)

    reader = threading.Thread(target=read)
    reader.start()
    with open(theirs, "w") as file:
        console = Console(file=file, width=columns, markup=False, color_system=None)
        assert console.is_terminal
        with live(console) as told:
            tick = ticker(told, "calibrate", 4, 2048)
            for _ in range(3):
                tick()
    reader.join(10)
    os.close(ours)
    return b"".join(got).decode()


def test_a_terminal_has_a_bar_with_everything(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    seen = drawn(100)
    assert "\x1b[" in seen  # it is redrawn in place
    last = re.sub(r"\x1b\[[\d;?]*[A-Za-z]", "", seen).replace("\r", "\n").strip().splitlines()[-1]
    assert re.search(
        r"^calibrate .*3/4 layers  \d+ tokens/s  host [\d.]+ [MG]B  \d+:\d\d left", last
    )


def test_a_narrow_terminal_has_one_line(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    plain = re.sub(r"\x1b\[[\d;?]*[A-Za-z]", "", drawn(40)).replace("\r", "\n")
    assert all(len(x) <= 40 for x in plain.splitlines()) and "3/4" in plain


def test_quiet_says_nothing_and_json_is_all_there_is(checkpoint, text, tmp_path):
    model, stats = checkpoint("qwen3_moe", tokenizer=True), tmp_path / "stats"
    args = ("--recipe", "uniform_rtn", "--data", text, *SMALL)
    assert run("calibrate", model, "-o", stats, *args, "--quiet") == (0, "", "")
    code, out, err = run("calibrate", model, "-o", stats, *args, "--json", "-q")
    assert (code, json.loads(out), err) == (0, {"stats": str(stats)}, "")
    plan = ("plan", stats, "-o", tmp_path / "plan.yaml", "--recipe", "uniform_rtn", "--bits", "3")
    code, out, err = run(*plan, "--json", "--quiet")
    assert code == 0 and json.loads(out)["nominal_bits"] == 3 and err == ""
    assert run(*plan, "--quiet") == (0, "", "")
    code, out, err = run("generate", model, "the cat", "--tokens", "3", "--quiet")
    assert code == 0 and out and err == ""
    code, said, err = run("generate", model, "the cat", "--tokens", "3", "--json", "--quiet")
    assert (code, json.loads(said)["text"], err) == (0, out, "")
    code, out, err = run("inspect", tmp_path, "--quiet")  # a mistake is told all the same
    assert (code, out) == (2, "") and err.startswith("moecule: ") and err.count("\n") == 1
    code, out, _ = run("inspect", model, "--no-time")  # and the next command is not hushed
    assert code == 0 and "8 a layer" in out


def test_where_another_process_tells_nothing_is_printed(monkeypatch, capsys):
    monkeypatch.setattr(show.out_console, "quiet", True)
    monkeypatch.setattr(show.err_console, "quiet", True)
    show.print_json({})
    with show.bar() as told:
        told("apply", 0, 1, 0)
        told("apply", 1, 1, 0)
    assert capsys.readouterr() == ("", "")
