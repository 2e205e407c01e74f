"""Builds the figures of one run or of its seeds: metrics over exits, before and after training."""

import math
from collections.abc import Mapping, Sequence
from statistics import fmean

from icet_jax.evaluation.combined import family_of
from icet_jax.report.charts.figures import DataTable, Figure, Key, Panel
from icet_jax.report.charts.heatmap import share_map
from icet_jax.report.charts.lines import Chart, Point, Series
from icet_jax.report.paper import paper_references
from icet_jax.report.schema import metric_family
from icet_jax.report.study import Study, Value, dataset_name
from icet_jax.report.text import number
from icet_jax.report.values import axis_number, axis_percent, show, show_change, title_on

GEOMETRY_TITLES = {"norm_ratio": "Norm ratio", "cosine": "Cosine similarity", "cka": "Linear CKA"}
MAP_TONES = {"asr": "unsafe", "refusal": "refused", "refusal_unsafe": "safe"}
"""Metric families that have a heat map by category, each with the name of the map's colour in `marks.TONES`."""
MOST_CATEGORIES = 32  # most categories in a heat map
_UNIT = (0.0, 1.0)

Curve = list[tuple[int, Value]]
"""(exit, value) of a metric."""


def single_figure(
    chart: Chart, name: str, *, keys: Sequence[Key] = (), source: str = "", wide: bool = False
) -> Figure | None:
    """Returns a figure of one chart, with the chart's title; None if the chart has no points. See `Figure`."""
    return None if chart.is_empty else Figure(chart.title, name, (Panel(chart),), tuple(keys), source, wide)


def phase_keys(phases: Sequence[str]) -> tuple[Key, ...]:
    """Returns the legend of a chart with the series `phases` ("before", "after"); empty if there is only one series."""
    return tuple(Key(phase, phase) for phase in phases) if len(phases) > 1 else ()


def exit_highlights(study: Study) -> dict[int, str]:
    """Returns the exits that every chart emphasises, each with the reason "planted" or "default"."""
    highlights = dict.fromkeys(study.planted, "planted")
    if study.default_exit is not None:
        highlights[study.default_exit] = "default"
    return highlights


def metric_figure(study: Study, dataset: str, metric: str, *, wide: bool = False, full: bool = True) -> Figure | None:
    """Returns the figure of a metric over exits, before and after training; None if the metric was not measured.

    With `full`, the axis of a share always ends at 100 %. Otherwise it ends at the largest value, but not below 10 %.
    """
    family = metric_family(metric)
    min_y_range = (_UNIT if full else (0.0, 0.1)) if family.share else None
    chart = Chart(
        title=title_on(study, dataset, metric),
        series=_curve_series(study, dataset, metric),
        show=axis_percent if family.share else axis_number,
        detail=lambda x: show(metric, x),
        ticks=range(1, study.num_exits + 1),
        min_y_range=_UNIT if metric == "length" else min_y_range,
        max_y_range=_UNIT if family.share else (-math.inf, math.inf),
        highlights=exit_highlights(study),
        references=paper_references(study, dataset, metric),
    )
    keys = phase_keys(study.phases(dataset))
    if chart.references:
        keys += (Key("paper’s Table 2", "plain", "dotted"),)
    return single_figure(chart, metric, keys=keys, source=dataset_name(dataset), wide=wide)


def _curve_series(study: Study, dataset: str, metric: str) -> list[Series]:
    """Returns a metric's series over exits before and after training, with intervals.

    With several seeds, these series are means over seeds, and each seed has a thin series of its own as well.
    """
    series = []
    for phase in study.phases(dataset):
        curve = study.curve(phase, dataset, metric)
        if study.has_several_seeds:
            by_seed = {layer: study.seeds(phase, dataset, metric, layer) for layer, _ in curve}
            for index in range(len(study.runs)):
                of_seed = [(layer, values[index]) for layer, values in by_seed.items()]
                series.append(Series("", phase, [Point(x, y) for x, y in of_seed if y is not None], thin=True, gap=1))
        shown = [Point(layer, value.mean, value.low, value.high) for layer, value in curve]
        series.append(Series(phase, phase, shown, gap=1))
    return [each for each in series if each.points]


