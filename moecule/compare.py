"""compare: several compressed models beside each other, if they were measured alike."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from moecule.blocks import Bar, Cell, Figure, Page, Section, Table, Tile
from moecule.budget import format_size
from moecule.drawing import Named, Point, front, points
from moecule.errors import DataError
from moecule.paired import Gap, gap
from moecule.run import Run, read_runs

PLOT = (56, 14)  # columns and rows of the plot in text
HEAD = (
    *("model", "added loss", "to the first", "size", "of the original", "true bits", "nominal bits"),
    *("KL", "perplexity", "same token", "prompt tokens/s", "decoded tokens/s", "recipe"),
)  # fmt: skip


@dataclass(frozen=True)
class Comparison:
    """Of models that were measured alike, by size."""

    runs: tuple[Run, ...]
    gaps: tuple[Gap, ...]  # of each run's loss to that of the folder named first
    page: Page

    @property
    def table(self) -> Table:
        """One row a model."""
        return self.page.sections[0].tables[0]


def compare(folders: Sequence[str | Path]) -> Comparison:
    """Beside each other. Raises DataError where there are fewer than two, or they were measured in
    different ways, saying which."""
    if len(folders) < 2:
        raise DataError("compare wants two folders or more, each of which compress made")
    return _compared(folders)


def _compared(folders: Sequence[str | Path]) -> Comparison:
    runs = read_runs(list(folders))
    why = difference(runs)
    if why is not None:
        raise DataError(why)
    ordered = tuple(sorted(runs, key=lambda run: (run.result.size_bytes, run.result.loss_nats)))
    found = tuple(_gaps(ordered, runs[0]))
    return Comparison(ordered, found, compare_page(ordered, "c", None, runs[0]))


def difference(runs: Sequence[Run]) -> str | None:
    """In what the first two that differ were measured differently, and what to do; None: in nothing."""
    for run in runs:
        if not run.result.text_digests:
            return (
                f"{run.folder} does not say on which text it was measured; run: "
                f"moecule evaluate {run.folder} --against MODEL"
            )
    first = runs[0]
    wanted = _measured(first)
    for run in runs[1:]:
        for what, found in _measured(run).items():
            if found != wanted[what]:
                return (
                    f"{first.folder} and {run.folder} were measured differently: {what} is "
                    f"{wanted[what]} in the one and {found} in the other; evaluate both in the same way"
                )
    return None


def _measured(run: Run) -> dict[str, str]:
    r = run.result
    return {
        "the original model": run.original_digest,
        "the text": ", ".join(f"{name} {digest}" for name, digest in r.text_digests.items()),
        "the window": f"{r.window} tokens",
        "the dtype": r.dtype,
        "the device": r.device,
    }


def _gaps(runs: Sequence[Run], first: Run) -> list[Gap]:
    return [gap(run.result.by_file, first.result.by_file) for run in runs]


def compare_page(runs: Sequence[Run], key: str, why: str | None, first: Run) -> Page:
    """One table, and points: loss against bytes, and against speed. `why` they cannot be compared.

    `first`: the one of them that the others' losses are set against, window by window.
    """
    title = "Beside each other"
    if why is not None:
        return Page(title, "", (), (Section("Not compared", notes=(f"{why}.",)),))
    r = runs[0].result
    loss = None if r.original is None else r.original.loss_nats
    gaps = _gaps(runs, first)
    table = _table(runs, first, gaps)
    figures = [_against_bytes(runs, key, table)]
    timed = [run for run in runs if run.result.decode_tokens_per_s is not None]
    if len(timed) > 1:
        figures.append(_against_speed(timed, key, table))
    text = (
        f"All compressed from one model ({runs[0].original_digest}), measured on the same text "
        f"({len(r.text_digests)} files, {sum(x.tokens for x in r.by_file.values()):,} tokens, windows of "
        f"{r.window}), in {r.dtype} on {r.device}."
    )
    if loss is not None:
        text += f" The original's loss is {loss:.4f} nats a token."
    sections = (
        Section("Figures", _legend(first, gaps), (), (table,), _absent(runs, first, gaps)),
        Section("Loss against bytes and speed", "In bold: beaten by none in both.", tuple(figures)),
    )  # fmt: skip
    best = min(runs, key=lambda run: run.result.loss_nats)
    least = min(runs, key=lambda run: run.result.size_bytes)
    tiles = (
        Tile("models", str(len(runs))),
        Tile("least loss", best.name, f"{_added(best):+.4f} nats a token"),
        Tile("fewest bytes", least.name, format_size(least.result.size_bytes)),
    )
    return Page(title, text, tiles, sections)


def _added(run: Run) -> float:
    """Loss over the original's where that is known, else the loss itself, nats a token."""
    before = run.result.original_loss_nats
    return run.result.loss_nats - (0.0 if before is None else before)


def _points(runs: Sequence[Run]) -> list[Point]:
    return [Point(run.name, run.result.size_bytes / 1e6, _added(run)) for run in runs]


def _legend(first: Run, gaps: Sequence[Gap]) -> str:
    text = f"* marks what no other beats in both bytes and loss. To the first: the loss less {first.name}'s"
    if any(d.half for d in gaps):
        text += ", with the 95 % interval of that over the same windows"
    return f"{text}."


def _absent(runs: Sequence[Run], first: Run, gaps: Sequence[Gap]) -> tuple[str, ...]:
    """Why there are no intervals, each reason once."""
    lacking: dict[str, list[str]] = {}
    for run, found in zip(runs, gaps, strict=True):
        if found.why is not None and run is not first:
            lacking.setdefault(found.why, []).append(run.name)
    return tuple(
        f"No interval between {first.name} and {', '.join(names)}: {why}."
        for why, names in lacking.items()
    )


