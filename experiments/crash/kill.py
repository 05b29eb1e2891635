"""kill -9 at random moments of compress, and what the same command then makes of it.

python experiments/crash/kill.py -o kills.json --kills 30 --samples 32 --length 256

One run is left alone: it notes when each line of a journal appears, and is what the others are
compared with. Every other run is killed, with all that it started, when it has used as many seconds
of CPU as a lot drawn evenly from those of the first says; then the same command is run to its end.
All times are seconds of CPU of all processes of a run, so that what else the machine does counts
little; seconds of the clock stand beside. With --within only moments in that stage are drawn.

The start is what comes before the stage's first step can be done: Python, headers, text to windows.
Where the check of what was written was under way that is also the start of its fresh process.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

import moecule

POLL_S = 0.01
NOTED = ("request", "up", "down", "original_up", "sums", "done")
LAYERS = (" up ", " down ", " original_up ")
CHECK = ("apply: done written", "config.json")  # at its end, and soon after
MEASURED = (
    "prefill_tokens_per_s", "decode_tokens_per_s", "read_bytes_per_s", "peak_memory_bytes", "seconds",
)  # fmt: skip


@dataclass(frozen=True)
class Step:
    """What a run has done by then."""

    name: str
    at_s: float  # after its start, by the clock
    cpu_s: float  # used by then


@dataclass(frozen=True)
class Kill:
    """One killed run, and the one after it."""

    at_s: float  # of CPU
    during: str  # the step that was under way
    left_s: float  # of CPU, of the run that was left alone, from where this one was
    start_s: float  # of CPU, of a run that goes on there
    took_s: float  # of CPU, by the second run
    took_clock_s: float
    same: bool  # every byte of every file, times and memory apart
    clean: bool  # nothing hidden lies in or beside the folder


class Watched:
    """A run of the command in a folder, and the steps seen of it."""

    def __init__(self, folder: Path, args: list[str]) -> None:
        self.out, self.steps = folder / "out", list[Step]()
        command = [sys.executable, "-m", "moecule", "compress", "embedded", "-o", "out", *args]
        self.used_s = 0.0
        self.log = (folder / "log.txt").open("a")
        self.start = time.perf_counter()
        self.process = subprocess.Popen(
            command, cwd=folder, stdout=self.log, stderr=self.log, start_new_session=True
        )

    def seconds(self) -> float:
        """Since it began."""
        return time.perf_counter() - self.start

    def cpu_s(self) -> float:
        """Used so far by all of its processes, of those that ended too."""
        if self.process.returncode is not None:
            return self.used_s
        ticks = 0
        for stat in Path("/proc").glob("[0-9]*/stat"):
            try:
                fields = stat.read_text().rpartition(")")[2].split()
            except OSError:  # it has just ended
                continue
            if int(fields[2]) == self.process.pid:  # the group
                ticks += sum(map(int, fields[11:15]))
        return ticks / os.sysconf("SC_CLK_TCK")

    def look(self) -> None:
        """Note what has been done by now."""
        seen = {s.name for s in self.steps}
        for name in self._done():
            if name not in seen:
                self.steps.append(Step(name, self.seconds(), self.cpu_s()))

    def _done(self) -> list[str]:
        found = []
        for verb, folder in (
            ("calibrate", self.out / ".stats.partial"),
            ("apply", _beside(self.out)),
            ("evaluate", self.out / ".losses.partial"),
        ):
            for line in _lines(folder / "journal.jsonl"):
                what = next(f"{k} {line[k]}" for k in NOTED if k in line)
                found.append(f"{verb}: {'start' if what.startswith('request') else what}")
        for name in ("plan.yaml", "config.json", "result.json"):
            found += [name] if (self.out / name).exists() else []
        return found

    def wait(self, until_s: float | None = None) -> int | None:
        """Its exit status; None where it had used `until_s` of CPU first."""
        polls = 0
        while not self._ended():
            self.look()
            polls += 1
            if until_s is not None and polls % 8 == 0 and self.cpu_s() >= until_s:
                return None
            time.sleep(POLL_S)
        self.look()
        self.log.close()
        return self.process.returncode

    def _ended(self) -> bool:
        pid, status, usage = os.wait4(self.process.pid, os.WNOHANG)
        if pid:
            self.process.returncode = os.waitstatus_to_exitcode(status)
            self.used_s = usage.ru_utime + usage.ru_stime
        return bool(pid)

    def kill(self) -> None:
        """With all that it started."""
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self.log.close()


def _beside(out: Path) -> Path:
    return out.with_name(f".{out.name}.partial")


def _lines(file: Path) -> list[dict[str, Any]]:
    try:
        raw = file.read_bytes()
    except OSError:  # not there, or just gone
        return []
    return [json.loads(line) for line in raw[: raw.rfind(b"\n") + 1].splitlines()]


def content(out: Path) -> dict[str, bytes]:
    """Every file, hidden ones too; of what was measured neither times nor memory, nor where it lies."""
    files = {str(p.relative_to(out)): p.read_bytes() for p in sorted(out.rglob("*")) if p.is_file()}
    for name in ("result.json", "evidence.json"):
        if name in files:
            said = json.dumps(_lasting(json.loads(files[name])))
            files[name] = said.replace(str(out), "OUT").encode()
    return files


def _lasting(said: Any) -> Any:
    """Without what is another number each time."""
    if isinstance(said, dict):
        return {k: _lasting(v) for k, v in said.items() if k not in MEASURED}
    return [_lasting(v) for v in said] if isinstance(said, list) else said


def run(args: argparse.Namespace, work: Path) -> dict[str, Any]:
    """The run that is left alone, then all the others."""
    extra = ["--bits", "2.5", "--samples", str(args.samples), "--length", str(args.length)]
    for text in args.text:
        extra += ["--text", str(Path(text).resolve())]
    whole = Watched(work, extra)
    if whole.wait() != 0:
        raise SystemExit((work / "log.txt").read_text())
    total, wanted = whole.seconds(), content(whole.out)
    limits = _limits(whole.steps, whole.cpu_s())
    lot = random.Random(args.seed)
    moments = [lot.uniform(*_span(whole, args.within)) for _ in range(args.kills)]

    def one(n: int) -> Kill:
        kill = killed(work / f"kill_{n}", extra, moments[n], whole, wanted, limits)
        print(_row(n, kill, limits), flush=True)
        return kill

    with ThreadPoolExecutor(args.jobs) as pool:
        kills = list(pool.map(one, range(args.kills)))
    return {
        "command": "moecule compress embedded -o out " + " ".join(extra),
        "device": f"{_cpu()}, {os.cpu_count()} cores, torch {torch.__version__}",
        "date": time.strftime("%Y-%m-%d"),
        "moecule": moecule.__version__,
        "total_s": whole.cpu_s(),
        "total_clock_s": total,
        "steps": [asdict(s) for s in whole.steps],
        **limits,
        "kills": [asdict(k) for k in kills],
    }


def killed(
    folder: Path,
    extra: list[str],
    moment: float,
    whole: Watched,
    wanted: dict[str, bytes],
    limits: dict[str, float],
) -> Kill:
    """Kill a run at the moment, run again to the end, and compare with what is wanted."""
    folder.mkdir()
    first = Watched(folder, extra)
    used = first.cpu_s() if first.wait(until_s=moment) is None else whole.cpu_s()
    if first.process.returncode is None:
        first.kill()
    left, during = _left(whole, first.steps, used), _during(whole.steps, first.steps)
    second = Watched(folder, extra)
    if second.wait() != 0:
        raise SystemExit(f"killed at {moment:.2f} s: {(folder / 'log.txt').read_text()}")
    took, found = second.seconds(), content(second.out)
    clean = {p.name for p in folder.iterdir()} == {"out", "log.txt"}
    shutil.rmtree(folder)
    start = limits["start_s"]
    if during.startswith("evaluate"):
        start = limits["start_evaluate_s"]
    elif during in CHECK:
        start += limits["start_process_s"]
    return Kill(moment, during, left, start, second.cpu_s(), took, found == wanted, clean)


def _span(whole: Watched, stage: str) -> tuple[float, float]:
    """From when to when the run was at the stage, in CPU seconds; "": all of it."""
    if not stage:
        return 0.0, whole.cpu_s()
    inside = [s.cpu_s for s in whole.steps if s.name.startswith(stage)]
    return min(inside), max(inside)


def _limits(steps: list[Step], total: float) -> dict[str, float]:
    """Of the run that was left alone: the longest layer, and what comes before the first step."""
    at = {s.name: s.cpu_s for s in steps}
    spans = {s.name: s.cpu_s - e for s, e in zip(steps, [0.0, *at.values()], strict=False)}
    layers = [t for name, t in spans.items() if any(kind in name for kind in LAYERS)]
    return {
        "layer_s": max(layers),
        "start_s": at["calibrate: start"] + spans["apply: start"],
        "start_evaluate_s": at["calibrate: start"] + spans["evaluate: start"],
        "start_process_s": _process_s(),
        "check_s": sum(spans.get(name, 0.0) for name in CHECK),
        "longest_sum_s": max(t for name, t in spans.items() if " sums " in name),
        "end_s": total - max(s.cpu_s for s in steps if " sums " in s.name),
    }


def _process_s() -> float:
    """CPU seconds that the process of the check takes before it has opened anything."""
    before = os.times()
    subprocess.run([sys.executable, "-c", "import moecule.verify"], check=True)
    after = os.times()
    return sum(after[2:4]) - sum(before[2:4])


def _left(whole: Watched, done: list[Step], used: float) -> float:
    """CPU seconds of the whole run from where the killed one was, which had used so many.

    By its steps: a second of one run is not a second of another where the machine is shared.
    """
    last, at = _last(whole.steps, done), {s.name: s.cpu_s for s in done}
    ends = [0.0, *(s.cpu_s for s in whole.steps), whole.cpu_s()]
    since = used - (at[whole.steps[last].name] if last >= 0 else 0.0)
    return max(0.0, ends[-1] - min(ends[last + 1] + since, ends[last + 2]))


def _last(whole: list[Step], done: list[Step]) -> int:
    """Which step of the whole run was the killed one's last; -1 for none."""
    seen = {s.name for s in done}
    return max((i for i, s in enumerate(whole) if s.name in seen), default=-1)


