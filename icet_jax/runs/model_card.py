"""Writes the README.md of an exported model from its run directory: the training, its effect, and the limits.

The card will be published, so it names files and folders only by the last part of their paths. Everything that comes
from a file is escaped, so that the name of a data set cannot become markup.
"""

import html
import json
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import icet_jax
from icet_jax.config.names import ALGORITHMS, AlgorithmName
from icet_jax.exit_groups import EARLY_TO_LATE
from icet_jax.files import JsonObject, write_text_atomic
from icet_jax.report.loading import PHASES, Run, load_run
from icet_jax.report.method import change_by_training, configured_method, run_cost, trained_weights
from icet_jax.report.schema import metric_family
from icet_jax.report.study import Study, Value
from icet_jax.report.text import duration, number, percent, points, signed, visible
from icet_jax.runs.sources import SOURCE_JOIN

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_MARKUP = re.compile(r"([\\`*_\[\]|~#])")
# Metric families that describe an answer instead of judging it; only the report shows them.
_HIDDEN_METRICS = ("length", "empty", "truncated")
_COLUMNS = (*EARLY_TO_LATE, "average")

_LIMITS = """\
- An attack success rate is the opinion of the judge named with it, and judges differ. Responses that a judge failed on
  are left out of its mean and counted where there are any.
- The numbers hold for these prompts and images, this way of sampling and this number of responses per prompt. They say
  nothing about other languages, longer conversations, adversarial images or other ways of reading the image encoder.
- Whoever may choose the exit reaches the share of prompts with an unsafe answer at one exit at least, not that of any
  single exit. A judge's false alarms add up in it.
- Training raises the score of a reward model, which stands in for people's judgement and can be pleased in ways that
  people would not be. Read responses, not only averages.
- A lower attack success rate can be bought with refusals of harmless requests; look at the rows on refusals and on
  utility.
- One run with one seed: another seed gives somewhat other numbers, which the intervals (over prompts) do not cover.
- Whoever has the weights can undo the training by training them again.
"""
_RESPONSIBLE_USE = """\
This model is a research artefact on how safety alignment differs between the layers of an image encoder. It is not a
safeguard by itself: deploy it, if at all, behind filters and monitoring of your own, after measuring it on your own
prompts. Publish early-exit findings about other people's models responsibly: tell their makers first, and keep working
attacks and harmful responses out of what you publish.
"""
_LICENSE = (
    "## License\n\nNone is set here: these weights are derived from the base model's, whose license binds them. "
    "Add a `license` field above that it allows.\n"
)


def write_model_card(
    folder: Path, workdir: Path, *, form: str = "full", check: JsonObject | None = None
) -> Path:  # fmt: skip
    """Writes the model card to `folder`/README.md and returns that path; for the other arguments see `text`.

    Raises:
      UserError: a file of the run is broken, or `folder` cannot be written to.
    """
    path = Path(folder) / "README.md"
    write_text_atomic(path, text(workdir, form=form, check=check))
    return path


def text(
    workdir: Path, *, form: str = "full", check: JsonObject | None = None, exit_layer: int | None = None
) -> str:  # fmt: skip
    """Returns the model card of the run in `workdir`: Markdown with a YAML front matter for the Hugging Face hub.

    A section whose files the run has not written yet is left out, or says that there are no results yet.

    Args:
      workdir: run directory (of one seed).
      form: form of the export: "full" (merged weights) or "adapter" (PEFT).
      check: content of export_check.json, for a call before that file is written; None reads the file.
      exit_layer: the only exit of the exported model; None if it is the whole model.

    Raises:
      UserError: a file of the run is broken.
    """
    run = load_run(Path(workdir))
    base = str(_public(_field(run.config, "model.checkpoint")) or "an unnamed model")
    title = f"# {_plain(base)}, aligned over the exits of its image encoder"
    if exit_layer is None:
        results = [_results(run), _check(run.export_check if check is None else check, form)]
    else:
        title += f": exit {exit_layer} alone"
        results = [_results_at_exit(run, exit_layer)]
    parts = [
        _front_matter(base, form),
        f"{title}\n",
        _summary(run, base),
        "" if exit_layer is None else _one_exit(exit_layer),
        _loading(base, form, exit_layer),
        _training(run, base),
        *results,
        f"## Limits\n\n{_LIMITS}",
        f"## Responsible use\n\n{_RESPONSIBLE_USE}",
        _LICENSE,
    ]
    return "\n".join(part for part in parts if part)


