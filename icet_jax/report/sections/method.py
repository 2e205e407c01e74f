"""The part on the method: of a run what trained it and what that cost; of several runs all methods side by side."""

from icet_jax.files import JsonObject
from icet_jax.report.blocks import Block, Heading, Span, Text, code, joined, note, remark, table, text
from icet_jax.report.charts.figures import Figure
from icet_jax.report.comparison import Comparison, Member
from icet_jax.report.method import (
    TrainingCost,
    algorithm,
    equation,
    is_trained,
    main_settings,
    method_name,
    training_cost,
)
from icet_jax.report.sections.numbers import run_name
from icet_jax.report.study import Study, Value
from icet_jax.report.text import duration, percent
from icet_jax.report.tradeoff import UTILITY_LOST, tradeoff_figure
from icet_jax.report.values import difference_text, value_text

_COST_NOTE = (
    "Tokens are those that were generated to learn from, those of a harvest included. Operations are counted from the "
    "lengths of all rows, without padding, scoring and harvest. Time includes compilation."
)
_REWARDS = {"exact_match": "exact match with the training answers", "none": "nothing"}
_FRONT_NOTE = "The dashed line joins the methods that no other one beats in both directions (the Pareto front)."


def of_study(study: Study) -> list[Block]:
    """Returns the method of a run: its name, its equation, the settings that define it, and its cost; [] if nothing
    was trained."""
    config = study.first_run.config
    if not is_trained(study) or not config:
        return []
    method = algorithm(config)
    about = f": {method.about}." if method is not None else "."
    file = f"{method.module.replace('.', '/')}.py" if method is not None else "–"
    settings = [code(f"{name} = {value}") for name, value in main_settings(config).items()]
    cost = training_cost(study)
    mean = ", mean over seeds" if study.has_several_seeds else ""
    return [
        Heading("Method"),
        note(Span(method_name(study), "b"), about, *(f" {sentence}" for sentence in _rewards(config))),
        note("Equation: ", code(equation(config)), " (step by step in ", code(file), ")."),
        note("Settings: ", joined(settings, " · "), "."),
        *table(f"What the training cost{mean}", ["What", *_COST_COLUMNS], [[text("Training"), *cost_cells(cost)]]),
        note(_COST_NOTE),
    ]


def _rewards(config: JsonObject) -> list[str]:
    """Returns a sentence for each kind of training row on what rewards it; [] if the algorithm has no rewards."""
    reward, mixture, method = config.get("reward"), config.get("data", {}).get("mixture"), algorithm(config)
    if method is None or not method.rewarded or not isinstance(reward, dict) or not isinstance(mixture, dict):
        return []
    names = _REWARDS | {"reward_model": f"the reward model ({reward.get('model')})"}
    sentences = []
    for kind, share in mixture.items():
        source = reward.get("by_kind", {}).get(kind)
        rows = f"{'VQA' if kind == 'vqa' else kind.capitalize()} rows ({percent(float(share), 0)})"
        sentences += [f"{rows} are rewarded by {names.get(source, source)}."] if share else []
    return sentences


_COST_COLUMNS = ("Iterations", "Tokens", "Operations", "Time")


def cost_cells(cost: TrainingCost) -> list[Text]:
    """Returns the cells of `_COST_COLUMNS`; "–" for what a run did not record."""
    return [
        text("–" if cost.iterations is None else f"{cost.iterations:g}"),
        text("–" if cost.tokens is None else f"{round(cost.tokens):,}".replace(",", "\u2009")),
        text("–" if cost.flops is None else f"{cost.flops:.2e}"),
        text("–" if cost.seconds is None else duration(cost.seconds)),
    ]


def of_comparison(comparison: Comparison) -> list[Block]:
    """Returns a table with a row per run (attack success rates after training, utility and cost) and the figure of
    safety against lost utility; [] if fewer than two runs were trained."""
    if sum(is_trained(member.study) for member in comparison.members) < 2 or comparison.headline is None:
        return []
    dataset, judge = comparison.headline
    rows = []
    for index, member in enumerate(comparison.members):
        cells = [*_attack_cells(member.study, dataset, judge), *_utility_cells(member)]
        rows.append([text(run_name(index, member.name)), *cells, *cost_cells(training_cost(member.study))])
    head = ["Method", "ASR, worst exit", "ASR, any exit", "Benign refused, worst exit", "Accuracy, default exit"]
    head += ["Change", *_COST_COLUMNS]
    figure = tradeoff_figure(comparison)
    shown: list[Figure] = [figure] if figure is not None else []
    explanation = [note(f"{UTILITY_LOST} {_FRONT_NOTE}")] if shown else []
    return [*table("After training; untrained models as they are", head, rows), *shown, *explanation, note(_COST_NOTE)]


def _attack_cells(study: Study, dataset: str, judge: str) -> list[Text]:
    """Returns the ASR at the worst exit and at any exit, after training if that was measured, else before."""
    phases = study.phases(dataset)
    if not phases:
        return [text("–"), text("–")]
    worst = study.worst(phases[-1], dataset, judge)
    share = value_text(judge, worst and worst.value)
    shown = text(share, " ", remark(f"exit {worst.layer}")) if worst else share
    return [shown, value_text(judge, study.any_exit(phases[-1], dataset, judge))]


def _utility_cells(member: Member) -> list[Text]:
    """Returns refusals of benign requests at the worst exit, accuracy at the default exit, and the accuracy's change
    by training, each of the first such metric of the first data set that has one."""
    study = member.study
    refused: tuple[str, Value] | None = None
    accuracy: tuple[str, str] | None = None
    for dataset in study.of_kind("benign", "mixed"):
        for metric in study.metrics(dataset, "refusal"):
            worst = study.worst(study.phases(dataset)[-1], dataset, metric)
            refused = refused or ((metric, worst.value) if worst is not None else None)
    for dataset in study.of_kind("vqa"):
        for metric in (*study.metrics(dataset, "vqa"), *study.metrics(dataset, "accuracy")):
            accuracy = accuracy or (dataset, metric)
    cells = [text("–") if refused is None else value_text(*refused)]
    if accuracy is None:
        return [*cells, text("–"), text("–")]
    dataset, metric = accuracy
    value = study.value(study.phases(dataset)[-1], dataset, metric, study.default_exit)
    change = study.value("difference", dataset, metric, study.default_exit)
    return [*cells, value_text(metric, value), difference_text(metric, change)]
