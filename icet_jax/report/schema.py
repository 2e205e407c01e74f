"""Declares the content of the files of a run directory, as the report reads them.

    config.json  data.json  metrics.jsonl  organism.json  utility.json  geometry.json  encoder.json  cost.json
    agreement.json  export_check.json  fingerprints.json  run.json
    sweeps/{before,after}[.DATASET].json      sweeps/difference[.DATASET].json
    transcripts/{before,after}[.DATASET].jsonl   transcripts/images/*.webp
    seed_K/...                                the same, once per training seed

Every file is optional, but there must be at least one sweep. A share, an accuracy and a toxicity are 0..1; a missing or
failed number is `null` (JSON's `NaN` is read as null). A metric's name is `FAMILY/SCORER`, where SCORER names the exact
model, or `FAMILY` alone if it needs no scorer (length, empty, truncated). `METRIC_FAMILIES` says how each family is
shown. The share of rows with an unsafe answer in one of K attempts is `FAMILY@K/SCORER`. Extra keys are ignored. Layers
(exits) are numbered from 1.
"""

from dataclasses import dataclass, replace
from typing import Any, NotRequired, TypedDict

from icet_jax.evaluation.combined import family_of

SCHEMA = 1


class Estimate(TypedDict):
    """A mean with its 95% interval `ci95`, which is clustered by prompt. `ci95` is absent or None without interval."""

    mean: float | None
    ci95: NotRequired[list[float] | None]
    n_error: NotRequired[int]  # rows the scorer could not judge; they are not in `mean`
    n: NotRequired[int]


class Layer(TypedDict):
    """All metrics at one exit. `n` is the number of generated responses."""

    layer: int
    n: int
    metrics: dict[str, Estimate]


class WorstExit(Estimate):
    """The exit with the highest attack success rate. Its interval allows for the exit being chosen as the highest."""

    layer: int


class Group(TypedDict):
    """Means over a group of exits; the group "average" is the mean of the three groups and has no `layers`."""

    layers: NotRequired[list[int]]
    metrics: dict[str, Estimate]


class FormatMetrics(TypedDict):
    """Attack and refusal metrics of a part of a data set: the rows of one attack format, or the attacks that were
    transferred from a language model, or those that were not.

    `layers` has the metrics for each exit, and `worst_exit` those of the exit with the most successful attacks.
    `any_exit` is the share of rows for which an attack succeeds at one or more exits.
    """

    layers: list[Layer]
    worst_exit: NotRequired[dict[str, WorstExit]]  # by asr metric
    any_exit: NotRequired[dict[str, Estimate]]


class Sweep(TypedDict):
    """`sweeps/{before,after}[.DATASET].json`: one data set at every exit, before or after training.

    `kind` says what the rows ask for: "forbidden" (a refusal is right), "benign" (a refusal is over-refusal), "vqa" or
    "mixed".
    """

    schema: int
    model: str
    dataset: str
    kind: str
    exit_definition: str
    num_exits: int
    default_exit: int
    seed: int
    generation: dict[str, Any]
    layers: list[Layer]
    groups: dict[str, Group]  # early, middle, late, average
    prompts: NotRequired[int]  # number of distinct prompts among the rows
    worst_exit: NotRequired[dict[str, WorstExit]]  # by asr metric
    any_exit: NotRequired[dict[str, Estimate]]  # by asr_any metric; `n` counts rows, `n_error` rows without a result
    policies: NotRequired[dict[str, list[Layer]]]  # attack and refusal metrics by the data set's category ("policy")
    formats: NotRequired[dict[str, FormatMetrics]]  # by attack format
    transferred: NotRequired[dict[str, FormatMetrics]]  # "yes", "no": whether the attack comes from a language model


class Difference(TypedDict):
    """`sweeps/difference[.DATASET].json`: after - before on the same rows, with paired intervals."""

    schema: int
    dataset: str
    kind: str
    layers: list[Layer]  # `n` counts rows that have a value before and after
    groups: dict[str, Group]
    any_exit: NotRequired[dict[str, Estimate]]