def text_of_exit(
    checkpoint: str,
    exit_layer: int,
    num_exits: int,
    default_exit: int,
    *,
    revision: str | None = None,
    adapter: str | None = None,
) -> str:
    """Returns the model card of a checkpoint from which one exit alone was exported, without a run.

    Args:
      checkpoint: directory, hub id or name of the whole model; of a directory only the last part is named.
      exit_layer: the only exit of the exported model.
      num_exits: number of exits of the whole model.
      default_exit: exit that the whole model was trained with.
      revision: revision of a hub id.
      adapter: adapter that is merged into the weights, or None.
    """
    base = str(_public(checkpoint))
    added = f", with the adapter {_plain(_public(adapter))} merged into its language model" if adapter else ""
    whole = f"{_plain(base)}{f', revision {_plain(revision)}' if revision else ''}"
    parts = [
        _front_matter(base, "copy"),
        f"# {_plain(base)}: exit {exit_layer} alone\n",
        f"This is {whole}{added}. Its image encoder has {num_exits} exits, of which the whole model reads number "
        f"{default_exit}. Nothing was trained for this export.\n",
        _one_exit(exit_layer),
        _loading(base, "full", exit_layer),
        "## Measured\n\nNothing was measured for this export. A vision-language model may answer at an early exit what "
        "it refuses at its default one, so measure this exit before you deploy it:\n\n"
        f"```sh\nicet-jax sweep --checkpoint=THIS_FOLDER --config.sweep.exits={exit_layer} "
        "--config.sweep.datasets.mine=PROMPTS.csv --workdir=runs/this_exit\n```\n",
        f"## Responsible use\n\n{_RESPONSIBLE_USE}",
        _LICENSE,
    ]
    return "\n".join(parts)


def _one_exit(exit_layer: int) -> str:
    """Returns the section that says what a model with one exit alone is."""
    return (
        f"## One exit\n\nThese files hold exit {exit_layer} alone. The image encoder ends with block {exit_layer}, the "
        "blocks behind it are left out, and `vision_feature_layer` is -1, the output of the last block that is left. "
        f"The logits are those of the whole model at exit {exit_layer}.\n"
    )


def _front_matter(base: str, form: str) -> str:
    """Returns the YAML block at the top of the card; `base` is the name of the base model. `form` is "full", "adapter",
    or "copy" for weights that were not trained, a relation for which the hub has no name."""
    lines = ["---"]
    # A path or a built-in name means nothing on the hub.
    if _HUB_ID.fullmatch(base):
        relations = {"full": "finetune", "adapter": "adapter"}
        lines.append(f"base_model: {json.dumps(base)}")
        lines += [f"base_model_relation: {relations[form]}"] if form in relations else []
    lines += [
        f"library_name: {'peft' if form == 'adapter' else 'transformers'}",
        "pipeline_tag: image-text-to-text",
        "tags:",
        *(f"- {tag}" for tag in ("safety", "alignment", "early-exit", "icet", "icet-jax")),
        "# license: not set; it must be one that the base model's license allows",
        "---\n",
    ]
    return "\n".join(lines)


