"""Heat maps of exit by policy: which categories of requests each exit lets through, before and after."""

from collections.abc import Mapping
from statistics import fmean

from icet_jax.report.heatmap import svg_policies
from icet_jax.report.load import PHASES
from icet_jax.report.study import Study, Value, dataset_name
from icet_jax.report.text import escape, percent
from icet_jax.report.widgets import change_html, code, details_html, table_html, title_on

_TONES = {"asr": "unsafe", "refusal": "refused", "refusal_unsafe": "safe"}
_MOST = 32  # policies drawn

Curve = list[tuple[int, Value]]
"""(exit, value) of a metric."""


def policies_html(study: Study) -> str:
    """For each data set with policies: the first judge's map and numbers, other scorers' maps to open."""
    parts = []
    for dataset in study.datasets:
        for family in _TONES:
            names = study.judges(dataset) if family == "asr" else study.metrics(dataset, family)
            maps = [_map(study, dataset, metric) for metric in names]
            maps = [drawn for drawn in maps if drawn]
            if maps:
                parts += [maps[0], _numbers(study, dataset, names[0])]
                parts.append(details_html("The same by other scorers", "".join(maps[1:])))
    return "".join(parts)


def ordered(study: Study, dataset: str, metric: str) -> list[str]:
    """At most `_MOST` policies, those with the highest mean over exits (before training) first."""
    chosen = study.policies(dataset, metric)[:_MOST]
    phase = study.phases(dataset)[0]
    return sorted(
        chosen,
        key=lambda policy: (
            -fmean([value.mean for _, value in study.policy_curve(phase, dataset, metric, policy)] or [0.0])
        ),
    )


def _map(study: Study, dataset: str, metric: str) -> str:
    """One metric's maps side by side, a row for each policy."""
    curves = {
        policy: {phase: study.policy_curve(phase, dataset, metric, policy) for phase in study.phases(dataset)}
        for policy in ordered(study, dataset, metric)
    }
    return map_html(study, dataset, metric, curves, by="policy")


def map_html(study: Study, dataset: str, metric: str, curves: Mapping[str, Mapping[str, Curve]], *, by: str) -> str:
    """Shares of parts of a data set by exit, a map for each phase, side by side and with one scale: 0 to 100%.

    Args:
      study, dataset, metric: what is drawn; `metric` is of a family in `_TONES`.
      curves: part -> phase -> (exit, share); parts from the top.
      by: what the parts are, in the title.
    """
    if not curves or len(study.layers(dataset)) < 2:
        return ""
    panels = {
        phase: {(part, layer): value for part, phases in curves.items() for layer, value in phases[phase]}
        for phase in study.phases(dataset)
    }
    title = f"{title_on(study, dataset, metric)} by {by} and exit, {dataset_name(dataset)}"
    svg = svg_policies(
        panels,
        list(curves),
        study.layers(dataset),
        title=title,
        tone=_TONES[metric.partition("/")[0]],
        default_exit=study.default_exit,
    )
    key = f'<span class="legend">0% <span class="ramp {_TONES[metric.partition("/")[0]]}"></span> 100%</span>'
    head = f"<figcaption><b>{escape(title)}</b>{code(metric)}{key}</figcaption>"
    scroll = f'<div class="scroll" tabindex="0" role="region" aria-label="{escape(title)}">{svg}</div>'
    return f'<figure class="chart wide">{head}{scroll}</figure>'


def _numbers(study: Study, dataset: str, metric: str) -> str:
    """The map in numbers: each policy's mean over exits and its worst exit."""
    rows = []
    for policy in ordered(study, dataset, metric):
        curves = [study.policy_curve(phase, dataset, metric, policy) for phase in PHASES]
        means = [Value(fmean(value.mean for _, value in curve)) if curve else None for curve in curves]
        highest = [max(curve, key=lambda item: item[1].mean, default=None) for curve in curves]
        count = max((value.n or 0 for curve in curves for _, value in curve), default=0)
        worst = '<span class="arrow"> → </span>'.join(
            f'<span class="{phase}">{percent(found[1].mean)}</span> <span class="ci">exit {found[0]}</span>'
            for phase, found in zip(PHASES, highest, strict=True)
            if found is not None
        )
        rows.append([escape(policy), str(count or "–"), change_html(metric, *means), worst])
    head = ["Policy", "Rows", "Mean over exits", "Highest exit"]
    table = table_html(head, rows, f"{metric} on {dataset_name(dataset)} by policy")
    return details_html(f"The map of {metric} in numbers", table)
