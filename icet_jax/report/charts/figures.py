"""Defines a figure: charts with the same scale, side by side under one title and one legend."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from icet_jax.report.charts.lines import Chart, line_drawing
from icet_jax.report.charts.marks import Drawing
from icet_jax.report.charts.scatter import Scatter, scatter_drawing

# Sizes of a panel in pixels (width, height): on a small screen; on a large screen and in a file by number of panels.
_NARROW = (380, 236)
_WIDE = {1: (1080, 330), 2: (540, 280)}
_PRINTED = {1: (640, 330), 2: (500, 300), 3: (360, 260)}
_LEAST_SCATTER_HEIGHT = 400  # pixels, so that names of neighbouring points fit


@dataclass(frozen=True)
class Key:
    """Holds an entry of a legend, from left to right: the text `before`, a sample, and the text `label`.

    The sample has the colour and dash of the tone named `tone` in `marks.TONES`. Its `shape` is "dot", "line",
    "dotted" (a dotted line), "box" or "ramp" (from light to dark).
    """

    label: str
    tone: str
    shape: str = "dot"
    before: str = ""


@dataclass(frozen=True)
class DataTable:
    """Holds the numbers behind a chart: names of the columns, and rows of texts, numbers and None."""

    columns: Sequence[str]
    rows: Sequence[Sequence[Any]]


@dataclass(frozen=True)
class Panel:
    """Holds a chart of a figure and the title above it.

    A `Drawing` is already laid out and keeps its size; `data` has its numbers, which other charts hold themselves.
    """

    chart: Chart | Scatter | Drawing
    title: str = ""
    data: DataTable | None = None

    @property
    def narrow(self) -> Drawing:
        """The drawing for small screens and for figures that stand side by side."""
        return _drawing(self.chart, _NARROW)


@dataclass(frozen=True)
class Figure:
    """Holds charts with everything that is needed to read them.

    Attributes:
      title: what is shown.
      name: full name of the metric.
      panels: one to three charts.
      keys: entries of the legend.
      source: name of the data set, which is printed in PNG files; the page prints it above the figure.
      wide: whether the figure is as wide as the page.
    """

    title: str
    name: str
    panels: tuple[Panel, ...]
    keys: tuple[Key, ...] = ()
    source: str = ""
    wide: bool = False

    @property
    def is_drawing(self) -> bool:
        """Whether the first panel is a `Drawing` with a fixed size; the page lets it scroll if it does not fit."""
        return isinstance(self.panels[0].chart, Drawing)

    def wide_drawing(self, panel: Panel) -> Drawing:
        """Returns the drawing of a panel of a wide figure for a large screen."""
        return _drawing(panel.chart, _WIDE[len(self.panels)])

    def print_drawings(self) -> list[Drawing]:
        """Returns the drawings of all panels for a PNG file."""
        return [_drawing(panel.chart, _PRINTED[len(self.panels)]) for panel in self.panels]


def _drawing(chart: Chart | Scatter | Drawing, size: tuple[int, int]) -> Drawing:
    """Returns a chart laid out in `size` = (width, height) pixels; a drawing is returned unchanged."""
    match chart:
        case Drawing():
            return chart
        case Scatter():
            return scatter_drawing(chart, size[0], max(size[1], _LEAST_SCATTER_HEIGHT))
    return line_drawing(chart, *size)
