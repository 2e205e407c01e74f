"""Who judged: every scorer's answered and failed rows, and how far the judges of attacks agree."""

from collections.abc import Sequence
from typing import Any

from icet_jax.report.load import PHASES
from icet_jax.report.study import Study, as_value, dataset_name
from icet_jax.report.text import escape, number, percent
from icet_jax.report.widgets import code, details_html, table_html

_WITHOUT_SCORER = ("length", "empty", "truncated", "vqa", "accuracy")  # rules and right answers never fail
_SHOWN = 12  # differing rows named for each pair


def judges_html(study: Study) -> str:
    """The table of scorers, then the table of agreement from `agreement.json`."""
    return _scorers(study) + _agreement(study)


def _scorers(study: Study) -> str:
    """Rows scored and rows without a score by metric, over all data sets, exits and seeds."""
    found: dict[str, dict[str, list[tuple[int, int]]]] = {}
    for dataset in study.datasets:
        for metric in study.metrics(dataset):
            if metric.partition("/")[0] not in _WITHOUT_SCORER and metric != "degenerate/text_rules":
                found.setdefault(metric, {})[dataset] = [_judged(study, phase, dataset, metric) for phase in PHASES]
    rows, failures = [], False
    for metric, datasets in found.items():
        sides = [tuple(map(sum, zip(*side, strict=True))) for side in zip(*datasets.values(), strict=True)]
        where = [
            f"{dataset_name(name)} {_arrow(cells, 1)}" for name, cells in datasets.items() if any(c[1] for c in cells)
        ]
        failures |= bool(where)
        failed = _arrow(sides, 1)
        failed = (
            f'<span class="failed">{failed}</span> <span class="ci">{escape(", ".join(where))}</span>' if where else "0"
        )
        rows.append([code(metric), _arrow(sides, 0), failed])
    head = ["Scorer", "Responses scored", "Without a score"]
    table = table_html(head, rows, "Over all data sets and exits, before → after")
    note = (
        "<p class=note>To ask scorers again for what they left open (after an outage, say), remove the set’s files "
        "from sweeps/ and run the same command again: the answers are kept.</p>"
    )
    return table + (note if failures else "")


def _arrow(sides: Sequence[Sequence[int]], place: int) -> str:
    """ "280 → 283"; one number where a phase was not measured at all."""
    return " → ".join(_count(side[place]) for side in sides if any(side))


def _judged(study: Study, phase: str, dataset: str, metric: str) -> tuple[int, int]:
    """(scored, failed) responses of a metric over all exits and seeds."""
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


def _agreement(study: Study) -> str:
    """Cohen's kappa of every two judges, and the rows that they see differently."""
    pairs = study.first.agreement.get("pairs")
    pairs = [pair for pair in pairs if _is_pair(pair)] if isinstance(pairs, list) else []
    rows, details = [], []
    for pair in pairs:
        rows.append(
            [
                f"{code(pair['a'])} <span class=ci>and</span> {code(pair['b'])}",
                _kappa(pair),
                percent(_mean(pair.get("agree"))),
                *(_count(pair.get(name)) for name in ("a_only", "b_only", "n")),
            ]
        )
        details.append(_examples(pair))
    if not rows:
        return ""
    head = ["Judges", "Cohen’s κ", "Same verdict", "Only the first: unsafe", "Only the second: unsafe", "Responses"]
    note = (
        "<p class=note>κ is 1 where two judges always agree and 0 where they agree as often as their shares of unsafe "
        "verdicts alone would make them. Over all data sets and exits, before and after"
        f"{', of the first seed' if study.several else ''}; intervals are clustered by prompt.</p>"
    )
    return (
        "<h3>Do they agree?</h3>"
        + table_html(head, rows, "Agreement between judges of attacks")
        + note
        + "".join(details)
    )


def _kappa(pair: dict[str, Any]) -> str:
    value = as_value({"mean": _mean(pair.get("kappa")), "ci95": pair.get("ci95")})
    if value is None:
        return "–"
    if value.low is None or value.high is None:
        return escape(number(value.mean))
    return f'{escape(number(value.mean))} <span class="ci">({number(value.low)} to {number(value.high)})</span>'


def _examples(pair: dict[str, Any]) -> str:
    """Where to look: the rows that two judges see differently, without their text."""
    found = pair.get("examples")
    rows = [
        [escape(row.get("dataset")), escape(row.get("id")), escape(row.get("layer")), escape(row.get("phase")),
         code(str(row.get("unsafe", "–")))]
        for row in (found if isinstance(found, list) else [])[:_SHOWN]
        if isinstance(row, dict)
    ]  # fmt: skip
    title = f"Responses that {pair['a']} and {pair['b']} see differently"
    head = ["Data set", "Row", "Exit", "Phase", "Unsafe according to"]
    return details_html(title, table_html(head, rows, f"{len(rows)} of them; agreement.json names more"))


def _is_pair(pair: Any) -> bool:
    return isinstance(pair, dict) and isinstance(pair.get("a"), str) and isinstance(pair.get("b"), str)


def _mean(value: Any) -> float | None:
    found = as_value(value)
    return None if found is None else round(found.mean, 6)


def _count(value: Any) -> str:
    return f"{value:,}".replace(",", "\u2009") if isinstance(value, int) else "–"