def _table(runs: Sequence[Run], first: Run, gaps: Sequence[Gap]) -> Table:
    best = {p.name for p in front(_points(runs))}
    most = max(max(map(_added, runs)), 1e-300)
    rows: list[tuple[Cell, ...]] = []
    for run, found in zip(runs, gaps, strict=True):
        r, before = run.result, run.result.original
        added = _added(run)
        rows.append(
            (
                f"{run.name} *" if run.name in best else run.name,
                Bar(f"{added:+.4f}", max(added, 0.0) / most, "worse"),
                "" if run is first else str(found),
                format_size(r.size_bytes),
                "" if before is None else f"{100 * r.size_bytes / before.size_bytes:.1f} %",
                f"{r.bits_per_weight:.2f}",
                f"{r.nominal_bits:.2f}",
                "" if r.kl_nats is None else f"{r.kl_nats:.4f}",
                f"{r.perplexity:.2f}",
                "" if r.top1_agreement is None else f"{100 * r.top1_agreement:.1f} %",
                _rate(r.prefill_tokens_per_s),
                _rate(r.decode_tokens_per_s),
                run.recipe,
            )
        )
    return Table.of("By size", HEAD, rows)


def _rate(value: float | None) -> str:
    return "" if value is None else f"{value:,.0f}" if value >= 100 else f"{value:.1f}"


def _against_bytes(runs: Sequence[Run], key: str, table: Table) -> Figure:
    shown = _points(runs)
    best = ", ".join(p.name for p in front(shown))
    named = Named(f"{key}-bytes", "Added loss against true bytes", f"No other beats: {best}.")
    svg = points(named, shown, "size on disk, MB", "added loss, nats a token")
    return Figure(named.title, svg, _of(table, "size"), note=named.text)


def _against_speed(runs: Sequence[Run], key: str, table: Table) -> Figure:
    shown = [Point(run.name, run.result.decode_tokens_per_s or 0.0, _added(run)) for run in runs]
    best = ", ".join(p.name for p in front(shown, more_is_better=True))
    named = Named(f"{key}-speed", "Added loss against speed", f"No other beats: {best}.")
    svg = points(named, shown, "decoded tokens/s", "added loss, nats a token", more_is_better=True)
    return Figure(named.title, svg, _of(table, "decoded tokens/s"), note=named.text)


def _of(table: Table, column: str) -> Table:
    """The model, the column and the added loss."""
    head = ("model", column, "added loss")
    rows = [_cells(row, head) for row in table.rows]
    return Table.of("All numbers", head, rows, folded=True)


def _cells(row: Sequence[Cell], columns: Sequence[str]) -> list[str]:
    """Of these columns, as text."""
    cells = [row[HEAD.index(name)] for name in columns]
    return [cell.text if isinstance(cell, Bar) else cell for cell in cells]


def text_table(found: Comparison) -> str:
    """For a terminal; the first column is a model's letter in `text_plot`. Nothing is cut off."""
    keep = (
        *("model", "added loss", "to the first", "size", "true bits"),
        *("KL", "perplexity", "decoded tokens/s"),
    )
    rows: list[tuple[str, ...]] = [("", *keep)]
    rows += [(letter(k), *_cells(row, keep)) for k, row in enumerate(found.table.rows)]
    wide = [max(len(row[c]) for row in rows) for c in range(len(rows[0]))]
    lines = [
        "  ".join(
            text.ljust(w) if c < 2 else text.rjust(w)
            for c, (text, w) in enumerate(zip(row, wide, strict=True))
        )
        for row in rows
    ]
    notes = ("", *found.page.sections[0].notes) if found.page.sections[0].notes else ()
    return "\n".join([*(line.rstrip() for line in lines), *notes])


def readme_table(root: Path) -> str:
    """The committed results, a folder a model and in it one a method, as README.md has them."""
    lines = [
        "| original | method | true bits | size | of the original | added loss | KL | same token |",
        "|---" * 2 + "|--:" * 6 + "|",
    ]
    for model in sorted(p for p in root.iterdir() if p.is_dir()):
        found = _compared(sorted(p.parent for p in model.glob("*/result.json")))
        for run, row in zip(found.runs, found.table.rows, strict=True):
            shown = ("true bits", "size", "of the original", "added loss", "KL", "same token")
            cells = [f"`{run.name}`", *_cells(row, shown)]
            lines.append(f"| {' | '.join([model.name, *cells])} |")
    return "\n".join(lines) + "\n"


def text_plot(runs: Sequence[Run]) -> str:
    """Added loss against bytes for a terminal: a letter each, in the table's order."""
    shown = _points(runs)
    wide, high = PLOT
    top, right = max(p.y for p in shown), max(p.x for p in shown)
    low, left = min(0.0, *(p.y for p in shown)), min(p.x for p in shown)
    grid = [[" "] * wide for _ in range(high)]
    for k, p in reversed(list(enumerate(shown))):
        x = round((p.x - left) / ((right - left) or 1) * (wide - 1))
        y = round((top - p.y) / ((top - low) or 1) * (high - 1))
        grid[y][x] = letter(k)
    lines = [f"{top:8.4f} |{''.join(grid[0])}"]
    lines += [f"{'':8} |{''.join(row)}" for row in grid[1:-1]]
    lines += [f"{low:8.4f} |{''.join(grid[-1])}", f"{'':8} +{'-' * wide}"]
    lines.append(f"{'':9} {format_size(left * 1e6):<{wide - 12}}{format_size(right * 1e6):>12}")
    return "\n".join(
        ["added loss, nats a token, against bytes", *(line.rstrip() for line in lines)]
    )


def letter(k: int) -> str:
    """Of the k-th row."""
    return "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"[k % 52]
