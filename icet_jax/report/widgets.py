"""The page's building blocks: figures, tables, tiles. Arguments named `*_html` are markup, everything else is text."""

import math
from collections.abc import Callable, Sequence

from icet_jax.report.charts import Chart, Line, Point, svg_chart
from icet_jax.report.schema import metric_family
from icet_jax.report.study import Study, Value
from icet_jax.report.text import escape, number, percent, points, signed

_UNIT = (0.0, 1.0)


def show(metric: str, value: float | None) -> str:
    """A metric's number as its family is read: percent for shares, else a plain number."""
    return percent(value) if metric_family(metric).share else number(value)


def show_change(metric: str, value: float | None) -> str:
    """A difference as its family is read: percentage points for shares, always signed."""
    return points(value) if metric_family(metric).share else signed(value)


def show_value(metric: str, value: Value | None) -> str:
    """The mean with its interval: "2.3% (0.9% to 5.0%)"."""
    return _with_interval(value, lambda x: show(metric, x))


def show_change_value(metric: str, value: Value | None) -> str:
    """A difference with its interval: "−97.3 (−99.1 to −94.0)"."""
    return _with_interval(value, lambda x: show_change(metric, x))


def family_title(metric: str) -> str:
    """What a chart of the metric is called."""
    return metric_family(metric).title


def title_on(study: Study, dataset: str, metric: str) -> str:
    """`family_title`, saying whose refusals they are where a data set has requests that should be refused too."""
    safe = study.kind(dataset) == "mixed" and metric.startswith("refusal/")
    return family_title(metric) + (" of safe requests" if safe else "")


def code(text: str) -> str:
    """A name from a file, in the fixed-width face."""
    return f"<code>{escape(text)}</code>"


def legend_html(phases: Sequence[str]) -> str:
    """Which colour is which, where a chart has two."""
    if len(phases) < 2:
        return ""
    return '<span class="legend">' + "".join(f'<span class="{p}">{p}</span>' for p in phases) + "</span>"


def figure_html(chart: Chart, name: str, *, phases: Sequence[str] = (), wide: bool = False, title: str = "") -> str:
    """A chart under its title and the metric's full name; empty where there is nothing to draw.

    A wide figure is drawn twice, and the style sheet shows the one that fits, so that its letters keep their size.
    """
    svg = svg_chart(chart, 380, 236)
    if not svg:
        return ""
    if wide:
        svg = f'<div class="on-wide">{svg_chart(chart, 1080, 330)}</div><div class="on-narrow">{svg}</div>'
    head = f"<b>{escape(title or chart.title)}</b>{code(name)}{legend_html(phases)}"
    return f'<figure class="chart{" wide" if wide else ""}"><figcaption>{head}</figcaption>{svg}</figure>'


def exit_marks(study: Study) -> dict[int, str]:
    """The exits every chart points out."""
    marks = dict.fromkeys(study.planted, "planted")
    if study.default_exit is not None:
        marks[study.default_exit] = "default"
    return marks


def curve_lines(study: Study, dataset: str, metric: str) -> list[Line]:
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


def metric_figure(study: Study, dataset: str, metric: str, *, wide: bool = False, full: bool = True) -> str:
    """A metric over exits. `full` keeps a share's axis at 0..100%; otherwise it shrinks to the data, 10% at least."""
    family = metric_family(metric)
    y_range = (_UNIT if full else (0.0, 0.1)) if family.share else None
    if metric == "length":
        y_range = (0.0, 1.0)
    chart = Chart(
        title=title_on(study, dataset, metric),
        lines=curve_lines(study, dataset, metric),
        show=_axis_percent if family.share else axis_number,
        detail=lambda x: show(metric, x),
        ticks=range(1, study.num_exits + 1),
        y_range=y_range,
        y_limits=_UNIT if family.share else (-math.inf, math.inf),
        marks=exit_marks(study),
    )
    return figure_html(chart, metric, phases=study.phases(dataset), wide=wide)


def difference_figure(study: Study, dataset: str, metric: str) -> str:
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
        marks=exit_marks(study),
        whiskers=True,
    )
    return figure_html(chart, metric)


def grid_html(figures: Sequence[str]) -> str:
    """Figures side by side, as many as fit."""
    shown = "".join(figures)
    return f'<div class="grid">{shown}</div>' if shown else ""


def table_html(head: Sequence[str], rows: Sequence[Sequence[str]], caption: str) -> str:
    """A table whose cells are markup; the first column is the rows' heads. It scrolls sideways where it must."""
    if not rows:
        return ""
    top = "".join(f'<th scope="col">{cell}</th>' for cell in head)
    body = "".join(
        f'<tr><th scope="row">{row[0]}</th>' + "".join(f"<td>{cell}</td>" for cell in row[1:]) + "</tr>" for row in rows
    )
    return (
        f'<div class="scroll" role="region" tabindex="0" aria-label="{escape(caption)}"><table>'
        f"<caption><span>{escape(caption)}</span></caption><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def change_html(metric: str, before: Value | None, after: Value | None) -> str:
    """ "64.6% → 38.0%", coloured like the charts; one number where only one was measured."""
    sides = [
        f'<span class="{phase}">{show(metric, value.mean)}</span>'
        for phase, value in (("before", before), ("after", after))
        if value is not None
    ]
    return '<span class="arrow"> → </span>'.join(sides) or "–"


def details_html(summary: str, body_html: str) -> str:
    """Something to open."""
    return f"<details><summary>{escape(summary)}</summary>{body_html}</details>" if body_html else ""


def _with_interval(value: Value | None, text: Callable[[float], str]) -> str:
    if value is None:
        return "–"
    if value.low is None or value.high is None:
        return escape(text(value.mean))
    return (
        f'{escape(text(value.mean))} <span class="ci">({escape(text(value.low))} to {escape(text(value.high))})</span>'
    )


def axis_number(value: float) -> str:
    """No more digits than it needs."""
    return f"{value:.6g}".replace("-", "−")


def _axis_percent(share: float) -> str:
    return f"{axis_number(100 * share)}%"
