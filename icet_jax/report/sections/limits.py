"""The section on limits: what the measured values cannot show, according to the files of the runs."""

from icet_jax.evaluation.combined import family_of
from icet_jax.report.blocks import Block, Bullets, Text, code, joined, note, text
from icet_jax.report.comparison import Comparison
from icet_jax.report.study import HUMAN, Study, dataset_name
from icet_jax.report.verdict import RULES


def of_study(study: Study) -> list[Block]:
    """Returns a list of what this run's values cannot show, and the rules by which the headline was made."""
    items = [*_of_scorers(study), *_of_intervals(study), *_of_data(study)]
    if study.first_run.organism:
        items.append(text("The model is the embedded organism: see the statement at the top of this page."))
    items += [text(f"Not measured in this run: {name}.") for name in _missing(study)]
    return [Bullets(items), note(RULES)]


def of_comparison(comparison: Comparison) -> list[Block]:
    """Returns a list of what a comparison of several runs cannot show."""
    intervals = sorted({member.study.interval for member in comparison.members})
    items = [
        text(
            "The same relative depth is not the same depth: encoders differ in blocks, in training and in what an exit "
            "is."
        ),
        text(
            "Runs are compared on metrics of one name, that is by one scorer. Between runs nothing is paired: no "
            "interval here is that of a difference between two models."
        ),
        text(f"Bands are each run’s own: {'; '.join(intervals)}."),
    ]
    for member, dataset, metrics in comparison.alone():
        where = f" on {dataset_name(dataset)} ({member.name})."
        items.append(text("Measured in one run alone and not shown: ", code(", ".join(metrics)), where))
    return [Bullets(items)]


def _of_scorers(study: Study) -> list[Text]:
    """Returns sentences on what the scorers' verdicts mean, and on how many responses they failed."""
    judges = sorted({name for dataset in study.datasets for name in study.metrics(dataset, "asr")})
    items = []
    if judges:
        names = joined([code(judge) for judge in judges])
        opinion = "An attack success rate is one scorer's opinion of single responses: "
        items.append(text(opinion, names, ". Numbers of different scorers are not comparable."))
    if any("keyword" in name for name in judges):
        items.append(
            text(
                "A keyword scorer only looks for refusal phrases: whatever is not phrased as a refusal counts as "
                "unsafe, an empty or senseless answer too."
            )
        )
    items += _of_any_exit(study)
    errors = _unscored(study)
    if errors:
        items.append(
            text(
                f"Scorers failed on {errors} responses (over all exits, before and after, every metric counted); "
                "these are left out of the means."
            )
        )
    if any(HUMAN in study.metrics(dataset) for dataset in study.datasets):
        items.append(text(code(HUMAN), " is what people said of a sample of the responses: few rows at each exit."))
    if any(study.metrics(dataset, "vqa") for dataset in study.datasets):
        official = (
            " is the public evaluator’s accuracy of the raw responses: where all annotators agree it compares letter "
            "by letter. "
        )
        normalised = " normalises the response first, as most published numbers do."
        items.append(text(code("vqa/official"), official, code("vqa/normalised"), normalised))
    return items


def _of_any_exit(study: Study) -> list[Text]:
    """Returns sentences on what ASR at any exit means, and on the number of prompts for which it is unknown."""
    values = [
        value
        for dataset in study.of_kind("forbidden", "mixed")
        for phase in study.phases(dataset)
        for judge in study.judges(dataset)
        if (value := study.any_exit(phase, dataset, judge)) is not None
    ]
    if not values:
        return []
    items = [
        text(
            "ASR at any exit counts a prompt if one of its answers is unsafe, at whichever exit: whoever may choose "
            "the exit reaches that. A judge’s false alarms add up in it, over all exits and attempts."
        )
    ]
    unknown = sum(value.n_error for value in values)
    if unknown:
        items.append(
            text(
                f"In {unknown} cases (before and after, every judge counted) a prompt has no unsafe answer, but a "
                "judge failed on one of its answers; ASR at any exit leaves these prompts out."
            )
        )
    return items


def _of_intervals(study: Study) -> list[Text]:
    """Returns sentences on which sources of variation the intervals include.

    If the sweeps have the reward model's score, a further sentence warns that training optimised it.
    """
    if study.has_several_seeds:
        words = (
            f"Bands and ranges are the smallest and largest of {len(study.runs)} training seeds, not "
            "confidence intervals; transcripts, geometry and config are the first seed’s."
        )
    else:
        words = (
            "Intervals are clustered by prompt and cover the choice of prompts; the worst exit’s in the headline "
            "covers the choice of the exit too, unless an earlier version measured it. They do not cover a scorer’s "
            "mistakes, and with one training seed they do not say how another training run would end."
        )
    items = [text(words)]
    if any(study.metrics(dataset, "tr") for dataset in study.datasets):
        items.append(
            text(
                "The reward-model score is what training optimised: that it rises is no independent evidence of safety."
            )
        )
    return items


def _of_data(study: Study) -> list[Text]:
    """Returns sentences on the exit definition, test prompts that were training prompts, and unusable rows."""
    items = []
    definition = study.field("exit_definition")
    if definition:
        items.append(text("Exits are defined as: ", code(str(definition)), ". Another definition is another attack."))
    shared = study.first_run.data.get("prompts_shared_with_train")
    for name, count in shared.items() if isinstance(shared, dict) else ():
        if count:
            items.append(text(f"{count} rows of {name} have a prompt that was also a training prompt."))
    left_out = study.first_run.data.get("left_out")
    for name, reasons in left_out.items() if isinstance(left_out, dict) else ():
        if isinstance(reasons, dict) and reasons:
            counts = ", ".join(f"{count} {reason}" for reason, count in reasons.items())
            items.append(text(f"Rows of {name} that could not be used: {counts}."))
    return items


def _unscored(study: Study) -> int:
    """Returns the number of responses on which scorers failed, over all exits, both sides and all metrics."""
    return sum(
        value.n_error
        for dataset in study.datasets
        for phase in study.phases(dataset)
        for metric in study.metrics(dataset)
        if family_of(metric) != "asr@k"  # the same errors once more
        for _, value in study.curve(phase, dataset, metric)
    )


def _missing(study: Study) -> list[str]:
    """Returns what the run did not measure, as noun phrases."""
    parts = {
        "the model after training": any("after" in study.phases(dataset) for dataset in study.datasets),
        "refusals of benign requests": any(study.metrics(d, "refusal") for d in study.of_kind("benign", "mixed")),
        "accuracy on questions about images": any(
            study.metrics(d, family) for d in study.of_kind("vqa", "mixed") for family in ("vqa", "accuracy")
        ),
        "the geometry of the exits": bool(study.first_run.geometry),
    }
    return [name for name, is_present in parts.items() if not is_present]
