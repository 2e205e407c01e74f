"""Attack success by attack format, and of attacks transferred from language models: tables and heat maps."""

from statistics import fmean

from icet_jax.report.policies import map_html
from icet_jax.report.study import Study, Value, dataset_name
from icet_jax.report.text import escape
from icet_jax.report.widgets import code, details_html, show_value, table_html

_MOST = 32  # formats shown
_HEADS = {"formats": "Attack format", "transferred": "Transferred from a language model"}
_NOTE = (
    "Formats are the data set’s own words for how a request is disguised. They need not disguise the same requests, "
    "and a format of few rows tells little."
)
_NOTE_INTERVAL = " The interval of a worst exit includes the choice of that exit."  # of one run's


def formats_html(study: Study) -> str:
    """For each data set with attack formats: the first judge's tables and map, other judges' to open."""
    found = []
    for dataset in study.datasets:
        by_judge = [_judge_html(study, dataset, metric) for metric in study.judges(dataset)]
        by_judge = [html for html in by_judge if html]
        if by_judge:
            found += [_missing_html(study, dataset), by_judge[0]]
            found.append(details_html("The same by other judges", "".join(by_judge[1:])))
    note = _NOTE + ("" if study.several else _NOTE_INTERVAL)
    return f"<p class=note>{escape(note)}</p>{''.join(found)}" if found else ""


def _judge_html(study: Study, dataset: str, metric: str) -> str:
    """One judge's table by format, its map, and its table by transfer."""
    formats = _measured(study, dataset, metric, "formats")
    curves = {
        name: {phase: part.curve(phase, dataset, metric) for phase in study.phases(dataset)}
        for name, part in formats.items()
    }
    return (
        _table(study, dataset, metric, "formats", formats)
        + map_html(study, dataset, metric, curves, by="attack format")
        + _table(study, dataset, metric, "transferred", _measured(study, dataset, metric, "transferred"))
    )


def _measured(study: Study, dataset: str, metric: str, field: str) -> dict[str, Study]:
    """At most `_MOST` parts that a judge has judged; those with the highest mean over exits (before training) first."""
    phases = study.phases(dataset)
    parts = list(study.parts(dataset, field).items())[:_MOST]
    means = {name: [_mean(part.curve(phase, dataset, metric)) for phase in phases] for name, part in parts}
    known = [(name, part) for name, part in parts if any(mean is not None for mean in means[name])]
    return dict(sorted(known, key=lambda item: [-(mean or 0.0) for mean in means[item[0]]]))


def _mean(curve: list[tuple[int, Value]]) -> float | None:
    return fmean(value.mean for _, value in curve) if curve else None


def _table(study: Study, dataset: str, metric: str, field: str, parts: dict[str, Study]) -> str:
    """Worst and default exit of each part before and after, under those of all rows."""
    phases = study.phases(dataset)
    exits = ["Worst exit"] + ([f"Default exit {study.default_exit}"] if study.default_exit is not None else [])
    head = [_HEADS[field], "Rows", *(f"{name}, {phase}" for name in exits for phase in phases)]
    rows = [
        [name, _count(part, dataset, metric), *_cells(part, dataset, metric, phases)]
        for name, part in ([("<b>All rows</b>", study)] + [(escape(name), part) for name, part in parts.items()])
    ]
    what = "attack format" if field == "formats" else "whether the attack is transferred from a language model"
    caption = f"Attack success rate by {what}, {dataset_name(dataset)} ({study.interval})"
    return f"<p class=note>{code(metric)}</p>{table_html(head, rows, caption)}" if parts else ""


def _cells(part: Study, dataset: str, metric: str, phases: list[str]) -> list[str]:
    """The worst exit of each phase, then the default exit of each phase."""
    cells = []
    for phase in phases:
        worst = part.worst(phase, dataset, metric)
        place = "" if worst is None else f' <span class="ci">exit {worst[0]}</span>'
        cells.append(show_value(metric, worst and worst[1]) + place)
    if part.default_exit is not None:
        cells += [show_value(metric, part.value(phase, dataset, metric, part.default_exit)) for phase in phases]
    return cells


def _count(part: Study, dataset: str, metric: str) -> str:
    """Rows that the judge has judged at the exit where it judged most."""
    counts = [value.n or 0 for phase in part.phases(dataset) for _, value in part.curve(phase, dataset, metric)]
    return str(max(counts, default=0) or "–")


def _missing_html(study: Study, dataset: str) -> str:
    """Says which phase an earlier version measured, whose sweeps have no formats."""
    parts = [part for field in _HEADS for part in study.parts(dataset, field).values()]
    missing = [phase for phase in study.phases(dataset) if not any(phase in part.phases(dataset) for part in parts)]
    if not missing:
        return ""
    text = (
        f"The sweep of {dataset_name(dataset)} {missing[0]} training has no attack formats: an earlier version "
        "prepared or measured its rows."
    )
    return f"<p class=note>{escape(text)}</p>"
