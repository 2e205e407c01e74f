"""The sections about what was measured over exits: safety, group table, differences, over-refusal and utility."""

from collections.abc import Sequence

from icet_jax.report.load import PHASES
from icet_jax.report.study import GROUPS, Study, Value, dataset_name, group_layers
from icet_jax.report.text import escape
from icet_jax.report.widgets import (
    change_html,
    code,
    details_html,
    difference_figure,
    family_title,
    grid_html,
    metric_figure,
    show_change_value,
    show_value,
    table_html,
)

# Families that say how safe or useful a model is; the others describe the form of its responses.
_USEFUL = ("refusal", "refusal_unsafe", "vqa", "accuracy")
_MAIN = ("asr", "tr", "ts", *_USEFUL)
_FORM = ("degenerate", "empty", "truncated", "length")


def tiles_html(study: Study) -> str:
    """The key figures under the headline, before -> after: worst, average and default ASR, refusals, accuracies."""
    tiles = []
    default = study.default_exit
    for dataset in study.of_kind("forbidden", "mixed")[:1]:
        for metric in study.judges(dataset)[:1]:
            worst = [study.worst(phase, dataset, metric) for phase in PHASES]
            tiles.append(_tile("ASR, worst exit", metric, [found[1] if found else None for found in worst]))
            tiles.append(_tile("ASR, average", metric, [study.group(p, dataset, metric, "average") for p in PHASES]))
            at_default = [study.value(phase, dataset, metric, default) for phase in PHASES]
            tiles.append(_tile(f"ASR, default exit {default}", metric, at_default))
    for dataset in study.datasets:
        wanted = {"benign": ("refusal", "accuracy"), "mixed": ("refusal",), "vqa": ("vqa", "accuracy")}
        families = wanted.get(study.kind(dataset), ())
        for metric in [name for family in families for name in study.metrics(dataset, family)[:1]]:
            what = "refusals" if metric.startswith("refusal") else "accuracy"
            what += " of safe requests" if study.kind(dataset) == "mixed" else ""
            at_default = [study.value(phase, dataset, metric, default) for phase in PHASES]
            tiles.append(_tile(f"{dataset_name(dataset)} {what}, default exit {default}", metric, at_default))
    return f'<div class="tiles">{"".join(tiles)}</div>' if any(tiles) else ""


def safety_html(study: Study) -> str:
    """ASR large, then every other metric of the forbidden data sets."""
    parts = []
    for dataset in study.of_kind("forbidden", "mixed"):
        judges = study.judges(dataset)
        others = [name for name in study.metrics(dataset) if name not in judges[:1] and _family(name) not in _USEFUL]
        parts.append(_dataset_head(study, dataset))
        parts += [metric_figure(study, dataset, metric, wide=True) for metric in judges[:1]]
        parts.append(
            grid_html([metric_figure(study, dataset, name, full=_family(name) not in _FORM) for name in others])
        )
    if parts:
        parts.append(_all_numbers(study, study.of_kind("forbidden", "mixed")))
    return "".join(parts)


def groups_html(study: Study) -> str:
    """Early / Middle / Late / Average of each data set, before -> after, as the paper prints them."""
    parts = []
    sizes = group_layers(study.num_exits)
    for dataset in study.datasets:
        metrics = [name for name in study.metrics(dataset) if _family(name) in _MAIN]
        rows = []
        for name in GROUPS:
            cells = [
                change_html(metric, *(study.group(phase, dataset, metric, name) for phase in PHASES))
                for metric in metrics
            ]
            span = f' <span class="ci">exits {sizes[name][0]}–{sizes[name][-1]}</span>' if sizes.get(name) else ""
            if any(cell != "–" for cell in cells):
                rows.append([name.capitalize() + span, *cells])
        head = ["Exits", *(f"{escape(family_title(metric))} {code(metric)}" for metric in metrics)]
        parts.append(table_html(head, rows, _what(study, dataset)))
    return "".join(parts)


def differences_html(study: Study) -> str:
    """after - before on the same rows."""
    parts = []
    for dataset in study.datasets:
        metrics = [name for name in study.metrics(dataset) if _family(name) in _MAIN]
        if len(study.phases(dataset)) == 2 and metrics:
            parts.append(_dataset_head(study, dataset))
            parts.append(grid_html([difference_figure(study, dataset, metric) for metric in metrics]))
    return "".join(parts)


