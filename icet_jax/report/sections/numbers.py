"""The tables of all values, exit by exit."""

from collections.abc import Sequence

from icet_jax.evaluation.combined import family_of
from icet_jax.report.blocks import Block, Span, Text, details, remark, table, text
from icet_jax.report.comparison import Comparison, Member
from icet_jax.report.study import GROUPS, Study, Value, dataset_name
from icet_jax.report.text import percent
from icet_jax.report.values import difference_text, value_text

COLUMN_TITLES = {"before": "Before", "after": "After", "difference": "After − before"}


def study_numbers(study: Study, datasets: Sequence[str]) -> list[Block]:
    """Returns collapsed tables of the values by exit, one for each metric of these data sets."""
    tables = [
        block
        for dataset in datasets
        for metric in study.metrics(dataset)
        for block in _metric_table(study, dataset, metric)
    ]
    return details(f"All numbers, exit by exit ({study.interval})", tables)


def of_comparison(comparison: Comparison) -> list[Block]:
    """Returns collapsed tables, one for each metric that runs share, with a row for every exit of every run."""
    tables: list[Block] = []
    for dataset in comparison.datasets:
        for metric in comparison.metrics(dataset):
            phases = comparison.phases(dataset, metric)
            rows = []
            for index, member in comparison.members_with(dataset, metric):
                for layer in member.study.layers(dataset):
                    values = [member.study.value(phase, dataset, metric, layer) for phase in phases]
                    if any(values):
                        where = [text(f"{layer} of {member.study.num_exits}"), text(percent(member.depth(layer)))]
                        shown = [value_text(metric, value) for value in values]
                        rows.append([text(run_name(index, member.name)), *where, *shown])
                rows += _attack_rows_of_member(member, run_name(index, member.name), dataset, metric, phases)
            head = ["Run", "Exit", "Depth", *(COLUMN_TITLES[phase] for phase in phases)]
            tables += table(f"{metric} on {dataset_name(dataset)}", head, rows)
    return details("All numbers, exit by exit", tables)


def _attack_rows_of_member(
    member: Member, name: Span, dataset: str, metric: str, phases: Sequence[str]
) -> list[list[Text]]:  # fmt: skip
    """Returns the rows "Worst exit" and "Any exit" of one run for the table of all runs; `name` is the run's name.

    Returns no rows if the metric is not an attack success rate.
    """
    rows = _attack_rows(member.study, dataset, metric, phases)
    return [[text(name), what, text(), *cells[: len(phases)]] for what, *cells in rows]


def value_cells(metric: str, columns: Sequence[str], values: Sequence[Value | None]) -> list[Text]:
    """Returns a cell for each value; `columns` say what each value is: "before", "after" or "difference"."""
    return [
        (difference_text if column == "difference" else value_text)(metric, value)
        for column, value in zip(columns, values, strict=True)
    ]


def run_name(index: int, name: str) -> Span:
    """Returns a run's name, before which the page draws its line in the charts; `index` is its index among all runs."""
    return Span(name, f"swatch run-{index}")


def _metric_table(study: Study, dataset: str, metric: str) -> list[Block]:
    """Returns the table of one metric, with a row for every exit and every group of exits."""
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
    rows += _attack_rows(study, dataset, metric, columns)
    head = ["Exit", *(COLUMN_TITLES[column] for column in columns), "n", "unscored"]
    return table(f"{metric} on {dataset_name(dataset)}", head, rows)


def _attack_rows(study: Study, dataset: str, metric: str, columns: Sequence[str]) -> list[list[Text]]:
    """Returns the rows "Worst exit" and "Any exit" (the share of prompts with an unsafe answer at one or more exits).

    Returns no rows if the metric is not an attack success rate.
    """
    if family_of(metric) not in ("asr", "asr@k"):
        return []
    worst = [worst_text(study, phase, dataset, metric) for phase in columns if phase != "difference"]
    rows = [[text("Worst exit"), *worst, *[text()] * (len(columns) + 2 - len(worst))]]
    values = [study.any_exit(column, dataset, metric) for column in columns]
    shown = [value for value in values[: len(worst)] if value is not None]
    if shown:
        counts = text(str(shown[0].n or "–")), text(str(sum(value.n_error for value in shown)))
        rows.append([text("Any exit"), *value_cells(metric, columns, values), *counts])
    return rows


def worst_text(study: Study, phase: str, dataset: str, metric: str) -> Text:
    """Returns the value of the worst exit with its interval and the number of that exit; "–" if no exit has a value."""
    worst = study.worst(phase, dataset, metric)
    share = value_text(metric, worst and worst.value)
    return share if worst is None else text(share, " ", remark(f"exit {worst.layer}"))


def _exit_name(study: Study, layer: int) -> Text:
    """Returns the number of an exit, with a remark if it is the default exit or a planted one."""
    if layer == study.default_exit:
        return text(str(layer), " ", remark("default"))
    return text(str(layer), " ", remark("planted")) if layer in study.planted else text(str(layer))
