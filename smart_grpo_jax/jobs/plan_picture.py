"""Memory over the phases as a picture: what lies there, arguments and temporaries against the limit."""

from __future__ import annotations

import html
from collections.abc import Callable, Sequence

from smart_grpo_jax.jobs import report_style
from smart_grpo_jax.jobs.plan_numbers import Phase, Plan
from smart_grpo_jax.jobs.report_plot import ticks
from smart_grpo_jax.runtime.topologies import GIB

WIDTH, LEFT, RIGHT, TOP, BAR, GAP, FOOT = 720.0, 96.0, 24.0, 84.0, 34.0, 22.0, 44.0
STYLE = """
.plot text.title { font-weight:600; font-size:14px; fill:var(--ink); }
.plot .limit { stroke:var(--ink); stroke-width:1.5; stroke-dasharray:5 4; }
"""
PARTS = ("beside it", "arguments", "temporaries and results")


def svg(plan: Plan) -> str:
    """A file that stands alone, light and dark."""
    limit = plan.topology.chip.usable if plan.topology.chip else None
    high = max([limit or 0.0, *(p.total for p in plan.phases)]) / GIB * 1.04 or 1.0
    x = lambda size: LEFT + size / GIB / high * (WIDTH - LEFT - RIGHT)
    height = TOP + len(plan.phases) * (BAR + GAP) + FOOT
    foot = height - FOOT
    title = f"Memory of a device, {plan.topology.name}: {'fits' if plan.fits else 'does not fit'}"
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" class="plot" width="{WIDTH:g}" height="{height:g}" '
        f'viewBox="0 0 {WIDTH:g} {height:g}" role="img" aria-label="{html.escape(title)}">'
        f"<style>{report_style.PLOT}{STYLE}</style>"
        f'<rect class="ground" width="100%" height="100%" rx="10"/>'
        f'<text class="title" x="{LEFT:g}" y="24">{html.escape(title)}</text>{_key()}'
    ]
    for value in ticks(0.0, high, 6):
        if 0 <= value <= high:
            at = x(value * GIB)
            parts.append(f'<line class="grid" x1="{at:.1f}" x2="{at:.1f}" y1="{TOP:g}" y2="{foot:g}"/>')
            parts.append(f'<text x="{at:.1f}" y="{foot + 18:g}" text-anchor="middle">{value:g} GiB</text>')
    for i, one in enumerate(plan.phases):
        parts.append(_bar(one, TOP + GAP / 2 + i * (BAR + GAP), x))
    if limit is not None:
        at = x(limit)
        parts.append(f'<line class="limit" x1="{at:.1f}" x2="{at:.1f}" y1="{TOP - 4:g}" y2="{foot:g}"/>')
        said = f"usable {limit / GIB:.2f}"
        parts.append(f'<text class="key" x="{at:.1f}" y="{TOP - 9:g}" text-anchor="end">{said}</text>')
    return "".join(parts) + "</svg>\n"


def stacked(one: Phase) -> Sequence[float]:
    """Bytes of each part: together they are the phase's total."""
    arguments = min(one.found.get("argument_bytes", 0.0), one.found.get("peak_bytes", 0.0))
    return one.beside, arguments, one.found.get("peak_bytes", 0.0) - arguments


def _key() -> str:
    shown, at = [], LEFT
    for color, name in enumerate(PARTS):
        shown.append(
            f'<rect class="fill{color}" x="{at:g}" y="40" width="12" height="12" rx="2"/>'
            f'<text class="key" x="{at + 18:g}" y="51">{name}</text>'
        )
        at += 44 + 7 * len(name)
    return "".join(shown)


def _bar(one: Phase, y: float, x: Callable[[float], float]) -> str:
    begin, shown = 0.0, [f'<text class="key" x="{LEFT - 10:g}" y="{y + BAR / 2 + 4:.1f}" '
                         f'text-anchor="end">{html.escape(one.name)}</text>']  # fmt: skip
    for color, (name, size) in enumerate(zip(PARTS, stacked(one), strict=True)):
        if size > 0:
            left, right = x(begin), x(begin + size)
            told = f"{one.name}, {name}: {size / GIB:.2f} GiB"
            shown.append(
                f'<rect class="fill{color}" x="{left:.1f}" y="{y:.1f}" width="{right - left:.1f}" '
                f'height="{BAR:g}"><title>{html.escape(told)}</title></rect>'
            )
        begin += size
    said = f"{one.total / GIB:.1f}" if one.total else one.verdict
    shown.append(f'<text class="value" x="{x(begin) + 6:.1f}" y="{y + BAR / 2 + 4:.1f}">{said}</text>')
    return "".join(shown)
