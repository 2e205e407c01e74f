"""The sections about what was measured over exits: safety, group table, differences, over-refusal and utility."""

from icet_jax.report.study import GROUPS, Study, Value, group_layers
from icet_jax.report.text import escape
from icet_jax.report.verdict import dataset_name
from icet_jax.report.widgets import (
    change_html,
    code,
    details_html,
    difference_figure,
    family_title,
    grid_html,
    metric_figure,
    show_change,
    show_change_value,
    show_value,
    table_html,
)

# Families that say how safe or useful a model is; the others describe the form of its responses.
_MAIN = ("asr", "tr", "ts", "refusal", "accuracy")
_FORM = ("degenerate", "empty", "length")


def tiles_html(study: Study) -> str:
    """The key figures under the headline, before -> after: worst, default and average ASR, refusals, accuracies."""
    tiles = []
    default = study.default_exit
    for dataset in study.of_kind("forbidden")[:1]:
        for metric in study.judges(dataset)[:1]:
            ends = [study.worst(phase, dataset, metric) for phase in ("before", "after")]
            tiles.append(_tile("ASR, worst exit", metric, *(end and end[1] for end in ends)))
            tiles.append(_tile("ASR, average", metric, *(study.group(p, dataset, metric, "average")
                                                         for p in ("before", "after"))))
            if default is not None:
                tiles.append(_tile(f"ASR, default exit {default}", metric,
                                   *(study.value(p, dataset, metric, default) for p in ("before", "after"))))
    for dataset in study.datasets if default is not None else ():
        wanted = {"benign": ("refusal", "accuracy"), "vqa": ("accuracy",)}.get(study.kind(dataset), ())
        for metric in [name for family in wanted for name in study.metrics(dataset, family)[:1]]:
            what = "refusals" if metric.startswith("refusal") else "accuracy"
            tiles.append(_tile(f"{dataset_name(dataset)} {what}, default exit {default}", metric,
                               *(study.value(p, dataset, metric, default) for p in ("before", "after"))))
    return f'<div class="tiles">{"".join(tiles)}</div>' if any(tiles) else ""


def safety_html(study: Study) -> str:
    """ASR large, then every other metric of the forbidden data sets."""
    parts = []
    for dataset in study.of_kind("forbidden"):
        judges = study.judges(dataset)
        others = [name for name in study.metrics(dataset) if name not in judges[:1]]
        parts.append(_dataset_head(study, dataset))
        parts += [metric_figure(study, dataset, metric, wide=True) for metric in judges[:1]]
        parts.append(grid_html([metric_figure(study, dataset, name, full=_family(name) not in _FORM)
                                for name in others]))
    if parts:
        parts.append(_all_numbers(study, study.of_kind("forbidden")))
    return "".join(parts)


def groups_html(study: Study) -> str:
    """Early / Middle / Late / Average of each data set, before -> after, as the paper prints them."""
    parts = []
    sizes = group_layers(study.num_exits)
    for dataset in study.datasets:
        metrics = [name for name in study.metrics(dataset) if _family(name) in _MAIN]
        rows = []
        for name in GROUPS:
            cells = [change_html(metric, *(study.group(phase, dataset, metric, name) for phase in ("before", "after")))
                     for metric in metrics]
            span = f' <span class="ci">exits {sizes[name][0]}–{sizes[name][-1]}</span>' if sizes.get(name) else ""
            if any(cell != "–" for cell in cells):
                rows.append([name.capitalize() + span, *cells])
        head = ["Exits", *(f"{escape(family_title(metric))} {code(metric)}" for metric in metrics)]
        parts.append(table_html(head, rows, _rows_caption(study, dataset)))
    return "".join(parts)


def differences_html(study: Study) -> str:
    """after - before on the same rows."""
    figures, tables = [], []
    for dataset in study.datasets:
        if study.phases(dataset) != ["before", "after"]:
            continue
        metrics = [name for name in study.metrics(dataset) if _family(name) in _MAIN]
        figures += [difference_figure(study, dataset, metric) for metric in metrics]
        rows = [
            [f"{layer}{_mark(study, layer)}", *(show_change_value(m, study.value("difference", dataset, m, layer))
                                               for m in metrics)]
            for layer in study.layers(dataset)
        ]
        head = ["Exit", *(code(metric) for metric in metrics)]
        tables.append(table_html(head, rows, f"{dataset_name(dataset)}: after − before (shares in percentage points)"))
    return grid_html(figures) + details_html("All differences, exit by exit", "".join(tables))


