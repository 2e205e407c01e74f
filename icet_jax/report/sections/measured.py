"""The sections with charts over exits: safety, over-refusal and utility."""

from collections.abc import Sequence

from icet_jax.evaluation.combined import family_of
from icet_jax.report.blocks import Block, Heading, code, details, grid, joined, note, remark, table, text
from icet_jax.report.comparison import Comparison
from icet_jax.report.curves import metric_figure
from icet_jax.report.loading import PHASES
from icet_jax.report.overlays import metric_overlay
from icet_jax.report.sections.numbers import COLUMN_TITLES, study_numbers, value_cells
from icet_jax.report.study import HUMAN, Study, dataset_name
from icet_jax.report.text import number, percent
from icet_jax.report.values import FORM_FAMILIES, MAIN_FAMILIES, USEFUL_FAMILIES, show
from icet_jax.scorers.calibration import calibrations

_SAFETY_KINDS = ("forbidden", "mixed")


def safety_of_study(study: Study) -> list[Block]:
    """Returns charts for each data set with forbidden requests, then collapsed tables of all values.

    The first judge's ASR has a large chart, the other metrics small ones.
    """
    blocks: list[Block] = []
    datasets = study.of_kind(*_SAFETY_KINDS)
    for dataset in datasets:
        first = study.judges(dataset)[:1]
        others = [
            name for name in study.metrics(dataset) if name not in first and family_of(name) not in USEFUL_FAMILIES
        ]
        blocks.append(Heading(dataset_heading(study, dataset)))
        for metric in first:
            figure = metric_figure(study, dataset, metric, wide=True)
            blocks += [figure] if figure is not None else []
        blocks += charts(study, dataset, others)
    blocks += _agreement_with_people([name for dataset in datasets for name in study.judges(dataset)])
    return [*blocks, *study_numbers(study, datasets)]


def _agreement_with_people(metrics: Sequence[str]) -> list[Block]:
    """Returns a note for each of these metrics whose judge was compared with people's labels."""
    measured = calibrations()
    notes: list[Block] = []
    for metric in dict.fromkeys(metrics):
        people = measured.get(metric.removeprefix("asr/"))
        if people is not None:
            words = (
                f" agrees with people on {percent(people.agree, 0)} of {people.n} of {people.responses}, "
                f"κ {number(people.kappa)} (docs/judging.md)."
            )
            notes.append(note(code(metric), words))
    return notes


def utility_of_study(study: Study) -> list[Block]:
    """Returns a table, charts and collapsed tables of all values, for benign, mixed and VQA data sets.

    The table has the values at the default exit; the charts show refusals and accuracies over exits.
    """
    datasets = [dataset for dataset in study.of_kind("mixed", "benign", "vqa") if _metrics_to_show(study, dataset)]
    blocks = _default_table(study, datasets)
    for dataset in datasets:
        names = _metrics_to_show(study, dataset)
        names = [name for name in names if family_of(name) in (*MAIN_FAMILIES, *FORM_FAMILIES)]
        if len(study.layers(dataset)) > 1:
            blocks.append(Heading(dataset_heading(study, dataset)))
            blocks += charts(study, dataset, names)
    return [*blocks, *study_numbers(study, study.of_kind("benign", "vqa"))]


def safety_of_comparison(comparison: Comparison) -> list[Block]:
    """Returns charts of every shared metric of the data sets with forbidden requests."""
    datasets = [name for name in comparison.datasets if comparison.kind(name) in _SAFETY_KINDS]
    return [block for name in datasets for block in _overlays(comparison, name)]


def utility_of_comparison(comparison: Comparison) -> list[Block]:
    """Returns charts of every shared metric of the other data sets."""
    datasets = [name for name in comparison.datasets if comparison.kind(name) not in _SAFETY_KINDS]
    return [block for name in datasets for block in _overlays(comparison, name)]


