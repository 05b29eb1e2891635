"""What a person sees: lines, tables, bars."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Console
from rich.table import Table

from moecule.progress import lines, live

# no markup: a path may hold [brackets]
out_console, err_console = Console(markup=False), Console(markup=False, stderr=True)


WIDE = 10_000  # columns


@dataclass
class _Told:
    """What the user wants to be told."""

    hushed: bool = False  # nothing but JSON, text that a model makes, warnings and errors


_told = _Told()


def hush(hushed: bool) -> None:
    """--quiet, or not."""
    _told.hushed = hushed


def say(line: str) -> None:
    """As one line, however long, so that the command in it can be copied."""
    if not _told.hushed:
        out_console.print(line, soft_wrap=True)


def remark(line: str) -> None:
    """As one line, beside what goes to a script."""
    if not _told.hushed:
        err_console.print(line, soft_wrap=True)


def print_json(doc: Any) -> None:
    """For scripts; of several processes the first prints it."""
    if not out_console.quiet:
        sys.stdout.write(json.dumps(doc, indent=2, default=str) + "\n")


def show(table: Table) -> None:
    """A table: as wide as a terminal is, elsewhere a line for every row, however long."""
    if _told.hushed or out_console.quiet:
        return
    wide = out_console if out_console.is_terminal else Console(markup=False, width=WIDE)
    wide.print(table)


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
    show(shown)


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
    show(shown)


def print_table(rows: Sequence[Sequence[str]]) -> None:
    """Rows under the first, which is the head."""
    shown = Table(*rows[0], box=None)
    for row in rows[1:]:
        shown.add_row(*row)
    show(shown)


@contextmanager
def bar() -> Iterator[Any]:
    """Within: a callback for how far a verb is. A bar on a terminal, else lines; neither where hushed."""
    if err_console.quiet or _told.hushed:
        yield lambda what, done, of, tokens=0: None
    elif err_console.is_terminal:
        with live(err_console) as progress:
            yield progress
    else:
        yield lines(err_console)


def complain(who: str, what: object, style: str) -> None:
    """One line, whatever the text was wrapped from."""
    line = " ".join(f"{who}: {what}".split())
    err_console.print(line, style=style, soft_wrap=True, highlight=False)
