"""Line and bar plots as SVG text: no library, no script, colours from the style sheet of the page."""

from __future__ import annotations

import dataclasses
import html
import math
from collections.abc import Callable, Sequence

TOP, LEFT, RIGHT, BOTTOM = 10, 58, 16, 40
LEGEND_ROW = 20
LETTER = 6.4
"""Mean width of a letter at the plot's font size of 12: where a legend breaks its line."""
MOST_MARKS = 120
"""Points of a line that answer the pointer."""


@dataclasses.dataclass(frozen=True)
class Line:
    """One line: points, an optional band (low, high) around them, dots where each point was measured."""

    label: str
    x: Sequence[float]
    y: Sequence[float]
    band: tuple[Sequence[float], Sequence[float]] | None = None
    dots: bool = False


@dataclasses.dataclass(frozen=True)
class Frame:
    """The box of a plot: data ranges to pixels."""

    width: float
    height: float
    top: float
    x_range: tuple[float, float]
    y_range: tuple[float, float]

    def x(self, value: float) -> float:
        """Pixels from the left."""
        low, high = self.x_range
        return LEFT + (value - low) / (high - low) * (self.width - LEFT - RIGHT)

    def y(self, value: float) -> float:
        """Pixels from the top."""
        low, high = self.y_range
        return self.height - BOTTOM - (value - low) / (high - low) * (self.height - BOTTOM - self.top)


def ticks(low: float, high: float, count: int = 5, whole: bool = False) -> list[float]:
    """About `count` round numbers (1, 2 or 5 times a power of ten apart) that enclose [low, high].

    `whole` keeps them at least 1 apart, for epochs.
    """
    if not high > low:
        pad = abs(low) * 0.1 or 0.5
        low, high = low - pad, high + pad
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= rough * 0.999)
    step = max(step, 1.0) if whole else step
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [i * step for i in range(first, max(last, first + 1) + 1)]


def number(value: float, step: float | None = None) -> str:
    """A value for a reader: 1.2M, 350k, 0.25, 3e-7; `step` gives the decimals of a tick."""
    if value == 0 or (step is not None and abs(value) < step / 1e6):
        return "0"
    size = abs(value) if step is None else max(abs(value), 10 * step)
    for unit, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e4, "k")):
        if size >= unit:
            scale = 1e3 if letter == "k" else unit
            return f"{value / scale:.3g}{letter}"
    if size < 1e-3:
        return f"{value:.2g}".replace("e-0", "e-")
    decimals = 3 if step is None else max(0, -math.floor(math.log10(step) + 1e-9))
    text = f"{value:.{decimals}f}"
    return text if step is not None or float(text) != int(value) else f"{int(value)}"


