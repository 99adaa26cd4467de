"""Charts as inline SVG, coloured by CSS classes so that they follow light and dark.

Not for choosing what to show: report.py and run_report.py do.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from m2encoder.eval.markup import Markup, element

WIDTH, HEIGHT = 440, 230
LEFT, RIGHT, TOP, BOTTOM = 46, 12, 10, 28
MAX_POINTS = 300
SMOOTH_FROM = 40
"""Points from which a line is drawn smoothed, with the raw values faint behind it."""


@dataclass(frozen=True)
class Line:
    """One curve."""

    label: str
    points: Sequence[tuple[float, float]]
    """(x, y) with x rising; points that are not finite are left out."""
    style: str
    """CSS class that gives its colour: `zh`, `en`, `total`, `other`, or a cause of waiting."""


class Mark(NamedTuple):
    """Something that happened at one x: a vertical line."""

    x: float
    label: str
    """Shown when the pointer rests on it."""
    style: str
    """CSS class: `resumed` or `bad`."""


class Frame(NamedTuple):
    """The part of the plane that a chart shows, in data units."""

    x_low: float
    x_high: float
    y_low: float
    y_high: float

    def place(self, x: float, y: float) -> tuple[float, float]:
        """Return where a point lies in the picture, in its units."""
        across = (x - self.x_low) / (self.x_high - self.x_low)
        up = (y - self.y_low) / (self.y_high - self.y_low)
        return (
            LEFT + across * (WIDTH - LEFT - RIGHT),
            HEIGHT - BOTTOM - up * (HEIGHT - TOP - BOTTOM),
        )


def line_chart(
    title: str,
    lines: Sequence[Line],
    *,
    y_text: Callable[[float], str] = lambda y: f"{y:g}",
    y_at_least: float | None = None,
    reference: tuple[str, float] | None = None,
    marks: Sequence[Mark] = (),
) -> Markup | None:
    """Return a figure with title, legend, axes and curves, or None if there is no point to show.

    y_text: how to write a value. The axis starts at 0 and reaches `y_at_least` or further.
    reference: a name and a value to mark with a dashed line, such as chance. marks: drawn where
    they lie within the curves.
    """
    lines = [Line(line.label, _thinned(line.points), line.style) for line in lines]
    lines = [line for line in lines if line.points]
    if not lines:
        return None
    frame = _frame(lines, y_at_least, reference)
    parts = [*_grid(frame, y_text), *_marks(frame, marks)]
    if reference is not None:
        (left, y), (right, _) = (
            frame.place(frame.x_low, reference[1]),
            frame.place(frame.x_high, reference[1]),
        )
        parts.append(element("path", class_="reference", d=f"M{left:.1f} {y:.1f}H{right:.1f}"))
    for line in lines:
        parts += _curve(line, frame)
    values = [(line, line.points[-1][1]) for line in lines]
    return _figure(title, parts, values, y_text, reference, said="At the end")


def stacked_chart(
    title: str,
    lines: Sequence[Line],
    *,
    y_text: Callable[[float], str] = lambda y: f"{y:g}",
    y_at_least: float | None = None,
    marks: Sequence[Mark] = (),
) -> Markup | None:
    """Return a figure of areas that lie on one another, the first lowest; None without a point.

    The lines have the same x. The legend says the mean of each.
    """
    lines = [Line(line.label, _thinned(line.points), line.style) for line in lines]
    if not lines or not lines[0].points:
        return None
    edges: list[list[tuple[float, float]]] = [[(x, 0.0) for x, _ in lines[0].points]]
    for line in lines:
        pairs = zip(edges[-1], line.points, strict=True)
        edges.append([(x, below + y) for (x, below), (_, y) in pairs])
    top = Line("", edges[-1], "")
    frame = _frame([top], y_at_least, None)
    parts = [*_grid(frame, y_text)]
    for line, below, above in zip(lines, edges, edges[1:], strict=False):
        outline = _path([*above, *reversed(below)], frame) + "Z"
        parts.append(element("path", class_=f"area {line.style}", d=outline))
    parts += _marks(frame, marks)
    values = [(line, sum(y for _, y in line.points) / len(line.points)) for line in lines]
    return _figure(title, parts, values, y_text, None, said="On average")


def _figure(
    title: str,
    parts: Sequence[Markup],
    values: Sequence[tuple[Line, float]],
    y_text: Callable[[float], str],
    reference: tuple[str, float] | None,
    *,
    said: str,
) -> Markup:
    told = ", ".join(f"{line.label} {y_text(value)}" for line, value in values)
    picture = element(
        "svg",
        parts,
        viewBox=f"0 0 {WIDTH} {HEIGHT}",
        role="img",
        aria_label=f"{title}. {said}: {told}.",
    )
    return element(
        "figure", element("figcaption", title), _legend(values, y_text, reference), picture
    )


def _legend(
    values: Sequence[tuple[Line, float]],
    y_text: Callable[[float], str],
    reference: tuple[str, float] | None,
) -> Markup:
    entries = [
        element(
            "li",
            element("i", class_=f"key {line.style}"),
            line.label,
            " ",
            element("b", y_text(value)),
        )
        for line, value in values
    ]
    if reference is not None:
        label, value = reference
        name = [element("i", class_="key dashed"), label, " ", element("b", y_text(value))]
        entries.append(element("li", name))
    return element("ul", entries, class_="legend")


def _thinned(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Leave out what is not finite, and average neighbours so that at most MAX_POINTS remain."""
    kept = [(x, y) for x, y in points if math.isfinite(x) and math.isfinite(y)]
    group = -(-len(kept) // MAX_POINTS)
    if group < 2:
        return kept
    groups = [kept[i : i + group] for i in range(0, len(kept), group)]
    return [(each[-1][0], sum(y for _, y in each) / len(each)) for each in groups]


def _frame(
    lines: Sequence[Line], y_at_least: float | None, reference: tuple[str, float] | None
) -> Frame:
    xs = [x for line in lines for x, _ in line.points]
    ys = [y for line in lines for _, y in line.points]
    ys += [reference[1]] if reference else []
    y_low, y_high = min(0.0, *ys), max(*ys, y_at_least or -math.inf)
    if y_high <= y_low:
        y_high = y_low + 1
    ticks = nice_ticks(y_low, y_high)
    return Frame(min(0.0, *xs), max(*xs, 1.0), min(y_low, ticks[0]), max(y_high, ticks[-1]))


def nice_ticks(low: float, high: float, *, about: int = 4) -> list[float]:
    """Return rising multiples of 1, 2 or 5 times a power of ten that enclose low to high."""
    power = 10 ** math.floor(math.log10((high - low) / about))
    step = next(n * power for n in (1, 2, 5, 10) if (high - low) / (n * power) <= about + 1e-9)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(n * step, 12) for n in range(first, last + 1)]


