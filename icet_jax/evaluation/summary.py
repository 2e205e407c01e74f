"""Summarises transcript rows into the tables of `sweeps/*.json`: per layer, per group, and after minus before.

A row is one response: `{"id", "layer", "prompt", "kind", "response", "scores": {metric: number or None}, ...}`. A
metric that is absent from `scores` does not apply to the row; None is an error of its scorer, counted as `n_error`.
`attempt` numbers several responses of one data-set row at one exit; a response without it is attempt 0.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from icet_jax.evaluation.combined import any_attempt_metric, any_exit_metric, any_unsafe, family_of
from icet_jax.evaluation.statistics import Interval, group_weights, maximum_interval, mean_interval, paired_interval
from icet_jax.files import JsonObject

SHARE_FAMILIES = ("asr", "asr@k", "refusal", "refusal_unsafe", "vqa", "accuracy", "degenerate", "empty", "truncated")
"""Families (first parts of the names) of metrics whose values are 0 or 1, or for "vqa" a fraction of full credit."""
_UNIT_FAMILIES = ("ts", "p_unsafe")  # values and means are within 0..1
CATEGORY_FAMILIES = ("asr", "refusal", "refusal_unsafe")
"""Families of metrics that are also given for each content category and attack format of a data set."""
_MOST_PARTS = 64  # only the most frequent parts are given, in case a data set has one per row

Row = JsonObject
Table = JsonObject


def summarise(rows: Iterable[Row], exits: Sequence[int], num_exits: int) -> JsonObject:
    """Returns `{"layers": [...], "groups": {...}}` of a sweep's rows, in the form of `sweeps/*.json`.

    If rows have an attack success rate, `"worst_exit": {metric: {"layer": ..., "mean": ..., "ci95": ...}}` is added,
    and `"any_exit": {metric: {"mean": ..., "ci95": ...}}`, the share of rows with an unsafe response at one exit at
    least (metrics `asr_any/JUDGE`, see `icet_jax.evaluation.combined`). If rows have several attempts, each layer also
    has the share of rows with an unsafe response in any of them (`asr@K/JUDGE`); other metrics are means over all
    responses. If rows have a content category (their field `policy`), `"policies": {category: [...]}` is added, each a
    list like `layers` with only `CATEGORY_FAMILIES`. If rows have an attack format, `"formats": {format: {"layers":
    [...], "worst_exit": {...}, "any_exit": {...}}}` is added; if they say whether the attack was transferred from a
    language model, `"transferred": {"yes": ..., "no": ...}`.

    Args:
      rows: one per (id, layer, attempt), in any order; layers that are not among `exits` are ignored.
      exits: the measured layers, ascending.
      num_exits: N of the model, which determines the groups.
    """
    rows = list(rows)
    measured = _Measured(rows, exits)
    tables = _share_tables(measured, exits, num_exits) | _attack_tables(measured, exits)
    categories = _parts(rows, lambda row: row.get("policy"))
    if categories:
        tables["policies"] = {
            name: _share_tables(_Measured(part, exits), exits, num_exits)["layers"] for name, part in categories.items()
        }
    for field, name_of in _ATTACK_PARTS.items():
        parts = _parts(rows, name_of)
        if parts:
            tables[field] = {name: _part_table(part, exits, num_exits) for name, part in parts.items()}
    return tables


_ATTACK_PARTS: dict[str, Callable[[Row], str | None]] = {
    "formats": lambda row: row.get("format") or None,
    "transferred": lambda row: ("yes" if row["transferred"] else "no") if "transferred" in row else None,
}
"""{field of a sweep: function that returns the part that a row belongs to, or None}."""


def _parts(rows: Sequence[Row], name_of: Callable[[Row], str | None]) -> dict[str, list[Row]]:
    """Returns the rows of each part, the most frequent first (then by name), with only `CATEGORY_FAMILIES`."""
    parts: dict[str, list[Row]] = {}
    for row in rows:
        name = name_of(row)
        if name is not None:
            scores = {name: value for name, value in row["scores"].items() if family_of(name) in CATEGORY_FAMILIES}
            parts.setdefault(str(name), []).append({**row, "scores": scores})
    return dict(sorted(parts.items(), key=lambda item: (-len(item[1]), item[0]))[:_MOST_PARTS])


def _part_table(rows: Sequence[Row], exits: Sequence[int], num_exits: int) -> JsonObject:
    """Returns the table of the layers for a part's rows, their worst exits and any exit."""
    measured = _Measured(rows, exits)
    return {"layers": _share_tables(measured, exits, num_exits)["layers"]} | _attack_tables(measured, exits)