def lines(
    series: Sequence[Line],
    *,
    title: str,
    x_label: str = "epoch",
    y_label: str = "",
    width: float = 400,
    height: float = 250,
    zero: bool = False,
) -> str:
    """The plot as an `<svg>`; series without points are left out. `zero` puts 0 on the y axis."""
    drawn = [(i, line) for i, line in enumerate(series) if len(line.x)]
    if not drawn:
        raise ValueError(f"{title}: nothing to draw")
    xs = [x for _, line in drawn for x in line.x]
    ys = [y for _, line in drawn for y in line.y]
    ys += [y for _, line in drawn if line.band for side in line.band for y in side]
    ys += [0.0] if zero else []
    legend, rows = _legend([(i, line.label) for i, line in drawn], width)
    count = max(3, int((width - LEFT) // 75))
    x_ticks = ticks(min(xs), max(xs), count, whole=x_label == "epoch")
    y_ticks = ticks(min(ys), max(ys), 4)
    x_range = (min(xs), max(xs)) if max(xs) > min(xs) else (x_ticks[0], x_ticks[-1])
    frame = Frame(width, height, TOP + LEGEND_ROW * rows, x_range, (y_ticks[0], y_ticks[-1]))
    body = [_grid(frame, y_ticks, y_label), _x_axis(frame, x_ticks, x_label), legend]
    for i, line in drawn:
        body += [_band(frame, i, line), _path(frame, i, line)]
    body += [_marks(frame, i, line, x_label) for i, line in drawn]
    return _svg(width, height, title, body)


def bars(
    names: Sequence[str],
    values: Sequence[float],
    *,
    title: str,
    x_label: str = "",
    y_label: str = "",
    width: float = 400,
    height: float = 250,
) -> str:
    """One bar per name, from 0; the value stands at its end."""
    y_ticks = ticks(min(0.0, *values), max(0.0, *values), 4)
    frame = Frame(width, height, TOP + 8, (0.0, float(len(names))), (y_ticks[0], y_ticks[-1]))
    body = [_grid(frame, y_ticks, y_label)]
    for i, (name, value) in enumerate(zip(names, values, strict=True)):
        middle = frame.x(i + 0.5)
        wide = min(46.0, 0.62 * (frame.x(1) - frame.x(0)))
        top, low = frame.y(max(value, 0.0)), frame.y(min(value, 0.0))
        above = top - 5 if value >= 0 else low + 14
        body.append(
            f'<rect class="fill0" x="{middle - wide / 2:.1f}" y="{top:.1f}" width="{wide:.1f}" '
            f'height="{max(low - top, 0.5):.1f}" rx="2"><title>{_text(name)}: {number(value)}</title></rect>'
            f'<text class="value" x="{middle:.1f}" y="{above:.1f}" text-anchor="middle">{value:+.3f}</text>'
            f'<text x="{middle:.1f}" y="{height - BOTTOM + 16:.1f}" text-anchor="middle">{_text(name)}</text>'
        )
    zero = frame.y(0.0)
    body.append(f'<line class="axis" x1="{LEFT}" x2="{width - RIGHT}" y1="{zero:.1f}" y2="{zero:.1f}"/>')
    body.append(_label_below(frame, x_label))
    return _svg(width, height, title, body)


def _svg(width: float, height: float, title: str, body: Sequence[str]) -> str:
    return (
        f'<svg class="plot" viewBox="0 0 {width:g} {height:g}" role="img" aria-label="{_text(title)}">'
        + "".join(body)
        + "</svg>"
    )


def _text(value: str) -> str:
    return html.escape(value, quote=True)


def _grid(frame: Frame, values: Sequence[float], label: str) -> str:
    step = values[1] - values[0]
    left, right = LEFT, frame.width - RIGHT
    parts = []
    for value in values:
        y = frame.y(value)
        kind = "axis" if abs(value) < step / 1e6 else "grid"
        parts.append(f'<line class="{kind}" x1="{left}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{left - 7}" y="{y + 4:.1f}" text-anchor="end">{number(value, step)}</text>')
    if label:
        middle = (frame.top + frame.height - BOTTOM) / 2
        parts.append(
            f'<text text-anchor="middle" transform="translate(12 {middle:.1f}) rotate(-90)">'
            f"{_text(label)}</text>"
        )
    return "".join(parts)


def _x_axis(frame: Frame, values: Sequence[float], label: str) -> str:
    step = values[1] - values[0]
    y = frame.height - BOTTOM
    low, high = frame.x_range
    inside = [v for v in values if low - 1e-9 * step <= v <= high + 1e-9 * step]
    parts = [
        f'<line class="axis" x1="{frame.x(v):.1f}" x2="{frame.x(v):.1f}" y1="{y:.1f}" y2="{y + 4:.1f}"/>'
        f'<text x="{frame.x(v):.1f}" y="{y + 17:.1f}" text-anchor="middle">{number(v, step)}</text>'
        for v in inside
    ]
    return "".join(parts) + _label_below(frame, label)


def _label_below(frame: Frame, label: str) -> str:
    middle = (LEFT + frame.width - RIGHT) / 2
    at = f'x="{middle:.1f}" y="{frame.height - 6:.1f}"'
    return f'<text {at} text-anchor="middle">{_text(label)}</text>'


def _legend(labels: Sequence[tuple[int, str]], width: float) -> tuple[str, int]:
    """The legend above the plot, and how many lines it takes."""
    parts, x, row = [], float(LEFT), 0
    for i, label in labels:
        wide = 24 + LETTER * len(label) + 18
        if x > LEFT and x + wide > width:
            x, row = float(LEFT), row + 1
        y = TOP + LEGEND_ROW * row + 4
        parts.append(
            f'<line class="line line{i}" x1="{x:.1f}" x2="{x + 18:.1f}" y1="{y}" y2="{y}"/>'
            f'<text class="key" x="{x + 24:.1f}" y="{y + 4}">{_text(label)}</text>'
        )
        x += wide
    return "".join(parts), row + 1


def _points(frame: Frame, xs: Sequence[float], ys: Sequence[float]) -> str:
    return " ".join(f"{frame.x(x):.1f},{frame.y(y):.1f}" for x, y in zip(xs, ys, strict=True))


def _band(frame: Frame, i: int, line: Line) -> str:
    if line.band is None:
        return ""
    low, high = line.band
    there = _points(frame, line.x, high)
    back = _points(frame, list(line.x)[::-1], list(low)[::-1])
    return f'<polygon class="band band{i}" points="{there} {back}"/>'


def _path(frame: Frame, i: int, line: Line) -> str:
    return f'<polyline class="line line{i}" points="{_points(frame, line.x, line.y)}"/>'


def _marks(frame: Frame, i: int, line: Line, x_label: str) -> str:
    """A dot where `dots` asks for one or nothing else would be seen; an invisible target with the numbers."""
    every = max(1, math.ceil(len(line.x) / MOST_MARKS))
    visible = line.dots or len(line.x) == 1
    dot: Callable[[str], str] = lambda at: f'<circle class="fill{i}" {at} r="3"/>' if visible else ""
    parts = []
    for k in range(0, len(line.x), every):
        at = f'cx="{frame.x(line.x[k]):.1f}" cy="{frame.y(line.y[k]):.1f}"'
        said = f"{line.label}: {number(line.y[k])} at {x_label} {number(line.x[k])}"
        parts.append(f'{dot(at)}<circle class="target" {at} r="7"><title>{_text(said)}</title></circle>')
    return "".join(parts)
