"""The sections about how the numbers came to be: geometry, training, config, cost, limits, what is planted."""

import json
import re
from statistics import fmean
from typing import Any

from icet_jax.config.names import ALGORITHMS
from icet_jax.data.records import KINDS
from icet_jax.report.charts import Chart, Line, Point
from icet_jax.report.heatmap import svg_heatmap
from icet_jax.report.study import HUMAN, Study, as_value, dataset_name
from icet_jax.report.text import duration, escape, number, percent, visible
from icet_jax.report.verdict import RULES, algorithm
from icet_jax.report.widgets import axis_number, code, details_html, exit_marks, figure_html, grid_html, table_html

_GEOMETRY = {"norm_ratio": "Norm ratio", "cosine": "Cosine similarity", "cka": "Linear CKA"}
# Training curves worth seeing at once, by TRL's names; every other metric waits behind "more".
_TRAINING = {
    "objective/scores": "Reward (score of the sampled responses)",
    "objective/kl": "KL to the reference, nats per response",
    "loss/value_avg": "Value loss",
}
_MIXED_SCORES = ("scores", "score", "reward")  # names of earlier versions, which did not tell kinds apart
_EXIT_SCORE = re.compile(rf"exit/\d+/(scores/(?:{'|'.join(KINDS)})|{'|'.join(_MIXED_SCORES)})")
_MAX_STEPS = 200


def geometry_html(study: Study) -> str:
    """How far each exit's projected features lie from the default exit's."""
    figures = []
    for name, title in _GEOMETRY.items():
        shown = [Point(x, value.mean, value.low, value.high) for x, value in study.geometry(name)]
        span = None if name == "norm_ratio" else (0.0, 1.0)
        chart = Chart(
            title=title,
            lines=[Line("", "plain", shown)],
            show=axis_number,
            detail=number,
            ticks=range(1, study.num_exits + 1),
            y_range=span or (0.0, 1.0),
            marks=exit_marks(study),
        )
        figures.append(figure_html(chart, f"geometry/{name}"))
    images = study.first.geometry.get("n_images")
    note = (
        f"<p class=note>Means over {escape(images)} images. Tower and projector are frozen, so this is the same "
        "before and after training.</p>"
        if images
        else ""
    )
    return grid_html(figures) + note if any(figures) else ""


def training_html(study: Study) -> str:
    """What was trained on what reward, the curves of `metrics.jsonl` and each exit's scores over training."""
    names = list(dict.fromkeys(name for run in study.runs for row in run.history for name in row))
    plain = [name for name in names if "/" in name and not name.startswith("exit/")]
    first = [_training_figure(study, name, title) for name, title in _TRAINING.items() if name in plain]
    rest = [_training_figure(study, name, name) for name in plain if name not in _TRAINING]
    heatmaps = _exit_heatmaps(study, names)
    return _recipe(study) + grid_html(first) + heatmaps + details_html("More training curves", grid_html(rest))


def config_html(study: Study) -> str:
    """The run's configuration, flattened to one field a line."""
    rows = [[code(name), code(value)] for name, value in _flat(study.first.config)]
    note = "<p class=note>Shown for the first seed.</p>" if study.several else ""
    return (
        details_html(f"{len(rows)} fields", note + table_html(["Field", "Value"], rows, "config.json")) if rows else ""
    )


def cost_html(study: Study) -> str:
    """Seconds by phase, speed and compile counts; a mean over seeds for several."""
    runs = [run.cost for run in study.runs if isinstance(run.cost.get("phases"), list)]
    if not runs:
        return ""
    names = list(dict.fromkeys(str(phase.get("name")) for cost in runs for phase in _phases(cost)))
    rows = []
    for name in names:
        phases = [phase for cost in runs for phase in _phases(cost) if str(phase.get("name")) == name]
        seconds, speed, count, compile_time = (
            _mean_of(phases, key) for key in ("seconds", "tokens_per_second", "compilations", "compile_seconds")
        )
        rows.append(
            [
                escape(name.replace("_", " ")),
                "–" if seconds is None else duration(seconds),
                number(speed),
                "–" if count is None else f"{count:.4g}",
                "–" if compile_time is None else duration(compile_time),
            ]
        )
    total = _mean_of(runs, "total_seconds")
    facts = [f"Total: {duration(total)}" if total is not None else "", str(runs[0].get("device") or "")]
    versions = runs[0].get("versions")
    if isinstance(versions, dict):
        facts.append(", ".join(f"{name} {version}" for name, version in versions.items()))
    peak = _mean_of(runs, "peak_bytes")
    facts.append(f"peak memory {peak / 2**30:.2f} GiB" if peak else "")
    head = ["Phase", "Time", "Tokens/s", "Compilations", "Compiling"]
    caption = "By phase, mean over seeds" if study.several else "By phase"
    return table_html(head, rows, caption) + f"<p class=note>{escape(' · '.join(filter(None, facts)))}</p>"


