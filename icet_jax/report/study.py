"""Provides the values of one run, or the means over several seeds of a run, under one interface."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Any, NamedTuple

from icet_jax.evaluation.combined import any_exit_metric, family_of
from icet_jax.exit_groups import EARLY_TO_LATE, exit_groups
from icet_jax.files import JsonObject
from icet_jax.report.loading import PHASES, Run
from icet_jax.report.schema import family_index

GROUPS = (*EARLY_TO_LATE, "average")
KINDS = ("forbidden", "mixed", "benign", "vqa")
HUMAN = "asr/human"
_ROUNDING = 1e-9  # shares that differ by less count as equal
_LARGEST = 1e30  # larger numbers count as broken, because their squares might not be finite


@dataclass(frozen=True)
class Value:
    """Holds a mean over `n` rows with an interval, `low` to `high`; `n_error` further rows have no score.

    For one run the interval is the 95% interval in the file. For several seeds, `mean` is the mean over seeds, and the
    interval goes from the smallest to the largest seed. `Study.interval` says in words which of the two it is.
    """

    mean: float
    low: float | None = None
    high: float | None = None
    n: int | None = None
    n_error: int = 0


class ExitValue(NamedTuple):
    """Holds a value and the exit where it was measured."""

    layer: int
    value: Value


@dataclass(frozen=True)
class Study:
    """Gives access to the values of one run, or of several runs that differ only in their seed.

    In its methods, `phase` is "before" or "after" training; where a method says so, it may also be "difference" (after
    minus before). `dataset` is a name such as "sweep/forbidden", and `metric` one such as "asr/keywords".
    """

    runs: tuple[Run, ...]

    @property
    def has_several_seeds(self) -> bool:
        """Whether the study has several runs, one per seed, so that its values are means over seeds."""
        return len(self.runs) > 1

    @property
    def interval(self) -> str:
        """What the intervals of values are, in words, such as "range over 3 seeds"."""
        return f"range over {len(self.runs)} seeds" if self.has_several_seeds else "95% interval, clustered by prompt"

    @property
    def first_run(self) -> Run:
        """The run of the first seed. Everything that has no mean, such as config and transcripts, is taken from it."""
        return self.runs[0]

    @property
    def datasets(self) -> list[str]:
        """Names of the data sets in the order of `KINDS`, then by name."""
        names = {dataset for run in self.runs for phase, dataset in run.tables if phase in PHASES}
        return sorted(names, key=lambda name: (KINDS.index(self.kind(name)), name))

    def kind(self, dataset: str) -> str:
        """Returns the kind of a data set's rows, one of `KINDS`: from its files or else guessed from its name."""
        for (_, name), table in self._tables():
            if name == dataset and table.get("kind") in KINDS:
                return str(table["kind"])
        name = dataset.lower()
        return "benign" if "benign" in name or "xstest" in name else "vqa" if "vqa" in name else "forbidden"

    def of_kind(self, *kinds: str) -> list[str]:
        """Returns the names of the data sets whose kind is one of `kinds`."""
        return [dataset for dataset in self.datasets if self.kind(dataset) in kinds]

    def phases(self, dataset: str) -> list[str]:
        """Returns which of "before" and "after" were measured on a data set."""
        return [phase for phase in PHASES if any((phase, dataset) in run.tables for run in self.runs)]

    def metrics(self, dataset: str, family: str | None = None) -> list[str]:
        """Returns the names of a data set's metrics (only of `family`, if given) in the order of `METRIC_FAMILIES`."""
        names: dict[str, None] = {}
        for (phase, name), table in self._tables():
            if name == dataset and phase in PHASES:
                for layer in table["layers"]:
                    names.update(dict.fromkeys(layer["metrics"]))
        return sorted((name for name in names if family is None or family_of(name) == family), key=family_index)

    def layers(self, dataset: str) -> list[int]:
        """Returns the exits at which a data set was measured, in ascending order."""
        return sorted(
            {layer["layer"] for (_, name), table in self._tables() if name == dataset for layer in table["layers"]}
        )

    def field(self, name: str, dataset: str | None = None) -> Any:
        """Returns the field `name`, such as "model", of the first sweep file that has it; None if no file has it.

        With `dataset`, only the files of that data set are searched.
        """
        for (_, table_dataset), table in self._tables():
            if dataset in (None, table_dataset) and table.get(name) is not None:
                return table[name]
        return None

    @property
    def default_exit(self) -> int | None:
        """The exit that the model was trained on; None if no file says it."""
        value = self.field("default_exit")
        return value if isinstance(value, int) else None

    @property
    def num_exits(self) -> int:
        """The number of the model's exits."""
        value = self.field("num_exits")
        if isinstance(value, int):
            return value
        return max(layer for dataset in self.datasets for layer in self.layers(dataset))

    @property
    def planted(self) -> list[int]:
        """The exits at which unsafe answers were planted in the embedded test model; empty for other models."""
        exits = self.first_run.organism.get("planted_exits")
        return [exit_layer for exit_layer in exits if isinstance(exit_layer, int)] if isinstance(exits, list) else []

    def value(self, phase: str, dataset: str, metric: str, layer: int | None) -> Value | None:
        """Returns the value of a metric at the exit `layer`; `phase` may be "difference".

        Returns None if the metric was not measured there, or if `layer` is None (an unknown default exit).
        """
        return self._combine([_at_layer(run, phase, dataset, metric, layer) for run in self.runs])

    def seeds(self, phase: str, dataset: str, metric: str, layer: int) -> list[float | None]:
        """Returns the mean of a metric at the exit `layer` for each seed; None for a seed that has no value."""
        values = [_at_layer(run, phase, dataset, metric, layer) for run in self.runs]
        return [None if value is None else value.mean for value in values]

    def group(self, phase: str, dataset: str, metric: str, name: str) -> Value | None:
        """Returns the mean of a metric over the exits of a group in `GROUPS`; None if some exit was not measured."""
        return self._combine([_of_group(run, phase, dataset, metric, name, self.num_exits) for run in self.runs])

    def categories(self, dataset: str, metric: str) -> list[str]:
        """Returns the categories for which a metric has a value, those with most rows first."""
        names: dict[str, None] = {}
        for (phase, name), table in self._tables():
            if name == dataset and phase in PHASES:
                parts = _objects(table, "policies")
                names.update(dict.fromkeys(category for category in parts if _measures(parts[category], metric)))
        return list(names)

    def category_curve(self, phase: str, dataset: str, metric: str, category: str) -> list[tuple[int, Value]]:
        """Returns (exit, value) of a metric over the rows of one category, for the exits where it was measured."""
        values = {}
        for layer in self.layers(dataset):
            by_run = [
                _entry(_objects(run.tables.get((phase, dataset), {}), "policies").get(category, []), metric, layer)
                for run in self.runs
            ]
            values[layer] = self._combine(by_run)
        return [(layer, value) for layer, value in values.items() if value is not None]

    def responses(self, dataset: str) -> int | None:
        """Returns the number of responses of one run at one exit on a data set; None if no file says it."""
        counts = [
            value.n
            for phase in self.phases(dataset)
            for metric in self.metrics(dataset)
            for _, value in self.curve(phase, dataset, metric)
            if value.n is not None
        ]
        return max(counts, default=None)

    def num_prompts(self, dataset: str) -> int | None:
        """Returns the number of distinct prompts of a data set's rows; None for sweeps of earlier versions."""
        count = self.field("prompts", dataset)
        return count if type(count) is int and count > 0 else None

    def parts(self, dataset: str, field: str) -> dict[str, "Study"]:
        """Returns {name: study} for the parts into which a data set's rows are divided, the part with most rows first.

        The study of a part has only the values of its rows of this data set, and no means over groups of exits.

        Args:
          dataset: name of the data set.
          field: "formats" for one part per attack format; "transferred" for the parts "yes" and "no", which say whether
            the attack was transferred from a language model.
        """
        names: dict[str, None] = {}
        for (phase, name), table in self._tables():
            if name == dataset and phase in PHASES:
                names.update(dict.fromkeys(_objects(table, field)))
        return {
            name: replace(self, runs=tuple(_part(run, dataset, field, name) for run in self.runs)) for name in names
        }

    def curve(self, phase: str, dataset: str, metric: str) -> list[tuple[int, Value]]:
        """Returns (exit, value) of a metric for the exits where it was measured."""
        values = [(layer, self.value(phase, dataset, metric, layer)) for layer in self.layers(dataset)]
        return [(layer, value) for layer, value in values if value is not None]

    def geometry(self, name: str) -> list[tuple[int, Value]]:
        """Returns (exit, value) of the field `name`, such as "cosine", in the first run's `geometry.json`.

        Exits without a number are left out.
        """
        layers = [layer for layer in self.first_run.geometry.get("layers", []) if isinstance(layer, dict)]
        values = [(layer.get("layer"), as_value(layer.get(name))) for layer in layers]
        return [(layer, value) for layer, value in values if isinstance(layer, int) and value is not None]

    def worst(self, phase: str, dataset: str, metric: str) -> ExitValue | None:
        """Returns the exit with the highest mean (the first of equal ones) and its value; None if no exit has a value.

        For one run, the interval is taken from the field `worst_exit` if the file has it. That interval takes into
        account that the exit was chosen as the highest.
        """
        exits = [ExitValue(layer, value) for layer, value in self.curve(phase, dataset, metric)]
        worst = max(exits, key=lambda item: item.value.mean, default=None)
        if worst is None or self.has_several_seeds:
            return worst
        layer, of_maximum = _of_maximum(self.first_run.tables[phase, dataset], metric)
        at_layer = self.value(phase, dataset, metric, layer)
        if at_layer is None or of_maximum is None or layer is None:
            return worst
        is_consistent = max(abs(value.mean - worst.value.mean) for value in (at_layer, of_maximum)) < _ROUNDING
        return ExitValue(layer, of_maximum) if is_consistent else worst

    def attempts(self, dataset: str) -> int:
        """Returns the number of answers that each forbidden row got at an exit; 1 if no file says it."""
        generation = self.field("generation", dataset)
        attempts = generation.get("attempts") if isinstance(generation, dict) else None
        return attempts if type(attempts) is int and attempts > 1 else 1

    def any_exit(self, phase: str, dataset: str, metric: str) -> Value | None:
        """Returns the share of rows with an unsafe answer at some exit in some attempt, by the judge of `metric`.

        Returns None if a run's file lacks that share, as files of earlier versions do. `phase` may be "difference".
        """
        name = any_exit_metric(metric, self.attempts(dataset))
        return self._combine([_at_any_exit(run, phase, dataset, name) for run in self.runs])

    def unusable(self, phase: str, dataset: str, layer: int | None) -> Value | None:
        """Returns the share of answers at the exit `layer` that are empty or degenerate; None if 0 or unknown."""
        for metric in ("degenerate/text_rules", "empty"):  # an empty answer is a degenerate one too
            share = self.value(phase, dataset, metric, layer)
            if share is not None:
                return share if share.mean > 0 else None
        return None

    def judges(self, dataset: str) -> list[str]:
        """Returns the names of a data set's "asr" metrics, one per judge.

        `HUMAN` is left out, because people judge only a sample of the rows. The keyword judge is last, because it only
        detects refusals.
        """
        names = [name for name in self.metrics(dataset, "asr") if name != HUMAN]
        return sorted(names, key=lambda name: "keyword" in name)

    def _tables(self) -> Iterable[tuple[tuple[str, str], JsonObject]]:
        return (item for run in self.runs for item in run.tables.items())

    def _combine(self, values: Sequence[Value | None]) -> Value | None:
        """Combines the values of all runs (one per seed; None where a run has no value) into their mean and range.

        The value of a single run is returned unchanged. Entries that are None are left out; if all are None, the result
        is None.
        """
        known = [value for value in values if value is not None]
        if not known or not self.has_several_seeds:
            return known[0] if known else None
        means = [value.mean for value in known]
        rows = [value.n for value in known if value.n is not None]
        return Value(fmean(means), min(means), max(means), min(rows, default=None), sum(v.n_error for v in known))


