"""The section on scorers: how many responses each one scored or failed on, and how far the judges agree."""

from collections.abc import Sequence
from typing import Any

from icet_jax.evaluation.combined import family_of
from icet_jax.files import JsonObject
from icet_jax.report.blocks import Block, Heading, Span, Text, code, details, note, remark, table, text
from icet_jax.report.loading import PHASES
from icet_jax.report.study import Study, as_value, dataset_name
from icet_jax.report.text import number, percent
from icet_jax.report.values import with_interval

# Metrics that cannot fail: rules, comparisons with right answers, and shares over attempts, computed from "asr".
_WITHOUT_SCORER = ("length", "empty", "truncated", "vqa", "accuracy", "asr@k")
_MOST_EXAMPLES = 12  # most rows with different verdicts that are named for each pair of judges
_NOTE_FAILURES = (
    "To ask scorers again for what they left open (after an outage, say), remove the set’s files from sweeps/ and run "
    "the same command again: the answers are kept."
)


def of_study(study: Study) -> list[Block]:
    """Returns the table of scorers, and the table of agreement from `agreement.json`."""
    return [*_scorers(study), *_agreement(study)]


def _scorers(study: Study) -> list[Block]:
    """Returns a table of the number of responses with and without a score, over all data sets, exits and seeds.

    There is a row for each metric that a scorer computes.
    """
    counts: dict[str, dict[str, list[tuple[int, int]]]] = {}
    for dataset in study.datasets:
        for metric in study.metrics(dataset):
            if family_of(metric) not in _WITHOUT_SCORER and metric != "degenerate/text_rules":
                counts.setdefault(metric, {})[dataset] = [judged(study, phase, dataset, metric) for phase in PHASES]
    rows, has_failures = [], False
    for metric, datasets in counts.items():
        sides = [tuple(map(sum, zip(*side, strict=True))) for side in zip(*datasets.values(), strict=True)]
        where = [
            f"{dataset_name(name)} {_arrow(cells, 1)}" for name, cells in datasets.items() if any(c[1] for c in cells)
        ]
        has_failures |= bool(where)
        failed = text(Span(_arrow(sides, 1), "failed"), " ", remark(", ".join(where))) if where else text("0")
        rows.append([text(code(metric)), text(_arrow(sides, 0)), failed])
    head = ["Scorer", "Responses scored", "Without a score"]
    blocks = table("Over all data sets and exits, before → after", head, rows)
    return [*blocks, note(_NOTE_FAILURES)] if has_failures else blocks


def _arrow(sides: Sequence[Sequence[int]], index: int) -> str:
    """Returns a count before and after training, such as "280 → 283"; one number if only one side was measured.

    `sides` has (scored, unscored) responses for each measured side, and `index` chooses one of these two counts.
    """
    return " → ".join(_count(side[index]) for side in sides if any(side))


def judged(study: Study, phase: str, dataset: str, metric: str) -> tuple[int, int]:
    """Returns how many responses have a score of a metric and how many have none, over all exits and seeds."""
    judged = failed = 0
    for run in study.runs:
        table = run.tables.get((phase, dataset))
        for layer in table["layers"] if table is not None else ():
            entry = layer["metrics"].get(metric)
            if isinstance(entry, dict):
                errors = entry.get("n_error")
                errors = errors if isinstance(errors, int) else 0
                count = entry.get("n")
                rows = layer.get("n")
                judged += count if isinstance(count, int) else max(rows - errors, 0) if isinstance(rows, int) else 0
                failed += errors
    return judged, failed


def _agreement(study: Study) -> list[Block]:
    """Returns a table of Cohen's kappa for every two judges, and collapsed tables of rows with different verdicts."""
    pairs = study.first_run.agreement.get("pairs")
    pairs = [pair for pair in pairs if _is_pair(pair)] if isinstance(pairs, list) else []
    if not pairs:
        return []
    rows = [
        [
            text(code(pair["a"]), " ", remark("and"), " ", code(pair["b"])),
            _kappa(pair),
            text(percent(_rounded_mean(pair.get("agree")))),
            *(text(_count(pair.get(name))) for name in ("a_only", "b_only", "n")),
        ]
        for pair in pairs
    ]
    head = ["Judges", "Cohen’s κ", "Same verdict", "Only the first: unsafe", "Only the second: unsafe", "Responses"]
    words = (
        "κ is 1 where two judges always agree and 0 where they agree as often as their shares of unsafe verdicts alone "
        f"would make them. Over all data sets and exits, before and after"
        f"{', of the first seed' * study.has_several_seeds}; intervals are clustered by prompt."
    )
    agreement = table("Agreement between judges of attacks", head, rows)
    examples = [block for pair in pairs for block in _examples(pair)]
    return [Heading("Do they agree?"), *agreement, note(words), *examples]


def _kappa(pair: JsonObject) -> Text:
    entry = {"mean": _rounded_mean(pair.get("kappa")), "ci95": pair.get("ci95")}
    return with_interval(as_value(entry), number)


def _examples(pair: JsonObject) -> list[Block]:
    """Returns a collapsed table of rows on which two judges differ, without the text of the responses."""
    examples = pair.get("examples")
    rows = [
        [*(text(str(row.get(name))) for name in ("dataset", "id", "layer", "phase")),
         text(code(str(row.get("unsafe", "–"))))]
        for row in (examples if isinstance(examples, list) else [])[:_MOST_EXAMPLES]
        if isinstance(row, dict)
    ]  # fmt: skip
    title = f"Responses that {pair['a']} and {pair['b']} see differently"
    head = ["Data set", "Row", "Exit", "Phase", "Unsafe according to"]
    return details(title, table(f"{len(rows)} of them; agreement.json names more", head, rows))


def _is_pair(pair: Any) -> bool:
    """Returns whether an entry of agreement.json names two judges."""
    return isinstance(pair, dict) and isinstance(pair.get("a"), str) and isinstance(pair.get("b"), str)


def _rounded_mean(entry: Any) -> float | None:
    """Returns a number of agreement.json rounded to six decimals; None if it is not a number."""
    value = as_value(entry)
    return None if value is None else round(value.mean, 6)


def _count(value: Any) -> str:
    return f"{value:,}".replace(",", "\u2009") if isinstance(value, int) else "–"
