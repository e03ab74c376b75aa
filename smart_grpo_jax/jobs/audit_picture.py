"""The audit as a picture: fidelity and leverage over the time of the sampler, the window shaded in both."""

from __future__ import annotations

import html
from collections.abc import Callable, Sequence

import numpy as np

from smart_grpo_jax.jobs import report_style
from smart_grpo_jax.jobs.audit_numbers import Interval, Step
from smart_grpo_jax.jobs.audit_report import Audit
from smart_grpo_jax.jobs.report_plot import BOTTOM, LEFT, RIGHT, Frame, number, ticks

PANEL, HEIGHT, TOP = 430.0, 350.0, 84.0
STYLE = """
.plot text.title { font-weight:600; font-size:14px; fill:var(--ink); }
.plot .shade { fill:var(--c2); opacity:.13; }
.plot text.window { fill:var(--c2); font-weight:600; }
"""


def svg(found: Audit) -> str:
    """A file that stands alone, light and dark."""
    left = panel(found, "Fidelity: does the one-step decode tell?", _fidelity, 0)
    right = panel(found, "Leverage: what is there to decide?", _leverage, 1)
    size = f'width="{2 * PANEL:g}" height="{HEIGHT:g}" viewBox="0 0 {2 * PANEL:g} {HEIGHT:g}"'
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" class="plot" {size} role="img" '
        f'aria-label="Fidelity and leverage of the search reward, step by step">'
        f"<style>{report_style.PLOT}{STYLE}</style>"
        f'<rect class="ground" width="100%" height="100%" rx="10"/>'
        f'<g>{left}</g><g transform="translate({PANEL:g} 0)">{right}</g></svg>\n'
    )


def panel(found: Audit, title: str, draw: Callable[[Frame, Sequence[Step]], str], side: int) -> str:
    """One plot: noise is at its left, as the sampler goes."""
    values = _values(found.steps, side)
    low, high = min(0.0, *values), max(0.0, *values)
    air = 0.05 * (high - low)
    scale = [v for v in ticks(low, high, 5) if low - air <= v <= high + air]
    times = (found.steps[0].t + 0.03, found.steps[-1].t_next - 0.02)
    frame = Frame(PANEL, HEIGHT, TOP, times, (low - air, high + air))
    heading = f'<text class="title" x="{LEFT}" y="22">{html.escape(title)}</text>'
    return "".join((heading, _shade(frame, found), _axes(frame, scale), draw(frame, found.steps)))


def _values(steps: Sequence[Step], side: int) -> list[float]:
    """All numbers that a panel shows."""
    every = [v for s in steps for v in (s.gain if side else s.fidelity)]
    every += [v for s in steps for v in (s.spread, s.expected)] if side else [1.0]
    return [float(v) for v in every if np.isfinite(v)] or [0.0, 1.0]


def _shade(frame: Frame, found: Audit) -> str:
    """The recommended steps, each from half way to its neighbours."""
    if not found.recommended:
        return ""
    t = [s.t for s in found.steps]
    first, last = found.recommended[0], found.recommended[-1]
    begin = (t[first] + t[first - 1]) / 2 if first else frame.x_range[0]
    end = (t[last] + found.steps[last].t_next) / 2
    left, right = frame.x(begin), frame.x(end)
    steps = f"step {first}" if first == last else f"steps {first}–{last}"
    return (
        f'<rect class="shade" x="{left:.1f}" y="{frame.top:.1f}" width="{right - left:.1f}" '
        f'height="{frame.height - BOTTOM - frame.top:.1f}"/>'
        f'<text class="window" x="{(left + right) / 2:.1f}" y="{frame.top - 6:.1f}" '
        f'text-anchor="middle">{steps}</text>'
    )


def _axes(frame: Frame, scale: Sequence[float]) -> str:
    gap = scale[1] - scale[0]
    left, right, foot = LEFT, frame.width - RIGHT, frame.height - BOTTOM
    parts = []
    for value in scale:
        y, kind = frame.y(value), "axis" if abs(value) < gap / 1e6 else "grid"
        parts.append(f'<line class="{kind}" x1="{left}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{left - 7}" y="{y + 4:.1f}" text-anchor="end">{number(value, gap)}</text>')
    for t in np.linspace(1.0, 0.0, 6):
        if frame.x_range[0] >= t >= frame.x_range[1]:
            parts.append(
                f'<text x="{frame.x(t):.1f}" y="{foot + 17:.1f}" text-anchor="middle">{t:.1f}</text>'
            )
    middle = (left + right) / 2
    parts.append(
        f'<text x="{middle:.1f}" y="{frame.height - 6:.1f}" text-anchor="middle">'
        "noise → time t of the step → image</text>"
    )
    return "".join(parts)


def _fidelity(frame: Frame, steps: Sequence[Step]) -> str:
    said = "rank correlation with the finished image, 95 %"
    return _key(0, 0, 0, said) + _line(frame, steps, [s.fidelity for s in steps], 0, said)


def _leverage(frame: Frame, steps: Sequence[Step]) -> str:
    gain, wide, product = (
        "gain of the finished image when searched, 95 %",
        "spread of the candidates",
        "fidelity of the candidates × spread",
    )
    plain = lambda values: [Interval(v, float("nan"), float("nan")) for v in values]
    return (
        _key(0, 0, 1, gain)
        + _key(0, 1, 3, wide)
        + _key(194, 1, 0, "× their fidelity")
        + _line(frame, steps, plain(s.spread for s in steps), 3, wide)
        + _line(frame, steps, plain(s.expected for s in steps), 0, product)
        + _line(frame, steps, [s.gain for s in steps], 1, gain)
    )


def _key(offset: float, line: int, color: int, said: str) -> str:
    x, y = LEFT + offset, 40 + 18 * line
    return (
        f'<line class="line line{color}" x1="{x:g}" x2="{x + 18:g}" y1="{y - 4}" y2="{y - 4}"/>'
        f'<text class="key" x="{x + 24:g}" y="{y}">{html.escape(said)}</text>'
    )


def _line(frame: Frame, steps: Sequence[Step], values: Sequence[Interval], color: int, said: str) -> str:
    """Points with their intervals as bars, joined by a line; steps without a number are left out."""
    known = [(s, v) for s, v in zip(steps, values, strict=True) if np.isfinite(v.value)]
    joined = " ".join(f"{frame.x(s.t):.1f},{frame.y(v.value):.1f}" for s, v in known)
    parts = [f'<polyline class="line line{color}" points="{joined}"/>']
    for step, v in known:
        x = frame.x(step.t)
        if np.isfinite(v.low):
            ends = f'y1="{frame.y(v.low):.1f}" y2="{frame.y(v.high):.1f}"'
            parts.append(f'<line class="line{color}" stroke-width="1.5" x1="{x:.1f}" x2="{x:.1f}" {ends}/>')
        told = f"step {step.step}, t = {step.t:.2f}: {said} {v.words()}"
        parts.append(
            f'<circle class="fill{color}" cx="{x:.1f}" cy="{frame.y(v.value):.1f}" r="3.5">'
            f"<title>{html.escape(told)}</title></circle>"
        )
    return "".join(parts)
