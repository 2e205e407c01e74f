"""Draws scatter charts: a point per method with intervals in both directions, and the Pareto front."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from icet_jax.report.charts.lines import nice_ticks
from icet_jax.report.charts.marks import Box, Dot, Drawing, Label, Layer, Mark, Number, Path

_LEFT, _RIGHT, _TOP, _BOTTOM = 46, 18, 30, 44
_RADIUS, _LETTER, _LINE, _HIT = 4, 5.9, 13, 18  # pixels: of a dot, a letter's width, a line's height, a tooltip's area
_SHARES = (0.0, 0.01, 0.05, 0.1, 0.25, 0.5, 1.0)


@dataclass(frozen=True)
class Spot:
    """Holds a point of a scatter chart; an interval is drawn where both of its ends are known.

    Attributes:
      label: name beside the point.
      tone: name in `marks.TONES`.
      x, y: its position; y is a share, 0 to 1.
      x_range, y_range: intervals (low, high).
      tip: text of its tooltip.
    """

    label: str
    tone: str
    x: float
    y: float
    x_range: tuple[float, float] | None = None
    y_range: tuple[float, float] | None = None
    tip: str = ""


@dataclass(frozen=True)
class Scatter:
    """Describes a scatter chart in which low values are good in both directions.

    The vertical axis is a share on a square-root scale, which keeps small shares apart.

    Attributes:
      title: text for screen readers.
      spots: the points; at least one.
      front: corners of the line through the points that no other point beats, in ascending order of x.
      x_title, y_title: titles of the axes.
      show_x, show_y: turn a value into text for an axis.
    """

    title: str
    spots: Sequence[Spot]
    front: Sequence[tuple[float, float]]
    x_title: str
    y_title: str
    show_x: Callable[[float], str]
    show_y: Callable[[float], str]


def scatter_drawing(chart: Scatter, width: int, height: int) -> Drawing:
    """Returns the chart laid out in `width` x `height` pixels."""
    xs = [x for spot in chart.spots for x in (spot.x, *(spot.x_range or ()))]
    ys = [y for spot in chart.spots for y in (spot.y, *(spot.y_range or ()))]
    ticks = nice_ticks(min(0.0, *xs), max(0.01, *xs), 6)
    levels = [share for index, share in enumerate(_SHARES) if index < 3 or _SHARES[index - 1] < max(ys)]
    frame = _Frame(width, height, ticks[0], ticks[-1], levels[-1])
    layers = [Layer("axes", [*_axes(frame, chart, ticks, levels), *_front(frame, chart.front)])]
    layers += [Layer("series", _error_bars(frame, spot), spot.tone) for spot in chart.spots]
    layers += [Layer("series", [Dot(*frame.place(spot.x, spot.y), _RADIUS)], spot.tone) for spot in chart.spots]
    layers.append(Layer("axes", _names(frame, chart.spots)))
    layers.append(Layer("hits", [_tooltip(frame, spot) for spot in chart.spots if spot.tip]))
    return Drawing(width, height, chart.title, layers)


@dataclass(frozen=True)
class _Frame:
    """Converts values to pixels of a drawing of `width` x `height`; the plot ends at `x_low`, `x_high`, 0 and
    `y_high`."""

    width: int
    height: int
    x_low: float
    x_high: float
    y_high: float

    @property
    def right(self) -> int:
        return self.width - _RIGHT

    @property
    def bottom(self) -> int:
        return self.height - _BOTTOM

    def place(self, x: float, y: float) -> tuple[float, float]:
        """Returns the pixel of a point."""
        across = (x - self.x_low) / (self.x_high - self.x_low)
        up = math.sqrt(max(y, 0.0) / self.y_high)
        left = _LEFT + across * (self.right - _LEFT)
        return round(left, 1), round(self.bottom - up * (self.bottom - _TOP), 1)


def _axes(frame: _Frame, chart: Scatter, ticks: Sequence[float], levels: Sequence[float]) -> list[Mark]:
    """Returns grid lines, their labels, and the titles of the axes."""
    marks: list[Mark] = []
    for level in levels:
        _, y = frame.place(ticks[0], level)
        marks += [
            Path(((_LEFT, y), (frame.right, y)), "grid-line"),
            Label(_LEFT - 7, y + 4, chart.show_y(level), "end"),
        ]
    for tick in ticks:
        x, _ = frame.place(tick, 0.0)
        marks.append(Path(((x, _TOP), (x, frame.bottom)), "zero-line" if tick == 0 else "grid-line"))
        marks.append(Label(x, frame.bottom + 16, chart.show_x(tick), "middle"))
    marks.append(Label(_LEFT - 34, _TOP - 14, chart.y_title))
    return [*marks, Label(frame.right, frame.bottom + 34, chart.x_title, "end")]


def _front(frame: _Frame, corners: Sequence[tuple[float, float]]) -> list[Mark]:
    """Returns the Pareto front as steps: right of and above it, some point is better in both directions."""
    points: list[tuple[Number, Number]] = []
    for corner in corners:
        x, y = frame.place(*corner)
        points += [(x, points[-1][1] if points else _TOP), (x, y)]
    return [Path([*points, (frame.right, points[-1][1])], "front")] if points else []


def _error_bars(frame: _Frame, spot: Spot) -> list[Mark]:
    """Returns the intervals of a point."""
    bars = []
    if spot.x_range is not None:
        bars.append([(end, spot.y) for end in spot.x_range])
    if spot.y_range is not None:
        bars.append([(spot.x, end) for end in spot.y_range])
    return [Path([frame.place(*end) for end in bar], "error-bar") for bar in bars]


def _tooltip(frame: _Frame, spot: Spot) -> Box:
    """Returns the invisible area around a point that shows its tooltip."""
    x, y = frame.place(spot.x, spot.y)
    return Box(x - _HIT / 2, y - _HIT / 2, _HIT, _HIT, "hit", spot.tip)


def _names(frame: _Frame, spots: Sequence[Spot]) -> list[Mark]:
    """Returns the names of all points where they cover neither each other nor a point, with lines to names that are
    not beside their point."""
    places = [frame.place(spot.x, spot.y) for spot in spots]
    taken = [(x - _RADIUS, y - _RADIUS, x + _RADIUS, y + _RADIUS) for x, y in places]
    marks: list[Mark] = []
    for (x, y), spot in zip(places, spots, strict=True):
        size = _LETTER * len(spot.label)
        left, base, distance = _free_place(frame, x, y, size, taken)
        taken.append(_area(left, base, size))
        if distance > 1:
            end = min(max(x, left), left + size)
            marks.append(
                Path(((x, y), (end, base - 4 if abs(base - y) < _LINE else base + (2 if base < y else -10))), "leader")
            )
        marks.append(Label(round(left, 1), round(base, 1), spot.label, style="mark-text"))
    return marks


_Area = tuple[float, float, float, float]


def _free_place(frame: _Frame, x: float, y: float, size: float, taken: Sequence[_Area]) -> tuple[float, float, int]:
    """Returns (left end, baseline, number of lines away) of the nearest free place for a text of `size` pixels."""
    # Above or below the point, where its intervals do not cross the text.
    above, below = y - _RADIUS - 2, y + _RADIUS + _LINE - 3
    for distance in range(1, 16):
        rise = (distance - 1) * _LINE
        for base in (above - rise, below + rise):
            for left in (x + _RADIUS, x - _RADIUS - size):
                area = _area(left, base, size)
                inside = area[0] >= 2 and area[2] <= frame.width - 2 and area[1] >= _TOP - 4 and area[3] <= frame.bottom
                if inside and not any(_overlap(area, other) for other in taken):
                    return left, base, distance
    return x + _RADIUS, above, 1


def _area(left: float, base: float, size: float) -> _Area:
    """Returns (left, top, right, bottom) of a text."""
    return left, base - _LINE + 3, left + size, base + 3


def _overlap(a: _Area, b: _Area) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]
