"""Computes the tables of `sweeps/*.json` from transcript rows: means per exit and per group, and after minus before.

A transcript row is one response: `{"id", "layer", "prompt", "kind", "response", "scores": {metric: number or None},
...}`, where `layer` is its exit. A metric that is absent from `scores` does not apply to the row; None means that the
metric's scorer gave no score, which is counted as `n_error`. If a row of data has several responses at an exit, the
field `attempt` numbers them; a response without this field is attempt 0.
"""

from collections.abc import Callable, Iterable, Sequence

import numpy as np

from icet_jax.evaluation.combined import any_attempt_metric, any_exit_metric, any_unsafe, family_of
from icet_jax.evaluation.statistics import Interval, group_weights, maximum_interval, mean_interval, paired_interval
from icet_jax.files import JsonObject

SHARE_FAMILIES = ("asr", "asr@k", "refusal", "refusal_unsafe", "vqa", "accuracy", "degenerate", "empty", "truncated")
"""Families (first parts of the names) of metrics whose values are 0 or 1, or for "vqa" a fraction of full credit."""
_UNIT_FAMILIES = ("ts", "p_unsafe")  # values and means are within 0..1
CATEGORY_FAMILIES = ("asr", "refusal", "refusal_unsafe")
"""Families of metrics that are also computed for each content category and attack format of a data set."""
_MOST_PARTS = 64  # most categories or formats that get tables of their own; a data set might have one per row

Row = JsonObject
Table = JsonObject


def summarise(rows: Iterable[Row], exits: Sequence[int], num_exits: int) -> JsonObject:
    """Returns the tables of a sweep, which are part of `sweeps/*.json`.

    Args:
      rows: transcript rows, one per (id, exit, attempt), in any order; rows at other exits than `exits` are ignored.
      exits: the measured exits, ascending.
      num_exits: number of exits of the model, which determines the groups.

    Returns:
      A dict with these entries; all but the first three exist only if rows have the metrics or fields that they need:
      `"layers": [...]` and `"groups": {...}`: means of every metric over the rows, at each exit and in each group of
      exits. With K attempts this includes `asr@K/JUDGE`, see `icet_jax.evaluation.combined`.
      `"prompts"`: number of distinct prompts among the rows; intervals are clustered by prompt.
      `"worst_exit": {metric: {"layer", "mean", "ci95", ...}}`: the exit with the highest attack success rate.
      `"any_exit": {metric: {"mean", "ci95", ...}}`: the share of rows with an unsafe response at one or more exits
      (metrics `asr_any/JUDGE`).
      `"policies": {category: [...]}`: a list like `layers` for each content category (the field `policy`), with the
      metrics of `CATEGORY_FAMILIES` only.
      `"formats": {attack format: {"layers", "worst_exit", "any_exit"}}`: the same for each attack format.
      `"transferred": {"yes": ..., "no": ...}`: the same for attacks that were transferred from a language model, and
      for those that were not.
    """
    rows = list(rows)
    measured = _Measured(rows, exits)
    tables = _share_tables(measured, exits, num_exits) | _attack_tables(measured, exits)
    tables["prompts"] = len(set(measured.row_prompts))
    categories = _parts(rows, lambda row: row.get("policy"))
    if categories:
        tables["policies"] = {
            name: _share_tables(_Measured(part, exits), exits, num_exits)["layers"] for name, part in categories.items()
        }
    for field, part_of in _ATTACK_PARTS.items():
        parts = _parts(rows, part_of)
        if parts:
            tables[field] = {name: _part_table(part, exits, num_exits) for name, part in parts.items()}
    return tables


_ATTACK_PARTS: dict[str, Callable[[Row], str | None]] = {
    "formats": lambda row: row.get("format") or None,
    "transferred": lambda row: ("yes" if row["transferred"] else "no") if "transferred" in row else None,
}
"""{entry of a sweep's tables: function that returns the name of the part that a row belongs to, or None}."""


