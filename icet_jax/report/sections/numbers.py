"""Every number exit by exit, to read and to copy."""

from collections.abc import Sequence

from icet_jax.report.blocks import Block, Span, Text, details, remark, table, text
from icet_jax.report.comparison import Comparison
from icet_jax.report.study import GROUPS, Study, Value, dataset_name
from icet_jax.report.text import percent
from icet_jax.report.values import difference_text, value_text

COLUMN_TITLES = {"before": "Before", "after": "After", "difference": "After − before"}


def study_numbers(study: Study, datasets: Sequence[str]) -> list[Block]:
    """A table for each metric of some data sets, behind a line to open."""
    tables = [
        block
        for dataset in datasets
        for metric in study.metrics(dataset)
        for block in _metric_table(study, dataset, metric)
    ]
    return details(f"All numbers, exit by exit ({study.interval})", tables)


def of_comparison(comparison: Comparison) -> list[Block]:
    """A table for each shared metric, with a row for every exit of every run."""
    tables: list[Block] = []
    for dataset in comparison.datasets:
        for metric in comparison.metrics(dataset):
            phases = comparison.phases(dataset, metric)
            rows = []
            for place, member in comparison.holders(dataset, metric):
                for layer in member.study.layers(dataset):
                    values = [member.study.value(phase, dataset, metric, layer) for phase in phases]
                    if any(values):
                        where = [text(f"{layer} of {member.study.num_exits}"), text(percent(member.depth(layer)))]
                        shown = [value_text(metric, value) for value in values]
                        rows.append([text(run_name(place, member.name)), *where, *shown])
            head = ["Run", "Exit", "Depth", *(COLUMN_TITLES[phase] for phase in phases)]
            tables += table(f"{metric} on {dataset_name(dataset)}", head, rows)
    return details("All numbers, exit by exit", tables)


def value_cells(metric: str, columns: Sequence[str], values: Sequence[Value | None]) -> list[Text]:
    """A cell for each value; `columns` are phases and "difference"."""
    return [
        (difference_text if column == "difference" else value_text)(metric, value)
        for column, value in zip(columns, values, strict=True)
    ]


def run_name(place: int, name: str) -> Span:
    """A compared run's name behind its line of the charts."""
    return Span(name, f"swatch run-{place}")


def _metric_table(study: Study, dataset: str, metric: str) -> list[Block]:
    """One metric at every exit and group."""
    phases = study.phases(dataset)
    columns = [*phases, "difference"] if len(phases) == 2 else phases
    rows = []
    for layer in study.layers(dataset):
        values = [study.value(column, dataset, metric, layer) for column in columns]
        measured = [value for value in values[: len(phases)] if value is not None]
        count = str(measured[0].n or "–") if measured else "–"
        unscored = str(sum(value.n_error for value in measured))
        cells = value_cells(metric, columns, values)
        rows.append([_exit_name(study, layer), *cells, text(count), text(unscored)])
    for name in GROUPS:
        values = [study.group(column, dataset, metric, name) for column in columns]
        if any(values):
            rows.append([text(name.capitalize()), *value_cells(metric, columns, values), text(), text()])
    head = ["Exit", *(COLUMN_TITLES[column] for column in columns), "n", "unscored"]
    return table(f"{metric} on {dataset_name(dataset)}", head, rows)


def _exit_name(study: Study, layer: int) -> Text:
    if layer == study.default_exit:
        return text(str(layer), " ", remark("default"))
    return text(str(layer), " ", remark("planted")) if layer in study.planted else text(str(layer))