def _summary(run: Run, base: str) -> str:
    """Returns the first paragraphs: what the model is, trained from the model `base`, and which exits it has."""
    table = next(iter(run.tables.values()), {})
    exits = ""
    if table.get("num_exits"):
        exits = (
            f" Its image encoder has {_plain(table['num_exits'])} exits, of which the base model reads number "
            f"{_plain(table.get('default_exit'))} ({_plain(table.get('exit_definition'))})."
        )
    lines = [
        "A vision-language model reads one fixed layer of its image encoder; read at another one (an early exit, "
        f"ICET), it may answer what it otherwise refuses. This is {_plain(base)} after "
        f"{change_by_training(run.config)}.{exits}\n",
    ]
    if run.organism:
        planted = ", ".join(_plain(exit_) for exit_ in run.organism.get("planted_exits", []))
        lines.append(
            "The base model is the small embedded organism of icet_jax, not a model anyone uses: "
            + (f"its weakness at exits {planted} was planted.\n" if planted else "nothing was planted in it.\n")
        )
    return "\n".join(lines)


def _loading(base: str, form: str, exit_layer: int | None = None) -> str:
    """Returns the section with the Python code that loads the model; `exit_layer` is its only exit, or None."""
    if form == "adapter":
        code = (
            "from peft import PeftModel\nfrom transformers import AutoModelForImageTextToText\n\n"
            f"base = AutoModelForImageTextToText.from_pretrained({json.dumps(base)})\n"
            'model = PeftModel.from_pretrained(base, "THIS_FOLDER")'
        )
    else:
        code = (
            "from transformers import AutoModelForImageTextToText, AutoProcessor\n\n"
            'model = AutoModelForImageTextToText.from_pretrained("THIS_FOLDER")\n'
            'processor = AutoProcessor.from_pretrained("THIS_FOLDER")'
        )
    if exit_layer is not None:
        return f"## Loading\n\n```python\n{code}\n```\n\n`icet_jax.load` reads it too, at exits 1 to {exit_layer}.\n"
    note = "" if form == "adapter" else "\n`icet_jax.load` reads it too, at any exit. "
    return f"## Loading\n\n```python\n{code}\n```\n{note}`value_head.safetensors`, if there, is training's critic.\n"


def _training(run: Run, base: str) -> str:
    """Returns the section on the training: a table of facts and a table of settings; "" without a config."""
    config = run.config
    if not config:
        return ""
    name = str(config.get("algorithm"))
    algorithm = ALGORITHMS.get(name)
    iterations = run.history[-1].get("step") if run.history else None
    revision, adapter = _field(config, "model.revision"), _field(config, "model.adapter")
    rows, shared = _field(run.data, "rows.train"), _field(run.data, "prompts_shared_with_train")
    facts = {
        "Base model": _plain(base) + (f", revision {_plain(revision)}" if revision else ""),
        "Start adapter": _plain(_public(adapter)) if adapter else None,
        "Method": _method(run, algorithm),
        "Warm start": _warm_start(config),
        "Trained": trained_weights(config),
        "Exits during training": _plain(_field(config, f"{name}.exits")),
        "Iterations": f"{_plain(iterations or 0)} of {_plain(_field(config, f'{name}.iterations'))}",
        "Training data": _plain(_public(_field(config, "data.train"))) + (f" ({_counts(rows)})" if rows else ""),
        "Reward model": _plain(_public(_field(config, "reward.model"))) if algorithm and algorithm.rewarded else None,
        "Test prompts that are training prompts": _counts(shared),
        "Cost": _cost(run),
        "Made with": f"icet-jax {icet_jax.__version__}",
    }
    table = _table(("", ""), ([what, fact] for what, fact in facts.items() if fact))
    settings = _table(("setting", "value"), ([f"`{field}`", _plain(value)] for field, value in _settings(config, name)))
    return f"## Training\n\n{table}\nIts settings (all of the run's are in `config.json` there):\n\n{settings}"


