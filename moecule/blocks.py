"""What a report is made of, before it is HTML or Markdown: pages of sections of tables and figures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Tone = Literal["", "plain", "better", "worse"]


@dataclass(frozen=True)
class Bar:
    """A number in a cell, drawn as a bar too."""

    text: str
    share: float  # of the cell's width, 0 to 1
    tone: Tone = ""


Cell = str | Bar


@dataclass(frozen=True)
class Table:
    """The first column is what a row is about."""

    caption: str
    head: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    folded: bool = False  # behind its caption, until it is opened

    @staticmethod
    def of(
        caption: str, head: Sequence[str], rows: Sequence[Sequence[Cell]], *, folded: bool = False
    ) -> Table:
        """Of any sequences."""
        return Table(caption, tuple(head), tuple(map(tuple, rows)), folded)


@dataclass(frozen=True)
class Figure:
    """A drawing, and a table that says the same."""

    title: str
    svg: str
    table: Table
    key: tuple[tuple[str, str], ...] = ()  # (CSS class of a swatch, what it stands for)
    note: str = ""
    wide: bool = False  # scrolls in its own box; too large for Markdown
    again: bool = False  # its table is another figure's, or stands beside it


@dataclass(frozen=True)
class Section:
    """One subject."""

    title: str
    text: str = ""
    figures: tuple[Figure, ...] = ()
    tables: tuple[Table, ...] = ()
    notes: tuple[str, ...] = ()  # a list
    code: str = ""


@dataclass(frozen=True)
class Tile:
    """A figure to see first."""

    name: str
    value: str
    note: str = ""


@dataclass(frozen=True)
class Page:
    """About one model, or about several beside each other."""

    title: str
    text: str
    tiles: tuple[Tile, ...]
    sections: tuple[Section, ...]
