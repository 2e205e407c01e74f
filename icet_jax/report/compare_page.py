"""The page that lays the curves of several runs over each other."""

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from icet_jax.files import write_text_atomic
from icet_jax.report.charts import Chart, Line, Point, svg_chart
from icet_jax.report.compare import Comparison, Member, load_comparison
from icet_jax.report.document import document_html
from icet_jax.report.load import PHASES
from icet_jax.report.schema import metric_family
from icet_jax.report.study import GROUPS, HUMAN, Value, dataset_name
from icet_jax.report.text import escape, number, percent
from icet_jax.report.verdict import algorithm
from icet_jax.report.widgets import (
    axis_number,
    change_html,
    code,
    details_html,
    family_title,
    show,
    show_value,
    table_html,
)

_FORM = ("degenerate", "empty", "truncated", "length")
_TICKS = (0.0, 0.25, 0.5, 0.75, 1.0)
_GEOMETRY = {"norm_ratio": "Norm ratio", "cosine": "Cosine similarity", "cka": "Linear CKA"}
_WHEN = {"before": "Before training", "after": "After training"}


def build_comparison(run_dirs: Sequence[Path], out: Path) -> Path:
    """See `icet_jax.report.compare_runs`."""
    comparison = load_comparison(run_dirs)
    page = out / "compare.html"
    write_text_atomic(page, render(comparison))
    from icet_jax.report.compare_figures import write_figures  # matplotlib is slow to import

    write_figures(comparison, out / "figures")
    return page


def render(comparison: Comparison) -> str:
    """The whole page. It holds no response."""
    safety = [name for name in comparison.datasets if comparison.kind(name) in ("forbidden", "mixed")]
    utility = [name for name in comparison.datasets if name not in safety]
    sections = [
        ("runs", "What is compared", _runs_html(comparison)),
        ("safety", "Safety over relative depth", "".join(_dataset_html(comparison, name) for name in safety)),
        ("utility", "Over-refusal and utility", "".join(_dataset_html(comparison, name) for name in utility)),
        ("groups", "Early, middle, late", _groups_html(comparison)),
        ("geometry", "How far each exit lies from the default", _geometry_html(comparison)),
        ("numbers", "All numbers", _numbers_html(comparison)),
        ("limits", "What these numbers do not say", _limits_html(comparison)),
    ]
    return document_html(sentence(comparison), _header(comparison), sections)


def sentence(comparison: Comparison) -> str:
    """The worst exits of all runs in one sentence."""
    count = f"{len(comparison.members)} runs side by side"
    if comparison.headline is None:
        return f"{count}; they share no attack success rate."
    dataset, judge = comparison.headline
    parts = []
    for phase in comparison.phases(dataset, judge):
        worst = [m.study.worst(phase, dataset, judge) for _, m in comparison.holders(dataset, judge)]
        shares = [found[1].mean for found in worst if found is not None]
        low, high = percent(min(shares)), percent(max(shares))
        spread = low if low == high else f"between {low} and {high}"
        parts.append(f"{phase} training the worst exit is {spread} unsafe")
    return f"{count}: {', '.join(parts)}."


def _header(comparison: Comparison) -> str:
    basis = ""
    if comparison.headline:
        dataset, judge = comparison.headline
        basis = f"<p class=basis>ASR is {code(judge)} on {escape(dataset_name(dataset))}.</p>"
    planted = [member.name for member in comparison.members if member.study.first.organism]
    caveats = [*_senseless_answers(comparison), *_cautions(comparison)]
    if planted:
        caveats.append(
            f"{', '.join(planted)}: a small model trained here, whose hole, where it has one, was built in. It is no "
            "evidence that the hole emerges in real models."
        )
    return (
        '<header class="measured"><p class=kicker>Layer-wise comparison</p>'
        f"<h1>{escape(sentence(comparison))}</h1>{basis}"
        + "".join(f"<p class=caveat>{escape(text)}</p>" for text in caveats)
        + "</header>"
    )


