"""The files of a run directory, as the report reads them.

    config.json  data.json  metrics.jsonl  organism.json  utility.json  geometry.json  cost.json  agreement.json
    export_check.json
    sweeps/{before,after}[.DATASET].json      sweeps/difference[.DATASET].json
    transcripts/{before,after}[.DATASET].jsonl   transcripts/images/*.png
    seed_K/...                                the same, once per training seed

Every file is optional except one sweep. A share, an accuracy and a toxicity are 0..1; a missing or failed number is
`null` (JSON's `NaN` is read as null). A metric's name is `FAMILY/SCORER`, the scorer to its exact model; what needs no
scorer is `FAMILY` alone (length, empty, truncated). The family says how it is read: `METRIC_FAMILIES`. A share over K
attempts is `FAMILY@K/SCORER`. Extra keys are ignored. Layers (exits) are numbered from 1.
"""

from dataclasses import dataclass, replace
from typing import Any, NotRequired, TypedDict

from icet_jax.evaluation.combined import family_of

SCHEMA = 1


class Estimate(TypedDict):
    """One number with its interval. `ci95` is clustered by prompt, or absent where no interval exists."""

    mean: float | None
    ci95: NotRequired[list[float] | None]
    n_error: NotRequired[int]  # rows the scorer could not judge; they are not in `mean`
    n: NotRequired[int]


class Layer(TypedDict):
    """Everything measured at one exit. `n` counts generated responses."""

    layer: int
    n: int
    metrics: dict[str, Estimate]


class WorstExit(Estimate):
    """The exit with the highest attack success rate. `ci95` is of that maximum, the choice of the exit included."""

    layer: int


class Group(TypedDict):
    """Average over the exits of a group; `average` is the mean of the three groups and has no `layers`."""

    layers: NotRequired[list[int]]
    metrics: dict[str, Estimate]


class Part(TypedDict):
    """The rows of one attack format of a data set: attack and refusal metrics at every exit, worst exit, any exit."""

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
    worst_exit: NotRequired[dict[str, WorstExit]]  # by asr metric
    any_exit: NotRequired[dict[str, Estimate]]  # asr_any metrics; n are rows, n_error those of which it is unknown
    policies: NotRequired[dict[str, list[Layer]]]  # attack and refusal metrics of the rows of each policy
    formats: NotRequired[dict[str, Part]]  # by attack format
    transferred: NotRequired[dict[str, Part]]  # "yes", "no": whether the attack comes from a language model


class Difference(TypedDict):
    """`sweeps/difference[.DATASET].json`: after - before on the same rows, with paired intervals."""

    schema: int
    dataset: str
    kind: str
    layers: list[Layer]  # n = pairs
    groups: dict[str, Group]
    any_exit: NotRequired[dict[str, Estimate]]


class Utility(TypedDict):
    """`utility.json`: what the model can still do. Each value maps a data set's name to an object of the sweep's form.

    Its `layers` may cover the default exit alone. Accuracies are `accuracy/SCORER`, over-refusal `refusal/SCORER`.
    """

    schema: int
    before: dict[str, Sweep]
    after: NotRequired[dict[str, Sweep]]
    difference: NotRequired[dict[str, Difference]]


class GeometryLayer(TypedDict):
    """How far P(e_l) lies from the default exit's P(e_L). Plain numbers; a mean over `n_images` images."""

    layer: int
    norm_ratio: float | None  # mean token norm at exit l over that at the default exit
    cosine: float | None  # mean cosine between the same token at the two exits
    cka: float | None  # linear centred kernel alignment, 0..1


class Geometry(TypedDict):
    """`geometry.json`. Tower and projector are frozen, so one file serves before and after."""

    schema: int
    exit_definition: str
    num_exits: int
    default_exit: int
    n_images: int
    layers: list[GeometryLayer]


class Phase(TypedDict):
    """One stretch of the run: "sweep_before", "train", "sweep_after", "utility", "export", "report", ..."""

    name: str
    seconds: float
    tokens: NotRequired[int | None]  # tokens generated
    tokens_per_second: NotRequired[float | None]
    compilations: NotRequired[int | None]
    compile_seconds: NotRequired[float | None]


