"""The section that compares this run with the paper's Table 2, if it has the paper's model and test sets.

`icet_jax.report.paper` has the table.
"""

from icet_jax.report.blocks import Block, Bullets, Span, Text, code, table, text
from icet_jax.report.loading import PHASES
from icet_jax.report.paper import NAMES, PAPER_ROWS, TABLE_2, is_papers_model, main_metrics, papers_name, section
from icet_jax.report.schema import metric_family
from icet_jax.report.sections.groups import group_name
from icet_jax.report.study import GROUPS, Study, dataset_name
from icet_jax.report.text import percent
from icet_jax.report.values import ARROW, change_text


def of_study(study: Study) -> list[Block]:
    """Returns a table for each of the paper's test sets that the run measured, with the paper's values and the run's.

    Returns [] for another model than the paper's.
    """
    if not is_papers_model(study):
        return []
    sets = [(dataset, name) for dataset in study.datasets if (name := papers_name(study, dataset)) is not None]
    sets.sort(key=lambda pair: list(TABLE_2).index(pair[1]))
    tables = [block for dataset, name in sets for block in _table(study, dataset, name)]
    return [*tables, Bullets(_notes(study, sets))] if tables else []


def _table(study: Study, dataset: str, name: str) -> list[Block]:
    """Returns the table of one data set, which the paper calls `name`.

    It has a row per group of exits, and columns of the paper's and the run's values.
    """
    head, columns = [text("Exits")], []
    for index, (family, title) in enumerate(NAMES.items()):
        head.append(text(f"{title} ", Span("paper", "b")))
        columns.append({group: _paper_text(family, TABLE_2[name][group][index]) for group in GROUPS})
        for metric in study.judges(dataset) if family == "asr" else main_metrics(study, dataset, family):
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
    source = str(section(study.first_run.config, "data").get("train"))
    if any("after" in study.phases(dataset) for dataset, _ in sets) and not source.startswith("redteam_2k:"):
        notes.append(text("The paper trained on RedTeam-2K, this run on ", code(source), "."))
    for dataset, name in sets:
        counts = [value.n for metric in study.metrics(dataset) for _, value in study.curve("before", dataset, metric)]
        rows = max((count for count in counts if count is not None), default=None)
        if rows is not None and rows != PAPER_ROWS[name]:
            notes.append(text(f"{name} has {PAPER_ROWS[name]} rows in the paper, {rows} were answered here."))
        if name == "Custom Prompts":
            notes.append(text("The paper’s own Custom Prompts are not public; these are others of their kind."))
        if study.group("before", dataset, next(iter(study.judges(dataset)), ""), "average") is None:
            notes.append(text(f"Not every exit was measured on {dataset_name(dataset)}: such means are left out."))
    return notes