def _senseless_answers(comparison: Comparison) -> list[str]:
    """Names the runs whose worst exit, which the headline counts, has empty or degenerate answers."""
    if comparison.headline is None:
        return []
    dataset, judge = comparison.headline
    listed = []
    for phase in comparison.phases(dataset, judge):
        for _, member in comparison.holders(dataset, judge):
            worst = member.study.worst(phase, dataset, judge)
            share = worst and member.study.senseless(phase, dataset, worst[0])
            if worst and share:
                listed.append(f"{member.name}, {phase} training, exit {worst[0]}: {percent(share.mean)}")
    return [f"Some answers of the worst exits are empty or degenerate ({'; '.join(listed)})."] if listed else []


def _cautions(comparison: Comparison) -> list[str]:
    """What makes numbers of one name differ for another reason than the model."""
    found = [
        f"{names} {'is not the same set' if single else 'are not the same sets'} in all runs ({listed})."
        for names, single, listed in _listed(comparison.differing_sources())
    ]
    found += [
        f"The runs answered different numbers of rows of {names} at each exit ({listed})."
        for names, _, listed in _listed(comparison.differing_sizes())
    ]
    ways = comparison.differing_generation()
    if ways:
        listed = "; ".join(f"{', '.join(runs)}: {way}" for way, runs in ways.items())
        found.append(f"The responses were not generated alike ({listed}).")
    return found


def _listed(differing: Sequence[tuple[str, Mapping[Any, list[str]]]]) -> list[tuple[str, bool, str]]:
    """(data sets, whether it is one, "runs: value; ...") with the sets that differ in the same way together."""
    together: dict[str, list[str]] = {}
    for dataset, values in differing:
        listed = "; ".join(f"{', '.join(runs)}: {value}" for value, runs in values.items())
        together.setdefault(listed, []).append(dataset_name(dataset))
    return [(" and ".join(names), len(names) == 1, listed) for listed, names in together.items()]


def _runs_html(comparison: Comparison) -> str:
    """One row per run, and what an exit is in each."""
    rows = []
    for place, member in enumerate(comparison.members):
        study = member.study
        trained = algorithm(study) if any("after" in study.phases(name) for name in study.datasets) else "not trained"
        worst = _worst_cell(comparison, member)
        default = "–" if study.default_exit is None else str(study.default_exit)
        rows.append(
            [
                _swatch(place, member.name),
                escape(study.field("model") or "–"),
                str(study.num_exits),
                default,
                escape(trained) + (f", {len(study.runs)} seeds" if study.several else ""),
                worst,
            ]
        )
    head = ["Run", "Model", "Exits", "Default exit", "Training", "Worst exit"]
    defined: dict[str, list[str]] = {}
    for member in comparison.members:
        defined.setdefault(member.exit_definition, []).append(member.name)
    items = [
        f"<li>{escape(', '.join(names))}: {code(text) if text else 'its sweeps do not say'}</li>"
        for text, names in defined.items()
    ]
    return (
        table_html(head, rows, "The runs")
        + f"<h3>What exit l is</h3><ul>{''.join(items)}</ul>"
        + "<p class=note>Charts place exit l of N at the relative depth l / N. A ring marks a run’s default exit.</p>"
    )


def _worst_cell(comparison: Comparison, member: Member) -> str:
    if comparison.headline is None:
        return "–"
    dataset, judge = comparison.headline
    worst = [member.study.worst(phase, dataset, judge) for phase in PHASES]
    where = " → ".join(f"exit {found[0]}" for found in worst if found is not None)
    return change_html(judge, *(found[1] if found else None for found in worst)) + (
        f' <span class="ci">{where}</span>' if where else ""
    )


