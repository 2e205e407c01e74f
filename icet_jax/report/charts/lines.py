"""Draws line charts: series over exits, relative depth or training steps."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from icet_jax.report.charts.marks import Box, Dot, Drawing, Label, Layer, Mark, Number, Path

LEFT, RIGHT, TOP, BOTTOM = 46, 14, 16, 24
_MOST_MARKERS, _MOST_TOOLTIPS = 40, 250
_MOST_COVERED, _MOST_COVERED_ONE_SIDED = 0.3, 0.1  # shares of the plot's height
_BAR_GAP = 3  # pixels from a series' bars to those of the next series
_REFERENCE_END = 4  # half the height in pixels of the bars at the ends of a published mean
_LABEL_WIDTH = 22  # pixels that the label of an exit needs


@dataclass(frozen=True)
class Point:
    """Holds one measured point. Its interval is drawn if `low` and `high` are known, and a circle if `ring` is set."""

    x: Number
    y: float
    low: float | None = None
    high: float | None = None
    ring: bool = False


@dataclass(frozen=True)
class Series:
    """Holds the points of one line of a chart.

    Attributes:
      label: name in tooltips.
      tone: name in `marks.TONES` that gives colour and dash.
      points: points in ascending order of x.
      thin: whether only a thin line is drawn (without markers, band and tooltips), as for a single seed.
      gap: largest distance in x of two points that the line joins, so that it does not cross unmeasured exits.
    """

    label: str
    tone: str
    points: Sequence[Point]
    thin: bool = False
    gap: Number = math.inf

    @property
    def pieces(self) -> list[list[Point]]:
        """The points in runs that a line joins."""
        pieces: list[list[Point]] = []
        for point in self.points:
            if not pieces or point.x - pieces[-1][-1].x > self.gap * (1 + 1e-9):
                pieces.append([])
            pieces[-1].append(point)
        return pieces


@dataclass(frozen=True)
class Reference:
    """Holds a published mean over the exits `first` to `last`, which a chart shows as a horizontal mark.

    `label` names its source in tooltips, and `tone` is the name in `marks.TONES` of the phase that it belongs to.
    """

    label: str
    tone: str
    first: int
    last: int
    y: float


@dataclass(frozen=True)
class Chart:
    """Describes a line chart.

    Attributes:
      title: text for screen readers.
      series: the lines.
      show: turns a value into text for the vertical axis.
      detail: turns a value into text for tooltips; None means `show`.
      x_name: "exit", "step" or "depth" (number of an exit divided by the number of exits).
      show_x: turns an x position into text for the horizontal axis.
      tip: turns an x position into the text of its tooltip; None means that the tooltip lists the points at x.
      ticks: x positions with a label; if empty, they follow from the points.
      min_y_range: (low, high) that the vertical axis covers at least; None means that it follows from the points.
      highlights: exits to emphasise, each with "default" or "planted".
      max_y_range: (low, high) that the vertical axis never exceeds, such as (0, 1) for a share.
      whiskers: whether intervals are drawn as bars, without a line through the points and with an axis at zero. Other
        charts have bands, and thin bars where bands would cover `_MOST_COVERED` of the plot, or blocks above zeros (or
        below ones) `_MOST_COVERED_ONE_SIDED` of it.
      references: published values beside the measured ones.
    """

    title: str
    series: Sequence[Series]
    show: Callable[[float], str]
    detail: Callable[[float], str] | None = None
    x_name: str = "exit"
    show_x: Callable[[Number], str] = str
    tip: Callable[[Number], str] | None = None
    ticks: Sequence[Number] = ()
    min_y_range: tuple[float, float] | None = None
    max_y_range: tuple[float, float] = (-math.inf, math.inf)
    highlights: dict[int, str] = field(default_factory=dict)
    whiskers: bool = False
    references: Sequence[Reference] = ()

    @property
    def is_empty(self) -> bool:
        """Whether there is no point to draw."""
        return not any(series.points for series in self.series)


def nice_ticks(low: Number, high: Number, count: int = 4) -> list[float]:
    """Returns about `count` equally spaced round numbers that cover low..high (both finite)."""
    if high - low <= 1e-9 * max(abs(low), abs(high)):  # one value, or several that differ by rounding only
        high = low + (abs(low) or 1.0)
    raw = (high - low) / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= raw * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [float(f"{index * step:.12g}") for index in range(first, last + 1)]


def line_drawing(chart: Chart, width: int, height: int) -> Drawing:
    """Returns the chart laid out in `width` x `height` pixels. It must not be empty (`Chart.is_empty`)."""
    points = [point for series in chart.series for point in series.points]
    levels = _levels(chart, points)
    ticks = list(chart.ticks) or _step_ticks([p.x for p in points])
    pad = {"exit": 0.4, "depth": 0.04}.get(chart.x_name, 0.0)
    left, right = min(*ticks, *(p.x for p in points)) - pad, max(*ticks, *(p.x for p in points)) + pad
    frame = _Frame(width, height, left, right if right > left else left + 1, levels[0], levels[-1])
    look = "whiskers" if chart.whiskers else "bars" if _has_wide_intervals(frame, chart) else "band"
    shown = [series for series in chart.series if series.points]
    thick = [series for series in shown if not series.thin]
    # Bars of several series stand beside each other.
    shifts = {id(series): _BAR_GAP * (index - (len(thick) - 1) / 2) for index, series in enumerate(thick)}
    thin_first = sorted(shown, key=lambda series: not series.thin)
    layers = [
        Layer("axes", _axes(frame, chart, levels, ticks)),
        *(Layer("series", _series_marks(frame, s, look, shifts.get(id(s), 0.0)), s.tone) for s in thin_first),
        *(Layer("series", _reference_marks(frame, reference), reference.tone) for reference in chart.references),
        Layer("hits", _tooltip_areas(frame, chart)),
    ]
    return Drawing(width, height, chart.title, layers)


@dataclass(frozen=True)
class _Frame:
    """Converts values to pixels of a drawing of `width` x `height` pixels.

    `x_low`, `x_high`, `y_low` and `y_high` are the values at the edges of the plot.
    """

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
    """Returns the values of the horizontal grid lines, in ascending order."""
    values = [value for p in points for value in (p.y, p.low, p.high) if value is not None]
    values += [reference.y for reference in chart.references]
    low, high = chart.min_y_range or (values[0], values[0])
    if chart.whiskers:
        values.append(0.0)
    levels = nice_ticks(min(low, *values), max(high, *values))
    inside = [level for level in levels if chart.max_y_range[0] <= level <= chart.max_y_range[1]]
    return inside if len(inside) > 1 else levels


def _step_ticks(values: Sequence[Number]) -> list[int]:
    """Returns whole numbers within the range of `values`, for the labels of an axis of training steps."""
    inside = [tick for tick in nice_ticks(min(values), max(values), 5) if min(values) <= tick <= max(values)]
    return sorted({int(tick) for tick in inside if tick == int(tick)}) or [int(values[0])]


def _axes(frame: _Frame, chart: Chart, levels: Sequence[float], ticks: Sequence[Number]) -> list[Mark]:
    """Returns the marks behind the series: grid, labels and highlighted exits."""
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
    # Every `spacing`-th exit is labelled, counted from the default one.
    spacing = max(1, math.ceil(len(ticks) * _LABEL_WIDTH / (frame.right - LEFT)))
    anchor = next((tick for tick, name in chart.highlights.items() if name == "default"), ticks[0])
    for tick in ticks:
        if chart.x_name != "exit" or (tick - anchor) % spacing == 0:
            style = f"tick-{chart.highlights[int(tick)]}" if tick in chart.highlights else "label"
            marks.append(Label(frame.x(tick), frame.bottom + 16, chart.show_x(tick), "middle", style))
    return [*marks, Label(LEFT - 7, frame.bottom + 16, chart.x_name, "end")]


def _has_wide_intervals(frame: _Frame, chart: Chart) -> bool:
    """Returns whether the intervals of a series are so wide that its band would cover much of the plot.

    Where a rare event was not seen, the interval begins at its point and the band is a block: less of it is too much.
    """
    for series in chart.series:
        intervals = [(p.y, p.low, p.high) for p in series.points if p.low is not None and p.high is not None]
        heights = [frame.y(low) - frame.y(high) for _, low, high in intervals]
        one_sided = [height for height, (y, low, high) in zip(heights, intervals, strict=True) if y in (low, high)]
        for covered, most in ((heights, _MOST_COVERED), (one_sided, _MOST_COVERED_ONE_SIDED)):
            if covered and sum(covered) / len(intervals) > most * (frame.bottom - TOP):
                return True
    return False


def _series_marks(frame: _Frame, series: Series, look: str, shift: float) -> list[Mark]:
    """Returns the marks of one series: intervals ("band", "bars" or "whiskers", as `look` says), line and markers.

    `shift` is the distance in pixels of bars from their points.
    """
    if series.thin:
        return [Path(_positions(frame, piece), "thin") for piece in series.pieces if len(piece) > 1]
    marks: list[Mark] = []
    for piece in series.pieces:
        marks += _intervals(frame, piece, look, shift)
        if look != "whiskers" and (len(piece) > 1 or len(series.points) == 1):
            marks.append(Path(_positions(frame, piece), "stroke"))
    positions = _positions(frame, series.points)
    if len(positions) <= _MOST_MARKERS:
        marks += [Dot(x, y, 3.4 if look == "whiskers" else 3) for x, y in positions]
    rings = [position for position, point in zip(positions, series.points, strict=True) if point.ring]
    return [*marks, *(Dot(x, y, 6.5, "ring") for x, y in rings)]


def _reference_marks(frame: _Frame, reference: Reference) -> list[Mark]:
    """Returns the mark of a published mean: a line over its exits with a short bar at both ends."""
    left, right, y = frame.x(reference.first - 0.35), frame.x(reference.last + 0.35), frame.y(reference.y)
    ends = [Path(((x, y - _REFERENCE_END), (x, y + _REFERENCE_END)), "reference-end") for x in (left, right)]
    return [Path(((left, y), (right, y)), "reference"), *ends]


def _positions(frame: _Frame, points: Sequence[Point]) -> list[tuple[float, float]]:
    return [(frame.x(point.x), frame.y(point.y)) for point in points]


def _intervals(frame: _Frame, points: Sequence[Point], look: str, shift: float) -> list[Mark]:
    """Returns the intervals of points that a line joins; for `look` and `shift` see `_series_marks`."""
    intervals = [
        (frame.x(p.x), frame.y(p.low), frame.y(p.high)) for p in points if p.low is not None and p.high is not None
    ]
    if look == "band" and len(intervals) > 1:
        upper = [(x, high) for x, _, high in intervals]
        lower = [(x, low) for x, low, _ in reversed(intervals)]
        return [Path([*upper, *lower], "band", closed=True)]
    if look == "whiskers":
        return [Path(((x, low), (x, high)), "whisker") for x, low, high in intervals]
    return [Path(((x + shift, low), (x + shift, high)), "error-bar") for x, low, high in intervals]


def _tooltip_areas(frame: _Frame, chart: Chart) -> list[Mark]:
    """Returns an invisible box for each x, which shows the values at that x when the mouse is over it.

    The page's script shows the text. Without the script the browser does, because it is in a `<title>` element.
    """
    detail = chart.detail or chart.show
    rows: dict[Number, list[str]] = {}
    for series in chart.series:
        for point in series.points if not series.thin else ():
            text = f"{series.label}: {detail(point.y)}" if series.label else detail(point.y)
            if point.low is not None and point.high is not None:
                text += f" ({detail(point.low)} to {detail(point.high)})"
            rows.setdefault(point.x, []).append(text)
    for reference in chart.references:
        for x in rows:
            if reference.first <= x <= reference.last:
                exits = f"mean of exits {reference.first} to {reference.last}"
                rows[x].append(f"{reference.label}, {reference.tone}: {detail(reference.y)} ({exits})")
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