def _during(whole: list[Step], done: list[Step]) -> str:
    """The first step of the whole run that the killed one had not done."""
    last = _last(whole, done)
    return whole[last + 1].name if last + 1 < len(whole) else "the end"


def _row(n: int, kill: Kill, limits: dict[str, float]) -> str:
    most = kill.left_s + limits["layer_s"] + kill.start_s
    within = "yes" if kill.took_s <= most else "no"
    bytes_ = "DIFFER" if not kill.same else "same" if kill.clean else "same, and more beside"
    cells = (f"{n}", f"{kill.at_s:.1f}", kill.during, f"{kill.left_s:.1f}", f"{kill.took_s:.1f}")
    return f"| {' | '.join((*cells, f'{most:.1f}', within, f'{kill.took_clock_s:.1f}', bytes_))} |"


def _cpu() -> str:
    table = Path("/proc/cpuinfo")
    lines = table.read_text().splitlines() if table.is_file() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def main() -> None:
    """Run, print the table, write the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("-o", "--out", type=Path, required=True)
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--jobs", type=int, default=1, help="runs beside each other")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--within", default="", choices=("", "calibrate", "apply", "evaluate"))
    parser.add_argument("--text", action="append", default=[])
    args = parser.parse_args()
    print(
        "| | killed at, s | before it was done | left | took | at most | within | clock, s | bytes |"
    )
    print("|--:|--:|---|--:|--:|--:|---|--:|---|", flush=True)
    with tempfile.TemporaryDirectory() as work:
        found = run(args, Path(work))
    kills = found["kills"]
    same = sum(k["same"] and k["clean"] for k in kills)
    most = [k["left_s"] + found["layer_s"] + k["start_s"] for k in kills]
    within = sum(k["took_s"] <= m for k, m in zip(kills, most, strict=True))
    print(
        f"\nuninterrupted {found['total_s']:.1f} s ({found['total_clock_s']:.1f} by the clock), "
        f"longest layer {found['layer_s']:.1f} s, start "
        f"{found['start_s']:.1f} s, the check {found['check_s']:.1f} s, of which its process's start "
        f"{found['start_process_s']:.1f} s; {same} of {len(kills)} with "
        f"the same bytes, {within} within left + layer + start"
    )
    args.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
