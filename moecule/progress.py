"""How far a verb is: a live bar on a terminal, plain lines elsewhere.

Either says how many layers are done, tokens a second (of the text, through all of them), what the process
holds in memory on the host and on the device, and how long the rest will take, by the latest layers.
"""

from __future__ import annotations

import sys
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.filesize import decimal
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn
from rich.table import Column
from rich.text import Text

EVERY_S = 5.0  # between two plain lines, at least
TRAINING = ("heal", "train", "learn")  # whose steps are no layers
LATEST = 8  # steps, of which the rate is taken
STATUS = Path("/proc/self/statm")


@dataclass
class Track:
    """One part of a verb: its steps, and when the latest of them were done."""

    what: str
    of: int
    tokens: int  # of the text that passes through all steps; 0 where there is none
    marks: deque[tuple[float, int]] = field(default_factory=lambda: deque(maxlen=LATEST + 1))

    def add(self, done: int, now: float) -> None:
        """`done` steps are done at `now`, in seconds of any clock."""
        self.marks.append((now, done))

    @property
    def done(self) -> int:
        """Steps."""
        return self.marks[-1][1] if self.marks else 0

    @property
    def step_s(self) -> float | None:
        """Seconds of one of the latest steps, or None where none was timed."""
        if len(self.marks) < 2 or self.marks[-1][1] == self.marks[0][1]:
            return None
        (began, first), (ended, last) = self.marks[0], self.marks[-1]
        return (ended - began) / (last - first)

    def left_s(self, now: float) -> float | None:
        """Seconds until all is done."""
        step = self.step_s
        if step is None:
            return None
        return max((self.of - self.done) * step - (now - self.marks[-1][0]), 0.0)

    def says(self, now: float) -> list[str]:
        """What a person reads of it."""
        step, left = self.step_s, self.left_s(now)
        unit = "" if not self.tokens else " steps" if self.what in TRAINING else " layers"
        said = [f"{self.done}/{self.of}{unit}"]
        if self.tokens and step:
            said.append(f"{self.tokens / (self.of * step):.0f} tokens/s")
        said.append(f"host {decimal(host_bytes())}")
        if device := device_bytes():
            said.append(f"device {decimal(device)}")
        if left is not None and self.done < self.of:
            said.append(f"{clock(left)} left")
        return said


def clock(seconds: float) -> str:
    """Hours, where there are any, minutes and seconds.

    >>> clock(59.6), clock(3661)
    ('1:00', '1:01:01')
    """
    minutes, s = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{s:02d}" if hours else f"{minutes}:{s:02d}"


def host_bytes() -> int:
    """What this process holds; at its peak, where the system does not tell of now; 0 if of neither."""
    if STATUS.is_file():
        import resource

        return int(STATUS.read_text().split()[1]) * resource.getpagesize()
    try:
        import resource
    except ImportError:  # Windows
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def device_bytes() -> int:
    """What torch has allocated on the GPU, 0 without one. torch is not imported for it."""
    cuda = getattr(sys.modules.get("torch"), "cuda", None)
    return cuda.memory_allocated() if cuda is not None and cuda.is_initialized() else 0


class Says(ProgressColumn):
    """The numbers of a track, beside its bar."""

    max_refresh = 0.5

    def render(self, task: Task) -> Text:
        """As text of one line."""
        track: Track = task.fields["track"]
        return Text("  ".join(track.says(time.monotonic())), no_wrap=True, overflow="ellipsis")


@contextmanager
def live(console: Console) -> Iterator[Any]:
    """A callback as `session.Progress`: bars that the terminal redraws."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=None),
        Says(Column(no_wrap=True)),
    )
    with Progress(*columns, console=console, expand=True) as bars:
        tasks: dict[str, Any] = {}

        def progress(what: str, done: int, of: int, tokens: int = 0) -> None:
            if what not in tasks or done == 0:
                track = Track(what, of, tokens)
                if what in tasks:
                    bars.reset(tasks[what], total=of, track=track)
                else:
                    tasks[what] = bars.add_task(what, total=of, track=track)
            task = next(t for t in bars.tasks if t.id == tasks[what])
            task.fields["track"].add(done, time.monotonic())
            bars.update(tasks[what], completed=done)

        yield progress


def lines(console: Console) -> Any:
    """The same in plain lines: one when all is done, before that one every EVERY_S seconds at most."""
    tracks: dict[str, Track] = {}
    said = time.monotonic()

    def progress(what: str, done: int, of: int, tokens: int = 0) -> None:
        nonlocal said
        now = time.monotonic()
        if what not in tracks or done == 0:
            tracks[what] = Track(what, of, tokens)
        tracks[what].add(done, now)
        if done and (done == of or now - said >= EVERY_S):
            said = now
            console.print(f"{what} {', '.join(tracks[what].says(now))}", soft_wrap=True)

    return progress