def utility_html(study: Study) -> str:
    """Benign, mixed and VQA data sets: refusals and accuracy over exits, and a table at the default exit."""
    datasets = [dataset for dataset in study.of_kind("mixed", "benign", "vqa") if _useful_first(study, dataset)]
    parts = [_default_table(study, datasets)]
    for dataset in datasets:
        names = [name for name in _useful_first(study, dataset) if _family(name) in (*_MAIN, *_FORM)]
        figures = [metric_figure(study, dataset, name, full=_family(name) not in _FORM) for name in names]
        if len(study.layers(dataset)) > 1:
            parts += [_dataset_head(study, dataset), grid_html(figures)]
    parts.append(_all_numbers(study, study.of_kind("benign", "vqa")))
    return "".join(parts)


def _default_table(study: Study, datasets: list[str]) -> str:
    """Refusals, accuracies and scorers' means at the default exit."""
    rows = []
    columns = [*PHASES, "difference"]
    for dataset in datasets:
        for metric in _useful_first(study, dataset):
            values = [study.value(column, dataset, metric, study.default_exit) for column in columns]
            if _family(metric) in _MAIN and any(values):
                n = next((value.n for value in values if value is not None), None)
                name = f"{escape(dataset_name(dataset))} {code(metric)}"
                rows.append([name, *_cells(metric, columns, values), str(n or "–")])
    caption = f"At the default exit {study.default_exit} ({study.interval})"
    return table_html(["What", "Before", "After", "After − before", "n"], rows, caption)


def _useful_first(study: Study, dataset: str) -> list[str]:
    """A data set's metrics, refusals and accuracies first; of a mixed set these alone (see `safety_html`)."""
    names = sorted(study.metrics(dataset), key=lambda name: _family(name) not in _USEFUL)
    return [name for name in names if study.kind(dataset) != "mixed" or _family(name) in _USEFUL]


def _all_numbers(study: Study, datasets: list[str]) -> str:
    tables = [_metric_table(study, dataset, metric) for dataset in datasets for metric in study.metrics(dataset)]
    return details_html(f"All numbers, exit by exit ({study.interval})", "".join(tables))


def _metric_table(study: Study, dataset: str, metric: str) -> str:
    """One metric at every exit and group."""
    phases = study.phases(dataset)
    columns = [*phases, "difference"] if len(phases) == 2 else phases
    rows = []
    for layer in study.layers(dataset):
        values = [study.value(column, dataset, metric, layer) for column in columns]
        measured = [value for value in values[: len(phases)] if value is not None]
        rows.append([f"{layer}{_mark(study, layer)}", *_cells(metric, columns, values)])
        rows[-1] += [str(measured[0].n or "–") if measured else "–", str(sum(value.n_error for value in measured))]
    for name in GROUPS:
        values = [study.group(column, dataset, metric, name) for column in columns]
        rows += [[name.capitalize(), *_cells(metric, columns, values), "", ""]] if any(values) else []
    titles = {"before": "Before", "after": "After", "difference": "After − before"}
    head = ["Exit", *(titles[column] for column in columns), "n", "unscored"]
    return table_html(head, rows, f"{metric} on {dataset_name(dataset)}")


def _cells(metric: str, columns: Sequence[str], values: Sequence[Value | None]) -> list[str]:
    return [
        show_change_value(metric, value) if column == "difference" else show_value(metric, value)
        for column, value in zip(columns, values, strict=True)
    ]


def _dataset_head(study: Study, dataset: str) -> str:
    return f"<h3>{escape(_what(study, dataset))}</h3>"


def _what(study: Study, dataset: str) -> str:
    """ "Forbidden requests, 256 responses per exit"; the data set's name before it where it says more."""
    name, kind = dataset_name(dataset), study.kind(dataset)
    what = {
        "forbidden": "forbidden requests",
        "mixed": "requests of several kinds",
        "benign": "benign requests",
        "vqa": "questions about the image",
    }
    found = [
        value.n
        for phase in study.phases(dataset)
        for metric in study.metrics(dataset)
        for _, value in study.curve(phase, dataset, metric)
        if value.n is not None
    ]
    count = f", {max(found)} responses per exit{' and seed' if study.several else ''}" if found else ""
    return (what[kind].capitalize() if name == kind else f"{name}: {what[kind]}") + count


def _mark(study: Study, layer: int) -> str:
    if layer == study.default_exit:
        return ' <span class="ci">default</span>'
    return ' <span class="ci">planted</span>' if layer in study.planted else ""


def _tile(label: str, metric: str, sides: Sequence[Value | None]) -> str:
    if not any(sides):
        return ""
    return (
        f'<div class="tile"><span class="label">{escape(label)}</span>'
        f'<span class="big">{change_html(metric, *sides)}</span>{code(metric)}</div>'
    )


def _family(metric: str) -> str:
    return metric.partition("/")[0]
