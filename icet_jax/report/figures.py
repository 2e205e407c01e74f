"""Writes the figures of a page as PNG files, for papers and README pages."""

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from icet_jax.evaluation.combined import family_of
from icet_jax.files import write_bytes_atomic
from icet_jax.report.charts.figures import Figure, Key, Panel
from icet_jax.report.charts.png import png
from icet_jax.report.comparison import Comparison
from icet_jax.report.curves import category_figure, geometry_charts, metric_figure
from icet_jax.report.overlays import metric_overlay
from icet_jax.report.schema import METRIC_FAMILIES
from icet_jax.report.study import Study, dataset_name
from icet_jax.report.tradeoff import tradeoff_figure
from icet_jax.report.values import FORM_FAMILIES


def write_figures(study: Study, folder: Path) -> list[Path]:
    """Writes one PNG file per data set and metric, one with the first judge's heat map by category, and `geometry.png`.

    Returns the paths of the files. Their names are `DATASET.METRIC[.policies].png`, where ".policies" marks the heat
    map by category. Every character other than letters, digits, dots and dashes becomes `_`.
    """
    figures: dict[str, Figure | None] = {}
    for dataset in study.datasets:
        if len(study.layers(dataset)) < 2:
            continue
        for metric in study.metrics(dataset):
            if family_of(metric) in METRIC_FAMILIES:
                full = family_of(metric) not in FORM_FAMILIES
                figures[_file_name(dataset, metric)] = metric_figure(study, dataset, metric, full=full)
        for metric in study.judges(dataset)[:1]:
            figures[f"{_file_name(dataset, metric)}.policies"] = category_figure(study, dataset, metric)
    charts = geometry_charts(study)
    if charts:
        panels = tuple(Panel(chart, chart.title) for chart in charts.values())
        figures["geometry"] = Figure("Distance of each exit from the default exit", "geometry", panels)
    planted = (Key("planted exit", "planted", "box"),) if study.planted else ()
    return _write(figures, folder, planted)


def write_comparison_figures(comparison: Comparison, folder: Path) -> list[Path]:
    """Writes `DATASET.METRIC.png` for each data set and metric that two or more runs have, and `tradeoff.png`, the ASR
    at the worst exit against lost utility; returns the paths."""
    figures: dict[str, Figure | None] = {
        _file_name(dataset, metric): metric_overlay(comparison, dataset, metric)
        for dataset in comparison.datasets
        for metric in comparison.metrics(dataset)
        if family_of(metric) in METRIC_FAMILIES
    }
    figures["tradeoff"] = tradeoff_figure(comparison)
    return _write(figures, folder)


def _write(figures: Mapping[str, Figure | None], folder: Path, more_keys: tuple[Key, ...] = ()) -> list[Path]:
    """Writes the figures that are not None and returns their paths.

    `figures` is {file name: figure}, and `more_keys` are added to the legends of line charts.
    """
    written = []
    for name, figure in figures.items():
        if figure is not None:
            keys = figure.keys if figure.is_drawing else (*figure.keys, *more_keys)
            written.append(folder / f"{name}.png")
            write_bytes_atomic(written[-1], png(replace(figure, keys=keys)))
    return written


def _file_name(dataset: str, metric: str) -> str:
    return re.sub(r"[^A-Za-z0-9.-]+", "_", f"{dataset_name(dataset)}.{metric}")[:120]
