"""What a person sees: lines, tables, bars."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

# no markup: a path may hold [brackets]
out_console, err_console = Console(markup=False), Console(markup=False, stderr=True)


def say(line: str) -> None:
    """As one line, however long, so that the command in it can be copied."""
    out_console.print(line, soft_wrap=True)


def print_json(doc: Any) -> None:
    """For scripts."""
    sys.stdout.write(json.dumps(doc, indent=2) + "\n")


def print_change(before: Any, after: Any) -> None:
    """Two results, side by side."""
    from moecule.result import table

    shown = Table(title=f"{after.against} -> {after.model} ({after.device}, {after.dtype})")
    for name in ("", "before", "after", "change"):
        shown.add_column(name, justify="left" if not name else "right")
    for row in table(before, after):
        shown.add_row(*row)
    if len(after.by_file) > 1:
        for name, loss in after.by_file.items():
            change = loss.loss_nats - loss.original_loss_nats
            shown.add_row(
                f"  loss on {name}",
                f"{loss.original_loss_nats:.4f}",
                f"{loss.loss_nats:.4f}",
                f"{change:+.4f}",
            )
    out_console.print(shown)


def print_one(result: Any) -> None:
    """One result."""
    from moecule.budget import format_size
    from moecule.result import shown as with_error
    from moecule.result import told

    shown = Table(show_header=False, box=None)
    for name, value in asdict(result).items():
        if isinstance(value, (int, float, str)):
            shown.add_row(name, f"{value:.4f}" if isinstance(value, float) else str(value))
    for name, loss in result.by_file.items():
        shown.add_row(f"loss on {name}", f"{loss.loss_nats:.4f}")
    if result.throughput is not None:
        of = result.throughput
        shown.add_row(f"sequences in {format_size(of.memory_bytes)}", str(of.sequences))
        rate = of.decode_tokens_per_s
        shown.add_row("decoded tokens/s of all", "does not fit" if rate is None else f"{rate:.1f}")
    for name, row, metric in told(result):
        shown.add_row(f"{name}, {metric}", with_error(row, metric))
    out_console.print(shown)


def print_table(rows: Sequence[Sequence[str]]) -> None:
    """Rows under the first, which is the head."""
    shown = Table(*rows[0], box=None)
    for row in rows[1:]:
        shown.add_row(*row)
    out_console.print(shown)


@contextmanager
def bar() -> Iterator[Any]:
    """A bar on a terminal; elsewhere a plain line at every tenth of the way."""
    if not err_console.is_terminal:
        tenths: dict[str, int] = {}

        def line(what: str, done: int, of: int) -> None:
            tenth = 10 * done // max(of, 1)
            if tenth > tenths.setdefault(what, 0):
                tenths[what] = tenth
                err_console.print(f"{what} {done}/{of}")

        yield line
        return
    times = (TimeElapsedColumn(), TimeRemainingColumn())
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), *times)
    with Progress(*columns, console=err_console) as bars:
        tasks: dict[str, Any] = {}

        def progress(what: str, done: int, of: int) -> None:
            if what not in tasks:
                tasks[what] = bars.add_task(what, total=of)
            bars.update(tasks[what], completed=done)

        yield progress


def complain(who: str, what: object, style: str) -> None:
    """One line, whatever the text was wrapped from."""
    line = " ".join(f"{who}: {what}".split())
    err_console.print(line, style=style, soft_wrap=True, highlight=False)