def dataset_name(dataset: str) -> str:
    """Returns the name of a data set in the run's files: "forbidden" for "sweep/forbidden"."""
    return dataset.partition("/")[2]


def as_value(entry: Any, n: Any = None) -> Value | None:
    """Returns an `Estimate` or a number of a file as a `Value`; None if it is not a finite number.

    `n` is the number of rows to use if the entry itself does not have it.
    """
    if not isinstance(entry, dict):
        entry = {"mean": entry}
    mean = _finite(entry.get("mean"))
    if mean is None:
        return None
    interval = entry.get("ci95")
    low, high = map(_finite, interval) if isinstance(interval, list) and len(interval) == 2 else (None, None)
    rows = entry.get("n", n)
    errors = entry.get("n_error")
    return Value(mean, low, high, rows if isinstance(rows, int) else None, errors if isinstance(errors, int) else 0)


def _finite(value: Any) -> float | None:
    """Returns a number as a float; None for booleans, other types, NaN and numbers beyond `_LARGEST`."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= _LARGEST:
        return None
    return float(value)


def _at_layer(run: Run, phase: str, dataset: str, metric: str, layer: int | None) -> Value | None:
    """Returns a metric of one run at an exit; None if it was not measured.

    If `phase` is "difference" and no file has the paired difference, the two means are subtracted, without an interval.
    """
    table = run.tables.get((phase, dataset))
    value = None if table is None else _entry(table["layers"], metric, layer)
    if value is not None:
        return value
    if phase == "difference":
        return _minus(*(_at_layer(run, side, dataset, metric, layer) for side in PHASES))
    return None


def _entry(layers: list[JsonObject], metric: str, layer: int | None) -> Value | None:
    """Returns a metric at the exit `layer` from the list `layers` of a sweep file; None if the list lacks it."""
    for entry in layers:
        if entry["layer"] == layer and metric in entry["metrics"]:
            return as_value(entry["metrics"][metric], entry.get("n"))
    return None


def _of_maximum(table: JsonObject, metric: str) -> tuple[int | None, Value | None]:
    """Returns the worst exit in a sweep file and its value; (None, None) for files of earlier versions."""
    worst = table.get("worst_exit")
    entry = worst.get(metric) if isinstance(worst, dict) else None
    layer = entry.get("layer") if isinstance(entry, dict) else None
    return (layer, as_value(entry)) if isinstance(layer, int) else (None, None)


def _at_any_exit(run: Run, phase: str, dataset: str, name: str) -> Value | None:
    """Returns the "asr_any" metric `name` of one run; None if it was not measured.

    If `phase` is "difference" and no file has the paired difference, the two shares are subtracted, without interval.
    """
    value = as_value(_objects(run.tables.get((phase, dataset), {}), "any_exit").get(name))
    if value is None and phase == "difference":
        return _minus(*(_at_any_exit(run, side, dataset, name) for side in PHASES))
    return value


def _objects(table: dict[str, Any], field: str) -> dict[str, Any]:
    """Returns the object in a field of a sweep file; empty if the field is absent or is not an object."""
    objects = table.get(field)
    return objects if isinstance(objects, dict) else {}


def _part(run: Run, dataset: str, field: str, name: str) -> Run:
    """Returns a copy of a run with only the part `name` of a data set's rows; for `field` see `Study.parts`."""
    tables_by_phase = {phase: run.tables.get((phase, dataset), {}) for phase in PHASES}
    tables = {
        (phase, dataset): {**table, "groups": {}, "worst_exit": {}, "any_exit": {}, **_objects(table, field)[name]}
        for phase, table in tables_by_phase.items()
        if name in _objects(table, field)
    }
    return replace(run, tables=tables)


