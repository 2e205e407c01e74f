"""Summarises transcript rows into the tables of `sweeps/*.json`: per layer, per group, and after minus before.

A row is one response: `{"id", "layer", "prompt", "kind", "response", "scores": {metric: number or None}, ...}`. A
metric that is absent from `scores` does not apply to the row; None is an error of its scorer, counted as `n_error`.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from icet_jax.evaluation.statistics import Interval, group_weights, maximum_interval, mean_interval, paired_interval
from icet_jax.files import JsonObject

SHARE_FAMILIES = ("asr", "refusal", "refusal_unsafe", "vqa", "accuracy", "degenerate", "empty", "truncated")
"""Families (first parts of the names) of metrics whose values are 0 or 1, or for "vqa" a fraction of full credit."""
_UNIT_FAMILIES = ("ts", "p_unsafe")  # values and means are within 0..1
CATEGORY_FAMILIES = ("asr", "refusal", "refusal_unsafe")
"""Families of metrics that are also given for each content category and attack format of a data set."""
_MOST_PARTS = 64  # only the most frequent parts are given, in case a data set has one per row

Row = JsonObject
Table = JsonObject


def summarise(rows: Iterable[Row], exits: Sequence[int], num_exits: int) -> JsonObject:
    """Returns `{"layers": [...], "groups": {...}}` of a sweep's rows, in the form of `sweeps/*.json`.

    If rows have an attack success rate, `"worst_exit": {metric: {"layer": ..., "mean": ..., "ci95": ...}}` is added. If
    rows have a content category (their field `policy`), `"policies": {category: [...]}` is added, each a list like
    `layers` with only `CATEGORY_FAMILIES`. If rows have an attack format, `"formats": {format: {"layers": [...],
    "worst_exit": {...}}}` is added; if they say whether the attack was transferred from a language model,
    `"transferred": {"yes": ..., "no": ...}`.

    Args:
      rows: one per (id, layer), in any order; layers that are not among `exits` are ignored.
      exits: the measured layers, ascending.
      num_exits: N of the model, which determines the groups.
    """
    rows = list(rows)
    tables = _summarise(rows, exits, num_exits)
    worst_exits = _worst_exits(rows, exits)
    if worst_exits:
        tables["worst_exit"] = worst_exits
    categories = _parts(rows, lambda row: row.get("policy"))
    if categories:
        tables["policies"] = {name: _summarise(part, exits, num_exits)["layers"] for name, part in categories.items()}
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
            scores = {metric: value for metric, value in row["scores"].items() if _family(metric) in CATEGORY_FAMILIES}
            parts.setdefault(str(name), []).append({**row, "scores": scores})
    return dict(sorted(parts.items(), key=lambda item: (-len(item[1]), item[0]))[:_MOST_PARTS])


def _part_table(rows: Sequence[Row], exits: Sequence[int], num_exits: int) -> JsonObject:
    """Returns the table of the layers for a part's rows, and their worst exits."""
    table = {"layers": _summarise(rows, exits, num_exits)["layers"]}
    worst_exits = _worst_exits(rows, exits)
    return table | ({"worst_exit": worst_exits} if worst_exits else {})


def _summarise(rows: Sequence[Row], exits: Sequence[int], num_exits: int) -> JsonObject:
    measured = _Measured(rows, exits)

    def estimate(metric: str, chosen: np.ndarray, weights: np.ndarray | None) -> Table | None:
        values, errors = measured.values[metric][chosen], measured.errors[metric][chosen]
        if not (np.isfinite(values) | errors).any():
            return None
        interval = mean_interval(values, measured.prompts, share=_is_share(metric), weights=weights)
        if _family(metric) in _UNIT_FAMILIES:
            interval = Interval(interval.mean, *np.clip([interval.low, interval.high], 0.0, 1.0).tolist())
        return _estimate(interval, int(np.isfinite(values).sum()), int(errors.sum()))

    counts = [int(count) for count in measured.present.sum(axis=1)]
    return _tables(list(measured.values), exits, num_exits, counts, estimate)


