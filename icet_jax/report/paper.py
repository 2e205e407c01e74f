"""The paper's Table 2, and which data sets and metrics of a run it has values for.

LLaVA-1.5-7B, L-PPO trained on RedTeam-2K (Bachu et al., ICML 2025, Table 2), original -> aligned. AASR and ATS are
percent there and shares here; each number is the mean over the exits of a group, `average` the mean of the three.
"""

import re
from pathlib import PurePosixPath

from icet_jax.evaluation.combined import family_of
from icet_jax.exit_groups import exit_groups
from icet_jax.files import JsonObject
from icet_jax.report.charts.lines import Reference
from icet_jax.report.loading import PHASES
from icet_jax.report.study import Study, dataset_name

NAMES = {"asr": "AASR", "ts": "ATS", "tr": "ATR"}
"""The paper's names of the means over a group of exits, by metric family, in the order of the pairs in `TABLE_2`."""

_GroupValues = tuple[tuple[float, float], tuple[float, float], tuple[float, float]]
"""(original, aligned) of each metric in `NAMES`."""

TABLE_2: dict[str, dict[str, _GroupValues]] = {
    "Custom Prompts": {
        "early": ((0.7538, 0.4515), (0.0824, 0.0488), (0.57, 0.62)),
        "middle": ((0.7000, 0.4750), (0.1290, 0.0663), (-0.34, 0.46)),
        "late": ((0.4850, 0.2125), (0.1100, 0.0723), (-0.52, 0.90)),
        "average": ((0.6462, 0.3796), (0.1071, 0.0624), (-0.09, 0.66)),
    },
    "miniJailBreakV-28K": {
        "early": ((0.5379, 0.1840), (0.0903, 0.0548), (0.23, 0.46)),
        "middle": ((0.4933, 0.0957), (0.0839, 0.0538), (-0.54, 0.27)),
        "late": ((0.4862, 0.0353), (0.0634, 0.0472), (-0.72, 0.20)),
        "average": ((0.5058, 0.1050), (0.0792, 0.0519), (-0.34, 0.31)),
    },
    "AdvBench-COCO": {
        "early": ((0.8333, 0.6789), (0.0701, 0.0521), (0.49, 0.54)),
        "middle": ((0.5353, 0.3778), (0.0562, 0.0443), (-0.28, 0.45)),
        "late": ((0.5120, 0.2160), (0.0601, 0.0514), (-0.83, 0.47)),
        "average": ((0.6268, 0.4242), (0.0621, 0.0492), (-0.20, 0.49)),
    },
}
PAPER_ROWS = {"Custom Prompts": 100, "miniJailBreakV-28K": 280, "AdvBench-COCO": 520}
_MODEL = re.compile(r"llava-(v)?1\.5-7b(-hf)?")


def paper_references(study: Study, dataset: str, metric: str) -> list[Reference]:
    """Returns the paper's means as marks for the chart of a metric over exits: one per group of exits and phase.

    Returns [] unless the run has the paper's model, and the data set is one of its test sets. A keyword judge and
    secondary outputs of scorers have no marks: the paper has nothing like them.
    """
    family = family_of(metric)
    name = papers_name(study, dataset) if is_papers_model(study) else None
    if name is None or family not in NAMES or "keyword" in metric or metric not in main_metrics(study, dataset, family):
        return []
    place = list(NAMES).index(family)
    return [
        Reference("paper", phase, exits[0], exits[-1], TABLE_2[name][group][place][side])
        for group, exits in exit_groups(study.num_exits).items()
        for side, phase in enumerate(PHASES)
        if phase in study.phases(dataset)
    ]


def papers_name(study: Study, dataset: str) -> str | None:
    """Returns which of the paper's test sets a data set is, by its source in config.json; None for other data sets.

    The paper's Custom Prompts are not public. A user's own file takes their place if its data set has "custom" in its
    name.
    """
    sources = section(study.first_run.config, "sweep", "datasets")
    name = dataset_name(dataset)
    source = sources.get(name) if dataset.startswith("sweep/") else None
    if not isinstance(source, str):
        return None
    origin, _, rest = source.partition(":") if ":" in source else ("", "", source)
    file = PurePosixPath(rest.partition("?")[0].replace("\\", "/")).name.lower()
    if origin == "advbench_coco":
        return "AdvBench-COCO"
    if origin == "jailbreakv_28k":
        return "miniJailBreakV-28K" if "mini" in file else None
    if not origin and "custom" in name.lower() and file.endswith((".csv", ".jsonl")):
        return "Custom Prompts"
    return None


def is_papers_model(study: Study) -> bool:
    """Returns whether the run's checkpoint, or the model's name in the sweeps, is that of LLaVA-1.5-7B."""
    names = [section(study.first_run.config, "model").get("checkpoint"), study.field("model")]
    return any(
        _MODEL.fullmatch(part) for name in names if name for part in re.split(r"[/\\]", str(name).lower().rstrip("/\\"))
    )


def main_metrics(study: Study, dataset: str, family: str) -> list[str]:
    """Returns the metrics of a family, without a scorer's secondary outputs such as "ts/toxic_bert.insult"."""
    return [metric for metric in study.metrics(dataset, family) if "." not in metric]


def section(config: JsonObject, *names: str) -> JsonObject:
    """Returns the section of config.json at the path `names`; empty if it does not exist."""
    for name in names:
        inner = config.get(name)
        config = inner if isinstance(inner, dict) else {}
    return config
