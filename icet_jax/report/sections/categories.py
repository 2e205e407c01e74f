"""The section of heat maps by category and exit: which topics of requests each exit answers, before and after."""

from statistics import fmean

from icet_jax.report.blocks import Block, Span, details, remark, table, text
from icet_jax.report.curves import MAP_TONES, category_figure, ordered_categories
from icet_jax.report.loading import PHASES
from icet_jax.report.study import Study, Value, dataset_name
from icet_jax.report.text import percent
from icet_jax.report.values import change_text


def of_study(study: Study) -> list[Block]:
    """Returns heat maps by category, for each data set with categories and each metric family in `MAP_TONES`.

    The first scorer has a heat map and a table; the heat maps of the other scorers are in a collapsed section.
    """
    blocks: list[Block] = []
    for dataset in study.datasets:
        for family in MAP_TONES:
            metrics = study.judges(dataset) if family == "asr" else study.metrics(dataset, family)
            maps = [figure for metric in metrics if (figure := category_figure(study, dataset, metric)) is not None]
            if maps:
                blocks += [maps[0], *_category_table(study, dataset, metrics[0])]
                blocks += details("The same by other scorers", maps[1:])
    return blocks


def _category_table(study: Study, dataset: str, metric: str) -> list[Block]:
    """Returns a table that summarises the heat map of a metric by category, folded up until the reader opens it.

    Each category's row has its number of data rows and, before and after training, its mean over exits and its highest
    value with the exit where it was measured.
    """
    rows = []
    for category in ordered_categories(study, dataset, metric):
        curves = [study.category_curve(side, dataset, metric, category) for side in PHASES]
        means = [Value(fmean(value.mean for _, value in curve)) if curve else None for curve in curves]
        highest = [max(curve, key=lambda item: item[1].mean, default=None) for curve in curves]
        count = max((value.n or 0 for curve in curves for _, value in curve), default=0)
        worst: list[Span] = []
        for side, exit_and_value in zip(PHASES, highest, strict=True):
            if exit_and_value is not None:
                exit_layer, value = exit_and_value
                worst += [Span(" → ", "arrow")] if worst else []
                worst += [Span(percent(value.mean), side), Span(" "), remark(f"exit {exit_layer}")]
        rows.append([text(category), text(str(count or "–")), change_text(metric, *means), tuple(worst)])
    head = ["Category", "Rows", "Mean over exits", "Highest exit"]
    values = table(f"{metric} on {dataset_name(dataset)} by category", head, rows)
    return details(f"The map of {metric} in numbers", values)
