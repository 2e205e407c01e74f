"""Returns the numbers behind a chart as a table, for the files that a reader downloads from a page."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

from icet_jax.report.charts.figures import DataTable, Figure, Panel
from icet_jax.report.charts.lines import Chart
from icet_jax.report.charts.scatter import Scatter
from icet_jax.report.text import visible

_DIGITS = 7  # significant digits of numbers


def figure_data(figure: Figure) -> dict[str, Any]:
    """Returns the data of a figure as JSON values: `title`, `metric`, `dataset`, and `panels` with a table each.

    A table has `title`, `columns` and `rows`. A number that was not measured is None.
    """
    panels = [{"title": visible(panel.title), **_table(panel)} for panel in figure.panels]
    texts = {"title": figure.title, "metric": figure.name, "dataset": figure.source}
    return {name: visible(text) for name, text in texts.items()} | {"panels": panels}


def _table(panel: Panel) -> dict[str, Any]:
    """Returns the columns and rows of a panel."""
    match panel.chart:
        case Chart():
            table = _of_lines(panel.chart)
        case Scatter():
            table = _of_spots(panel.chart)
        case _:
            table = panel.data or DataTable((), ())
    return {"columns": [*map(visible, table.columns)], "rows": [[_cell(value) for value in row] for row in table.rows]}


def _of_lines(chart: Chart) -> DataTable:
    """Returns a row per point. Thin lines, which have no name in the chart, are numbered: "before, seed 2"."""
    rows: list[Sequence[Any]] = []
    counts: Counter[str] = Counter()
    for series in chart.series:
        name = series.label
        if series.thin:
            counts[series.tone] += 1
            name = f"{'' if series.tone == 'plain' else f'{series.tone}, '}seed {counts[series.tone]}"
        rows += [(name, point.x, point.y, point.low, point.high) for point in series.points]
    rows += [
        (f"{mark.label}, {mark.tone}", f"{mark.first} to {mark.last}", mark.y, None, None) for mark in chart.references
    ]
    return DataTable(("series", chart.x_name, "value", "low", "high"), rows)


def _of_spots(chart: Scatter) -> DataTable:
    """Returns a row per point with its intervals."""
    columns = ("name", chart.x_title, "low", "high", chart.y_title, "low", "high")
    rows = [
        (spot.label, spot.x, *(spot.x_range or (None, None)), spot.y, *(spot.y_range or (None, None)))
        for spot in chart.spots
    ]
    return DataTable(columns, rows)


def _cell(value: Any) -> Any:
    """Returns a number rounded, and a text with hidden characters made visible."""
    if isinstance(value, str):
        return visible(value)
    return float(f"{value:.{_DIGITS}g}") if isinstance(value, float) else value
