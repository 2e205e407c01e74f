"""The overlaid curves as PNG files."""

import re
from pathlib import Path
from typing import Any

from icet_jax.files import write_bytes_atomic
from icet_jax.report.compare import Comparison
from icet_jax.report.figures import new_figure, to_png
from icet_jax.report.schema import METRIC_FAMILIES, metric_family
from icet_jax.report.study import dataset_name
from icet_jax.report.widgets import family_title

_COLOURS = ("#2563b8", "#b26b00", "#4d7f1d", "#b0327a", "#6b3fb0", "#0f7b7b", "#8c4a2f", "#5b6470")
_PATTERNS = ("-", "--", ":")


def write_figures(comparison: Comparison, folder: Path) -> list[Path]:
    """Writes `DATASET.METRIC.png` for each data set and metric that runs share, and returns their paths."""
    written = []
    for dataset in comparison.datasets:
        for metric in comparison.metrics(dataset):
            phases = comparison.phases(dataset, metric)
            if metric.partition("/")[0] in METRIC_FAMILIES and phases:
                name = re.sub(r"[^A-Za-z0-9.-]+", "_", f"{dataset_name(dataset)}.{metric}")[:120]
                written.append(folder / f"{name}.png")
                write_bytes_atomic(written[-1], _png(comparison, dataset, metric, phases))
    return written


def _png(comparison: Comparison, dataset: str, metric: str, phases: list[str]) -> bytes:
    """One panel per phase, one line per run."""
    share = metric_family(metric).share
    figure, drawn = new_figure(len(phases), width=5.0, height=3.4)
    for phase, axes in zip(phases, drawn, strict=True):
        for place, member in comparison.holders(dataset, metric):
            _draw(axes, place, member.name, [
                (member.depth(layer), 100 * value.mean if share else value.mean, layer == member.study.default_exit)
                for layer, value in member.study.curve(phase, dataset, metric)
            ])  # fmt: skip
        axes.set_title(f"{phase}: {metric}, {dataset_name(dataset)}", loc="left", fontsize=9)
        axes.set_xlabel("relative depth (exit / exits); ring: default exit", fontsize=9)
        axes.set_xlim(0, 1.03)
    drawn[0].set_ylabel(family_title(metric) + (", %" if share else ""), fontsize=9)
    low = min(axes.get_ylim()[0] for axes in drawn)
    high = max(axes.get_ylim()[1] for axes in drawn)
    for axes in drawn:
        axes.set_ylim(low, high)
    handles = {name: handle for axes in drawn for handle, name in zip(*axes.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles, loc="outside right center", frameon=False, fontsize=8)
    return to_png(figure)


def _draw(axes: Any, place: int, name: str, points: list[tuple[float, float, bool]]) -> None:
    if not points:
        return
    colour = _COLOURS[place % len(_COLOURS)]
    xs, ys = [x for x, _, _ in points], [y for _, y, _ in points]
    axes.plot(xs, ys, color=colour, linestyle=_PATTERNS[place % 3], marker="o", markersize=3.5, label=name)
    for x, y, default in points:
        if default:
            axes.plot([x], [y], marker="o", markersize=9, markerfacecolor="none", color=colour)