def difference_figure(study: Study, dataset: str, metric: str) -> Figure | None:
    """Returns the figure of a metric's difference "after minus before" over exits, with paired intervals as whiskers.

    Returns None if no exit has a difference.
    """
    values = [(layer, study.value("difference", dataset, metric, layer)) for layer in study.layers(dataset)]
    shown = [Point(layer, value.mean, value.low, value.high) for layer, value in values if value is not None]
    share = metric_family(metric).share
    chart = Chart(
        title=f"{title_on(study, dataset, metric)}: after − before" + (", points" if share else ""),
        series=[Series("difference", "plain", shown)],
        show=(lambda x: axis_number(100 * x)) if share else axis_number,
        detail=lambda x: show_change(metric, x),
        ticks=range(1, study.num_exits + 1),
        min_y_range=(-0.05, 0.05) if share else None,
        max_y_range=(-1.0, 1.0) if share else (-math.inf, math.inf),
        highlights=exit_highlights(study),
        whiskers=True,
    )
    return single_figure(chart, metric, source=dataset_name(dataset))


def geometry_charts(study: Study) -> dict[str, Chart]:
    """Returns {field of geometry.json: chart of that measure over exits}, for the fields that have values.

    Each field measures how far the image features of an exit are from those of the default exit.
    """
    charts = {}
    for name, title in GEOMETRY_TITLES.items():
        points = [Point(x, value.mean, value.low, value.high) for x, value in study.geometry(name)]
        charts[name] = Chart(
            title=title,
            series=[Series("", "plain", points, gap=1)],
            show=axis_number,
            detail=number,
            ticks=range(1, study.num_exits + 1),
            min_y_range=_UNIT,
            highlights=exit_highlights(study),
        )
    return {name: chart for name, chart in charts.items() if not chart.is_empty}


def ordered_categories(study: Study, dataset: str, metric: str) -> list[str]:
    """Returns the `MOST_CATEGORIES` categories with most rows, those with the highest mean of a metric first.

    The mean is over exits, before training or, if that was not measured, after it.
    """
    phase = study.phases(dataset)[0]
    curves = {
        category: study.category_curve(phase, dataset, metric, category)
        for category in study.categories(dataset, metric)[:MOST_CATEGORIES]
    }
    return sorted(curves, key=lambda category: -fmean([value.mean for _, value in curves[category]] or [0.0]))


def category_figure(study: Study, dataset: str, metric: str) -> Figure | None:
    """Returns the heat maps of a metric by category of the requests; None if there are no categories."""
    curves = {
        category: {phase: study.category_curve(phase, dataset, metric, category) for phase in study.phases(dataset)}
        for category in ordered_categories(study, dataset, metric)
    }
    return map_figure(study, dataset, metric, curves, by="category")


def map_figure(
    study: Study, dataset: str, metric: str, curves: Mapping[str, Mapping[str, Curve]], *, by: str
) -> Figure | None:
    """Returns heat maps of a metric by part of a data set and exit: before and after side by side, from 0 to 100 %.

    Args:
      study: the run.
      dataset: name of the data set.
      metric: full name of the metric, whose family is in `MAP_TONES`.
      curves: {part: {"before" or "after": [(exit, share)]}}, in the order of the heat map's rows from the top.
      by: what the parts are, such as "category", for the title.

    Returns:
      The figure; None if there are no parts or only one exit.
    """
    if not curves or len(study.layers(dataset)) < 2:
        return None
    panels = {
        phase: {(part, layer): value for part, phases in curves.items() for layer, value in phases[phase]}
        for phase in study.phases(dataset)
    }
    title = f"{title_on(study, dataset, metric)} by {by} and exit, {dataset_name(dataset)}"
    tone = MAP_TONES[family_of(metric)]
    drawing = share_map(
        panels, list(curves), study.layers(dataset), title=title, tone=tone, default_exit=study.default_exit
    )
    rows = [
        (phase, part, layer, value.mean, value.low, value.high, value.n)
        for phase, values in panels.items()
        for (part, layer), value in values.items()
    ]
    data = DataTable(("phase", by, "exit", "share", "low", "high", "n"), rows)
    keys = (Key("100%", tone, "ramp", before="0%"),)
    return Figure(title, metric, (Panel(drawing, data=data),), keys, wide=True)
