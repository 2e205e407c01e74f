"""The sections on training: its rewards, the curves of `metrics.jsonl`, and the configuration."""

import json
import re
from statistics import fmean
from typing import Any

from icet_jax.data.records import KINDS
from icet_jax.files import JsonObject
from icet_jax.report.blocks import Block, code, details, grid, note, table, text
from icet_jax.report.charts.figures import DataTable, Figure, Key, Panel
from icet_jax.report.charts.heatmap import step_map
from icet_jax.report.charts.lines import Chart, Point, Series
from icet_jax.report.curves import single_figure
from icet_jax.report.sections import stability
from icet_jax.report.study import Study, as_value
from icet_jax.report.text import number, without_folders
from icet_jax.report.values import axis_number

# Training curves that are shown at once, with their titles; the curves of all other metrics are collapsed.
_MAIN_CURVES = {
    "objective/scores": "Reward (score of the sampled responses)",
    "objective/kl": "KL to the reference, nats per response",
    "loss/value_avg": "Value loss",
    "val/explained_variance": "Explained variance of the value head",
}
_MIXED_SCORES = ("scores", "score", "reward")  # names in earlier versions, which had one mean over all kinds of rows
_EXIT_SCORE = re.compile(rf"exit/\d+/(scores/(?:{'|'.join(KINDS)})|{'|'.join(_MIXED_SCORES)})")
_MAX_POINTS = 200  # largest number of points of a training curve


def of_study(study: Study) -> list[Block]:
    """Returns what its guards did, the training's curves, and heat maps of each exit's scores; [] without training."""
    names = list(dict.fromkeys(name for run in study.runs for row in run.history for name in row))
    plain = [name for name in names if "/" in name and not name.startswith("exit/")]
    main = [_curve(study, name, title) for name, title in _MAIN_CURVES.items() if name in plain]
    more = [_curve(study, name, name) for name in plain if name not in _MAIN_CURVES]
    return [
        *stability.of_study(study),
        *grid(main),
        *_exit_maps(study, names),
        *details("More training curves", grid(more)),
    ]


def config_of_study(study: Study) -> list[Block]:
    """Returns the run's configuration as a collapsed table with one field per row."""
    rows = [[text(code(name)), text(code(value))] for name, value in _flatten(study.first_run.config)]
    fields = table("config.json", ["Field", "Value"], rows)
    if study.has_several_seeds and rows:
        fields = [note("Shown for the first seed."), *fields]
    return details(f"{len(rows)} fields", fields)


def _curve(study: Study, name: str, title: str) -> Figure | None:
    """Returns the figure of the metric `name` over training steps; None if no row of metrics.jsonl has the metric.

    It shows the mean over seeds and, if there are several, a thin line per seed.
    """
    points_by_run = [_points(run.history, name) for run in study.runs]
    series = [
        Series("", "plain", _thin_out(points), thin=True)
        for points in points_by_run
        if study.has_several_seeds and points
    ]
    by_step: dict[float, list[float]] = {}
    for points in points_by_run:
        for point in points:
            by_step.setdefault(point.x, []).append(point.y)
    mean = [Point(step, fmean(values)) for step, values in sorted(by_step.items())]
    series.append(Series("", "plain", _thin_out(mean)))
    return single_figure(Chart(title, series, show=axis_number, detail=number, x_name="step"), name)


def _points(history: list[JsonObject], name: str) -> list[Point]:
    """Returns a point (step, value) for each row of metrics.jsonl that has the metric `name`, in the order of steps."""
    points = []
    for index, row in enumerate(history):
        value, step = as_value(row.get(name)), as_value(row.get("step"))
        if value is not None:
            points.append(Point(step.mean if step is not None else index, value.mean))
    return sorted(points, key=lambda point: point.x)


def _thin_out(points: list[Point]) -> list[Point]:
    """Returns at most `_MAX_POINTS` points, each the mean of the same number of consecutive points.

    The last one may be the mean of fewer points.
    """
    size = -(-len(points) // _MAX_POINTS)
    if size <= 1:
        return points
    groups = [points[start : start + size] for start in range(0, len(points), size)]
    return [Point(group[len(group) // 2].x, fmean(point.y for point in group)) for group in groups]


def _exit_maps(study: Study, names: list[str]) -> list[Block]:
    """Returns heat maps of the scores of sampled responses by exit and step, one for each kind of row.

    `names` are the metrics in metrics.jsonl. Runs of earlier versions recorded one mean over all kinds of rows, which
    gives one heat map.
    """
    matches = [match for name in names if (match := _EXIT_SCORE.fullmatch(name))]
    titles = {f"scores/{kind}": f"Score by exit over training, {_kind_name(kind)} rows" for kind in KINDS}
    titles |= dict.fromkeys(_MIXED_SCORES, "Score by exit over training, all kinds of rows in one mean")
    present = {match[1] for match in matches}
    figures: list[Block] = []
    for metric in (metric for metric in titles if metric in present):
        cells: dict[tuple[int, float], list[float]] = {}
        for run in study.runs:
            for exit_layer in range(1, study.num_exits + 1):
                for point in _points(run.history, f"exit/{exit_layer}/{metric}"):
                    cells.setdefault((exit_layer, point.x), []).append(point.y)
        if cells:
            means = {key: fmean(values) for key, values in cells.items()}
            drawing, low, high = step_map(means, study.num_exits, titles[metric])
            key = Key(number(high), "after", "ramp", before=number(low))
            data = DataTable(("exit", "step", "score"), [(layer, step, mean) for (layer, step), mean in means.items()])
            panel = Panel(drawing, data=data)
            figures.append(Figure(titles[metric], f"exit/*/{metric}", (panel,), (key,), wide=True))
    return figures


def _kind_name(kind: str) -> str:
    return "VQA" if kind == "vqa" else kind


def _flatten(value: Any, prefix: str = "") -> list[tuple[str, str]]:
    """Returns (dotted name, JSON value) of every field in nested dicts; `prefix` is the name of `value` and a dot."""
    if isinstance(value, dict) and value:
        return [pair for key, inner in value.items() for pair in _flatten(inner, f"{prefix}{key}.")]
    return [(prefix.rstrip("."), without_folders(json.dumps(value, ensure_ascii=False)))] if prefix else []