def utility_html(study: Study) -> str:
    """Benign and VQA data sets: refusals and accuracy over exits, and a table at the default exit."""
    datasets = [*study.of_kind("benign"), *study.of_kind("vqa")]
    parts = [_default_table(study, datasets)]
    for dataset in datasets:
        names = [name for name in study.metrics(dataset) if _family(name) in (*_MAIN, *_FORM)]
        figures = [metric_figure(study, dataset, name, full=_family(name) not in _FORM) for name in names]
        if len(study.layers(dataset)) > 1:
            parts += [_dataset_head(study, dataset), grid_html(figures)]
    if datasets:
        parts.append(_all_numbers(study, datasets))
    return "".join(parts)


def _default_table(study: Study, datasets: list[str]) -> str:
    rows = []
    for dataset in datasets if study.default_exit is not None else ():
        for metric in study.metrics(dataset):
            if _family(metric) not in ("refusal", "accuracy", "ts", "tr"):
                continue
            sides = [study.value(p, dataset, metric, study.default_exit) for p in ("before", "after")]
            change = study.value("difference", dataset, metric, study.default_exit)
            if any(sides):
                n = next(side.n for side in sides if side is not None)
                rows.append([f"{escape(dataset_name(dataset))} {code(metric)}", *(show_value(metric, s) for s in sides),
                             show_change_value(metric, change), str(n) if n is not None else "–"])
    caption = f"At the default exit {study.default_exit} ({study.interval})"
    return table_html(["What", "Before", "After", "After − before", "n"], rows, caption)


def _all_numbers(study: Study, datasets: list[str]) -> str:
    tables = []
    for dataset in datasets:
        for metric in study.metrics(dataset):
            phases = study.phases(dataset)
            rows = []
            for layer in study.layers(dataset):
                values = [study.value(phase, dataset, metric, layer) for phase in phases]
                change = study.value("difference", dataset, metric, layer)
                n = next((value.n for value in values if value is not None), None)
                errors = sum(value.n_error for value in values if value is not None)
                cells = [show_value(metric, value) for value in values]
                cells += [show_change(metric, change and change.mean)] if len(phases) == 2 else []
                rows.append([f"{layer}{_mark(study, layer)}", *cells, "–" if n is None else str(n), str(errors)])
            head = ["Exit", *(phase.capitalize() for phase in phases)]
            head += ["Change"] if len(phases) == 2 else []
            tables.append(table_html([*head, "n", "unscored"], rows, f"{metric} on {dataset_name(dataset)}"))
    return details_html(f"All numbers, exit by exit ({study.interval})", "".join(tables))


def _dataset_head(study: Study, dataset: str) -> str:
    return f'<h3>{escape(dataset_name(dataset))} <span class="ci">{escape(_rows(study, dataset))}</span></h3>'


def _rows_caption(study: Study, dataset: str) -> str:
    return f"{dataset_name(dataset)}, {_rows(study, dataset)}"


def _rows(study: Study, dataset: str) -> str:
    """ "forbidden requests, 256 responses per exit"."""
    what = {"forbidden": "forbidden requests", "benign": "benign requests", "vqa": "questions about the image"}
    found = [value.n for phase in study.phases(dataset) for metric in study.metrics(dataset)
             for _, value in study.curve(phase, dataset, metric) if value.n is not None]
    count = f", {min(found)} responses per exit{' and seed' if study.several else ''}" if found else ""
    return what[study.kind(dataset)] + count


def _mark(study: Study, layer: int) -> str:
    if layer == study.default_exit:
        return ' <span class="ci">default</span>'
    return ' <span class="ci">planted</span>' if layer in study.planted else ""


def _tile(label: str, metric: str, before: Value | None, after: Value | None) -> str:
    if before is None and after is None:
        return ""
    return (f'<div class="tile"><span class="label">{escape(label)}</span>'
            f'<span class="big">{change_html(metric, before, after)}</span>{code(metric)}</div>')


def _family(metric: str) -> str:
    return metric.partition("/")[0]