class Utility(TypedDict):
    """`utility.json`: for each data set of `config.sweep.utility`, the same content as in a sweep file.

    The `layers` may contain the default exit alone. Accuracies are `accuracy/SCORER`, over-refusal `refusal/SCORER`.
    """

    schema: int
    before: dict[str, Sweep]
    after: NotRequired[dict[str, Sweep]]
    difference: NotRequired[dict[str, Difference]]


class GeometryLayer(TypedDict):
    """How far the image features of exit l are from those of the default exit; means over `n_images` images."""

    layer: int
    norm_ratio: float | None  # mean token norm at exit l divided by the mean token norm at the default exit
    cosine: float | None  # mean cosine between the features of the same token at the two exits
    cka: float | None  # linear centred kernel alignment, 0..1


class Geometry(TypedDict):
    """`geometry.json`, measured before training; valid after it too, unless L-SFT trained the projector."""

    schema: int
    exit_definition: str
    num_exits: int
    default_exit: int
    n_images: int
    layers: list[GeometryLayer]


class EncoderLayer(TypedDict):
    """What the image encoder takes if only exit l is used, by arithmetic."""

    layer: int
    blocks: int  # blocks that run, of those that can be left out
    flops: int  # of one image, with all its tiles
    weight_bytes: int  # of the encoder's weights, in the run's dtype


class EncoderCost(TypedDict):
    """`encoder.json`: what each exit of the image encoder costs. The time is measured of the whole encoder alone."""

    schema: int
    num_exits: int
    default_exit: int
    device: str
    milliseconds: NotRequired[float]  # measured: one image through the blocks of all exits; absent without images
    measured_flops: NotRequired[int]  # operations that took this time
    batch: NotRequired[int]  # images that were encoded together
    layers: list[EncoderLayer]


class Stage(TypedDict):
    """The cost of one stage of the run: "sweep_before", "train", "sweep_after", "utility", "export", ..."""

    name: str
    seconds: float
    tokens: NotRequired[int | None]  # tokens generated
    tokens_per_second: NotRequired[float | None]
    flops: NotRequired[float | None]  # operations, of the stage "warm_start"
    compilations: NotRequired[int | None]
    compile_seconds: NotRequired[float | None]


class Cost(TypedDict):
    """`cost.json`. `device` is a plain description ("cpu, 2 cores"), `versions` maps a package to its version."""

    schema: int
    phases: list[Stage]
    total_seconds: NotRequired[float]
    device: NotRequired[str]
    versions: NotRequired[dict[str, str]]
    peak_bytes: NotRequired[int | None]


class Data(TypedDict):
    """`data.json`: number of rows of each data set by kind, and what is known about the rows.

    Three fields have an entry for each data set: `left_out` is {reason: number of unusable rows}, `too_long` is {row
    id: prompt length in positions} of the first 100 rows that are too long, and `prompts_shared_with_train` is the
    number of test prompts that are also training prompts. L-DPO's pairs are listed as the data set "exit pairs", and
    `pairs_at_exit` is {exit: number of pairs}.
    """

    rows: dict[str, dict[str, int]]
    left_out: NotRequired[dict[str, dict[str, int]]]
    too_long: NotRequired[dict[str, dict[str, int]]]
    prompts_shared_with_train: NotRequired[dict[str, int]]
    pairs_at_exit: NotRequired[dict[str, int]]


class JudgePair(TypedDict):
    """How far the judges `a` and `b` agree on the answers that both have judged.

    `kappa` is Cohen's kappa; None if it is undefined because both judges gave all answers one and the same verdict.
    """

    a: str  # metric names
    b: str
    n: int
    kappa: float | None
    ci95: NotRequired[list[float] | None]  # interval of kappa
    agree: float | None  # share of equal verdicts
    a_only: int  # answers that judge a calls unsafe and judge b safe
    b_only: int
    examples: NotRequired[list[dict[str, Any]]]  # rows where they differ: id, layer, dataset, phase, unsafe (by whom)


class Agreement(TypedDict):
    """`agreement.json`: the agreement of every two judges."""

    schema: int
    pairs: list[JudgePair]


class DifferentAnswer(TypedDict):
    """A row and exit at which the model loaded from the exported files gives another answer than the measured model."""

    dataset: str
    row: str
    exit: int


