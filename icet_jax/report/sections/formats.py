"""The section on attack formats: attack success by format, and by transfer from a language model."""

from statistics import fmean

from icet_jax.report.blocks import Block, Span, Text, code, details, note, table, text
from icet_jax.report.curves import Curve, map_figure
from icet_jax.report.sections.numbers import worst_text
from icet_jax.report.study import Study, dataset_name
from icet_jax.report.values import value_text

_MOST_FORMATS = 32  # most formats in a table or heat map
_HEADS = {"formats": "Attack format", "transferred": "Transferred from a language model"}
_NOTE = (
    "Formats are the data set’s own words for how a request is disguised. They need not disguise the same requests, "
    "and a format of few rows tells little."
)
# Only true for one run: with several seeds, intervals are the range over seeds.
_NOTE_INTERVAL = " The interval of a worst exit includes the choice of that exit."


def of_study(study: Study) -> list[Block]:
    """Returns the tables and heat maps of all judges for each data set with attack formats.

    Those of the first judge are shown at once, those of the other judges in a collapsed section.
    """
    blocks: list[Block] = []
    for dataset in study.datasets:
        by_judge = [_of_judge(study, dataset, metric) for metric in study.judges(dataset)]
        by_judge = [judge_blocks for judge_blocks in by_judge if judge_blocks]
        if by_judge:
            hidden = [block for judge_blocks in by_judge[1:] for block in judge_blocks]
            blocks += [*_missing_phase(study, dataset), *by_judge[0]]
            blocks += details("The same by other judges", hidden)
    return [note(_NOTE + ("" if study.has_several_seeds else _NOTE_INTERVAL)), *blocks] if blocks else []


def _of_judge(study: Study, dataset: str, metric: str) -> list[Block]:
    """Returns one judge's table by format, heat map by format and exit, and table by transfer."""
    formats = _judged_parts(study, dataset, metric, "formats")
    curves = {
        name: {phase: part.curve(phase, dataset, metric) for phase in study.phases(dataset)}
        for name, part in formats.items()
    }
    figure = map_figure(study, dataset, metric, curves, by="attack format")
    return [
        *_table(study, dataset, metric, "formats", formats),
        *([figure] if figure is not None else []),
        *_table(study, dataset, metric, "transferred", _judged_parts(study, dataset, metric, "transferred")),
    ]


def _judged_parts(study: Study, dataset: str, metric: str, field: str) -> dict[str, Study]:
    """Returns the parts of a data set's rows (see `Study.parts`) in which a judge has judged answers.

    They are sorted by the mean of `metric` over exits before training, highest first.
    """
    phases = study.phases(dataset)
    parts = list(study.parts(dataset, field).items())[:_MOST_FORMATS]
    means = {name: [_mean(part.curve(phase, dataset, metric)) for phase in phases] for name, part in parts}
    judged = [(name, part) for name, part in parts if any(mean is not None for mean in means[name])]
    return dict(sorted(judged, key=lambda item: [-(mean or 0.0) for mean in means[item[0]]]))


def _mean(curve: Curve) -> float | None:
    return fmean(value.mean for _, value in curve) if curve else None


def _table(study: Study, dataset: str, metric: str, field: str, parts: dict[str, Study]) -> list[Block]:
    """Returns one judge's table: a row for the whole data set, then one for each of `parts`, its parts by `field`."""
    if not parts:
        return []
    phases = study.phases(dataset)
    exits = ["Worst exit"]
    if _has_any_exit(study, dataset, metric):
        exits.append("Any exit")
    if study.default_exit is not None:
        exits.append(f"Default exit {study.default_exit}")
    head = [_HEADS[field], "Rows", *(f"{name}, {phase}" for name in exits for phase in phases)]
    named = [(text(Span("All rows", "b")), study), *((text(name), part) for name, part in parts.items())]
    rows = [[name, _count(part, dataset, metric), *_cells(part, study, dataset, metric)] for name, part in named]
    what = "attack format" if field == "formats" else "whether the attack is transferred from a language model"
    caption = f"Attack success rate by {what}, {dataset_name(dataset)} ({study.interval})"
    return [note(code(metric)), *table(caption, head, rows)]


def _has_any_exit(study: Study, dataset: str, metric: str) -> bool:
    return any(study.any_exit(phase, dataset, metric) for phase in study.phases(dataset))


def _cells(part: Study, whole: Study, dataset: str, metric: str) -> list[Text]:
    """Returns the values of `part` before and after training: at the worst exit, at any exit and at the default exit.

    They fill the columns of the table for `whole`, the whole data set. The column for any exit is left out if `whole`
    has no such value, the column for the default exit if that exit is unknown.
    """
    phases = whole.phases(dataset)
    cells = [worst_text(part, phase, dataset, metric) for phase in phases]
    if _has_any_exit(whole, dataset, metric):
        cells += [value_text(metric, part.any_exit(phase, dataset, metric)) for phase in phases]
    if part.default_exit is not None:
        cells += [value_text(metric, part.value(phase, dataset, metric, part.default_exit)) for phase in phases]
    return cells


def _count(part: Study, dataset: str, metric: str) -> Text:
    """Returns the number of rows that a judge has judged, the largest of all exits, as text; "–" if it is unknown."""
    counts = [value.n or 0 for phase in part.phases(dataset) for _, value in part.curve(phase, dataset, metric)]
    return text(str(max(counts, default=0) or "–"))


def _missing_phase(study: Study, dataset: str) -> list[Block]:
    """Returns a note if only one of the sweeps before and after training has attack formats; else an empty list."""
    parts = [part for field in _HEADS for part in study.parts(dataset, field).values()]
    missing = [phase for phase in study.phases(dataset) if not any(phase in part.phases(dataset) for part in parts)]
    if not missing:
        return []
    words = (
        f"The sweep of {dataset_name(dataset)} {missing[0]} training has no attack formats: an earlier version "
        "prepared or measured its rows."
    )
    return [note(words)]