def dataset_heading(study: Study, dataset: str) -> str:
    """Returns "xstest: benign requests, 256 responses per exit"; the name is left out if it only repeats the kind.

    The number of distinct prompts is added where rows share prompts: intervals are clustered by prompt, so that few
    prompts make them wide.
    """
    name, kind = dataset_name(dataset), study.kind(dataset)
    what = {
        "forbidden": "forbidden requests",
        "mixed": "requests of several kinds",
        "benign": "benign requests",
        "vqa": "questions about the image",
    }[kind]
    count = study.responses(dataset)
    suffix = (
        f", {count} responses per exit{' and seed' if study.has_several_seeds else ''}" if count is not None else ""
    )
    prompts = study.num_prompts(dataset)
    if prompts is not None and count is not None and prompts < count:
        suffix += f", {prompts} distinct prompt{'' if prompts == 1 else 's'}"
    return (what.capitalize() if name == kind else f"{name}: {what}") + suffix


def charts(study: Study, dataset: str, metrics: Sequence[str]) -> list[Block]:
    """Returns the small charts of metrics over exits, and one line for those that are 0 at every exit and on both
    sides."""
    flat = [metric for metric in metrics if is_flat(study, dataset, metric, study.phases(dataset))]
    full = {metric: family_of(metric) not in FORM_FAMILIES for metric in metrics}
    figures = [metric_figure(study, dataset, metric, full=full[metric]) for metric in metrics if metric not in flat]
    return [*grid(figures), *flat_line(study, dataset, flat, study.phases(dataset))]


def is_flat(study: Study, dataset: str, metric: str, columns: Sequence[str]) -> bool:
    """Returns whether a metric is 0 at every measured exit in all `columns` ("before", "after", "difference")."""
    curves = [study.curve(column, dataset, metric) for column in columns]
    means = [value.mean for curve in curves for _, value in curve]
    return len(means) > 0 and not any(means)


def flat_line(study: Study, dataset: str, metrics: Sequence[str], columns: Sequence[str]) -> list[Block]:
    """Returns one line for metrics that are 0 everywhere, with the highest end of their intervals; [] without metrics.

    For the other arguments see `is_flat`.
    """
    names = []
    for metric in metrics:
        ends = [value.high for column in columns for _, value in study.curve(column, dataset, metric)]
        highest = max((end for end in ends if end is not None), default=0.0)
        interval = text(" ", remark(f"(intervals up to {show(metric, highest)})")) if highest > 0 else ()
        names.append(text(code(metric), interval))
    if not names:
        return []
    where = "in the differences" if "difference" in columns else " and ".join(columns) + " training"
    return [note(f"0 at every exit, {where}: ", joined(names), ".")]


def _default_table(study: Study, datasets: list[str]) -> list[Block]:
    """Returns a table with a row for each main metric of each data set.

    A row has the metric's values at the default exit before and after training, and their difference.
    """
    rows = []
    columns = [phase for phase in PHASES if any(phase in study.phases(dataset) for dataset in datasets)]
    columns += ["difference"] if len(columns) == len(PHASES) else []
    for dataset in datasets:
        for metric in _metrics_to_show(study, dataset):
            values = [study.value(column, dataset, metric, study.default_exit) for column in columns]
            if family_of(metric) in MAIN_FAMILIES and any(values):
                n = next((value.n for value in values if value is not None), None)
                name = text(f"{dataset_name(dataset)} ", code(metric))
                rows.append([name, *value_cells(metric, columns, values), text(str(n or "–"))])
    head = ["What", *(COLUMN_TITLES[column] for column in columns), "n"]
    return table(f"At the default exit {study.default_exit} ({study.interval})", head, rows)


def _metrics_to_show(study: Study, dataset: str) -> list[str]:
    """Returns the metrics of a data set, refusals and accuracies first.

    Of a mixed data set, only refusals and accuracies are returned, because `safety_of_study` shows its other metrics.
    """
    names = sorted(study.metrics(dataset), key=lambda name: family_of(name) not in USEFUL_FAMILIES)
    return [name for name in names if study.kind(dataset) != "mixed" or family_of(name) in USEFUL_FAMILIES]


def _overlays(comparison: Comparison, dataset: str) -> list[Block]:
    """Returns charts of every metric of a data set that runs share.

    Charts of metrics of the responses' form (empty, truncated, degenerate) are in a collapsed section.
    """
    main: list[Block] = []
    form: list[Block] = []
    for metric in comparison.metrics(dataset):
        figure = metric_overlay(comparison, dataset, metric) if metric != HUMAN else None
        if figure is not None:
            (form if family_of(metric) in FORM_FAMILIES else main).append(figure)
    return [Heading(dataset_name(dataset)), *main, *details("Form of the responses", form)]
