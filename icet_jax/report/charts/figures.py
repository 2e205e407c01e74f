"""A figure: charts of one scale side by side, under one title and one legend."""

from dataclasses import dataclass

from icet_jax.report.charts.lines import Chart, line_drawing
from icet_jax.report.charts.marks import Drawing

_NARROW = (380, 236)
_WIDE = {1: (1080, 330), 2: (540, 280)}
_PRINTED = {1: (640, 330), 2: (500, 300), 3: (360, 260)}


@dataclass(frozen=True)
class Key:
    """An entry of a legend: a label behind a "dot", "line", "box" or "ramp" of a tone; `before` stands before it."""

    label: str
    tone: str
    shape: str = "dot"
    before: str = ""


@dataclass(frozen=True)
class Panel:
    """A chart with its title; a drawing is laid out already and keeps its size."""

    chart: Chart | Drawing
    title: str = ""

    @property
    def narrow(self) -> Drawing:
        """As it is shown beside others and on small screens."""
        return _drawing(self.chart, _NARROW)


@dataclass(frozen=True)
class Figure:
    """Charts with all that one needs to read them.

    Attributes:
      title: what is shown.
      name: the full name of the metric.
      panels: one to three.
      keys: the legend.
      source: the data set. The page names it above the figure, a file below the title.
      wide: True for a figure as wide as the page.
    """

    title: str
    name: str
    panels: tuple[Panel, ...]
    keys: tuple[Key, ...] = ()
    source: str = ""
    wide: bool = False

    @property
    def is_drawing(self) -> bool:
        """True where the first panel is laid out already: it scrolls where it does not fit."""
        return isinstance(self.panels[0].chart, Drawing)

    def wide_drawing(self, panel: Panel) -> Drawing:
        """A panel as it is shown on a large screen, if the figure is wide."""
        return _drawing(panel.chart, _WIDE[len(self.panels)])

    def print_drawings(self) -> list[Drawing]:
        """The panels as they stand side by side in a file."""
        return [_drawing(panel.chart, _PRINTED[len(self.panels)]) for panel in self.panels]


def _drawing(chart: Chart | Drawing, size: tuple[int, int]) -> Drawing:
    return chart if isinstance(chart, Drawing) else line_drawing(chart, *size)
