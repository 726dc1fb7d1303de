"""Small charts as SVG text, coloured by the page's variables, so they follow its light or dark theme."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT, LEFT, BOTTOM, TOP = 520, 240, 52, 34, 10
COLORS = 6
POINTS = 400
"""The most points of a line: more cannot be seen."""

LABELLED = 12
"""If there are more points, their names show on hovering only."""


@dataclass(frozen=True)
class Line:
    """A named line, or a point if it has one place only; `color` is one of the page's, by number."""

    name: str
    xs: Sequence[float]
    ys: Sequence[float]
    color: int = 0


def line_chart(lines: Sequence[Line], x_title: str) -> str:
    """Return lines over a common x-axis; y is logarithmic if the largest is over twenty times the smallest.

    Args:
        lines: The lines; NaN and infinity are left out.
        x_title: Title of the x-axis.
    """
    drawn = [_thinned(line) for line in lines if line.ys]
    if not drawn:
        return ""
    frame = _Frame.around(drawn)
    return _svg(frame, x_title, [_path(frame, line) for line in drawn])


def _path(frame: _Frame, line: Line) -> str:
    if len(line.xs) == 1:
        x, y = frame.x(line.xs[0]), frame.y(line.ys[0])
        return f'<circle class="dot c{line.color}" cx="{x:.1f}" cy="{y:.1f}" r="4">{_hover(line)}</circle>'
    return f'<polyline class="line c{line.color}" points="{frame.points(line)}">{_hover(line)}</polyline>'


def scatter_chart(points: Sequence[Line], x_title: str) -> str:
    """Return named points; see `line_chart`."""
    drawn = [point for point in points if point.ys]
    if not drawn:
        return ""
    frame = _Frame.around(drawn)
    dots = []
    for point in drawn:
        x, y = frame.x(point.xs[0]), frame.y(point.ys[0])
        dots.append(
            f'<circle class="dot c{point.color}" cx="{x:.1f}" cy="{y:.1f}" r="5">{_hover(point)}</circle>'
        )
        anchor, shift = ("end", -8) if x > WIDTH * 0.7 else ("start", 8)
        label = f'<text class="label" x="{x + shift:.1f}" y="{y + 4:.1f}" text-anchor="{anchor}">'
        dots.append(f"{label}{escape(point.name)}</text>" if len(drawn) <= LABELLED else "")
    return _svg(frame, x_title, dots)


@dataclass(frozen=True)
class _Frame:
    x_from: float
    x_to: float
    y_from: float
    y_to: float
    is_log: bool

    @classmethod
    def around(cls, lines: Sequence[Line]) -> _Frame:
        xs, ys = [x for line in lines for x in line.xs], [y for line in lines for y in line.ys]
        is_log = min(ys) > 0 and max(ys) > 20 * min(ys)
        low, high = (math.log10(min(ys)), math.log10(max(ys))) if is_log else (min(ys), max(ys))
        room = 0.05 * (high - low) or abs(high) * 0.05 or 1.0
        gap = 0.04 * (max(xs) - min(xs)) or abs(max(xs)) * 0.04 or 1.0
        single = all(len(line.xs) == 1 for line in lines)
        return cls(min(xs) - gap * single, max(xs) + gap * single, low - room, high + room, is_log)

    def x(self, value: float) -> float:
        return LEFT + (value - self.x_from) / max(self.x_to - self.x_from, 1e-12) * (WIDTH - LEFT - 12)

    def y(self, value: float) -> float:
        place = math.log10(value) if self.is_log else value
        return TOP + (self.y_to - place) / (self.y_to - self.y_from) * (HEIGHT - TOP - BOTTOM)

    def points(self, line: Line) -> str:
        return " ".join(f"{self.x(x):.1f},{self.y(y):.1f}" for x, y in zip(line.xs, line.ys, strict=True))


def _svg(frame: _Frame, x_title: str, marks: Sequence[str]) -> str:
    parts = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img">']
    for value in (log_ticks if frame.is_log else ticks)(frame.y_from, frame.y_to):
        y = frame.y(value)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - 12}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text class="tick" x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{value:g}</text>')
    for value in ticks(frame.x_from, frame.x_to):
        x = frame.x(value)
        parts.append(
            f'<text class="tick" x="{x:.1f}" y="{HEIGHT - 18}" text-anchor="middle">{value:g}</text>'
        )
    title = (
        f'<text class="tick" x="{WIDTH / 2}" y="{HEIGHT - 3}" text-anchor="middle">{escape(x_title)}</text>'
    )
    return "".join([*parts, title, *marks, "</svg>"])


def ticks(low: float, high: float) -> list[float]:
    """Return three to eight round numbers within a range.

    Args:
        low: Its start.
        high: Its end.
    """
    step = 10.0 ** math.floor(math.log10((high - low) / 4))
    step *= next((factor for factor in (5, 2) if (high - low) / (factor * step) >= 3), 1)
    first, last = math.ceil(low / step), math.floor(high / step)
    return [float(f"{place * step:.10g}") for place in range(first, last + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Return 1, 2 and 5 times the powers of ten within a range, or the powers alone if it is wide.

    Args:
        low: The logarithm of its start, to the base 10.
        high: The logarithm of its end.
    """
    factors = (1, 2, 5) if high - low < 3 else (1,)
    powers = range(math.floor(low), math.ceil(high) + 1)
    marks = [float(f"{factor}e{power}") for power in powers for factor in factors]
    return [mark for mark in marks if low <= math.log10(mark) <= high]


def _hover(line: Line) -> str:
    return f"<title>{escape(line.name)}</title>"


def _thinned(line: Line) -> Line:
    pairs = [(x, y) for x, y in zip(line.xs, line.ys, strict=True) if math.isfinite(y)]
    stride = -(-len(pairs) // POINTS) or 1
    kept = pairs[::stride]
    if pairs and kept[-1] != pairs[-1]:
        kept.append(pairs[-1])
    return Line(line.name, [x for x, _ in kept], [y for _, y in kept], line.color)
