"""A scatter plot as SVG text: two logarithmic axes, labels beside the marks. Standard library."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from html import escape
from typing import NamedTuple

WIDTH, HEIGHT = 960, 620
LEFT, RIGHT, TOP, BOTTOM = 80, 40, 96, 64
TEXT, PITCH, GLYPH = 13, 16, 7.4
"""Height of text and of a line, and the width of one character, in pixels."""

MARK, NEAR = 6, 18
"""Radius of a mark, and the distance within which marks share a list of labels, in pixels."""


class Point(NamedTuple):
    """One mark. `kind` is a key of KINDS; `measured` ones are circles, others squares."""

    label: str
    x: float
    y: float
    kind: str
    measured: bool


KINDS = {"exposes": "#c77400", "leaks": "#c22f2f", "clean": "#1f6fb4"}
"""The colours, worst first."""


class Axis(NamedTuple):
    """A logarithmic axis from `low` to `high` (data), over pixels `start` to `end`."""

    low: float
    high: float
    start: float
    end: float

    def at(self, value: float) -> float:
        """Return the pixel of a value; what is off the axis lies at its end."""
        value = min(max(value, self.low), self.high)
        part = math.log(value / self.low) / math.log(self.high / self.low)
        return self.start + part * (self.end - self.start)

    def ticks(self) -> Iterator[float]:
        """Yield 1, 1.5, 2, 3, 5 and 7 times the powers of ten on the axis."""
        for power in range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1):
            for step in (1, 1.5, 2, 3, 5, 7):
                if self.low <= step * 10.0**power <= self.high:
                    yield step * 10.0**power


def axis(values: Sequence[float], start: float, end: float) -> Axis:
    """Return an axis with room around the positive `values`."""
    positive = [value for value in values if value > 0] or [1.0]
    return Axis(min(positive) / 1.5, max(positive) * 1.6, start, end)


class Box(NamedTuple):
    """A rectangle: left, top, right, bottom."""

    left: float
    top: float
    right: float
    bottom: float

    @property
    def area(self) -> float:
        """Its area."""
        return (self.right - self.left) * (self.bottom - self.top)

    @property
    def middle(self) -> float:
        """The y half-way down."""
        return (self.top + self.bottom) / 2

    def overlap(self, other: Box) -> float:
        """Return the area that two rectangles share."""
        width = min(self.right, other.right) - max(self.left, other.left)
        height = min(self.bottom, other.bottom) - max(self.top, other.top)
        return max(width, 0) * max(height, 0)


FRAME = Box(LEFT, TOP, WIDTH - RIGHT, HEIGHT - BOTTOM)


def clusters(marks: Sequence[tuple[float, float]]) -> list[list[int]]:
    """Return the indices of marks that lie on or beside each other, group by group."""
    groups: list[list[int]] = []
    for index in sorted(range(len(marks)), key=lambda i: marks[i]):
        for group in groups:
            if math.dist(marks[index], marks[group[0]]) < NEAR:
                group.append(index)
                break
        else:
            groups.append([index])
    return [sorted(group, key=lambda i: marks[i][1]) for group in groups]


def set_apart(marks: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Return marks of which none covers another: those that would are moved by a few pixels."""
    apart = [list(mark) for mark in marks]
    least = 2 * MARK + 1
    for _ in range(200):
        moved = False
        for i, one in enumerate(apart):
            for k, two in enumerate(apart[:i]):
                gap = math.dist(one, two)
                if gap >= least:
                    continue
                moved = True
                angle = math.atan2(one[1] - two[1], one[0] - two[0]) if gap else 2.4 * (i + 7 * k)
                push = (least - gap) / 2 + 0.1
                for mark, sign in ((one, 1), (two, -1)):
                    mark[0] += sign * push * math.cos(angle)
                    mark[1] += sign * push * math.sin(angle)
        if not moved:
            break
    return [(x, y) for x, y in apart]


def place_lists(
    marks: Sequence[tuple[float, float]], labels: Sequence[str], groups: Sequence[list[int]]
) -> list[Box]:
    """Return a box for the labels of each group: beside its marks, where it covers least."""
    taken = [Box(x - MARK, y - MARK, x + MARK, y + MARK) for x, y in marks]
    boxes: list[Box | None] = [None] * len(groups)
    for place in sorted(range(len(groups)), key=lambda g: -len(groups[g])):
        group = groups[place]
        width = max(GLYPH * len(labels[i]) for i in group)
        height = PITCH * len(group)
        left = min(marks[i][0] for i in group) - MARK
        right = max(marks[i][0] for i in group) + MARK
        middle = sum(marks[i][1] for i in group) / len(group)
        spots = [
            Box(start, middle + up - height / 2, start + width, middle + up + height / 2)
            for away in (6, 18, 30, 50, 70, 100, 140, 200)
            for up in (PITCH / 2 * step for step in range(-30, 31))
            for start in (right + away, left - away - width)
        ]

        def cost(spot: Box, middle: float = middle, left: float = left) -> float:
            outside = 1 - spot.overlap(FRAME) / spot.area
            covered = sum(spot.overlap(other) for other in taken)
            far = abs(spot.middle - middle) + max(spot.left - left, left - spot.right)
            return 100 * covered + 1e6 * outside + far

        best = min(spots, key=cost)
        taken.append(best)
        boxes[place] = best
    return [box for box in boxes if box]