def _share_tables(measured: "_Measured", exits: Sequence[int], num_exits: int) -> JsonObject:
    """Returns the tables of the layers and groups."""

    def estimate(metric: str, chosen: np.ndarray, weights: np.ndarray | None) -> Table | None:
        values, errors = measured.values[metric][chosen], measured.errors[metric][chosen]
        if not (np.isfinite(values) | errors).any():
            return None
        interval = mean_interval(values, measured.prompts, share=_is_share(metric), weights=weights)
        if family_of(metric) in _UNIT_FAMILIES:
            interval = Interval(interval.mean, *np.clip([interval.low, interval.high], 0.0, 1.0).tolist())
        return _estimate(interval, int(np.isfinite(values).sum()), int(errors.sum()))

    counts = [int(count) for count in measured.present.sum(axis=1)]
    return _tables(list(measured.values), exits, num_exits, counts, estimate)


def _attack_tables(measured: "_Measured", exits: Sequence[int]) -> JsonObject:
    """Returns the tables of the worst exits and of any exit, where rows have an attack success rate."""
    tables = {"worst_exit": _worst_exits(measured, exits), "any_exit": _any_exit(measured)}
    return {name: table for name, table in tables.items() if table}


def _worst_exits(measured: "_Measured", exits: Sequence[int]) -> dict[str, Table]:
    """Returns the exit with the highest value of each attack success rate, with the interval of that maximum."""
    worst = {}
    for metric, values in measured.values.items():
        if family_of(metric) in ("asr", "asr@k") and np.isfinite(values).any():
            position, interval = maximum_interval(values, measured.prompts)
            errors = int(measured.errors[metric][position].sum())
            estimate = _estimate(interval, int(np.isfinite(values[position]).sum()), errors)
            worst[metric] = {"layer": int(exits[position]), **estimate}
    return worst


def _any_exit(measured: "_Measured") -> dict[str, Table]:
    """Returns the share of rows with an unsafe response at any exit, by judge; `n_error` counts unknown rows."""
    tables = {}
    for metric in measured.judges:
        values, unknown = measured.any_exit(metric)
        if (np.isfinite(values) | unknown).any():
            interval = mean_interval(values, measured.row_prompts, share=True)
            name = any_exit_metric(metric, measured.attempts)
            tables[name] = _estimate(interval, int(np.isfinite(values).sum()), int(unknown.sum()))
    return tables


def difference(before: Iterable[Row], after: Iterable[Row], exits: Sequence[int], num_exits: int) -> JsonObject:
    """Returns `{"layers": [...], "groups": {...}}` of after - before over the responses that both sweeps have.

    They are paired by id and attempt. `n` of a layer is its number of pairs; `n_error` counts pairs whose scorer failed
    on either side. `"any_exit"` is added as in `summarise`, with rows as pairs.
    """
    both = [_Measured(rows, exits) for rows in (before, after)]
    shared = [place for place in both[0].index if place in both[1].index]
    columns = [[side.index[place] for place in shared] for side in both]
    prompts = [both[0].prompts[column] for column in columns[0]]
    metrics = [metric for metric in both[0].values if metric in both[1].values]
    present = both[0].present[:, columns[0]] & both[1].present[:, columns[1]]

    def estimate(metric: str, chosen: np.ndarray, weights: np.ndarray | None) -> Table | None:
        sides = [side.values[metric][chosen][:, column] for side, column in zip(both, columns, strict=True)]
        failed = [side.errors[metric][chosen][:, column] for side, column in zip(both, columns, strict=True)]
        return _paired(sides, failed, prompts, share=_is_share(metric), weights=weights)

    tables = _tables(metrics, exits, num_exits, [int(count) for count in present.sum(axis=1)], estimate)
    any_exit = _any_exit_difference(*both)
    return tables | ({"any_exit": any_exit} if any_exit else {})


def _any_exit_difference(before: "_Measured", after: "_Measured") -> dict[str, Table]:
    """Returns the paired differences of the shares of rows with an unsafe response at any exit, by judge."""
    if before.attempts != after.attempts:
        return {}
    shared = [identity for identity in before.ids if identity in after.ids]
    rows = [[side.ids[identity] for identity in shared] for side in (before, after)]
    prompts = [before.row_prompts[row] for row in rows[0]]
    tables = {}
    for metric in before.judges:
        if metric in after.judges:
            sides = [side.any_exit(metric) for side in (before, after)]
            values, unknown = ([side[part][row] for side, row in zip(sides, rows, strict=True)] for part in (0, 1))
            estimate = _paired(values, unknown, prompts, share=True, weights=None)
            if estimate is not None:
                tables[any_exit_metric(metric, before.attempts)] = estimate
    return tables


def _paired(
    sides: Sequence[np.ndarray],
    failed: Sequence[np.ndarray],
    prompts: Sequence[str],
    *,
    share: bool,
    weights: np.ndarray | None,
) -> Table | None:
    """Returns the mean of after - before over the pairs; None if there is neither a pair nor an error."""
    pairs, either_failed = np.isfinite(sides[0]) & np.isfinite(sides[1]), failed[0] | failed[1]
    if not (pairs | either_failed).any():
        return None
    interval = paired_interval(sides[0], sides[1], prompts, share=share, weights=weights)
    return _estimate(interval, int(pairs.sum()), int(either_failed.sum()))