def _parts(rows: Sequence[Row], part_of: Callable[[Row], str | None]) -> dict[str, list[Row]]:
    """Returns {name of a part: its rows with the metrics of `CATEGORY_FAMILIES` only}, the largest parts first.

    `part_of` returns the name of the part to which a row belongs; None if it belongs to none.
    """
    parts: dict[str, list[Row]] = {}
    for row in rows:
        name = part_of(row)
        if name is not None:
            scores = {name: value for name, value in row["scores"].items() if family_of(name) in CATEGORY_FAMILIES}
            parts.setdefault(str(name), []).append({**row, "scores": scores})
    return dict(sorted(parts.items(), key=lambda item: (-len(item[1]), item[0]))[:_MOST_PARTS])


def _part_table(rows: Sequence[Row], exits: Sequence[int], num_exits: int) -> JsonObject:
    """Returns the entries "layers", "worst_exit" and "any_exit" of `summarise` for `rows`, which are
    a part of a data set, such as one category."""
    measured = _Measured(rows, exits)
    return {"layers": _share_tables(measured, exits, num_exits)["layers"]} | _attack_tables(measured, exits)


def _share_tables(measured: "_Measured", exits: Sequence[int], num_exits: int) -> JsonObject:
    """Returns the entries "layers" and "groups" of `summarise`."""

    def estimate(metric: str, exit_indices: np.ndarray, weights: np.ndarray | None) -> Table | None:
        """Returns the entry of a metric over some exits, see `_tables`."""
        values, errors = measured.values[metric][exit_indices], measured.errors[metric][exit_indices]
        if not (np.isfinite(values) | errors).any():
            return None
        interval = mean_interval(values, measured.prompts, share=_is_share(metric), weights=weights)
        if family_of(metric) in _UNIT_FAMILIES:
            interval = Interval(interval.mean, *np.clip([interval.low, interval.high], 0.0, 1.0).tolist())
        return _estimate(interval, int(np.isfinite(values).sum()), int(errors.sum()))

    counts = [int(count) for count in measured.present.sum(axis=1)]
    return _tables(list(measured.values), exits, num_exits, counts, estimate)


def _attack_tables(measured: "_Measured", exits: Sequence[int]) -> JsonObject:
    """Returns the entries "worst_exit" and "any_exit" of `summarise`; {} without an attack success rate."""
    tables = {"worst_exit": _worst_exits(measured, exits), "any_exit": _any_exit(measured)}
    return {name: table for name, table in tables.items() if table}


def _worst_exits(measured: "_Measured", exits: Sequence[int]) -> dict[str, Table]:
    """Returns {attack success rate: its worst exit, with the interval of the highest true rate}."""
    worst = {}
    for metric, values in measured.values.items():
        if family_of(metric) in ("asr", "asr@k") and np.isfinite(values).any():
            position, interval = maximum_interval(values, measured.prompts)
            errors = int(measured.errors[metric][position].sum())
            estimate = _estimate(interval, int(np.isfinite(values[position]).sum()), errors)
            worst[metric] = {"layer": int(exits[position]), **estimate}
    return worst


def _any_exit(measured: "_Measured") -> dict[str, Table]:
    """Returns {metric: share of rows with an unsafe response at one or more exits}; `n_error` counts unknown ones."""
    tables = {}
    for metric in measured.judges:
        values, unknown = measured.any_exit(metric)
        if (np.isfinite(values) | unknown).any():
            interval = mean_interval(values, measured.row_prompts, share=True)
            name = any_exit_metric(metric, measured.attempts)
            tables[name] = _estimate(interval, int(np.isfinite(values).sum()), int(unknown.sum()))
    return tables


def difference(before: Iterable[Row], after: Iterable[Row], exits: Sequence[int], num_exits: int) -> JsonObject:
    """Returns the tables of after minus before, which are part of `sweeps/difference.*.json`.

    Responses of both sweeps are paired by id, exit and attempt; responses that only one sweep has are left out.

    Args:
      before: transcript rows of the sweep before training.
      after: transcript rows of the sweep after training.
      exits: see `summarise`.
      num_exits: see `summarise`.

    Returns:
      `"layers"`, `"groups"` and `"any_exit"` as in `summarise`. `n` is the number of pairs with both scores, and
      `n_error` the number of pairs for which a scorer failed before, after or both times.
    """
    sides = [_Measured(rows, exits) for rows in (before, after)]
    shared = [response for response in sides[0].index if response in sides[1].index]
    columns = [[side.index[response] for response in shared] for side in sides]
    prompts = [sides[0].prompts[column] for column in columns[0]]
    metrics = [metric for metric in sides[0].values if metric in sides[1].values]
    present = sides[0].present[:, columns[0]] & sides[1].present[:, columns[1]]

    def estimate(metric: str, exit_indices: np.ndarray, weights: np.ndarray | None) -> Table | None:
        values = [side.values[metric][exit_indices][:, column] for side, column in zip(sides, columns, strict=True)]
        failed = [side.errors[metric][exit_indices][:, column] for side, column in zip(sides, columns, strict=True)]
        return _paired_estimate(values, failed, prompts, share=_is_share(metric), weights=weights)

    tables = _tables(metrics, exits, num_exits, [int(count) for count in present.sum(axis=1)], estimate)
    any_exit = _any_exit_difference(*sides)
    return tables | ({"any_exit": any_exit} if any_exit else {})


