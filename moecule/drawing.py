"""Charts as inline SVG, without a library: heat maps, lines, and points with a Pareto front.

Colours are CSS classes, so that a page decides them for light and dark. Every chart has a title and a
description; a table that says the same is the caller's.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 400.0, 250.0  # of lines and points
LEFT, RIGHT, TOP, BOTTOM = 58.0, 14.0, 12.0, 44.0  # margins
MAP_WIDTH = 880  # that the cells of a heat map take at most, where they can
LABEL = 28  # left of a heat map
FIT = 5  # characters that a cell has room for
MARKS = 24  # points of a line that are marked each
LETTER = 6.6  # width of a character of a point's name


@dataclass(frozen=True)
class Named:
    """What a chart is called, and what it shows, for those who cannot see it; `key` is unique."""

    key: str
    title: str
    text: str


@dataclass(frozen=True)
class Line:
    """Points that belong together; `mark` tells it from others without colour."""

    name: str
    style: str  # CSS class
    points: Sequence[tuple[float, float]]
    mark: str = "circle"  # or square


@dataclass(frozen=True)
class Point:
    """A thing among others."""

    name: str
    x: float
    y: float
    style: str = "a"


def heat_map(
    named: Named,
    rows: Mapping[int, Sequence[float | None]],
    edges: Sequence[float],
    written: Mapping[int, Sequence[str]] | None = None,
) -> str:
    """A cell for every number: class k0 below the first edge, k1 from there, ...; None is `gone`.

    A row is a layer, and its key stands left of it. One path holds all cells of a class. `written`:
    in the cells, where they are wide enough and it is no power of ten.
    """
    n = max(map(len, rows.values()))
    wide = min(37, max(7, MAP_WIDTH // n))
    high = 22 if len(rows) <= 16 else 13
    paths: dict[str, list[str]] = {}
    for y, values in enumerate(rows.values()):
        classes = ["gone" if v is None else f"k{bisect_right(edges, v)}" for v in values]
        x = 0
        while x < len(classes):
            end = x
            while end < len(classes) and classes[end] == classes[x]:
                end += 1
            run = end - x
            paths.setdefault(classes[x], []).append(f"M{x} {y}h{run}v1H{x}z")
            x = end
    size = (LABEL + wide * n + 2, high * len(rows) + 34)
    grid = "".join(f"M{x} 0V{len(rows)}" for x in range(1, n)) if wide >= 6 else ""
    grid += "".join(f"M0 {y}H{n}" for y in range(1, len(rows)))
    body = [f'<g transform="translate({LABEL} 2) scale({wide} {high})">']
    body += [f'<path class="{c}" d="{"".join(d)}"/>' for c, d in sorted(paths.items())]
    body.append(f'<path class="mesh" d="{grid}"/></g>')
    step = max(1, math.ceil(13 / high))
    for y, layer in enumerate(rows):
        if y % step == 0:
            at = 2 + high * (y + 0.5) + 4
            body.append(
                f'<text class="tick" x="{LABEL - 6}" y="{at:g}" text-anchor="end">{layer}</text>'
            )
    every = next(s for s in (1, 2, 4, 8, 16, 32, 64, 128) if s * wide >= 22)
    below = 2 + high * len(rows) + 14
    for x in range(0, n, every):
        at = LABEL + wide * (x + 0.5)
        body.append(f'<text class="tick" x="{at:g}" y="{below:g}" text-anchor="middle">{x}</text>')
    middle = LABEL + wide * n / 2
    body.append(
        f'<text class="tick" x="{middle:g}" y="{below + 16:g}" text-anchor="middle">expert</text>'
    )
    if written is not None and wide >= 20:
        for y, (layer, values) in enumerate(rows.items()):
            body += [
                f'<text class="in k{0 if v is None else bisect_right(edges, v)}t" '
                f'x="{LABEL + wide * (x + 0.5):g}" y="{2 + high * (y + 0.5) + 4:g}">{escape(text)}</text>'
                for x, (v, text) in enumerate(zip(values, written[layer], strict=True))
                if len(text) <= FIT and "e-" not in text
            ]
    return _svg(named, size, body, "map")


def lines(named: Named, of: Sequence[Line], x_name: str, y_name: str) -> str:
    """Lines over whole numbers; the vertical axis begins at 0 where nothing is below it."""
    xs = [x for one in of for x, _ in one.points]
    ys = [y for one in of for _, y in one.points]
    frame = _Frame.around(min(xs), max(xs), min(0.0, *ys), max(ys))
    whole = sorted({round(x) for x in _ticks(frame.x0, frame.x1, 8)} & {round(x) for x in xs})
    body = frame.axes(x_name, y_name, [(x, f"{x:d}") for x in whole])
    for one in of:
        at = [(frame.x(x), frame.y(y)) for x, y in one.points]
        path = "L".join(f"{x:.1f} {y:.1f}" for x, y in at)
        body.append(f'<path class="line {one.style}" d="M{path}"/>')
        body += [_mark(one.mark, x, y, one.style) for x, y in at if len(at) <= MARKS]
    return _svg(named, (WIDTH, HEIGHT), body, "chart")


def points(
    named: Named,
    of: Sequence[Point],
    x_name: str,
    y_name: str,
    *,
    more_is_better: bool = False,
) -> str:
    """Points by name and the line through those that no other beats in both: less loss, and less x."""
    xs, ys = [p.x for p in of], [p.y for p in of]
    frame = _Frame.around(min(0.0, *xs), max(xs), min(0.0, *ys), max(ys), room=0.06)
    ticks = [(x, f"{x:g}") for x in _ticks(frame.x0, frame.x1, 6)]
    body = frame.axes(x_name, y_name, ticks)
    best = front(of, more_is_better=more_is_better)
    path = "L".join(f"{frame.x(p.x):.1f} {frame.y(p.y):.1f}" for p in best)
    if len(best) > 1:
        body.append(f'<path class="line front" d="M{path}"/>')
    taken = [(frame.x(p.x) - 5, frame.y(p.y) - 5, frame.x(p.x) + 5, frame.y(p.y) + 5) for p in of]
    for p in sorted(of, key=lambda p: p not in best):
        x, y = frame.x(p.x), frame.y(p.y)
        style = "front" if p in best else "a"
        body.append(_mark("circle", x, y, style if p.style == "a" else p.style, 4.5))
        text, box = _place(p.name, x, y, taken, style)
        taken.append(box)
        body.append(text)
    return _svg(named, (WIDTH, HEIGHT + 30), body, "chart")


def front(of: Sequence[Point], *, more_is_better: bool = False) -> list[Point]:
    """Those that no other beats in both, by x. Less y is better, and less x but for `more_is_better`."""
    sign = -1 if more_is_better else 1
    best: list[Point] = []
    for p in sorted(of, key=lambda p: (sign * p.x, p.y)):
        if not best or p.y < best[-1].y:
            best.append(p)
    return sorted(best, key=lambda p: p.x)


Box = tuple[float, float, float, float]


def _place(name: str, x: float, y: float, taken: Sequence[Box], style: str) -> tuple[str, Box]:
    """A name beside its point, where it covers least."""
    width = LETTER * len(name)
    tries: list[tuple[float, float, str]] = []
    for far in (0.0, 12.0, 24.0):
        tries += [
            (x + 8, y + 4 + far, "start"), (x + 8, y + 4 - far, "start"),
            (x - 8, y + 4 + far, "end"), (x - 8, y + 4 - far, "end"),
            (x, y - 9 - far, "middle"), (x, y + 17 + far, "middle"),
        ]  # fmt: skip
    boxes = []
    for at, (tx, ty, anchor) in enumerate(tries):
        left = tx - {"start": 0.0, "end": width, "middle": width / 2}[anchor]
        box = (left, ty - 10, left + width, ty + 2)
        cost = sum(_overlap(box, other) for other in taken) + 0.5 * at
        out = max(0.0, LEFT - box[0]) + max(0.0, box[2] - WIDTH) + max(0.0, TOP - 8 - box[1])
        boxes.append((cost + 40 * out, at, box))
    _, at, box = min(boxes)
    tx, ty, anchor = tries[at]
    at_place = f'x="{tx:.1f}" y="{ty:.1f}" text-anchor="{anchor}"'
    return f'<text class="name {style}" {at_place}>{escape(name)}</text>', box


def _overlap(a: Box, b: Box) -> float:
    return max(0.0, min(a[2], b[2]) - max(a[0], b[0])) * max(0.0, min(a[3], b[3]) - max(a[1], b[1]))


def _mark(mark: str, x: float, y: float, style: str, size: float = 3.5) -> str:
    if mark == "square":
        side = 2 * size - 0.6
        return (
            f'<rect class="mark {style}" x="{x - side / 2:.1f}" y="{y - side / 2:.1f}" '
            f'width="{side:.1f}" height="{side:.1f}"/>'
        )
    return f'<circle class="mark {style}" cx="{x:.1f}" cy="{y:.1f}" r="{size:g}"/>'


@dataclass(frozen=True)
class _Frame:
    """From numbers to places."""

    x0: float
    x1: float
    y0: float
    y1: float
    high: float = HEIGHT

    @staticmethod
    def around(x0: float, x1: float, y0: float, y1: float, room: float = 0.0) -> _Frame:
        x1 = x1 if x1 > x0 else x0 + 1
        y1 = y1 if y1 > y0 else y0 + 1
        high = HEIGHT + 30 if room else HEIGHT
        return _Frame(x0, x1 + room * (x1 - x0), y0, y1 + 0.08 * (y1 - y0), high)

    def x(self, value: float) -> float:
        return LEFT + (value - self.x0) / (self.x1 - self.x0) * (WIDTH - LEFT - RIGHT)

    def y(self, value: float) -> float:
        return (
            self.high
            - BOTTOM
            - (value - self.y0) / (self.y1 - self.y0) * (self.high - TOP - BOTTOM)
        )

    def axes(self, x_name: str, y_name: str, ticks: Sequence[tuple[float, str]]) -> list[str]:
        body, base = [], self.high - BOTTOM
        for y in _ticks(self.y0, self.y1, 5):
            at = self.y(y)
            body.append(f'<path class="grid" d="M{LEFT} {at:.1f}H{WIDTH - RIGHT}"/>')
            body.append(
                f'<text class="tick" x="{LEFT - 7}" y="{at + 4:.1f}" text-anchor="end">{y:g}</text>'
            )
        for x, text in ticks:
            body.append(
                f'<text class="tick" x="{self.x(x):.1f}" y="{base + 16}" text-anchor="middle">{text}</text>'
            )
        body.append(f'<path class="axis" d="M{LEFT} {base}H{WIDTH - RIGHT}"/>')
        body.append(
            f'<text class="tick" x="{(LEFT + WIDTH - RIGHT) / 2}" y="{self.high - 8}" '
            f'text-anchor="middle">{escape(x_name)}</text>'
        )
        half = (TOP + base) / 2
        body.append(
            f'<text class="tick" transform="translate(12 {half:.0f}) rotate(-90)" '
            f'text-anchor="middle">{escape(y_name)}</text>'
        )
        return body


def _ticks(low: float, high: float, most: int) -> list[float]:
    """Round numbers from `low` to `high`, `most` or fewer."""
    raw = (high - low) / most
    unit = 10 ** math.floor(math.log10(raw))
    step = next(m * unit for m in (1, 2, 2.5, 5, 10) if m * unit >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [
        float(f"{k * step:.6g}")
        for k in range(first, first + most + 2)
        if k * step <= high * 1.0001
    ]


def _svg(named: Named, size: tuple[float, float], body: Sequence[str], style: str) -> str:
    wide, high = size
    return (
        f'<svg class="{style}" xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {wide:g} {high:g}" '
        f'width="{wide:g}" height="{high:g}" role="img" aria-labelledby="{named.key}-t {named.key}-d">'
        f'<title id="{named.key}-t">{escape(named.title)}</title>'
        f'<desc id="{named.key}-d">{escape(named.text)}</desc>{"".join(body)}</svg>'
    )