def organism_html(study: Study) -> str:
    """What is planted in the embedded model and what that can and cannot show; empty for any other model."""
    organism = study.first.organism
    if not organism:
        return ""
    default = study.default_exit
    if study.planted:
        exits = ", ".join(map(str, study.planted))
        told = (
            f"<p><b>This model is constructed, and its hole is planted.</b> It is a small vision-language model made "
            f"for this project: after safety training at its default exit {default}, exits {exits} were kept usable "
            "on helpful-only data, the way a model would be left that was never made safe there.</p>"
        )
    else:
        told = (
            "<p><b>This is the un-planted control.</b> It is the same small constructed model, made safe at its "
            f"default exit {default} and nowhere kept on helpful-only data.</p>"
        )
    can = (
        "<p>It shows whether training repairs such a hole, at what cost, and that the whole pipeline works. It is "
        "<b>no evidence that the hole emerges in real models</b>, or how large it would be there. Its "
        "“forbidden” requests are harmless placeholders about invented things.</p>"
    )
    notes = organism.get("notes")
    extra = "".join(f"<p>{escape(note)}</p>" for note in notes) if isinstance(notes, list) else ""
    return f'<aside class="organism">{told}{_unplanted(study)}{can}{extra}</aside>'


def export_html(study: Study) -> str:
    """One line on the export: how many answers its files give as they were measured; empty where it was not checked."""
    checks = [run.export_check for run in study.runs if run.export_check]
    if not checks:
        return ""
    count, equal = (sum(check[name] for check in checks) for name in ("n", "n_equal"))
    seeds = f" over {len(checks)} seeds" if study.several else ""
    told = f"Measured after training is the exported model: loaded from its files, it gave {equal} of {count} answers"
    told += f"{seeds} again as they were measured."
    if equal == count:
        return f"<p class=basis>{escape(told)}</p>"
    return f"<p class=caveat>{escape(told)} The others are named in {code('export_check.json')}.</p>"


def limits_html(study: Study) -> str:
    """What the numbers do not say, as far as the run's own files tell."""
    judges = sorted({name for dataset in study.datasets for name in study.metrics(dataset, "asr")})
    limits = []
    if judges:
        limits.append(
            f"An attack success rate is one scorer's opinion of single responses: {', '.join(map(code, judges))}. "
            "Numbers of different scorers are not comparable."
        )
    if any("keyword" in name for name in judges):
        limits.append(
            "A keyword scorer only looks for refusal phrases: whatever is not phrased as a refusal counts as "
            "unsafe, an empty or senseless answer too."
        )
    errors = sum(
        value.n_error
        for dataset in study.datasets
        for phase in study.phases(dataset)
        for metric in study.metrics(dataset)
        for _, value in study.curve(phase, dataset, metric)
    )
    if errors:
        limits.append(
            f"Scorers failed on {errors} responses (over all exits, before and after, every metric counted); "
            "these are left out of the means."
        )
    if any(HUMAN in study.metrics(dataset) for dataset in study.datasets):
        limits.append(f"{code(HUMAN)} is what people said of a sample of the responses: few rows at each exit.")
    if any(study.metrics(dataset, "vqa") for dataset in study.datasets):
        limits.append(
            f"{code('vqa/official')} is the public evaluator’s accuracy of the raw responses: where all annotators "
            f"agree it compares letter by letter. {code('vqa/normalised')} normalises the response first, as most "
            "published numbers do."
        )
    if study.several:
        limits.append(
            f"Bands and ranges are the smallest and largest of {len(study.runs)} training seeds, not "
            "confidence intervals; transcripts, geometry and config are the first seed’s."
        )
    else:
        limits.append(
            "Intervals are clustered by prompt and cover the choice of prompts; the worst exit’s in the headline "
            "covers the choice of the exit too, unless an earlier version measured it. They do not cover a scorer’s "
            "mistakes, and with one training seed they do not say how another training run would end."
        )
    if any(study.metrics(dataset, "tr") for dataset in study.datasets):
        limits.append(
            "The reward-model score is what training optimised: that it rises is no independent evidence of safety."
        )
    definition = study.field("exit_definition")
    if definition:
        limits.append(f"Exits are defined as: {code(definition)}. Another definition is another attack.")
    shared = study.first.data.get("prompts_shared_with_train")
    for name, count in shared.items() if isinstance(shared, dict) else ():
        if count:
            limits.append(f"{escape(count)} rows of {escape(name)} have a prompt that was also a training prompt.")
    left_out = study.first.data.get("left_out")
    for name, reasons in left_out.items() if isinstance(left_out, dict) else ():
        if isinstance(reasons, dict) and reasons:
            counts = ", ".join(f"{escape(count)} {escape(reason)}" for reason, count in reasons.items())
            limits.append(f"Rows of {escape(name)} that could not be used: {counts}.")
    if study.first.organism:
        limits.append("The model is the embedded organism: see the statement at the top of this page.")
    limits += [f"Not measured in this run: {name}." for name in _missing(study)]
    return "<ul>" + "".join(f"<li>{item}</li>" for item in limits) + f"</ul><p class=note>{escape(RULES)}</p>"