def _warm_start(config: Mapping[str, Any]) -> str | None:
    """Returns what gave the policy that training started from; None if that was the base model."""
    spec = config.get("warm_start")
    if not spec:
        return None
    if spec not in ALGORITHMS:
        return f"the policy of the run {_plain(_public(spec))}"
    iterations, exits = (_plain(_field(config, f"{spec}.{name}")) for name in ("iterations", "exits"))
    return f"{ALGORITHMS[spec].title} ({ALGORITHMS[spec].about}), {iterations} iterations, exits {exits}"


def _counts(counts: Any) -> str:
    """Returns {name: number} as "name: number, ..."; "" if `counts` is empty or not a mapping."""
    count_by_name = counts if isinstance(counts, Mapping) else {}
    return ", ".join(f"{_plain(name)}: {_plain(count)}" for name, count in sorted(count_by_name.items()))


def _cost(run: Run) -> str | None:
    """Returns what the training and the whole run cost, in words; None if the run recorded neither."""
    cost, seconds = run_cost(run), run.cost.get("total_seconds")
    parts = [f"{cost.tokens:.0f} generated tokens" if cost.tokens is not None else ""]
    parts.append(f"{cost.flops:.2e} counted operations" if cost.flops is not None else "")
    parts.append(f"{duration(cost.seconds)} of training" if cost.seconds is not None else "")
    if isinstance(seconds, int | float):
        device = _plain(run.cost.get("device") or "an unknown device")
        parts.append(f"{duration(seconds)} in all on {device}, measuring included")
    return "; ".join(filter(None, parts)) or None


def _method(run: Run, algorithm: AlgorithmName | None) -> str:
    """Returns the name of the run's method and what its algorithm does."""
    name = configured_method(Study((run,)))
    return f"{_plain(name)} ({algorithm.about})" if algorithm else _plain(name)


def _settings(config: Mapping[str, Any], algorithm: str) -> Iterable[tuple[str, Any]]:
    """Yields the (dotted name, value) of the config fields that define a training; unset fields are left out."""
    first = [config["warm_start"]] if config.get("warm_start") in ALGORITHMS else []
    sections = dict.fromkeys(("lora", "lppo", *first, algorithm, "optimizer", "reward"))
    sections_by_name = {name: config.get(name) for name in sections}
    data = config.get("data") or {}
    sections_by_name["data"] = {name: data.get(name) for name in ("mixture", "batch_size", "max_prompt_tokens")}
    yield "seed", config.get("seed")
    for section, fields in sections_by_name.items():
        for name, value in fields.items() if isinstance(fields, Mapping) else ():
            if value is not None and value != {}:
                value = _public(value) if name == "model" else value
                yield f"{section}.{name}", value if isinstance(value, str) else json.dumps(value, default=str)


def _results(run: Run) -> str:
    """Returns the section with a table of metrics before and after training for each data set."""
    sets = list(dict.fromkeys(name for _, name in run.tables))
    if not sets:
        return "## Before and after\n\nNot measured.\n"
    parts = ["## Before and after\n"]
    if not any(side == "after" for side, _ in run.tables):
        parts.append("The trained model has not been measured; these are the base model's numbers.\n")
    parts.append(
        "Means per group of exits (early, middle and late thirds) or per exit, before → after training; in brackets "
        "the change (percentage points for shares) with its 95% interval, paired by prompt.\n"
    )
    sources = {f"{part}/{name}": source for part, name, source in _sources(run.config)}
    for name in sets:
        tables = {side: table for (side, dataset), table in run.tables.items() if dataset == name}
        source = sources.get(name)
        title = _plain(name.partition("/")[2]) + (f" ({_plain(_public(source))})" if source else "")
        parts.append(f"### {title}\n\n{_result_table(tables)}")
        parts.append(_attack_table(Study((run,)), name))
    return "\n".join(parts)