def _any_exit_difference(before: "_Measured", after: "_Measured") -> dict[str, Table]:
    """Returns {metric: share of rows with an unsafe response at one or more exits, after minus before}.

    It is empty if the two sweeps have different numbers of attempts.
    """
    if before.attempts != after.attempts:
        return {}
    shared_ids = [row_id for row_id in before.ids if row_id in after.ids]
    rows = [[side.ids[row_id] for row_id in shared_ids] for side in (before, after)]
    prompts = [before.row_prompts[row] for row in rows[0]]
    tables = {}
    for metric in before.judges:
        if metric in after.judges:
            results = [side.any_exit(metric) for side in (before, after)]
            values = [side_values[row] for (side_values, _), row in zip(results, rows, strict=True)]
            unknown = [side_unknown[row] for (_, side_unknown), row in zip(results, rows, strict=True)]
            estimate = _paired_estimate(values, unknown, prompts, share=True, weights=None)
            if estimate is not None:
                tables[any_exit_metric(metric, before.attempts)] = estimate
    return tables


def _paired_estimate(
    values: Sequence[np.ndarray],
    failed: Sequence[np.ndarray],
    prompts: Sequence[str],
    *,
    share: bool,
    weights: np.ndarray | None,
) -> Table | None:
    """Returns the entry of a metric for after minus before; None if there is neither a pair nor an error.

    Args:
      values: (before, after) of the paired responses.
      failed: (before, after), whether the scorer failed.
      prompts, share, weights: see `paired_interval`.
    """
    pairs, either_failed = np.isfinite(values[0]) & np.isfinite(values[1]), failed[0] | failed[1]
    if not (pairs | either_failed).any():
        return None
    interval = paired_interval(values[0], values[1], prompts, share=share, weights=weights)
    return _estimate(interval, int(pairs.sum()), int(either_failed.sum()))