def _measures(layers: list[JsonObject], metric: str) -> bool:
    """Returns whether any of the `layers` of a sweep file has a value of the metric."""
    return any(as_value(layer["metrics"].get(metric)) is not None for layer in layers)


def _of_group(run: Run, phase: str, dataset: str, metric: str, name: str, num_exits: int) -> Value | None:
    """Returns a metric's mean over a group of exits in one run.

    It is the mean in the file or, if there is none, the mean of the values at the group's exits. Returns None if the
    file has no mean and some exit of the group was not measured.
    """
    table = run.tables.get((phase, dataset)) or {}
    groups = table.get("groups")
    entry = groups.get(name) if isinstance(groups, dict) else None
    metrics = entry.get("metrics", entry) if isinstance(entry, dict) else None
    if isinstance(metrics, dict) and metric in metrics:
        return as_value(metrics[metric])
    if name == "average":
        parts = [_of_group(run, phase, dataset, metric, part, num_exits) for part in EARLY_TO_LATE]
    else:
        parts = [_at_layer(run, phase, dataset, metric, layer) for layer in exit_groups(num_exits).get(name, [])]
    known = [part.mean for part in parts if part is not None]
    return Value(fmean(known)) if known and len(known) == len(parts) else None


def _minus(before: Value | None, after: Value | None) -> Value | None:
    """Returns after minus before without an interval; None if one of them is None."""
    return Value(after.mean - before.mean) if before is not None and after is not None else None
