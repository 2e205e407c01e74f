"""The figures of one run (or of its seeds): metrics over exits, before and after training."""

import math
from collections.abc import Mapping, Sequence
from statistics import fmean

from icet_jax.evaluation.combined import family_of
from icet_jax.report.charts.figures import Figure, Key, Panel
from icet_jax.report.charts.heatmap import part_map
from icet_jax.report.charts.lines import Chart, Line, Point
from icet_jax.report.schema import metric_family
from icet_jax.report.study import Study, Value, dataset_name
from icet_jax.report.text import number
from icet_jax.report.values import axis_number, axis_percent, show, show_change, title_on

GEOMETRY_TITLES = {"norm_ratio": "Norm ratio", "cosine": "Cosine similarity", "cka": "Linear CKA"}
MAP_TONES = {"asr": "unsafe", "refusal": "refused", "refusal_unsafe": "safe"}
"""Metric families that are mapped by category, with the tone of their maps."""
MOST_CATEGORIES = 32  # drawn
_UNIT = (0.0, 1.0)

Curve = list[tuple[int, Value]]
"""(exit, value) of a metric."""


def single_figure(
    chart: Chart, name: str, *, keys: Sequence[Key] = (), source: str = "", wide: bool = False
) -> Figure | None:
    """A chart under its title; None where there is nothing to draw."""
    return None if chart.is_empty else Figure(chart.title, name, (Panel(chart),), tuple(keys), source, wide)


def phase_keys(phases: Sequence[str]) -> tuple[Key, ...]:
    """Which colour is which, where a chart has two."""
    return tuple(Key(phase, phase) for phase in phases) if len(phases) > 1 else ()


def exit_highlights(study: Study) -> dict[int, str]:
    """The exits that every chart points out."""
    highlights = dict.fromkeys(study.planted, "planted")
    if study.default_exit is not None:
        highlights[study.default_exit] = "default"
    return highlights


def metric_figure(study: Study, dataset: str, metric: str, *, wide: bool = False, full: bool = True) -> Figure | None:
    """A metric over exits. `full` keeps a share's axis at 0..100 %; otherwise it shrinks to the data, 10 % at least."""
    family = metric_family(metric)
    y_range = (_UNIT if full else (0.0, 0.1)) if family.share else None
    chart = Chart(
        title=title_on(study, dataset, metric),
        lines=_curve_lines(study, dataset, metric),
        show=axis_percent if family.share else axis_number,
        detail=lambda x: show(metric, x),
        ticks=range(1, study.num_exits + 1),
        y_range=_UNIT if metric == "length" else y_range,
        y_limits=_UNIT if family.share else (-math.inf, math.inf),
        highlights=exit_highlights(study),
    )
    keys = phase_keys(study.phases(dataset))
    return single_figure(chart, metric, keys=keys, source=dataset_name(dataset), wide=wide)


def _curve_lines(study: Study, dataset: str, metric: str) -> list[Line]:
    """Before and after over exits: with intervals for one run, with a thin line per seed for several."""
    lines = []
    for phase in study.phases(dataset):
        curve = study.curve(phase, dataset, metric)
        if study.several:
            by_seed = {layer: study.seeds(phase, dataset, metric, layer) for layer, _ in curve}
            for index in range(len(study.runs)):
                known = [(layer, values[index]) for layer, values in by_seed.items()]
                lines.append(Line("", phase, [Point(x, y) for x, y in known if y is not None], thin=True))
        shown = [Point(layer, value.mean, value.low, value.high) for layer, value in curve]
        lines.append(Line(phase, phase, shown))
    return [line for line in lines if line.points]


def difference_figure(study: Study, dataset: str, metric: str) -> Figure | None:
    """after - before over exits, with paired intervals as whiskers."""
    values = [(layer, study.value("difference", dataset, metric, layer)) for layer in study.layers(dataset)]
    shown = [Point(layer, value.mean, value.low, value.high) for layer, value in values if value is not None]
    share = metric_family(metric).share
    chart = Chart(
        title=f"{title_on(study, dataset, metric)}: after − before" + (", points" if share else ""),
        lines=[Line("difference", "plain", shown)],
        show=(lambda x: axis_number(100 * x)) if share else axis_number,
        detail=lambda x: show_change(metric, x),
        ticks=range(1, study.num_exits + 1),
        y_range=(-0.05, 0.05) if share else None,
        y_limits=(-1.0, 1.0) if share else (-math.inf, math.inf),
        highlights=exit_highlights(study),
        whiskers=True,
    )
    return single_figure(chart, metric)


def geometry_charts(study: Study) -> dict[str, Chart]:
    """How far each exit's projected features lie from the default exit's, by field of `geometry.json`."""
    charts = {}
    for name, title in GEOMETRY_TITLES.items():
        points = [Point(x, value.mean, value.low, value.high) for x, value in study.geometry(name)]
        charts[name] = Chart(
            title=title,
            lines=[Line("", "plain", points)],
            show=axis_number,
            detail=number,
            ticks=range(1, study.num_exits + 1),
            y_range=_UNIT,
            highlights=exit_highlights(study),
        )
    return {name: chart for name, chart in charts.items() if not chart.is_empty}


def ordered_categories(study: Study, dataset: str, metric: str) -> list[str]:
    """At most `MOST_CATEGORIES`, those with the highest mean over exits (before training) first."""
    phase = study.phases(dataset)[0]
    curves = {
        category: study.category_curve(phase, dataset, metric, category)
        for category in study.categories(dataset, metric)[:MOST_CATEGORIES]
    }
    return sorted(curves, key=lambda category: -fmean([value.mean for _, value in curves[category]] or [0.0]))


def category_figure(study: Study, dataset: str, metric: str) -> Figure | None:
    """A metric's maps by category of request."""
    curves = {
        category: {phase: study.category_curve(phase, dataset, metric, category) for phase in study.phases(dataset)}
        for category in ordered_categories(study, dataset, metric)
    }
    return map_figure(study, dataset, metric, curves, by="category")


def map_figure(
    study: Study, dataset: str, metric: str, curves: Mapping[str, Mapping[str, Curve]], *, by: str
) -> Figure | None:
    """Shares of parts of a data set by exit, a map for each phase, side by side and with one scale: 0 to 100 %.

    Args:
      study, dataset, metric: what is drawn; `metric` is of a family in `MAP_TONES`.
      curves: part -> phase -> (exit, share); parts from the top.
      by: what the parts are, in the title.

    Returns:
      The figure; None without parts or with a single exit.
    """
    if not curves or len(study.layers(dataset)) < 2:
        return None
    panels = {
        phase: {(part, layer): value for part, phases in curves.items() for layer, value in phases[phase]}
        for phase in study.phases(dataset)
    }
    title = f"{title_on(study, dataset, metric)} by {by} and exit, {dataset_name(dataset)}"
    tone = MAP_TONES[family_of(metric)]
    drawing = part_map(
        panels, list(curves), study.layers(dataset), title=title, tone=tone, default_exit=study.default_exit
    )
    return Figure(title, metric, (Panel(drawing),), (Key("100%", tone, "ramp", before="0%"),), wide=True)