def _grid(frame: Frame, y_text: Callable[[float], str]) -> list[Markup]:
    parts = []
    for tick in nice_ticks(frame.y_low, frame.y_high):
        x, y = frame.place(frame.x_low, tick)
        style = "axis" if tick == 0 else "grid"
        parts.append(element("path", class_=style, d=f"M{x:.1f} {y:.1f}H{WIDTH - RIGHT}"))
        parts.append(element("text", y_text(tick), x=x - 7, y=f"{y + 4:.1f}", text_anchor="end"))
    for tick in nice_ticks(frame.x_low, frame.x_high):
        if tick > frame.x_high:
            continue
        x, y = frame.place(tick, frame.y_low)
        anchor = "end" if x > WIDTH - RIGHT - 15 else "middle"
        label = f"step {tick:,g}" if tick == 0 else f"{tick:,g}"
        anchor = "start" if tick == 0 else anchor
        parts.append(element("text", label, x=f"{x:.1f}", y=HEIGHT - 8, text_anchor=anchor))
    return parts


def _marks(frame: Frame, marks: Sequence[Mark]) -> list[Markup]:
    parts = []
    for mark in marks:
        if frame.x_low <= mark.x <= frame.x_high:
            x, _ = frame.place(mark.x, frame.y_low)
            line = element(
                "path",
                element("title", mark.label),
                class_=f"mark {mark.style}",
                d=f"M{x:.1f} {TOP}V{HEIGHT - BOTTOM}",
            )
            parts.append(line)
    return parts


def _curve(line: Line, frame: Frame) -> list[Markup]:
    if len(line.points) == 1:
        x, y = frame.place(*line.points[0])
        return [element("circle", class_=f"dot {line.style}", cx=f"{x:.1f}", cy=f"{y:.1f}", r=4)]
    if len(line.points) < SMOOTH_FROM:
        return [element("path", class_=f"curve {line.style}", d=_path(line.points, frame))]
    return [
        element("path", class_=f"curve raw {line.style}", d=_path(line.points, frame)),
        element("path", class_=f"curve {line.style}", d=_path(_smooth(line.points), frame)),
    ]


def _path(points: Sequence[tuple[float, float]], frame: Frame) -> str:
    places = (frame.place(x, y) for x, y in points)
    return "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in places)


def _smooth(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Average each value with its neighbours, fewer towards both ends so that ends stay true."""
    reach = max(1, len(points) // 40)
    smoothed = []
    for i, (x, _) in enumerate(points):
        near = min(reach, i, len(points) - 1 - i)
        ys = [y for _, y in points[i - near : i + near + 1]]
        smoothed.append((x, sum(ys) / len(ys)))
    return smoothed