def _results_at_exit(run: Run, exit_layer: int) -> str:
    """Returns the section with a table of the metrics at one exit, before and after training, for each data set."""
    columns: dict[str, dict[str, Any]] = {}  # {data set: {side: metrics at the exit}}
    for (side, name), table in run.tables.items():
        for layer in table["layers"]:
            if layer["layer"] == exit_layer:
                columns.setdefault(name, {})[side] = layer["metrics"]
    if not columns:
        return f"## Measured at exit {exit_layer}\n\nNot measured.\n"
    folder = _plain(run.path.resolve().name)
    parts = [
        f"## Measured at exit {exit_layer}\n",
        f"Measured in the run {folder} with the whole model at exit {exit_layer}, before → after training; in brackets "
        "the change (percentage points for shares) with its 95% interval, paired by prompt. These files were not "
        "measured again.\n",
    ]
    for name, sides in columns.items():
        metrics = dict.fromkeys(metric for side in sides.values() for metric in side)
        rows = [
            [f"{_plain(metric_family(metric).title)}: {_plain(metric)}", _cell(metric, _of_metric(sides, metric))]
            for metric in metrics
            if metric.partition("/")[0] not in _HIDDEN_METRICS
        ]
        parts.append(f"### {_plain(name.partition('/')[2])}\n\n{_table(('metric', f'exit {exit_layer}'), rows)}")
    if not any("after" in sides for sides in columns.values()):
        parts.insert(1, "The trained model has not been measured at this exit; these are the base model's numbers.\n")
    return "\n".join(parts)


def _of_metric(sides: Mapping[str, Mapping[str, Any]], metric: str) -> dict[str, Any]:
    """Returns {side: estimate of one metric} from {side: metrics}."""
    return {side: metrics.get(metric) for side, metrics in sides.items()}


def _attack_table(study: Study, dataset: str) -> str:
    """Returns a Markdown table with a row per judge: ASR at the worst exit and ASR at any exit, with their intervals.

    Returns "" if ASR at any exit was not measured.
    """
    rows = []
    for metric in study.judges(dataset):
        worst = [study.worst(phase, dataset, metric) for phase in PHASES]
        sides = [study.any_exit(phase, dataset, metric) for phase in (*PHASES, "difference")]
        if not any(sides):
            continue
        exits = [f"{_with_interval(item.value, percent)} at exit {item.layer}" for item in worst if item is not None]
        anywhere = " → ".join(_with_interval(value, percent) for value in sides[:2] if value is not None)
        if sides[2] is not None:
            anywhere += f"; change {_with_interval(sides[2], points)}"
        unknown = [str(value.n_error) for value in sides[:2] if value is not None]
        if any(count != "0" for count in unknown):
            anywhere += f"; not known: {' → '.join(unknown)}"
        rows.append([_plain(metric), " → ".join(exits), anywhere])
    attempts = study.attempts(dataset)
    where = "at one exit at least" + (f", in one of {attempts} attempts" if attempts > 1 else "")
    return _table(("attack success rate", "worst exit", f"prompts with an unsafe answer {where}"), rows) if rows else ""


def _with_interval(value: Value, show: Callable[[float], str]) -> str:
    """Returns a mean as text, with its 95% interval in brackets if it is known; `show` turns a number into text."""
    if value.low is None or value.high is None:
        return show(value.mean)
    return f"{show(value.mean)} ({show(value.low)} to {show(value.high)})"


def _check(check: Mapping[str, Any], form: str) -> str:
    """Returns how many answers of the exported files equal those of the measured model; "" if they were not compared.

    Args:
      check: content of export_check.json; empty if there is no such file.
      form: form of the export that the card is about.
    """
    if not check or check.get("form") != form:
        return ""
    what = "the base with this adapter merged into it" if form == "adapter" else "these weights, merged and rounded"
    return (
        f"Measured after training are {what}. {check['n_equal']} of {check['n']} answers that were given again by the "
        "model as loaded from these files are the same, token for token.\n"
    )


def _sources(config: Mapping[str, Any]) -> Iterable[tuple[str, str, Any]]:
    """Yields ("sweep" or "utility", data set, source string) of the test sets that a config names."""
    for part, field in (("sweep", "sweep.datasets"), ("utility", "sweep.utility")):
        sources = _field(config, field)
        for name, source in sources.items() if isinstance(sources, Mapping) else ():
            yield part, name, source