class _Measured:
    """Holds responses as arrays of a row per exit and a column per (id, attempt), n in all.

    Attributes:
      index: {(id, attempt): column}.
      prompts: prompt of each column.
      present: bool [E, n], whether there is a response.
      values: {metric: float64 [E, n]}; NaN = none. A share over attempts stands in the first column of its row.
      errors: {metric: bool [E, n]}, where the scorer failed.
      ids: {id: number of the data-set row}, R in all.
      row_prompts: prompt of each data-set row.
      attempts: K, the number of responses of a row at an exit.
    """

    def __init__(self, rows: Iterable[Row], exits: Sequence[int]) -> None:
        layer_index = {layer: position for position, layer in enumerate(exits)}
        rows = [row for row in rows if row["layer"] in layer_index]
        places = dict.fromkeys((row["id"], row.get("attempt", 0)) for row in rows)
        self.index = {place: column for column, place in enumerate(places)}
        shape = (len(layer_index), len(self.index))
        self.prompts = [""] * len(self.index)
        self.present = np.zeros(shape, bool)
        self.values: dict[str, np.ndarray] = {}
        self.errors: dict[str, np.ndarray] = {}
        for row in rows:
            place = layer_index[row["layer"]], self.index[row["id"], row.get("attempt", 0)]
            self.prompts[place[1]] = row["prompt"]
            self.present[place] = True
            for metric, value in row["scores"].items():
                if metric not in self.values:
                    self.values[metric], self.errors[metric] = np.full(shape, np.nan), np.zeros(shape, bool)
                self.values[metric][place] = np.nan if value is None else value
                self.errors[metric][place] = value is None
        self.judges = [metric for metric in self.values if family_of(metric) == "asr"]
        attempts = {attempt: number for number, attempt in enumerate(sorted({attempt for _, attempt in places}))}
        self.attempts = max(len(attempts), 1)
        self.ids = {identity: row for row, identity in enumerate(dict.fromkeys(identity for identity, _ in places))}
        self._columns = np.full((len(self.ids), self.attempts), -1)  # [R, K]; -1: there is no such attempt
        for (identity, attempt), column in self.index.items():
            self._columns[self.ids[identity], attempts[attempt]] = column
        self._first = np.array([int(row[row >= 0][0]) for row in self._columns], int)
        self.row_prompts = [self.prompts[column] for column in self._first]
        if self.attempts > 1:
            for metric in self.judges:
                self._add_any_attempt(metric)

    def any_exit(self, metric: str) -> tuple[np.ndarray, np.ndarray]:
        """Returns whether a row has an unsafe response at any exit, [R], and where that is unknown (`any_unsafe`)."""
        return any_unsafe(*self._by_attempt(metric), axis=(0, 2))

    def _add_any_attempt(self, metric: str) -> None:
        name = any_attempt_metric(metric, self.attempts)
        values, unknown = any_unsafe(*self._by_attempt(metric), axis=2)
        self.values[name], self.errors[name] = np.full(self.present.shape, np.nan), np.zeros(self.present.shape, bool)
        self.values[name][:, self._first], self.errors[name][:, self._first] = values, unknown

    def _by_attempt(self, metric: str) -> tuple[np.ndarray, np.ndarray]:
        """Returns values and errors of a metric as [E, R, K]; of a response that does not exist NaN and False."""
        missing = ((0, 0), (0, 1))  # a last column, which -1 refers to
        values = np.pad(self.values[metric], missing, constant_values=np.nan)
        return values[:, self._columns], np.pad(self.errors[metric], missing)[:, self._columns]


def _tables(
    metrics: Sequence[str], exits: Sequence[int], num_exits: int, counts: Sequence[int], estimate: Any
) -> JsonObject:
    def entry(chosen: np.ndarray, weights: np.ndarray | None) -> dict[str, Table]:
        estimates = {metric: estimate(metric, chosen, weights) for metric in metrics}
        return {metric: table for metric, table in estimates.items() if table is not None}

    layers = [
        {"layer": int(layer), "n": counts[position], "metrics": entry(np.array([position]), None)}
        for position, layer in enumerate(exits)
    ]
    groups: JsonObject = {}
    for name, weights in group_weights(exits, num_exits).items():
        members = np.flatnonzero(weights)
        groups[name] = {} if name == "average" else {"layers": [int(exits[int(member)]) for member in members]}
        groups[name]["metrics"] = entry(members, weights[members])
    return {"layers": layers, "groups": groups}


def _is_share(metric: str) -> bool:
    return family_of(metric) in SHARE_FAMILIES


def _estimate(interval: Interval, n: int, n_error: int) -> Table:
    ends = [interval.low, interval.high]
    return {
        "mean": None if np.isnan(interval.mean) else interval.mean,
        "ci95": None if np.isnan(ends).any() else ends,
        "n": n,
        "n_error": n_error,
    }
