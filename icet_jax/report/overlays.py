"""Builds the figures of a comparison: the curves of several runs over relative depth."""

import math
from collections.abc import Callable, Sequence

from icet_jax.evaluation.combined import family_of
from icet_jax.report.charts.figures import Figure, Key, Panel
from icet_jax.report.charts.lines import Chart, Point, Series
from icet_jax.report.comparison import Comparison, Member
from icet_jax.report.curves import GEOMETRY_TITLES, Curve
from icet_jax.report.schema import metric_family
from icet_jax.report.study import dataset_name
from icet_jax.report.text import number, percent
from icet_jax.report.values import FORM_FAMILIES, axis_number, axis_percent, family_title, show

_TICKS = (0.0, 0.25, 0.5, 0.75, 1.0)
_WHEN = {"before": "Before training", "after": "After training"}

MemberCurve = tuple[int, Member, Curve]
"""The index of a run among the compared runs, the run, and its curve."""


def metric_overlay(comparison: Comparison, dataset: str, metric: str) -> Figure | None:
    """Returns a metric's figure with a panel before and one after training and a line per run; None without values."""
    family, members_with_metric = metric_family(metric), comparison.members_with(dataset, metric)
    curves = {
        phase: [(index, m, m.study.curve(phase, dataset, metric)) for index, m in members_with_metric]
        for phase in comparison.phases(dataset, metric)
    }
    values = [
        number
        for members in curves.values()
        for _, _, curve in members
        for _, value in curve
        for number in (value.mean, value.low, value.high)
        if number is not None
    ]
    if not values:
        return None
    min_y_range = (min(values), max(values))
    if family.share:
        min_y_range = (0.0, 0.1 if family_of(metric) in FORM_FAMILIES and max(values) <= 0.1 else 1.0)
    panels = []
    for phase, members in curves.items():
        chart = _depth_chart(
            f"{family_title(metric)}, {_WHEN[phase].lower()}",
            [(index, member, curve) for index, member, curve in members if curve],
            show_y=axis_percent if family.share else axis_number,
            detail=lambda y: show(metric, y),
            min_y_range=min_y_range,
            max_y_range=(0.0, 1.0) if family.share else (-math.inf, math.inf),
        )
        panels.append(Panel(chart, _WHEN[phase]))
    keys = run_keys(members_with_metric)
    return Figure(family_title(metric), metric, tuple(panels), keys, dataset_name(dataset), wide=True)


def geometry_overlays(comparison: Comparison) -> list[Figure]:
    """Returns one figure for each measure in `GEOMETRY_TITLES` that at least two runs have.

    Each figure has one line per run, which shows the distance of every exit's image features from the default exit's.
    """
    figures = []
    for name, title in GEOMETRY_TITLES.items():
        curves = [(index, m, m.study.geometry(name)) for index, m in enumerate(comparison.members)]
        curves = [(index, member, curve) for index, member, curve in curves if curve]
        if len(curves) > 1:
            chart = _depth_chart(title, curves, show_y=axis_number, detail=number, min_y_range=(0.0, 1.0))
            keys = run_keys([(index, member) for index, member, _ in curves])
            figures.append(Figure(title, f"geometry/{name}", (Panel(chart),), keys, wide=True))
    return figures


def run_keys(members: Sequence[tuple[int, Member]]) -> tuple[Key, ...]:
    """Returns a chart's legend; `members` has (index among all compared runs, which gives the colour, run)."""
    return tuple(Key(member.name, f"run-{index}", "line") for index, member in members)


def _depth_chart(
    title: str,
    curves: Sequence[MemberCurve],
    *,
    show_y: Callable[[float], str],
    detail: Callable[[float], str],
    min_y_range: tuple[float, float],
    max_y_range: tuple[float, float] = (-math.inf, math.inf),
) -> Chart:
    """Returns a chart of curves over relative depth, whose tooltips show each run's value at its nearest exit.

    `show_y` is `Chart.show`; the other arguments are the fields of `Chart` with the same name.
    """
    series = []
    for index, member, curve in curves:
        default = member.study.default_exit
        points = [Point(member.depth(x), v.mean, v.low, v.high, ring=x == default) for x, v in curve]
        series.append(Series(member.name, f"run-{index}", points, gap=1 / member.study.num_exits))
    return Chart(
        title=title,
        series=series,
        show=show_y,
        x_name="depth",
        show_x=lambda x: percent(float(x), 0),
        tip=lambda depth: _tip(curves, depth, detail),
        ticks=_TICKS,
        min_y_range=min_y_range,
        max_y_range=max_y_range,
    )


def _tip(curves: Sequence[MemberCurve], depth: float, detail: Callable[[float], str]) -> str:
    """Returns the text of a tooltip: each run's value at its exit that is nearest to a relative depth."""
    texts = [f"depth {percent(depth, 0)}"]
    for _, member, curve in curves:
        layer, value = min(curve, key=lambda item: abs(member.depth(item[0]) - depth))
        text = f"{member.name}: {detail(value.mean)}"
        if value.low is not None and value.high is not None:
            text += f" ({detail(value.low)} to {detail(value.high)})"
        default = ", default" if layer == member.study.default_exit else ""
        texts.append(f"{text}, exit {layer} of {member.study.num_exits}{default}")
    return "\n".join(texts)
