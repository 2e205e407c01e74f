"""How the model was trained: what rewarded it, the curves of `metrics.jsonl`, and the configuration."""

import json
import re
from statistics import fmean
from typing import Any

from icet_jax.config.names import ALGORITHMS
from icet_jax.data.records import KINDS
from icet_jax.report.blocks import Block, code, details, grid, note, table, text
from icet_jax.report.charts.figures import Figure, Key, Panel
from icet_jax.report.charts.heatmap import step_map
from icet_jax.report.charts.lines import Chart, Line, Point
from icet_jax.report.curves import single_figure
from icet_jax.report.study import Study, as_value
from icet_jax.report.text import number, percent
from icet_jax.report.values import axis_number
from icet_jax.report.verdict import algorithm

# Training curves worth seeing at once, by TRL's names; every other metric waits behind "more".
_TRAINING = {
    "objective/scores": "Reward (score of the sampled responses)",
    "objective/kl": "KL to the reference, nats per response",
    "loss/value_avg": "Value loss",
}
_MIXED_SCORES = ("scores", "score", "reward")  # names of earlier versions, which did not tell kinds apart
_EXIT_SCORE = re.compile(rf"exit/\d+/(scores/(?:{'|'.join(KINDS)})|{'|'.join(_MIXED_SCORES)})")
_MAX_STEPS = 200
_REWARDS = {"exact_match": "exact match with the training answers", "none": "nothing"}


def of_study(study: Study) -> list[Block]:
    """What was trained on what reward, the curves of `metrics.jsonl` and each exit's scores over training."""
    names = list(dict.fromkeys(name for run in study.runs for row in run.history for name in row))
    plain = [name for name in names if "/" in name and not name.startswith("exit/")]
    first = [_curve(study, name, title) for name, title in _TRAINING.items() if name in plain]
    rest = [_curve(study, name, name) for name in plain if name not in _TRAINING]
    return [
        *_recipe(study),
        *grid(first),
        *_exit_maps(study, names),
        *details("More training curves", grid(rest)),
    ]


def config_of_study(study: Study) -> list[Block]:
    """The run's configuration, flattened to one field a line."""
    rows = [[text(code(name)), text(code(value))] for name, value in _flat(study.first.config)]
    fields = table("config.json", ["Field", "Value"], rows)
    if study.several and rows:
        fields = [note("Shown for the first seed."), *fields]
    return details(f"{len(rows)} fields", fields)


def _recipe(study: Study) -> list[Block]:
    """One paragraph: the algorithm, how exits were drawn, and what rewarded each kind of row."""
    config = study.first.config
    settings = config.get(str(config.get("algorithm")))
    if not isinstance(settings, dict) or not any("after" in study.phases(dataset) for dataset in study.datasets):
        return []
    schedule = str(settings.get("exits")).replace("_", " ")
    sentences = [f"{algorithm(study)}, {settings.get('iterations')} iterations, exits drawn {schedule}."]
    reward, mixture = config.get("reward"), config.get("data", {}).get("mixture")
    named = ALGORITHMS.get(str(config.get("algorithm")))
    if named is not None and named.rewarded and isinstance(reward, dict) and isinstance(mixture, dict):
        names = _REWARDS | {"reward_model": f"the reward model ({reward.get('model')})"}
        for kind, share in mixture.items():
            by = reward.get("by_kind", {}).get(kind)
            rows = f"{'VQA' if kind == 'vqa' else kind.capitalize()} rows ({percent(float(share), 0)})"
            sentences += [f"{rows} are rewarded by {names.get(by, by)}."] if share else []
    return [note(" ".join(sentences))]


def _curve(study: Study, name: str, title: str) -> Figure | None:
    """One metric over steps: the mean, and every seed thin behind it where there are several."""
    series = [_series(run.history, name) for run in study.runs]
    lines = [Line("", "plain", _binned(points), thin=True) for points in series if study.several and points]
    by_step: dict[float, list[float]] = {}
    for points in series:
        for point in points:
            by_step.setdefault(point.x, []).append(point.y)
    mean = [Point(step, fmean(values)) for step, values in sorted(by_step.items())]
    lines.append(Line("", "plain", _binned(mean)))
    return single_figure(Chart(title, lines, show=axis_number, detail=number, x_name="step"), name)


def _series(history: list[dict[str, Any]], name: str) -> list[Point]:
    points = []
    for index, row in enumerate(history):
        value, step = as_value(row.get(name)), as_value(row.get("step"))
        if value is not None:
            points.append(Point(step.mean if step is not None else index, value.mean))
    return sorted(points, key=lambda point: point.x)


def _binned(points: list[Point]) -> list[Point]:
    """At most `_MAX_STEPS` points: means of equal stretches."""
    size = -(-len(points) // _MAX_STEPS)
    if size <= 1:
        return points
    stretches = [points[start : start + size] for start in range(0, len(points), size)]
    return [Point(part[len(part) // 2].x, fmean(point.y for point in part)) for part in stretches]


def _exit_maps(study: Study, names: list[str]) -> list[Block]:
    """The sampled responses' scores by exit and step, one figure for each kind of row.

    Runs from before scores were told apart by kind have one mean over all kinds, which is shown as that.
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
                for point in _series(run.history, f"exit/{exit_layer}/{metric}"):
                    cells.setdefault((exit_layer, point.x), []).append(point.y)
        if cells:
            means = {key: fmean(values) for key, values in cells.items()}
            drawing, low, high = step_map(means, study.num_exits, titles[metric])
            key = Key(number(high), "after", "ramp", before=number(low))
            figures.append(Figure(titles[metric], f"exit/*/{metric}", (Panel(drawing),), (key,), wide=True))
    return figures


def _kind_name(kind: str) -> str:
    return "VQA" if kind == "vqa" else kind


def _flat(value: Any, prefix: str = "") -> list[tuple[str, str]]:
    if isinstance(value, dict) and value:
        return [pair for key, inner in value.items() for pair in _flat(inner, f"{prefix}{key}.")]
    return [(prefix.rstrip("."), json.dumps(value, ensure_ascii=False))] if prefix else []
