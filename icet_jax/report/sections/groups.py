"""The section of means over early, middle and late exits."""

from icet_jax.evaluation.combined import family_of
from icet_jax.exit_groups import exit_groups
from icet_jax.report.blocks import Block, Text, code, note, remark, table, text
from icet_jax.report.comparison import Comparison, Member
from icet_jax.report.loading import PHASES
from icet_jax.report.sections.measured import dataset_heading
from icet_jax.report.sections.numbers import run_name
from icet_jax.report.study import GROUPS, HUMAN, Study, dataset_name
from icet_jax.report.values import FORM_FAMILIES, MAIN_FAMILIES, change_text, family_title

_NOTE = "Each run’s exits in three nearly equal parts; “average” is the mean of the parts’ means."


def of_study(study: Study) -> list[Block]:
    """Returns a table for each data set: its main metrics, before → after, with one row per group in `GROUPS`."""
    blocks: list[Block] = []
    for dataset in study.datasets:
        metrics = [name for name in study.metrics(dataset) if family_of(name) in MAIN_FAMILIES]
        rows = []
        for name in GROUPS:
            sides = [[study.group(phase, dataset, metric, name) for phase in PHASES] for metric in metrics]
            if any(value is not None for values in sides for value in values):
                cells = [change_text(metric, *values) for metric, values in zip(metrics, sides, strict=True)]
                rows.append([group_name(study, name), *cells])
        head = [text("Exits"), *(text(f"{family_title(metric)} ", code(metric)) for metric in metrics)]
        blocks += table(dataset_heading(study, dataset), head, rows)
    return blocks


def of_comparison(comparison: Comparison) -> list[Block]:
    """Returns a table for each data set and metric, before → after, with a row per run and a column per group."""
    blocks: list[Block] = [note(_NOTE)]
    head = ["Run", *(name.capitalize() for name in GROUPS), "Default exit"]
    for dataset in comparison.datasets:
        for metric in comparison.metrics(dataset):
            if metric == HUMAN or family_of(metric) in FORM_FAMILIES:
                continue
            rows = [
                [text(run_name(index, member.name)), *_cells(member, dataset, metric)]
                for index, member in comparison.members_with(dataset, metric)
            ]
            blocks += table(f"{family_title(metric)}: {metric} on {dataset_name(dataset)}", head, rows)
    return blocks


def group_name(study: Study, name: str) -> Text:
    """Returns the name of a group with its exits, such as "Early exits 1–8"; of the average, the name alone."""
    exits = exit_groups(study.num_exits).get(name)
    return text(name.capitalize(), " ", remark(f"exits {exits[0]}–{exits[-1]}")) if exits else text(name.capitalize())


def _cells(member: Member, dataset: str, metric: str) -> list[Text]:
    """Returns a run's values of a metric, before → after: one cell per group, and one for the default exit."""
    study = member.study
    sides = [[study.group(phase, dataset, metric, name) for phase in PHASES] for name in GROUPS]
    sides.append([study.value(phase, dataset, metric, study.default_exit) for phase in PHASES])
    return [change_text(metric, *values) for values in sides]