def _worst_exits(rows: Sequence[Row], exits: Sequence[int]) -> dict[str, Table]:
    """Returns the exit with the highest value of each attack success rate, with the interval of that maximum."""
    measured = _Measured(rows, exits)
    worst = {}
    for metric, values in measured.values.items():
        if _family(metric) == "asr" and np.isfinite(values).any():
            position, interval = maximum_interval(values, measured.prompts)
            errors = int(measured.errors[metric][position].sum())
            estimate = _estimate(interval, int(np.isfinite(values[position]).sum()), errors)
            worst[metric] = {"layer": int(exits[position]), **estimate}
    return worst


def difference(before: Iterable[Row], after: Iterable[Row], exits: Sequence[int], num_exits: int) -> JsonObject:
    """Returns `{"layers": [...], "groups": {...}}` of after - before over the rows that both sweeps have, paired by id.

    `n` of a layer is its number of pairs; `n_error` counts pairs whose scorer failed on either side.
    """
    both = [_Measured(rows, exits) for rows in (before, after)]
    shared = [identity for identity in both[0].ids if identity in both[1].index]
    columns = [[side.index[identity] for identity in shared] for side in both]
    prompts = [both[0].prompts[column] for column in columns[0]]
    metrics = [metric for metric in both[0].values if metric in both[1].values]
    present = both[0].present[:, columns[0]] & both[1].present[:, columns[1]]

    def estimate(metric: str, chosen: np.ndarray, weights: np.ndarray | None) -> Table | None:
        sides = [side.values[metric][chosen][:, column] for side, column in zip(both, columns, strict=True)]
        failed = np.any(
            [side.errors[metric][chosen][:, column] for side, column in zip(both, columns, strict=True)], axis=0
        )
        pairs = np.isfinite(sides[0]) & np.isfinite(sides[1])
        if not (pairs | failed).any():
            return None
        interval = paired_interval(sides[0], sides[1], prompts, share=_is_share(metric), weights=weights)
        return _estimate(interval, int(pairs.sum()), int(failed.sum()))

    return _tables(metrics, exits, num_exits, [int(count) for count in present.sum(axis=1)], estimate)


class _Measured:
    """Holds rows as arrays: `values[metric]` float64 [E, n] (NaN = none), `errors[metric]` and `present` bool [E,
    n]."""

    def __init__(self, rows: Iterable[Row], exits: Sequence[int]) -> None:
        layer_index = {layer: position for position, layer in enumerate(exits)}
        rows = [row for row in rows if row["layer"] in layer_index]
        self.ids = list(dict.fromkeys(row["id"] for row in rows))
        self.index = {identity: column for column, identity in enumerate(self.ids)}
        shape = (len(layer_index), len(self.ids))
        self.prompts = [""] * len(self.ids)
        self.present = np.zeros(shape, bool)
        self.values: dict[str, np.ndarray] = {}
        self.errors: dict[str, np.ndarray] = {}
        for row in rows:
            place = layer_index[row["layer"]], self.index[row["id"]]
            self.prompts[place[1]] = row["prompt"]
            self.present[place] = True
            for metric, value in row["scores"].items():
                if metric not in self.values:
                    self.values[metric], self.errors[metric] = np.full(shape, np.nan), np.zeros(shape, bool)
                self.values[metric][place] = np.nan if value is None else value
                self.errors[metric][place] = value is None


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
    return _family(metric) in SHARE_FAMILIES


def _family(metric: str) -> str:
    return metric.partition("/")[0]


def _estimate(interval: Interval, n: int, n_error: int) -> Table:
    ends = [interval.low, interval.high]
    return {
        "mean": None if np.isnan(interval.mean) else interval.mean,
        "ci95": None if np.isnan(ends).any() else ends,
        "n": n,
        "n_error": n_error,
    }
