"""Names the method that trained a run, and sums up its parameters and what its training cost."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from icet_jax.config.names import ALGORITHMS, EXIT_SCHEDULES, TRAINED, AlgorithmName
from icet_jax.files import JsonObject
from icet_jax.report.loading import Run
from icet_jax.report.study import Study, as_value
from icet_jax.report.text import number
from icet_jax.report.verdict import algorithm_title

UNTRAINED = "no training"
TRAINING_STAGES = ("harvest", "warm_start", "train")
"""Stages of cost.json that are part of a method's cost; the others measure and export."""
_ANCHOR = "c E[KL(pi_ref(. | P(e_default), x, y_<t) || pi(. | P(e_l), x, y_<t))]"
_PARTS = {"policy": "language model", "projector": "projector"}
_SHARED_FIELDS = (
    "warm_start",
    "optimizer.learning_rate",
    "optimizer.schedule",
    "lora.rank",
    "lppo.train_exits",
    "seed",
)


@dataclass(frozen=True)
class TrainingCost:
    """Holds what a training cost; a quantity that the run did not record is None.

    Attributes:
      iterations: number of iterations.
      tokens: tokens that were generated to learn from, in all stages `TRAINING_STAGES`.
      flops: floating-point operations of all iterations, as `icet_jax.algorithms.utilisation` counts them, and of a
        warm start, without those of a harvest.
      seconds: duration of the stages `TRAINING_STAGES`, compilation included.
    """

    iterations: float | None = None
    tokens: float | None = None
    flops: float | None = None
    seconds: float | None = None


def is_trained(study: Study) -> bool:
    """Returns whether a run measured a model after training."""
    return any("after" in study.phases(dataset) for dataset in study.datasets)


def method_name(study: Study) -> str:
    """Returns the method that trained a run, such as "L-PPO, stratified exits, anchor 0.5"; `UNTRAINED` if the run did
    not measure a trained model."""
    return configured_method(study) if is_trained(study) else UNTRAINED


def configured_method(study: Study) -> str:
    """Returns the name of the method in a run's config: the algorithm, its exit schedule, and those settings that make
    another method of it."""
    config = study.first_run.config
    section, lppo = own_section(config), _mapping(config.get("lppo"))
    schedule = section.get("exits")
    phrases = [algorithm_title(study)]
    if schedule is not None and schedule != "fixed":
        known = EXIT_SCHEDULES.get(str(schedule))
        phrases.append(known.title if known is not None and known.title else f"exits {schedule}")
    method = algorithm(config)
    phrases += method.traits(section) if method is not None else []
    if method is not None and method.rewarded:
        phrases += _reward_traits(lppo)
    exits = lppo.get("train_exits")
    if isinstance(exits, list | tuple) and exits:
        phrases.append(f"trained at exits {', '.join(map(str, exits))}")
    return ", ".join(phrases)


def algorithm(config: JsonObject) -> AlgorithmName | None:
    """Returns the algorithm that a run's config names; None if this version does not know it."""
    return ALGORITHMS.get(str(config.get("algorithm")))


def own_section(config: JsonObject) -> Mapping[str, Any]:
    """Returns the config section of a run's algorithm; empty if the config does not have it."""
    return _mapping(config.get(str(config.get("algorithm"))))


def trained_parts(config: JsonObject) -> tuple[str, ...]:
    """Returns the parts of the model that a run trained: the language model ("policy"), the projector ("projector") or
    both; earlier versions trained the language model."""
    return TRAINED.get(str(own_section(config).get("train")), TRAINED["language"])


def trained_weights(config: JsonObject) -> str:
    """Returns which weights a run trained, in words."""
    language = (
        "the whole language model" if _mapping(config.get("lora")).get("rank") == 0 else "LoRA on the language model"
    )
    words = {"policy": language, "projector": "the whole projector"}
    return " and ".join(words[part] for part in trained_parts(config))


def change_by_training(config: JsonObject) -> str:
    """Returns what a run trained at sampled exits and what it left unchanged, as the end of a sentence."""
    parts = trained_parts(config)
    trained = " and ".join(_PARTS[part] for part in parts)
    others = [name for part, name in _PARTS.items() if part not in parts]
    unchanged = " and ".join(["image encoder", *others])
    is_one = "is" if not others else "are"
    return (
        f"its {trained} {'was' if len(parts) == 1 else 'were'} trained at sampled exits; {unchanged} {is_one} unchanged"
    )