class _Measured:
    """Holds the scores of a sweep as arrays, with a row for each of E exits and a column for each of n (id, attempt).

    Attributes:
      index: {(id, attempt): column}.
      prompts: prompt of each column.
      present: bool [E, n], whether there is a response.
      values: {metric: float64 [E, n]}, NaN without a score. For `asr@K`, the value of a row of data is in the column of
        its first attempt.
      errors: {metric: bool [E, n]}, whether the scorer failed.
      judges: metrics of attack success rates.
      ids: {id: index of the row of data}, for R rows.
      row_prompts: prompt of each row of data.
      attempts: K, the largest number of responses of a row of data at an exit.
    """

    def __init__(self, rows: Iterable[Row], exits: Sequence[int]) -> None:
        """Reads transcript rows; those at other exits than `exits` are ignored."""
        layer_index = {layer: position for position, layer in enumerate(exits)}
        rows = [row for row in rows if row["layer"] in layer_index]
        responses = dict.fromkeys((row["id"], row.get("attempt", 0)) for row in rows)
        self.index = {response: column for column, response in enumerate(responses)}
        shape = (len(layer_index), len(self.index))
        self.prompts = [""] * len(self.index)
        self.present = np.zeros(shape, bool)
        self.values: dict[str, np.ndarray] = {}
        self.errors: dict[str, np.ndarray] = {}
        for row in rows:
            exit_index, column = layer_index[row["layer"]], self.index[row["id"], row.get("attempt", 0)]
            self.prompts[column] = row["prompt"]
            self.present[exit_index, column] = True
            for metric, value in row["scores"].items():
                if metric not in self.values:
                    self.values[metric], self.errors[metric] = np.full(shape, np.nan), np.zeros(shape, bool)
                self.values[metric][exit_index, column] = np.nan if value is None else value
                self.errors[metric][exit_index, column] = value is None
        self.judges = [metric for metric in self.values if family_of(metric) == "asr"]
        attempts = {attempt: number for number, attempt in enumerate(sorted({attempt for _, attempt in responses}))}
        self.attempts = max(len(attempts), 1)
        self.ids = {row_id: number for number, row_id in enumerate(dict.fromkeys(row_id for row_id, _ in responses))}
        self._columns = np.full((len(self.ids), self.attempts), -1)  # [R, K]; -1: there is no such attempt
        for (row_id, attempt), column in self.index.items():
            self._columns[self.ids[row_id], attempts[attempt]] = column
        self._first = np.array([int(row[row >= 0][0]) for row in self._columns], int)
        self.row_prompts = [self.prompts[column] for column in self._first]
        if self.attempts > 1:
            for metric in self.judges:
                self._add_any_attempt(metric)

    def any_exit(self, metric: str) -> tuple[np.ndarray, np.ndarray]:
        """Returns whether each row of data has an unsafe response at one or more exits.

        The result is that of `any_unsafe`: (values [R], unknown [R]).
        """
        return any_unsafe(*self._by_attempt(metric), axis=(0, 2))

    def _add_any_attempt(self, metric: str) -> None:
        """Adds the metric `asr@K` of a judge to `values` and `errors`."""
        name = any_attempt_metric(metric, self.attempts)
        values, unknown = any_unsafe(*self._by_attempt(metric), axis=2)
        self.values[name], self.errors[name] = np.full(self.present.shape, np.nan), np.zeros(self.present.shape, bool)
        self.values[name][:, self._first], self.errors[name][:, self._first] = values, unknown

    def _by_attempt(self, metric: str) -> tuple[np.ndarray, np.ndarray]:
        """Returns (values, errors) of a metric as [E, R, K]; NaN and False for a response that does not exist."""
        extra_column = ((0, 0), (0, 1))  # appended as the last column, which the -1 in `_columns` index
        values = np.pad(self.values[metric], extra_column, constant_values=np.nan)
        return values[:, self._columns], np.pad(self.errors[metric], extra_column)[:, self._columns]


def _tables(
    metrics: Sequence[str],
    exits: Sequence[int],
    num_exits: int,
    counts: Sequence[int],
    estimate: Callable[[str, np.ndarray, np.ndarray | None], Table | None],
) -> JsonObject:
    """Returns the entries "layers" and "groups" of `summarise` or `difference`.

    Args:
      metrics: metrics to report.
      exits: the measured exits.
      num_exits: number of exits of the model.
      counts: number of responses at each exit.
      estimate: function of (metric, indices into `exits`, weights of these exits or None) that returns the mean of the
        metric over these exits, or None if it has no value.
    """

    def metrics_over(exit_indices: np.ndarray, weights: np.ndarray | None) -> dict[str, Table]:
        estimates = {metric: estimate(metric, exit_indices, weights) for metric in metrics}
        return {metric: table for metric, table in estimates.items() if table is not None}

    layers = [
        {"layer": int(layer), "n": counts[position], "metrics": metrics_over(np.array([position]), None)}
        for position, layer in enumerate(exits)
    ]
    groups: JsonObject = {}
    for name, weights in group_weights(exits, num_exits).items():
        members = np.flatnonzero(weights)
        groups[name] = {} if name == "average" else {"layers": [int(exits[int(member)]) for member in members]}
        groups[name]["metrics"] = metrics_over(members, weights[members])
    return {"layers": layers, "groups": groups}


def _is_share(metric: str) -> bool:
    return family_of(metric) in SHARE_FAMILIES


def _estimate(interval: Interval, n: int, n_error: int) -> Table:
    """Returns the entry of a metric in `sweeps/*.json`."""
    ends = [interval.low, interval.high]
    return {
        "mean": None if np.isnan(interval.mean) else interval.mean,
        "ci95": None if np.isnan(ends).any() else ends,
        "n": n,
        "n_error": n_error,
    }
