"""The section of differences: after minus before on the same rows."""

from icet_jax.evaluation.combined import family_of
from icet_jax.report.blocks import Block, Heading, grid
from icet_jax.report.curves import difference_figure
from icet_jax.report.sections.measured import dataset_heading, flat_line, is_flat
from icet_jax.report.study import Study
from icet_jax.report.values import MAIN_FAMILIES


def of_study(study: Study) -> list[Block]:
    """Returns, for each data set that was measured before and after, the differences of the main metrics by exit."""
    blocks: list[Block] = []
    for dataset in study.datasets:
        metrics = [name for name in study.metrics(dataset) if family_of(name) in MAIN_FAMILIES]
        if len(study.phases(dataset)) == 2 and metrics:
            blocks.append(Heading(dataset_heading(study, dataset)))
            flat = [metric for metric in metrics if is_flat(study, dataset, metric, ["difference"])]
            blocks += grid([difference_figure(study, dataset, metric) for metric in metrics if metric not in flat])
            blocks += flat_line(study, dataset, flat, ["difference"])
    return blocks