def number(value: float) -> str:
    """Return a tick's label: ``500``, ``2k``."""
    return f"{value / 1000:g}k" if value >= 1000 else f"{value:g}"


def scatter(
    points: Sequence[Point],
    title: str,
    subtitle: str,
    axes: tuple[str, str],
    legend: dict[str, str],
) -> str:
    """Return an SVG document with one mark a point.

    Parameters
    ----------
    points : sequence of Point
        A zero lies at the end of its axis, which is logarithmic.
    axes : (str, str)
        What x and y are, with units.
    legend : dict of str to str
        A kind to what it means; also ``measured`` and ``computed``, circle and square.
    """
    horizontal = axis([p.x for p in points], FRAME.left, FRAME.right)
    vertical = axis([p.y for p in points], FRAME.bottom, FRAME.top)
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" '
        f'width="{WIDTH}" height="{HEIGHT}" font-family="DejaVu Sans, Verdana, sans-serif" '
        f'font-size="{TEXT - 1}" fill="#222">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#fff"/>',
        text(LEFT, 28, title, size=18, weight="bold"),
        text(LEFT, 48, subtitle, fill="#555"),
    ]
    out += frame(horizontal, vertical, axes)
    out += key(legend, {p.kind for p in points}, {p.measured for p in points})
    marks = set_apart([(horizontal.at(p.x), vertical.at(p.y)) for p in points])
    groups = clusters(marks)
    for group, box in zip(
        groups, place_lists(marks, [p.label for p in points], groups), strict=True
    ):
        out += labelled([points[i] for i in group], [marks[i] for i in group], box)
    return "\n".join([*out, "</svg>", ""])


def labelled(points: Sequence[Point], marks: Sequence[tuple[float, float]], box: Box) -> list[str]:
    """Return the marks of one group, and its labels in `box`, in the order of the marks."""
    x, y = marks[0]
    after = box.left > x
    edge = box.left - 3 if after else box.right + 3
    out = []
    if len(points) > 1 or abs(edge - x) > 2 * NEAR:
        out.append(line(x, y, edge, box.middle, "#aaa"))
        out.append(line(edge, box.top, edge, box.bottom, "#aaa"))
    out += [
        mark(*place, KINDS[point.kind], point.measured)
        for point, place in zip(points, marks, strict=True)
    ]
    for row, point in enumerate(points):
        out.append(
            text(
                box.left if after else box.right,
                box.top + PITCH * row + TEXT - 1,
                point.label,
                anchor="start" if after else "end",
                fill=KINDS[point.kind],
            )
        )
    return out


def frame(horizontal: Axis, vertical: Axis, axes: tuple[str, str]) -> list[str]:
    """Return grid, ticks and names of the axes."""
    out = []
    for tick in horizontal.ticks():
        x = horizontal.at(tick)
        out.append(line(x, FRAME.top, x, FRAME.bottom, "#e4e4e4"))
        out.append(text(x, FRAME.bottom + 18, number(tick), anchor="middle"))
    for tick in vertical.ticks():
        y = vertical.at(tick)
        out.append(line(FRAME.left, y, FRAME.right, y, "#e4e4e4"))
        out.append(text(FRAME.left - 8, y + 4, number(tick), anchor="end"))
    middle = (FRAME.top + FRAME.bottom) / 2
    out.append(text((FRAME.left + FRAME.right) / 2, HEIGHT - 18, axes[0], anchor="middle"))
    out.append(
        f'<g transform="translate(22 {middle}) rotate(-90)">'
        f"{text(0, 0, axes[1], anchor='middle')}</g>"
    )
    return out


def key(legend: dict[str, str], kinds: set[str], measured: set[bool]) -> list[str]:
    """Return the legend of what the plot has, in one line above it."""
    entries = [(kind, KINDS[kind], True) for kind in KINDS if kind in kinds]
    entries += [("measured", "#777", True)] if True in measured else []
    entries += [("computed", "#777", False)] if False in measured else []
    out, x = [], float(LEFT + MARK)
    for name, colour, circle in entries:
        out += [mark(x, 72, colour, circle), text(x + 12, 76, legend[name])]
        x += 34 + 6.3 * len(legend[name])
    return out


def mark(x: float, y: float, colour: str, circle: bool) -> str:
    """Return a circle or a square."""
    if circle:
        return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{MARK}" fill="{colour}" stroke="#fff"/>'
    side = 2 * MARK - 1
    return (
        f'<rect x="{x - side / 2:.1f}" y="{y - side / 2:.1f}" width="{side}" height="{side}" '
        f'fill="{colour}" stroke="#fff"/>'
    )


def line(x1: float, y1: float, x2: float, y2: float, colour: str) -> str:
    """Return a line."""
    return f'<path d="M{x1:.1f} {y1:.1f}L{x2:.1f} {y2:.1f}" stroke="{colour}"/>'


def text(
    x: float,
    y: float,
    words: str,
    *,
    anchor: str = "start",
    fill: str = "#222",
    size: int = TEXT - 1,
    weight: str = "normal",
) -> str:
    """Return a line of text; `y` is its baseline."""
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="{fill}" '
        f'font-size="{size}" font-weight="{weight}">{escape(words)}</text>'
    )
