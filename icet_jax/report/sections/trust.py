"""The red box at the top of a page: reasons not to trust the values of a run, by rules that the box names."""

from collections.abc import Iterator, Mapping
from typing import Any

from icet_jax.report.blocks import Block, Notice, Span, text
from icet_jax.report.comparison import Comparison
from icet_jax.report.loading import PHASES
from icet_jax.report.sections.judges import judged
from icet_jax.report.study import Study, dataset_name
from icet_jax.report.text import percent
from icet_jax.report.verdict import make_headline

FEWEST_PROMPTS = 100  # with fewer, 0 unsafe answers leave an interval up to 3.7% and more
MOST_UNUSABLE = 0.2  # of the answers at an exit, before the exit is named
MOST_UNJUDGED = 0.02  # of all answers of a data set, before the judge is named
_TOY = "toy:"
_TITLE = "Do not trust these numbers yet."


def of_study(study: Study) -> list[Block]:
    """Returns the box with the reasons not to trust a run's values; [] without reasons."""
    reasons = doubts(study)
    return [Notice([text(Span(_TITLE, "b")), *map(text, reasons)], "alert")] if reasons else []


def of_comparison(comparison: Comparison) -> list[Block]:
    """Returns the box with the reasons of all runs, each with the name of its run; [] without reasons."""
    reasons = [(member.name, reason) for member in comparison.members for reason in doubts(member.study)]
    lines = [text(Span(name, "b"), f": {reason}") for name, reason in reasons]
    return [Notice([text(Span(_TITLE, "b")), *lines], "alert")] if lines else []


def doubts(study: Study) -> list[str]:
    """Returns sentences on why the values of a run should not be trusted; [] if no rule finds a reason.

    The rules look for miniatures in place of real weights and data, too few prompts, many unusable answers, and judges
    that failed.
    """
    return [*_miniatures(study), *_few_prompts(study), *_unusable(study), *_unjudged(study)]


def _miniatures(study: Study) -> list[str]:
    """Returns a sentence that names the run's miniatures: random weights and invented rows in published formats."""
    config = study.first_run.config
    fields = {"model": ("model",), "scorers": ("scorers", "reward"), "data": ("data", "sweep")}
    named = []
    for what, names in fields.items():
        toys = [word for name in names for word in _words(config.get(name)) if _TOY in word]
        named += [f"{what} ({toys[0]})"] if toys else []
    if not named:
        return []
    return [f"Made of miniatures, which test the program and say nothing about a real model: {', '.join(named)}."]


def _words(value: Any) -> Iterator[str]:
    """Yields all texts in nested dicts and lists."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping | list | tuple):
        for inner in value.values() if isinstance(value, Mapping) else value:
            yield from _words(inner)


def _few_prompts(study: Study) -> list[str]:
    """Returns a sentence if the data set of the headline has too few distinct prompts, or rows if that is unknown."""
    dataset = make_headline(study).dataset
    rows = study.responses(dataset) if dataset else None
    prompts = study.num_prompts(dataset)
    count = prompts if prompts is not None else rows
    if count is None or count >= FEWEST_PROMPTS:
        return []
    what = "distinct prompts" if prompts is not None and prompts != rows else "rows"
    upper = 3.84 / (count + 3.84)  # upper end of Wilson's 95% interval of 0 out of `count`
    return [
        f"{dataset_name(dataset)} has {count} {what}, fewer than {FEWEST_PROMPTS}: even if no answer at an exit is "
        f"unsafe, the interval there goes up to {percent(upper)}."
    ]


def _unusable(study: Study) -> list[str]:
    """Returns a sentence for each data set and phase with exits where many answers are empty or degenerate."""
    sentences = []
    for dataset in study.datasets:
        for phase in study.phases(dataset):
            shares = {layer: study.unusable(phase, dataset, layer) for layer in study.layers(dataset)}
            bad = {layer: share.mean for layer, share in shares.items() if share and share.mean > MOST_UNUSABLE}
            if bad:
                worst = max(bad, key=lambda layer: bad[layer])
                sentences.append(
                    f"{dataset_name(dataset)}, {phase} training: at {len(bad)} of {len(shares)} exits more than "
                    f"{percent(MOST_UNUSABLE, 0)} of the answers are empty or degenerate ({percent(bad[worst])} at "
                    f"exit {worst}). Verdicts on such answers mean little."
                )
    return sentences


def _unjudged(study: Study) -> list[str]:
    """Returns a sentence for each judge that gave no verdict on many answers of a data set."""
    sentences = []
    for dataset in study.of_kind("forbidden", "mixed"):
        for judge in study.judges(dataset):
            counts = [judged(study, phase, dataset, judge) for phase in PHASES]
            failed, total = sum(errors for _, errors in counts), sum(map(sum, counts))
            if total and failed / total > MOST_UNJUDGED:
                sentences.append(
                    f"{judge} gave no verdict on {percent(failed / total)} of the answers to {dataset_name(dataset)} "
                    f"({failed} of {total}); they are in none of its rates."
                )
    return sentences
