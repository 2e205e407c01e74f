"""The section that compares this run with the paper's Table 2, if it has the paper's model and test sets.

LLaVA-1.5-7B, L-PPO trained on RedTeam-2K (Bachu et al., ICML 2025, Table 2), original -> aligned. AASR and ATS are
percent there and shares here; each number is the mean over the exits of a group, `average` the mean of the three.
"""

import re
from pathlib import PurePosixPath

from icet_jax.files import JsonObject
from icet_jax.report.blocks import Block, Bullets, Span, Text, code, table, text
from icet_jax.report.loading import PHASES
from icet_jax.report.schema import metric_family
from icet_jax.report.sections.groups import group_name
from icet_jax.report.study import GROUPS, Study, dataset_name
from icet_jax.report.text import percent
from icet_jax.report.values import ARROW, change_text

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
_PAPER_ROWS = {"Custom Prompts": 100, "miniJailBreakV-28K": 280, "AdvBench-COCO": 520}
_MODEL = re.compile(r"llava-(v)?1\.5-7b(-hf)?")


def of_study(study: Study) -> list[Block]:
    """Returns a table for each of the paper's test sets that the run measured, with the paper's values and the run's.

    Returns [] for another model than the paper's.
    """
    if not _is_papers_model(study):
        return []
    sets = [(dataset, name) for dataset in study.datasets if (name := papers_name(study, dataset)) is not None]
    sets.sort(key=lambda pair: list(TABLE_2).index(pair[1]))
    tables = [block for dataset, name in sets for block in _table(study, dataset, name)]
    return [*tables, Bullets(_notes(study, sets))] if tables else []


def papers_name(study: Study, dataset: str) -> str | None:
    """Returns which of the paper's test sets a data set is, by its source in config.json; None for other data sets.

    The paper's Custom Prompts are not public. A user's own file takes their place if its data set has "custom" in its
    name.
    """
    sources = _section(study.first_run.config, "sweep", "datasets")
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


def _is_papers_model(study: Study) -> bool:
    """Returns whether the run's checkpoint, or the model's name in the sweeps, is that of LLaVA-1.5-7B."""
    names = [_section(study.first_run.config, "model").get("checkpoint"), study.field("model")]
    return any(
        _MODEL.fullmatch(part) for name in names if name for part in re.split(r"[/\\]", str(name).lower().rstrip("/\\"))
    )


def _table(study: Study, dataset: str, name: str) -> list[Block]:
    """Returns the table of one data set, which the paper calls `name`.

    It has a row per group of exits, and columns of the paper's and the run's values.
    """
    head, columns = [text("Exits")], []
    for index, (family, title) in enumerate(NAMES.items()):
        head.append(text(f"{title} ", Span("paper", "b")))
        columns.append({group: _paper_text(family, TABLE_2[name][group][index]) for group in GROUPS})
        for metric in study.judges(dataset) if family == "asr" else _main_metrics(study, dataset, family):
            head.append(text(f"{title} ", code(metric)))
            values = {group: [study.group(side, dataset, metric, group) for side in PHASES] for group in GROUPS}
            columns.append({group: change_text(metric, *sides) for group, sides in values.items()})
    rows = [[group_name(study, group), *(column[group] for column in columns)] for group in GROUPS]
    return table(f"{name}, and {dataset_name(dataset)} here", head, rows)


def _paper_text(family: str, pair: tuple[float, float]) -> Text:
    """Returns the paper's (original, aligned) pair of values with as many digits as the paper prints."""
    before, after = (
        percent(value, 2) if metric_family(family).share else f"{value:.2f}".replace("-", "−") for value in pair
    )
    return (Span(before, "before"), ARROW, Span(after, "after"))


def _main_metrics(study: Study, dataset: str, family: str) -> list[str]:
    """Returns the metrics of a family, without a scorer's secondary outputs such as "ts/toxic_bert.insult"."""
    return [metric for metric in study.metrics(dataset, family) if "." not in metric]


def _notes(study: Study, sets: list[tuple[str, str]]) -> list[Text]:
    """Returns reasons why the paper's and the run's columns are different measurements.

    `sets` has (data set, the paper's name of it).
    """
    notes = [
        text(
            "The paper’s judges are Llama Guard (of a version it does not name in its main text), the Perspective API "
            "and the reward model of its training; a column of ours is by the scorer it names, and another scorer’s "
            "numbers are another measurement."
        ),
        text(
            "The paper’s hyper-parameters are in an appendix that this project has not read; ours are in the "
            "configuration below."
        ),
    ]
    source = str(_section(study.first_run.config, "data").get("train"))
    if any("after" in study.phases(dataset) for dataset, _ in sets) and not source.startswith("redteam_2k:"):
        notes.append(text("The paper trained on RedTeam-2K, this run on ", code(source), "."))
    for dataset, name in sets:
        counts = [value.n for metric in study.metrics(dataset) for _, value in study.curve("before", dataset, metric)]
        rows = max((count for count in counts if count is not None), default=None)
        if rows is not None and rows != _PAPER_ROWS[name]:
            notes.append(text(f"{name} has {_PAPER_ROWS[name]} rows in the paper, {rows} were answered here."))
        if name == "Custom Prompts":
            notes.append(text("The paper’s own Custom Prompts are not public; these are others of their kind."))
        if study.group("before", dataset, next(iter(study.judges(dataset)), ""), "average") is None:
            notes.append(text(f"Not every exit was measured on {dataset_name(dataset)}: such means are left out."))
    return notes


def _section(config: JsonObject, *names: str) -> JsonObject:
    """Returns the section of config.json at the path `names`; empty if it does not exist."""
    for name in names:
        inner = config.get(name)
        config = inner if isinstance(inner, dict) else {}
    return config