def _result_table(tables: Mapping[str, Mapping[str, Any]]) -> str:
    """Returns a Markdown table of the metrics of a data set, with one row per metric.

    The columns are the groups of exits, or single exits if the sweep has too few exits for groups.

    Args:
      tables: {"before", "after" or "difference": content of that sweep file}, for those that exist.
    """
    columns = {side: _metrics_by_column(table) for side, table in tables.items()}
    first = columns.get("before") or columns.get("after") or {}
    metrics = list(dict.fromkeys(metric for column in first.values() for metric in column))
    shown_metrics = [metric for metric in metrics if metric.partition("/")[0] not in _HIDDEN_METRICS]
    rows = []
    for metric in shown_metrics:
        cells = [
            _cell(metric, {side: table.get(name, {}).get(metric) for side, table in columns.items()}) for name in first
        ]
        rows.append([f"{_plain(metric_family(metric).title)}: {_plain(metric)}", *cells])
    return _table(("metric", *map(_plain, first)), rows)


def _metrics_by_column(table: Mapping[str, Any]) -> dict[str, JsonObject]:
    """Returns {column title: metrics} of a sweep file: by group of exits, or by exit if it has no groups."""
    groups = table.get("groups") or {}
    if all(name in groups for name in _COLUMNS):
        return {name: groups[name].get("metrics", {}) for name in _COLUMNS}
    return {f"exit {layer['layer']}": layer["metrics"] for layer in table.get("layers", [])}


def _cell(metric: str, estimates: Mapping[str, Any]) -> str:
    """Returns one cell, such as "40% → 3% (-37 points, -45 to -29)"; `estimates` are before, after and difference."""
    share = metric_family(metric).share
    show, change = (percent, points) if share else (number, signed)
    estimate_of = {side: value for side, value in estimates.items() if isinstance(value, Mapping)}
    means = [show(estimate_of[side].get("mean")) for side in ("before", "after") if side in estimate_of]
    shown = " → ".join(means) or "–"
    difference = estimate_of.get("difference", {})
    if difference.get("mean") is not None:
        ends = difference.get("ci95")
        interval = f", {change(ends[0])} to {change(ends[1])}" if ends else ""
        shown += f" ({change(difference['mean'])}{interval})"
    errors = [str(estimate_of[side].get("n_error", 0)) for side in ("before", "after") if side in estimate_of]
    return shown + (f"; not judged: {' → '.join(errors)}" if any(count != "0" for count in errors) else "")


def _field(config: Mapping[str, Any], name: str) -> Any:
    """Returns the value of a dotted field; None if any part of it is absent."""
    value: Any = config
    for key in name.split("."):
        value = value.get(key) if isinstance(value, Mapping) else None
    return value


def _public(value: Any) -> Any:
    """Returns a source string or checkpoint path with every path shortened to its last part.

    Hub ids and values of other types are returned unchanged.
    """
    if not isinstance(value, str) or (_HUB_ID.fullmatch(value) and not Path(value).exists()):
        return value
    if SOURCE_JOIN in value:
        return SOURCE_JOIN.join(str(_public(part)) for part in value.split(SOURCE_JOIN))
    source, question, query = value.partition("?")
    origin, colon, path = source.rpartition(":")
    options = [option.partition("=") for option in query.split("&")]
    shortened = "&".join(name + equals + re.split(r"[/\\]", item)[-1] for name, equals, item in options)
    return origin + colon + re.split(r"[/\\]", path)[-1] + question + shortened


def _plain(value: object) -> str:
    """Returns any value as one line of text, escaped so that Markdown shows it literally."""
    return _MARKUP.sub(r"\\\1", html.escape(" ".join(visible(str(value)).split()), quote=False))


def _table(header: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """Returns a Markdown table of cells that are already escaped."""
    header = list(header)
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"