def _dataset_html(comparison: Comparison, dataset: str) -> str:
    """Every shared metric of a data set; those of the responses' form behind a line to open."""
    metrics = [metric for metric in comparison.metrics(dataset) if metric != HUMAN]
    drawn = {metric: _metric_html(comparison, dataset, metric) for metric in metrics}
    form = [metric for metric in metrics if metric.partition("/")[0] in _FORM]
    main = "".join(drawn[metric] for metric in metrics if metric not in form)
    rest = details_html("Form of the responses", "".join(drawn[metric] for metric in form))
    return f"<h3>{escape(dataset_name(dataset))}</h3>{main}{rest}"


def _metric_html(comparison: Comparison, dataset: str, metric: str) -> str:
    """Before and after in two panels of one scale, a line per run."""
    family, held = metric_family(metric), comparison.holders(dataset, metric)
    phases = comparison.phases(dataset, metric)
    curves = {phase: [(place, m, m.study.curve(phase, dataset, metric)) for place, m in held] for phase in phases}
    values = [
        number
        for phase in phases
        for _, _, curve in curves[phase]
        for _, value in curve
        for number in (value.mean, value.low, value.high)
        if number is not None
    ]
    if not values:
        return ""
    y_range = (min(values), max(values))
    if family.share:
        y_range = (0.0, 0.1 if metric.partition("/")[0] in _FORM and max(values) <= 0.1 else 1.0)
    panels = []
    for phase in phases:
        chart = _chart(
            f"{family_title(metric)}, {_WHEN[phase].lower()}",
            [(place, member, curve) for place, member, curve in curves[phase] if curve],
            show_y=(lambda y: f"{axis_number(100 * y)}%") if family.share else axis_number,
            detail=lambda y: show(metric, y),
            y_range=y_range,
            y_limits=(0.0, 1.0) if family.share else (-math.inf, math.inf),
        )
        panels.append((_WHEN[phase], chart))
    return _figure(family_title(metric), metric, panels, held)


def _geometry_html(comparison: Comparison) -> str:
    """Distances of each exit's projected features from the default exit's, where two or more runs have them."""
    held = [(place, m) for place, m in enumerate(comparison.members) if m.study.first.geometry]
    if len(held) < 2:
        return ""
    parts = []
    for name, title in _GEOMETRY.items():
        curves = [(place, m, m.study.geometry(name)) for place, m in held if m.study.geometry(name)]
        if len(curves) > 1:
            chart = _chart(title, curves, show_y=axis_number, detail=number, y_range=(0.0, 1.0))
            parts.append(_figure(title, f"geometry/{name}", [("", chart)], [(place, m) for place, m, _ in curves]))
    return "".join(parts)


_Curve = tuple[int, Member, list[tuple[int, Value]]]


def _chart(
    title: str,
    curves: Sequence[_Curve],
    *,
    show_y: Callable[[float], str],
    detail: Callable[[float], str],
    y_range: tuple[float, float],
    y_limits: tuple[float, float] = (-math.inf, math.inf),
) -> Chart:
    """Curves over relative depth; the tooltip at a depth names each run's nearest exit."""
    lines = []
    for place, member, curve in curves:
        default = member.study.default_exit
        shown = [Point(member.depth(x), v.mean, v.low, v.high, ring=x == default) for x, v in curve]
        lines.append(Line(member.name, f"run-{place}", shown))

    def tip(depth: float) -> str:
        texts = [f"depth {percent(depth, 0)}"]
        for _, member, curve in curves:
            layer, value = min(curve, key=lambda item: abs(member.depth(item[0]) - depth))
            mark = ", default" if layer == member.study.default_exit else ""
            text = f"{member.name}: {detail(value.mean)}"
            if value.low is not None and value.high is not None:
                text += f" ({detail(value.low)} to {detail(value.high)})"
            texts.append(f"{text}, exit {layer} of {member.study.num_exits}{mark}")
        return "\n".join(texts)

    return Chart(
        title=title,
        lines=lines,
        show=show_y,
        x_name="depth",
        show_x=lambda x: percent(float(x), 0),
        tip=tip,
        ticks=_TICKS,
        y_range=y_range,
        y_limits=y_limits,
    )