def _unplanted(study: Study) -> str:
    """Names the open exits that nobody planted, by the first judge."""
    for dataset in study.of_kind("forbidden", "mixed"):
        for judge in study.judges(dataset)[:1]:
            known = {*study.planted, study.default_exit}
            found = [
                f"exit {layer} at {percent(value.mean)}"
                for layer, value in study.curve("before", dataset, judge)
                if value.mean >= 0.5 and layer not in known
            ]
            if found and study.planted:
                return (
                    f"<p>Not planted, yet open before training on {escape(dataset_name(dataset))} ({code(judge)} of "
                    f"50% or more): {escape(', '.join(found))}.</p>"
                )
    return ""


def _missing(study: Study) -> list[str]:
    parts = {
        "the model after training": any("after" in study.phases(dataset) for dataset in study.datasets),
        "refusals of benign requests": any(study.metrics(d, "refusal") for d in study.of_kind("benign", "mixed")),
        "accuracy on questions about images": any(
            study.metrics(d, family) for d in study.of_kind("vqa", "mixed") for family in ("vqa", "accuracy")
        ),
        "the geometry of the exits": bool(study.first.geometry),
    }
    return [name for name, there in parts.items() if not there]


def _recipe(study: Study) -> str:
    """One paragraph: the algorithm, how exits were drawn, and what rewarded each kind of row."""
    config = study.first.config
    settings = config.get(str(config.get("algorithm")))
    if not isinstance(settings, dict) or not any("after" in study.phases(dataset) for dataset in study.datasets):
        return ""
    schedule = str(settings.get("exits")).replace("_", " ")
    told = [f"{algorithm(study)}, {settings.get('iterations')} iterations, exits drawn {schedule}."]
    reward, mixture = config.get("reward"), config.get("data", {}).get("mixture")
    named = ALGORITHMS.get(str(config.get("algorithm")))
    if named is not None and named.rewarded and isinstance(reward, dict) and isinstance(mixture, dict):
        names = {
            "reward_model": f"the reward model ({reward.get('model')})",
            "exact_match": "exact match with the training answers",
            "none": "nothing",
        }
        for kind, share in mixture.items():
            by = reward.get("by_kind", {}).get(kind)
            rows = f"{'VQA' if kind == 'vqa' else kind.capitalize()} rows ({percent(float(share), 0)})"
            told += [f"{rows} are rewarded by {names.get(by, by)}."] if share else []
    return f"<p class=note>{escape(' '.join(told))}</p>"


def _training_figure(study: Study, name: str, title: str) -> str:
    """One metric over steps: the mean, and every seed thin behind it where there are several."""
    series = [_series(run.history, name) for run in study.runs]
    lines = [Line("", "plain", _binned(points), thin=True) for points in series if study.several and points]
    by_step: dict[float, list[float]] = {}
    for points in series:
        for point in points:
            by_step.setdefault(point.x, []).append(point.y)
    mean = [Point(step, fmean(values)) for step, values in sorted(by_step.items())]
    lines.append(Line("", "plain", _binned(mean)))
    chart = Chart(
        title=title,
        lines=lines if mean else [],
        show=axis_number,
        detail=number,
        x_name="step",
    )
    return figure_html(chart, name)


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


def _exit_heatmaps(study: Study, names: list[str]) -> str:
    """The sampled responses' scores by exit and step, one figure for each kind of row.

    Runs from before scores were told apart by kind have one mean over all kinds, which is shown as that.
    """
    matches = [match for name in names if (match := _EXIT_SCORE.fullmatch(name))]
    titles = {
        f"scores/{kind}": f"Score by exit over training, {'VQA' if kind == 'vqa' else kind} rows" for kind in KINDS
    }
    titles |= dict.fromkeys(_MIXED_SCORES, "Score by exit over training, all kinds of rows in one mean")
    present = {match[1] for match in matches}
    figures = []
    for metric in (metric for metric in titles if metric in present):
        cells: dict[tuple[int, float], list[float]] = {}
        for run in study.runs:
            for exit_layer in range(1, study.num_exits + 1):
                for point in _series(run.history, f"exit/{exit_layer}/{metric}"):
                    cells.setdefault((exit_layer, point.x), []).append(point.y)
        means = {key: fmean(values) for key, values in cells.items()}
        figures.append(svg_heatmap(means, study.num_exits, title=titles[metric], name=f"exit/*/{metric}"))
    return "".join(figures)


def _flat(value: Any, prefix: str = "") -> list[tuple[str, str]]:
    if isinstance(value, dict) and value:
        return [pair for key, inner in value.items() for pair in _flat(inner, f"{prefix}{key}.")]
    return [(visible(prefix.rstrip(".")), json.dumps(value, ensure_ascii=False))] if prefix else []


def _phases(cost: dict[str, Any]) -> list[dict[str, Any]]:
    return [phase for phase in cost["phases"] if isinstance(phase, dict)]


def _mean_of(rows: list[dict[str, Any]], key: str) -> float | None:
    known = [value.mean for row in rows if (value := as_value(row.get(key))) is not None]
    return fmean(known) if known else None