def equation(config: JsonObject) -> str:
    """Returns the loss that a run's config asks for; "–" if this version does not know its algorithm."""
    method = algorithm(config)
    if method is None:
        return "–"
    anchor = as_value(_mapping(config.get("lppo")).get("anchor_coef"))
    has_anchor = method.rewarded and anchor is not None and anchor.mean > 0
    return method.equation + (f"; {_ANCHOR} is added to L" if has_anchor else "")


def main_settings(config: JsonObject) -> dict[str, str]:
    """Returns {dotted name of a field: its value as JSON} for the settings that define a run's method.

    They are the main fields of its algorithm's section, and learning rate, LoRA rank, exits and seed. Unset and empty
    fields are left out, and the rank where no language model was trained.
    """
    name, method, section = str(config.get("algorithm")), algorithm(config), own_section(config)
    own_fields = (method.main_fields if method is not None else ()) or tuple(section)
    values = {f"{name}.{field}": section.get(field) for field in own_fields}
    for path in _SHARED_FIELDS:
        if path == "lora.rank" and "policy" not in trained_parts(config):
            continue
        part, _, field = path.rpartition(".")
        values.setdefault(path, (_mapping(config.get(part)) if part else config).get(field))
    return {path: json.dumps(value) for path, value in values.items() if value not in (None, "", [], (), {})}


def training_cost(study: Study) -> TrainingCost:
    """Returns what a run's training cost, as the mean over its seeds."""
    costs = [run_cost(run) for run in study.runs]

    def mean(values: list[float | None]) -> float | None:
        known = [value for value in values if value is not None]
        return fmean(known) if len(known) == len(values) else None

    return TrainingCost(
        iterations=mean([cost.iterations for cost in costs]),
        tokens=mean([cost.tokens for cost in costs]),
        flops=mean([cost.flops for cost in costs]),
        seconds=mean([cost.seconds for cost in costs]),
    )


def run_cost(run: Run) -> TrainingCost:
    """Returns what the training of one run cost."""
    phases = run.cost.get("phases")
    stages = [stage for stage in phases if isinstance(stage, dict)] if isinstance(phases, list) else []
    stages = [stage for stage in stages if stage.get("name") in TRAINING_STAGES]
    seconds = [value.mean for stage in stages if (value := as_value(stage.get("seconds"))) is not None]
    tokens, flops = sum_over_iterations(run.history, "perf/tokens"), sum_over_iterations(run.history, "perf/flops")
    return TrainingCost(
        iterations=_last_step(run.history),
        tokens=None if tokens is None else tokens + _before_training(stages, "tokens"),
        flops=None if flops is None else flops + _before_training(stages, "flops"),
        seconds=sum(seconds) if seconds else None,
    )


def _before_training(stages: list[JsonObject], quantity: str) -> float:
    """Returns the sum of a quantity over the stages before the last training; a stage without it counts 0.

    The last training itself is counted from metrics.jsonl.
    """
    values = [as_value(stage.get(quantity)) for stage in stages if stage.get("name") != "train"]
    return sum((value.mean for value in values if value is not None), 0.0)


def _reward_traits(lppo: Mapping[str, Any]) -> list[str]:
    """Returns phrases on settings of `config.lppo` that change an algorithm which learns from rewards."""
    phrases = []
    anchor = as_value(lppo.get("anchor_coef"))
    if anchor is not None and anchor.mean > 0:
        phrases.append(f"anchor {anchor.mean:g}")
    if lppo.get("baseline") == "exit_kind":
        phrases.append("baselines by exit and kind")
    factors = _mapping(lppo.get("kl_coef_by_kind"))
    changed = [f"{kind} {number(value.mean)}" for kind in factors if (value := as_value(factors[kind])) is not None]
    if any(factor != 1 for factor in factors.values()) and changed:
        phrases.append(f"KL by kind ({', '.join(changed)})")
    return phrases


def sum_over_iterations(history: Sequence[JsonObject], metric: str) -> float | None:
    """Returns the sum of a metric over all iterations; None without rows, or if a row lacks it.

    Where metrics.jsonl has a row for every n-th iteration only, a row stands for the n iterations up to it.

    Args:
      history: rows of metrics.jsonl.
      metric: name of the metric.
    """
    total, previous = 0.0, 0.0
    for row in history:
        value, step = as_value(row.get(metric)), as_value(row.get("step"))
        if value is None or step is None:
            return None
        total += value.mean * (step.mean - previous)
        previous = step.mean
    return total if history else None


def _last_step(history: list[JsonObject]) -> float | None:
    step = as_value(history[-1].get("step")) if history else None
    return None if step is None else step.mean


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}