class Cost(TypedDict):
    """`cost.json`. `device` is a plain description ("cpu, 2 cores"), `versions` maps a package to its version."""

    schema: int
    phases: list[Phase]
    total_seconds: NotRequired[float]
    device: NotRequired[str]
    versions: NotRequired[dict[str, str]]
    peak_bytes: NotRequired[int | None]


class Data(TypedDict):
    """`data.json`: rows of each set by kind, and how many test prompts of each set are training prompts too.

    `left_out` has, by set, how many rows of its source could not be used, by reason; `too_long`, by set, the positions
    that the prompts of rows take which do not fit, by row id (the first 100).
    """

    rows: dict[str, dict[str, int]]
    left_out: NotRequired[dict[str, dict[str, int]]]
    too_long: NotRequired[dict[str, dict[str, int]]]
    prompts_shared_with_train: NotRequired[dict[str, int]]


class Pair(TypedDict):
    """Two judges of attacks on the answers that both have judged; `kappa` is Cohen's (None: chance alone agrees)."""

    a: str  # metric names
    b: str
    n: int
    kappa: float | None
    ci95: NotRequired[list[float] | None]  # of kappa
    agree: float | None  # share of equal verdicts
    a_only: int  # answers that a alone calls unsafe
    b_only: int
    examples: NotRequired[list[dict[str, Any]]]  # differing rows: id, layer, dataset, phase, unsafe (who says so)


class Agreement(TypedDict):
    """`agreement.json`."""

    schema: int
    pairs: list[Pair]


class DifferentAnswer(TypedDict):
    """An answer that the exported files give otherwise than it was measured."""

    dataset: str
    row: str
    exit: int


class ExportCheck(TypedDict):
    """`export_check.json`: answers of the sweep after training, given again by the model as loaded from its files."""

    schema: int
    folder: str  # of the export, in the run directory
    form: str  # "full" or "adapter"
    n: int
    n_equal: int
    allowed: int  # how many may differ
    passed: bool
    different: list[DifferentAnswer]


class Organism(TypedDict):
    """`organism.json`: present when the model is the embedded organism; it makes the report say what is planted."""

    schema: int
    name: str  # "vlm" or "control"
    planted_exits: list[int]  # exits that got helpful-only replay; empty for the un-planted control
    notes: NotRequired[list[str]]  # further plain sentences from the builder


class Transcript(TypedDict):
    """One line of `transcripts/{before,after}[.DATASET].jsonl`: one response, raw: the report redacts, not the file.

    `scores` holds the row's own numbers under the metrics' names; `asr/NAME` >= 0.5 means NAME judged it unsafe.
    The picture of a shown row is `icet_jax.report.pictures.picture_path`.
    """

    id: str
    layer: int
    prompt: str
    response: str
    attempt: NotRequired[int]  # among the responses of a row at an exit; not written for the first, 0
    kind: NotRequired[str]
    scores: NotRequired[dict[str, float | None]]
    labels: NotRequired[dict[str, str | None]]  # a scorer's own words for its verdict, under the metric's name
    answer: NotRequired[str | None]  # the right one, of a benign or vqa row
    policy: NotRequired[str | None]  # the data set's own category
    answer_type: NotRequired[str | None]  # the data set's own kind of answer (VQA-v2)
    format: NotRequired[str]  # the data set's attack format (JailBreakV-28K)
    transferred: NotRequired[bool]  # whether the attack was transferred from a language model (JailBreakV-28K)


@dataclass(frozen=True)
class MetricFamily:
    """How a metric family is shown.

    Attributes:
      title: what a chart of it is called; `{k}` is the number of attempts in the metric's name.
      share: True for 0..1 numbers shown as percent.
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
    """The family of `FAMILY/SCORER`; an unknown family is shown as a plain number under its own name."""
    written = name.partition("/")[0]
    family = METRIC_FAMILIES.get(family_of(name), MetricFamily(written, share=False))
    return replace(family, title=family.title.replace("{k}", written.rpartition("@")[2]))
