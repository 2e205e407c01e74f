"""Line charts as inline SVG: no script needed to read them, colours from the page's style sheet."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from icet_jax.report.text import escape


@dataclass(frozen=True)
class Point:
    """One measured point; `low`..`high` is drawn as a band or a whisker where both are known, `ring` points it out."""

    x: float | int
    y: float
    low: float | None = None
    high: float | None = None
    ring: bool = False


@dataclass(frozen=True)
class Line:
    """A series.

    Attributes:
      label: its name in tooltips.
      tone: a CSS class that colours it: "before", "after", "plain", "run-K".
      points: ascending in x.
      thin: a single seed behind a mean: no markers, no band, not in tooltips.
    """

    label: str
    tone: str
    points: Sequence[Point]
    thin: bool = False


@dataclass(frozen=True)
class Chart:
    """What to draw.

    Attributes:
      title: for screen readers.
      lines: the series.
      show: number -> text, for the axis.
      detail: number -> text, for tooltips; `show` where None.
      x_name: "exit", "step" or "depth" (an exit's number over how many there are).
      show_x: x -> text, for the axis.
      tip: x -> text of the tooltip there; made of the points at x where None.
      ticks: x positions to label; chosen from the data where empty.
      y_range: (low, high) that is shown at least.
      marks: x -> class ("default", "planted") of exits to point out.
      y_limits: no axis label lies outside them (a share never leaves 0..1).
      whiskers: True draws intervals as bars and no line through the points; zero is then an axis.
    """

    title: str
    lines: Sequence[Line]
    show: Callable[[float], str]
    detail: Callable[[float], str] | None = None
    x_name: str = "exit"
    show_x: Callable[[float | int], str] = str
    tip: Callable[[float | int], str] | None = None
    ticks: Sequence[float | int] = ()
    y_range: tuple[float, float] | None = None
    y_limits: tuple[float, float] = (-math.inf, math.inf)
    marks: dict[int, str] = field(default_factory=dict)
    whiskers: bool = False


LEFT, RIGHT, TOP, BOTTOM = 46, 14, 16, 24


def nice_ticks(low: float | int, high: float | int, count: int = 4) -> list[float]:
    """About `count` round steps that cover low..high (both finite)."""
    if high - low <= 1e-9 * max(abs(low), abs(high)):  # one value, or several that differ by rounding only
        high = low + (abs(low) or 1.0)
    raw = (high - low) / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= raw * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [float(f"{index * step:.12g}") for index in range(first, last + 1)]


def svg_chart(chart: Chart, width: int, height: int) -> str:
    """The chart as an `<svg>` element of that view box (user units = CSS pixels at full size)."""
    points = [point for line in chart.lines for point in line.points]
    values = [value for p in points for value in (p.y, p.low, p.high) if value is not None]
    if not points:
        return ""
    low, high = chart.y_range or (values[0], values[0])
    if chart.whiskers:
        values.append(0.0)
    levels = nice_ticks(min(low, *values), max(high, *values))
    inside = [level for level in levels if chart.y_limits[0] <= level <= chart.y_limits[1]]
    levels = inside if len(inside) > 1 else levels
    ticks = list(chart.ticks) or _step_ticks([p.x for p in points])
    pad = {"exit": 0.4, "depth": 0.04}.get(chart.x_name, 0.0)
    left, right = min(*ticks, *(p.x for p in points)) - pad, max(*ticks, *(p.x for p in points)) + pad
    frame = _Frame(width, height, left, right if right > left else left + 1, levels[0], levels[-1])
    parts = [
        f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{escape(chart.title)}">',
        _axes(frame, chart, levels, ticks),
        *(_line(frame, line, chart.whiskers) for line in sorted(chart.lines, key=lambda line: not line.thin)),
        _hits(frame, chart),
        "</svg>",
    ]
    return "".join(parts)


@dataclass(frozen=True)
class _Frame:
    """Maps data to the view box."""

    width: int
    height: int
    x_low: float | int
    x_high: float | int
    y_low: float
    y_high: float

    def x(self, value: float | int) -> float:
        share = (value - self.x_low) / (self.x_high - self.x_low)
        return round(LEFT + share * (self.width - LEFT - RIGHT), 1)

    def y(self, value: float) -> float:
        share = (value - self.y_low) / (self.y_high - self.y_low)
        return round(self.height - BOTTOM - share * (self.height - TOP - BOTTOM), 1)


def _step_ticks(values: Sequence[float | int]) -> list[int]:
    """Whole-number ticks within the data, for an axis of training steps."""
    inside = [tick for tick in nice_ticks(min(values), max(values), 5) if min(values) <= tick <= max(values)]
    return sorted({int(tick) for tick in inside if tick == int(tick)}) or [int(values[0])]


def _axes(frame: _Frame, chart: Chart, levels: Sequence[float], ticks: Sequence[float | int]) -> str:
    """Grid, labels and the marked exits."""
    bottom, right = frame.height - BOTTOM, frame.width - RIGHT
    parts = []
    for exit_layer, mark in chart.marks.items():
        x = frame.x(exit_layer)
        if mark == "default":
            parts.append(f'<line class="mark-default" x1="{x}" x2="{x}" y1="{TOP}" y2="{bottom}"/>')
            parts.append(f'<text class="mark-text" x="{x}" y="{TOP - 5}" text-anchor="middle">default</text>')
        else:
            half = max(6.0, (frame.x(1) - frame.x(0)) * 0.4)
            parts.append(
                f'<rect class="mark-planted" x="{x - half:.1f}" y="{TOP}" width="{2 * half:.1f}" '
                f'height="{bottom - TOP}"/>'
            )
    for level in levels:
        y = frame.y(level)
        zero = ' class="zero"' if level == 0 and frame.y_low < 0 else ' class="grid"'
        parts.append(f'<line{zero} x1="{LEFT}" x2="{right}" y1="{y}" y2="{y}"/>')
        parts.append(f'<text x="{LEFT - 7}" y="{y + 4}" text-anchor="end">{escape(chart.show(level))}</text>')
    room = max(1, math.ceil(len(ticks) * 22 / (right - LEFT)))
    anchor = next((tick for tick, mark in chart.marks.items() if mark == "default"), ticks[0])
    for tick in ticks:
        if chart.x_name != "exit" or (tick - anchor) % room == 0:
            weight = f' class="tick-{chart.marks[int(tick)]}"' if tick in chart.marks else ""
            name = escape(chart.show_x(tick))
            parts.append(f'<text{weight} x="{frame.x(tick)}" y="{bottom + 16}" text-anchor="middle">{name}</text>')
    parts.append(f'<text x="{LEFT - 7}" y="{bottom + 16}" text-anchor="end">{escape(chart.x_name)}</text>')
    return f'<g class="axes">{"".join(parts)}</g>'


def _line(frame: _Frame, line: Line, whiskers: bool) -> str:
    """One series: band, path, markers."""
    at = [(frame.x(p.x), frame.y(p.y)) for p in line.points]
    path = "M" + "L".join(f"{x} {y}" for x, y in at)
    if line.thin:
        return f'<path class="thin {line.tone}" d="{path}"/>'
    ranged = [
        (frame.x(p.x), frame.y(p.low), frame.y(p.high)) for p in line.points if p.low is not None and p.high is not None
    ]
    parts = []
    if whiskers:
        parts += [f'<line class="whisker" x1="{x}" x2="{x}" y1="{low}" y2="{high}"/>' for x, low, high in ranged]
    else:
        if len(ranged) > 1:
            upper = "L".join(f"{x} {high}" for x, _, high in ranged)
            lower = "L".join(f"{x} {low}" for x, low, _ in reversed(ranged))
            parts.append(f'<path class="band" d="M{upper}L{lower}Z"/>')
        parts.append(f'<path class="stroke" d="{path}"/>')
    if len(at) <= 40:
        parts += [f'<circle cx="{x}" cy="{y}" r="{3.4 if whiskers else 3}"/>' for x, y in at]
    rings = [place for place, point in zip(at, line.points, strict=True) if point.ring]
    parts += [f'<circle class="ring" cx="{x}" cy="{y}" r="6.5"/>' for x, y in rings]
    return f'<g class="series {line.tone}">{"".join(parts)}</g>'


def _hits(frame: _Frame, chart: Chart) -> str:
    """Invisible columns that carry each x's numbers for the page's tooltip (and as a native `<title>` without it)."""
    detail = chart.detail or chart.show
    rows: dict[float | int, list[str]] = {}
    for line in chart.lines:
        for point in line.points if not line.thin else ():
            text = f"{line.label}: {detail(point.y)}" if line.label else detail(point.y)
            if point.low is not None and point.high is not None:
                text += f" ({detail(point.low)} to {detail(point.high)})"
            rows.setdefault(point.x, []).append(text)
    if len(rows) > 250:
        return ""
    xs = sorted(rows)
    parts = []
    for index, x in enumerate(xs):
        left = LEFT if index == 0 else (frame.x(xs[index - 1]) + frame.x(x)) / 2
        right = frame.width - RIGHT if index == len(xs) - 1 else (frame.x(x) + frame.x(xs[index + 1])) / 2
        mark = chart.marks.get(int(x), "") if chart.x_name == "exit" else ""
        head = f"{chart.x_name} {x:g}" + (f" ({mark})" if mark else "")
        text = escape("\n".join([head, *rows[x]]) if chart.tip is None else chart.tip(x))
        parts.append(
            f'<rect data-{chart.x_name}="{x:g}" x="{left:.1f}" y="{TOP}" width="{max(right - left, 1):.1f}" '
            f'height="{frame.height - TOP - BOTTOM}"><title>{text}</title></rect>'
        )
    return f'<g class="hits">{"".join(parts)}</g>'
