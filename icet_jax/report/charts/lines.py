"""Line charts: series over exits, relative depth or training steps."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from icet_jax.report.charts.marks import Box, Dot, Drawing, Label, Layer, Mark, Number, Path

LEFT, RIGHT, TOP, BOTTOM = 46, 14, 16, 24
_MOST_MARKERS, _MOST_TOOLTIPS = 40, 250


@dataclass(frozen=True)
class Point:
    """One measured point; `low`..`high` is drawn as a band or a whisker where both are known, `ring` points it out."""

    x: Number
    y: float
    low: float | None = None
    high: float | None = None
    ring: bool = False


@dataclass(frozen=True)
class Line:
    """A series.

    Attributes:
      label: its name in tooltips.
      tone: its colour and dash, a name of `marks.TONES`.
      points: ascending in x.
      thin: True for a single seed behind a mean: no markers, no band, not in tooltips.
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
      highlights: exit -> "default" or "planted", for exits to point out.
      y_limits: no axis label lies outside them (a share never leaves 0..1).
      whiskers: True draws intervals as bars and no line through the points; zero is then an axis.
    """

    title: str
    lines: Sequence[Line]
    show: Callable[[float], str]
    detail: Callable[[float], str] | None = None
    x_name: str = "exit"
    show_x: Callable[[Number], str] = str
    tip: Callable[[Number], str] | None = None
    ticks: Sequence[Number] = ()
    y_range: tuple[float, float] | None = None
    y_limits: tuple[float, float] = (-math.inf, math.inf)
    highlights: dict[int, str] = field(default_factory=dict)
    whiskers: bool = False

    @property
    def is_empty(self) -> bool:
        """True where there is no point to draw."""
        return not any(line.points for line in self.lines)


def nice_ticks(low: Number, high: Number, count: int = 4) -> list[float]:
    """About `count` round steps that cover low..high (both finite)."""
    if high - low <= 1e-9 * max(abs(low), abs(high)):  # one value, or several that differ by rounding only
        high = low + (abs(low) or 1.0)
    raw = (high - low) / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= raw * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [float(f"{index * step:.12g}") for index in range(first, last + 1)]


def line_drawing(chart: Chart, width: int, height: int) -> Drawing:
    """The chart laid out in `width` x `height` pixels. It must have a point (see `Chart.is_empty`)."""
    points = [point for line in chart.lines for point in line.points]
    levels = _levels(chart, points)
    ticks = list(chart.ticks) or _step_ticks([p.x for p in points])
    pad = {"exit": 0.4, "depth": 0.04}.get(chart.x_name, 0.0)
    left, right = min(*ticks, *(p.x for p in points)) - pad, max(*ticks, *(p.x for p in points)) + pad
    frame = _Frame(width, height, left, right if right > left else left + 1, levels[0], levels[-1])
    lines = sorted(chart.lines, key=lambda line: not line.thin)
    layers = [
        Layer("axes", _axes(frame, chart, levels, ticks)),
        *(Layer("series", _series(frame, line, chart.whiskers), line.tone) for line in lines if line.points),
        Layer("hits", _hits(frame, chart)),
    ]
    return Drawing(width, height, chart.title, layers)


@dataclass(frozen=True)
class _Frame:
    """Maps data to pixels."""

    width: int
    height: int
    x_low: Number
    x_high: Number
    y_low: float
    y_high: float

    @property
    def right(self) -> int:
        return self.width - RIGHT

    @property
    def bottom(self) -> int:
        return self.height - BOTTOM

    def x(self, value: Number) -> float:
        share = (value - self.x_low) / (self.x_high - self.x_low)
        return round(LEFT + share * (self.right - LEFT), 1)

    def y(self, value: float) -> float:
        share = (value - self.y_low) / (self.y_high - self.y_low)
        return round(self.bottom - share * (self.bottom - TOP), 1)


def _levels(chart: Chart, points: Sequence[Point]) -> list[float]:
    """Where the horizontal grid lines lie."""
    values = [value for p in points for value in (p.y, p.low, p.high) if value is not None]
    low, high = chart.y_range or (values[0], values[0])
    if chart.whiskers:
        values.append(0.0)
    levels = nice_ticks(min(low, *values), max(high, *values))
    inside = [level for level in levels if chart.y_limits[0] <= level <= chart.y_limits[1]]
    return inside if len(inside) > 1 else levels


def _step_ticks(values: Sequence[Number]) -> list[int]:
    """Whole-number ticks within the data, for an axis of training steps."""
    inside = [tick for tick in nice_ticks(min(values), max(values), 5) if min(values) <= tick <= max(values)]
    return sorted({int(tick) for tick in inside if tick == int(tick)}) or [int(values[0])]


def _axes(frame: _Frame, chart: Chart, levels: Sequence[float], ticks: Sequence[Number]) -> list[Mark]:
    """Grid, labels and the highlighted exits."""
    marks: list[Mark] = []
    for exit_layer, name in chart.highlights.items():
        x = frame.x(exit_layer)
        if name == "default":
            marks.append(Path(((x, TOP), (x, frame.bottom)), "mark-default"))
            marks.append(Label(x, TOP - 5, "default", "middle", "mark-text"))
        else:
            half = max(6.0, (frame.x(1) - frame.x(0)) * 0.4)
            marks.append(Box(x - half, TOP, 2 * half, frame.bottom - TOP, "mark-planted"))
    for level in levels:
        y = frame.y(level)
        style = "zero-line" if level == 0 and frame.y_low < 0 else "grid-line"
        marks.append(Path(((LEFT, y), (frame.right, y)), style))
        marks.append(Label(LEFT - 7, y + 4, chart.show(level), "end"))
    room = max(1, math.ceil(len(ticks) * 22 / (frame.right - LEFT)))
    anchor = next((tick for tick, name in chart.highlights.items() if name == "default"), ticks[0])
    for tick in ticks:
        if chart.x_name != "exit" or (tick - anchor) % room == 0:
            style = f"tick-{chart.highlights[int(tick)]}" if tick in chart.highlights else "label"
            marks.append(Label(frame.x(tick), frame.bottom + 16, chart.show_x(tick), "middle", style))
    return [*marks, Label(LEFT - 7, frame.bottom + 16, chart.x_name, "end")]


def _series(frame: _Frame, line: Line, whiskers: bool) -> list[Mark]:
    """One series: band, path, markers."""
    places = [(frame.x(p.x), frame.y(p.y)) for p in line.points]
    if line.thin:
        return [Path(places, "thin")]
    intervals = [
        (frame.x(p.x), frame.y(p.low), frame.y(p.high)) for p in line.points if p.low is not None and p.high is not None
    ]
    marks: list[Mark] = []
    if whiskers:
        marks += [Path(((x, low), (x, high)), "whisker") for x, low, high in intervals]
    else:
        if len(intervals) > 1:
            upper = [(x, high) for x, _, high in intervals]
            lower = [(x, low) for x, low, _ in reversed(intervals)]
            marks.append(Path([*upper, *lower], "band", closed=True))
        marks.append(Path(places, "stroke"))
    if len(places) <= _MOST_MARKERS:
        marks += [Dot(x, y, 3.4 if whiskers else 3) for x, y in places]
    rings = [place for place, point in zip(places, line.points, strict=True) if point.ring]
    return [*marks, *(Dot(x, y, 6.5, "ring") for x, y in rings)]


def _hits(frame: _Frame, chart: Chart) -> list[Mark]:
    """Invisible columns that carry each x's numbers for the page's tooltip (and as a native `<title>` without it)."""
    detail = chart.detail or chart.show
    rows: dict[Number, list[str]] = {}
    for line in chart.lines:
        for point in line.points if not line.thin else ():
            text = f"{line.label}: {detail(point.y)}" if line.label else detail(point.y)
            if point.low is not None and point.high is not None:
                text += f" ({detail(point.low)} to {detail(point.high)})"
            rows.setdefault(point.x, []).append(text)
    if len(rows) > _MOST_TOOLTIPS:
        return []
    xs = sorted(rows)
    marks: list[Mark] = []
    for index, x in enumerate(xs):
        left = LEFT if index == 0 else (frame.x(xs[index - 1]) + frame.x(x)) / 2
        right = frame.right if index == len(xs) - 1 else (frame.x(x) + frame.x(xs[index + 1])) / 2
        name = chart.highlights.get(int(x), "") if chart.x_name == "exit" else ""
        head = f"{chart.x_name} {x:g}" + (f" ({name})" if name else "")
        tip = "\n".join([head, *rows[x]]) if chart.tip is None else chart.tip(x)
        place = (chart.x_name, f"{x:g}")
        marks.append(Box(left, TOP, max(right - left, 1), frame.bottom - TOP, "hit", tip, place))
    return marks