def _figure(title: str, name: str, panels: Sequence[tuple[str, Chart]], held: Sequence[tuple[int, Member]]) -> str:
    """Charts of one scale beside each other, under one caption and one legend."""
    wide, narrow = ((1080, 330), (380, 236)) if len(panels) == 1 else ((540, 280), (380, 236))
    drawn = "".join(
        f"<div>{f'<p class=panel>{escape(when)}</p>' if when else ''}"
        f'<div class="on-wide">{svg_chart(chart, *wide)}</div>'
        f'<div class="on-narrow">{svg_chart(chart, *narrow)}</div></div>'
        for when, chart in panels
    )
    legend = "".join(_swatch(place, member.name) for place, member in held)
    head = f'<b>{escape(title)}</b>{code(name)}<span class="legend">{legend}</span>'
    return (
        f'<figure class="chart wide"><figcaption>{head}</figcaption><div class="panels n{len(panels)}">{drawn}</div>'
        "</figure>"
    )


def _swatch(place: int, name: str) -> str:
    return f'<span class="swatch run-{place}">{escape(name)}</span>'


def _groups_html(comparison: Comparison) -> str:
    """Early, middle, late, average and the default exit of each run, before -> after."""
    parts = []
    for dataset in comparison.datasets:
        for metric in comparison.metrics(dataset):
            if metric == HUMAN or metric.partition("/")[0] in _FORM:
                continue
            rows = [
                [_swatch(place, member.name), *_group_cells(member, dataset, metric)]
                for place, member in comparison.holders(dataset, metric)
            ]
            head = ["Run", *(name.capitalize() for name in GROUPS), "Default exit"]
            parts.append(table_html(head, rows, f"{family_title(metric)}: {metric} on {dataset_name(dataset)}"))
    note = "<p class=note>Each run’s exits in three nearly equal parts; “average” is the mean of the parts’ means.</p>"
    return note + "".join(parts)


def _group_cells(member: Member, dataset: str, metric: str) -> list[str]:
    study = member.study
    cells = [[study.group(phase, dataset, metric, name) for phase in PHASES] for name in GROUPS]
    cells.append([study.value(phase, dataset, metric, study.default_exit) for phase in PHASES])
    return [change_html(metric, *sides) for sides in cells]


def _numbers_html(comparison: Comparison) -> str:
    """Every exit of every run, to read and to copy."""
    tables = []
    for dataset in comparison.datasets:
        for metric in comparison.metrics(dataset):
            phases = comparison.phases(dataset, metric)
            rows = []
            for place, member in comparison.holders(dataset, metric):
                for layer in member.study.layers(dataset):
                    values = [member.study.value(phase, dataset, metric, layer) for phase in phases]
                    if any(values):
                        where = f"{layer} of {member.study.num_exits}"
                        depth = percent(member.depth(layer))
                        shown = [show_value(metric, value) for value in values]
                        rows.append([_swatch(place, member.name), where, depth, *shown])
            head = ["Run", "Exit", "Depth", *(phase.capitalize() for phase in phases)]
            tables.append(table_html(head, rows, f"{metric} on {dataset_name(dataset)}"))
    return details_html("All numbers, exit by exit", "".join(tables))


def _limits_html(comparison: Comparison) -> str:
    limits = [
        "The same relative depth is not the same depth: encoders differ in blocks, in training and in what an exit is.",
        "Runs are compared on metrics of one name, that is by one scorer. Between runs nothing is paired: no interval "
        "here is that of a difference between two models.",
    ]
    intervals = {m.study.interval for m in comparison.members}
    limits.append(f"Bands are each run’s own: {'; '.join(sorted(map(escape, intervals)))}.")
    limits += [
        f"Measured in one run alone and not shown: {code(', '.join(metrics))} on {escape(dataset_name(dataset))} "
        f"({escape(member.name)})."
        for member, dataset, metrics in comparison.alone()
    ]
    return "<ul>" + "".join(f"<li>{item}</li>" for item in limits) + "</ul>"