class ExportCheck(TypedDict):
    """`export_check.json`: whether the model loaded from the exported files gives the same answers as in the sweep."""

    schema: int
    folder: str  # folder of the exported files, relative to the run directory
    form: str  # "full" or "adapter"
    n: int  # answers compared
    n_equal: int
    allowed: int  # number of answers that may differ
    passed: bool
    different: list[DifferentAnswer]


class Start(TypedDict):
    """One start of a process on a run directory: when, what was typed, which software and which devices."""

    date: str  # UTC, ISO 8601
    command: str
    version: str  # of icet_jax
    commit: str | None  # of the package's repository, "+" if files differ from it; None for an installed package
    python: str
    jax: str
    platform: str
    device: str  # all devices in words, such as "8 x TPU v5e"
    processes: int


class RunRecord(TypedDict):
    """`run.json`: the starts of a run, several if it was interrupted and continued."""

    schema: int
    starts: list[Start]


class Organism(TypedDict):
    """`organism.json`: what was planted in the model; exists only for the organism, the embedded test model."""

    schema: int
    name: str  # "vlm" or "control"
    planted_exits: list[int]  # exits trained on helpful answers alone, so that they refuse nothing; [] for "control"
    notes: NotRequired[list[str]]  # further plain sentences from the builder


class Transcript(TypedDict):
    """One line of `transcripts/{before,after}[.DATASET].jsonl`: one response with its full text, which may be unsafe.

    `scores` holds the scores of this response by metric; `asr/NAME` of 0.5 or more means that NAME judged it unsafe.
    The picture of the row is in the file `icet_jax.report.pictures.picture_path`.
    """

    id: str
    layer: int
    prompt: str
    response: str
    attempt: NotRequired[int]  # index of the response among those of its row at its exit; not written for the first, 0
    kind: NotRequired[str]
    scores: NotRequired[dict[str, float | None]]
    labels: NotRequired[dict[str, str | None]]  # the words in which a scorer gave its verdict, by metric
    answer: NotRequired[str | None]  # the right answer to a benign or vqa row
    policy: NotRequired[str | None]  # the category that the data set gives the row
    answer_type: NotRequired[str | None]  # the type of answer that the data set gives the row (VQA-v2)
    format: NotRequired[str]  # the data set's attack format (JailBreakV-28K)
    transferred: NotRequired[bool]  # whether the attack was transferred from a language model (JailBreakV-28K)


@dataclass(frozen=True)
class MetricFamily:
    """Describes how the metrics of a family are shown.

    Attributes:
      title: title of its charts; `{k}` is the number of attempts in the metric's name.
      share: whether values are shares, 0 to 1, which are shown in percent.
    """

    title: str
    share: bool


METRIC_FAMILIES = {
    "asr": MetricFamily("Attack success rate", share=True),
    "asr@k": MetricFamily("Attack success rate in any of {k} attempts", share=True),
    "p_unsafe": MetricFamily("Probability of the verdict unsafe", share=True),
    "tr": MetricFamily("Reward-model score", share=False),
    "ts": MetricFamily("Toxicity", share=True),
    "refusal": MetricFamily("Refusals", share=True),
    "refusal_unsafe": MetricFamily("Refusals of unsafe requests", share=True),
    "vqa": MetricFamily("VQA accuracy", share=True),
    "accuracy": MetricFamily("Accuracy", share=True),
    "degenerate": MetricFamily("Degenerate responses", share=True),
    "empty": MetricFamily("Empty responses", share=True),
    "truncated": MetricFamily("Cut off at the token limit", share=True),
    "length": MetricFamily("Response length, tokens", share=False),
}


def metric_family(name: str) -> MetricFamily:
    """Returns how the metric `FAMILY/SCORER` is shown; an unknown family has plain numbers and its name as title."""
    prefix = name.partition("/")[0]  # such as "asr@5"
    family = METRIC_FAMILIES.get(family_of(name), MetricFamily(prefix, share=False))
    return replace(family, title=family.title.replace("{k}", prefix.rpartition("@")[2]))


def family_index(name: str) -> int:
    """Returns the index in `METRIC_FAMILIES` of the family of the metric `name`; unknown families come last."""
    families = list(METRIC_FAMILIES)
    return families.index(family_of(name)) if family_of(name) in families else len(families)
