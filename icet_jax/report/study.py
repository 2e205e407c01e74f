"""One run, or the same run with several seeds, seen as one set of numbers."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Any, NamedTuple

from icet_jax.evaluation.combined import any_exit_metric, family_of
from icet_jax.exit_groups import EARLY_TO_LATE, exit_groups
from icet_jax.report.loading import PHASES, Run
from icet_jax.report.schema import METRIC_FAMILIES

GROUPS = (*EARLY_TO_LATE, "average")
KINDS = ("forbidden", "mixed", "benign", "vqa")
HUMAN = "asr/human"
_ROUNDING = 1e-9  # shares that differ by less are equal
_LARGEST = 1e30  # sums and squares of such numbers are finite


@dataclass(frozen=True)
class Value:
    """A number and its interval.

    For one run `low`..`high` is the file's 95% interval. For several seeds `mean` is the mean over seeds and
    `low`..`high` the smallest and largest seed: `Study.interval` names which.
    """

    mean: float
    low: float | None = None
    high: float | None = None
    n: int | None = None
    n_error: int = 0


class ExitValue(NamedTuple):
    """A number and the exit where it was measured."""

    layer: int
    value: Value


@dataclass(frozen=True)
class Study:
    """Runs that differ in their seed only. One run is the common case."""

    runs: tuple[Run, ...]

    @property
    def several(self) -> bool:
        """True when numbers are means over seeds."""
        return len(self.runs) > 1

    @property
    def interval(self) -> str:
        """What the intervals are, in words."""
        return f"range over {len(self.runs)} seeds" if self.several else "95% interval, clustered by prompt"

    @property
    def first(self) -> Run:
        """The run that stands for all where a thing cannot be averaged (config, transcripts)."""
        return self.runs[0]

    @property
    def datasets(self) -> list[str]:
        """Data sets in the order of `KINDS`; swept ones before utility ones."""
        names = {dataset for run in self.runs for phase, dataset in run.tables if phase in PHASES}
        return sorted(names, key=lambda name: (KINDS.index(self.kind(name)), name))

    def kind(self, dataset: str) -> str:
        """What the rows of a data set ask for; guessed from its name where the file does not say."""
        for (_, name), table in self._tables():
            if name == dataset and table.get("kind") in KINDS:
                return str(table["kind"])
        name = dataset.lower()
        return "benign" if "benign" in name or "xstest" in name else "vqa" if "vqa" in name else "forbidden"

    def of_kind(self, *kinds: str) -> list[str]:
        """The data sets of these kinds."""
        return [dataset for dataset in self.datasets if self.kind(dataset) in kinds]

    def phases(self, dataset: str) -> list[str]:
        """Which of "before" and "after" were measured on a data set."""
        return [phase for phase in PHASES if any((phase, dataset) in run.tables for run in self.runs)]

    def metrics(self, dataset: str, family: str | None = None) -> list[str]:
        """Metric names in the families' order, then in the order of the file."""
        names: dict[str, None] = {}
        for (phase, name), table in self._tables():
            if name == dataset and phase in PHASES:
                for layer in table["layers"]:
                    names.update(dict.fromkeys(layer["metrics"]))
        order = list(METRIC_FAMILIES)
        kept = [name for name in names if family is None or family_of(name) == family]
        return sorted(kept, key=lambda name: _index(order, family_of(name)))

    def layers(self, dataset: str) -> list[int]:
        """The exits at which a data set was measured, ascending."""
        return sorted(
            {layer["layer"] for (_, name), table in self._tables() if name == dataset for layer in table["layers"]}
        )

    def field(self, name: str, dataset: str | None = None) -> Any:
        """A header field of the sweeps ("model", "num_exits", "default_exit", ...); None where no file has it."""
        for (_, table_dataset), table in self._tables():
            if dataset in (None, table_dataset) and table.get(name) is not None:
                return table[name]
        return None

    @property
    def default_exit(self) -> int | None:
        """The exit the model was trained with."""
        value = self.field("default_exit")
        return value if isinstance(value, int) else None

    @property
    def num_exits(self) -> int:
        """How many exits the model has."""
        value = self.field("num_exits")
        if isinstance(value, int):
            return value
        return max(layer for dataset in self.datasets for layer in self.layers(dataset))

    @property
    def planted(self) -> list[int]:
        """The organism's planted exits; empty for any other model and for the control."""
        exits = self.first.organism.get("planted_exits")
        return [exit_layer for exit_layer in exits if isinstance(exit_layer, int)] if isinstance(exits, list) else []

    def value(self, phase: str, dataset: str, metric: str, layer: int | None) -> Value | None:
        """One metric at one exit (None: nowhere); `phase` may be "difference" (after - before)."""
        return self._combine([_at_layer(run, phase, dataset, metric, layer) for run in self.runs])

    def seeds(self, phase: str, dataset: str, metric: str, layer: int) -> list[float | None]:
        """The same for every seed."""
        values = [_at_layer(run, phase, dataset, metric, layer) for run in self.runs]
        return [None if value is None else value.mean for value in values]

    def group(self, phase: str, dataset: str, metric: str, name: str) -> Value | None:
        """The average over a group of exits, as the file gives it or from the exits' own means."""
        return self._combine([_of_group(run, phase, dataset, metric, name, self.num_exits) for run in self.runs])

    def categories(self, dataset: str, metric: str) -> list[str]:
        """Categories of a data set's rows for which a metric was measured, in the files' order: most rows first."""
        names: dict[str, None] = {}
        for (phase, name), table in self._tables():
            if name == dataset and phase in PHASES:
                parts = _objects(table, "policies")
                names.update(dict.fromkeys(category for category in parts if _measures(parts[category], metric)))
        return list(names)

    def category_curve(self, phase: str, dataset: str, metric: str, category: str) -> list[tuple[int, Value]]:
        """A metric of one category's rows at every exit where it was measured."""
        values = {}
        for layer in self.layers(dataset):
            by_run = [
                _entry(_objects(run.tables.get((phase, dataset), {}), "policies").get(category, []), metric, layer)
                for run in self.runs
            ]
            values[layer] = self._combine(by_run)
        return [(layer, value) for layer, value in values.items() if value is not None]

    def responses(self, dataset: str) -> int | None:
        """Responses per exit of a data set (and seed); None where no file says it."""
        counts = [
            value.n
            for phase in self.phases(dataset)
            for metric in self.metrics(dataset)
            for _, value in self.curve(phase, dataset, metric)
            if value.n is not None
        ]
        return max(counts, default=None)

    def parts(self, dataset: str, field: str) -> dict[str, "Study"]:
        """The rows of each attack format as studies, in the files' order: most rows first.

        Args:
          dataset: its name; a part has no other, and no group averages of its own.
          field: "formats", or "transferred" for the two parts "yes" and "no".
        """
        names: dict[str, None] = {}
        for (phase, name), table in self._tables():
            if name == dataset and phase in PHASES:
                names.update(dict.fromkeys(_objects(table, field)))
        return {
            name: replace(self, runs=tuple(_part(run, dataset, field, name) for run in self.runs)) for name in names
        }

    def curve(self, phase: str, dataset: str, metric: str) -> list[tuple[int, Value]]:
        """The metric at every exit where it was measured."""
        values = [(layer, self.value(phase, dataset, metric, layer)) for layer in self.layers(dataset)]
        return [(layer, value) for layer, value in values if value is not None]

    def geometry(self, name: str) -> list[tuple[int, Value]]:
        """A field of the first run's `geometry.json` at every exit where it is a number."""
        layers = [layer for layer in self.first.geometry.get("layers", []) if isinstance(layer, dict)]
        values = [(layer.get("layer"), as_value(layer.get(name))) for layer in layers]
        return [(layer, value) for layer, value in values if isinstance(layer, int) and value is not None]

    def worst(self, phase: str, dataset: str, metric: str) -> ExitValue | None:
        """The exit with the highest mean (the first of equals); its interval is that of the maximum, where known."""
        exits = [ExitValue(layer, value) for layer, value in self.curve(phase, dataset, metric)]
        worst = max(exits, key=lambda item: item.value.mean, default=None)
        if worst is None or self.several:
            return worst
        layer, of_maximum = _of_maximum(self.first.tables[phase, dataset], metric)
        known = self.value(phase, dataset, metric, layer)
        if known is None or of_maximum is None or layer is None:
            return worst
        same = max(abs(value.mean - worst.value.mean) for value in (known, of_maximum)) < _ROUNDING
        return ExitValue(layer, of_maximum) if same else worst

    def attempts(self, dataset: str) -> int:
        """How many answers each forbidden row got at an exit; 1 where no file says it."""
        generation = self.field("generation", dataset)
        attempts = generation.get("attempts") if isinstance(generation, dict) else None
        return attempts if type(attempts) is int and attempts > 1 else 1

    def any_exit(self, phase: str, dataset: str, metric: str) -> Value | None:
        """The share of rows with an unsafe answer at one exit at least, over all attempts, by the judge of `metric`.

        None where an earlier version measured the data set; `phase` may be "difference".
        """
        name = any_exit_metric(metric, self.attempts(dataset))
        return self._combine([_at_any_exit(run, phase, dataset, name) for run in self.runs])

    def unusable(self, phase: str, dataset: str, layer: int | None) -> Value | None:
        """The share of an exit's answers that are empty or degenerate, whatever a judge says; None where it is 0."""
        for metric in ("degenerate/text_rules", "empty"):  # an empty answer is a degenerate one too
            share = self.value(phase, dataset, metric, layer)
            if share is not None:
                return share if share.mean > 0 else None
        return None

    def judges(self, dataset: str) -> list[str]:
        """ASR metrics of all rows of a data set, the keyword judge last: it sees refusals, not what an answer says.

        People's labels are not among them: they are of a sample, a few rows at each exit.
        """
        names = [name for name in self.metrics(dataset, "asr") if name != HUMAN]
        return sorted(names, key=lambda name: "keyword" in name)

    def _tables(self) -> Iterable[tuple[tuple[str, str], dict[str, Any]]]:
        return (item for run in self.runs for item in run.tables.items())

    def _combine(self, values: Sequence[Value | None]) -> Value | None:
        known = [value for value in values if value is not None]
        if not known or not self.several:
            return known[0] if known else None
        means = [value.mean for value in known]
        rows = [value.n for value in known if value.n is not None]
        return Value(fmean(means), min(means), max(means), min(rows, default=None), sum(v.n_error for v in known))


def dataset_name(dataset: str) -> str:
    """A data set's name as the run's files have it: "sweep/forbidden" -> "forbidden"."""
    return dataset.partition("/")[2]


def as_value(entry: Any, n: Any = None) -> Value | None:
    """An `Estimate` or a plain number of a file as a `Value`; None where it holds no finite number."""
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
    """A finite number as a float; None for anything else (booleans are none, nor is what no run measures)."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= _LARGEST:
        return None
    return float(value)


def _at_layer(run: Run, phase: str, dataset: str, metric: str, layer: int | None) -> Value | None:
    """A metric of one run; a difference without a file is the difference of the means, without an interval."""
    table = run.tables.get((phase, dataset))
    value = None if table is None else _entry(table["layers"], metric, layer)
    if value is not None:
        return value
    if phase == "difference":
        return _minus(*(_at_layer(run, side, dataset, metric, layer) for side in PHASES))
    return None


def _entry(layers: list[dict[str, Any]], metric: str, layer: int | None) -> Value | None:
    """A metric at one exit of a list of layers."""
    for entry in layers:
        if entry["layer"] == layer and metric in entry["metrics"]:
            return as_value(entry["metrics"][metric], entry.get("n"))
    return None


def _of_maximum(table: dict[str, Any], metric: str) -> tuple[int | None, Value | None]:
    """The worst exit, and its value with the interval of the maximum; None for both in files of earlier versions."""
    worst = table.get("worst_exit")
    entry = worst.get(metric) if isinstance(worst, dict) else None
    layer = entry.get("layer") if isinstance(entry, dict) else None
    return (layer, as_value(entry)) if isinstance(layer, int) else (None, None)


def _at_any_exit(run: Run, phase: str, dataset: str, name: str) -> Value | None:
    """A metric over all exits of one run; a difference without an entry is that of the shares, without an interval."""
    value = as_value(_objects(run.tables.get((phase, dataset), {}), "any_exit").get(name))
    if value is None and phase == "difference":
        return _minus(*(_at_any_exit(run, side, dataset, name) for side in PHASES))
    return value


def _objects(table: dict[str, Any], field: str) -> dict[str, Any]:
    """A field of a table that maps names to parts of its rows; empty where it has none."""
    objects = table.get(field)
    return objects if isinstance(objects, dict) else {}


def _part(run: Run, dataset: str, field: str, name: str) -> Run:
    """A run whose only tables are those of a part of a data set's rows, under the head of the whole."""
    whole = {phase: run.tables.get((phase, dataset), {}) for phase in PHASES}
    tables = {
        (phase, dataset): {**table, "groups": {}, "worst_exit": {}, "any_exit": {}, **_objects(table, field)[name]}
        for phase, table in whole.items()
        if name in _objects(table, field)
    }
    return replace(run, tables=tables)


def _measures(layers: list[dict[str, Any]], metric: str) -> bool:
    return any(as_value(layer["metrics"].get(metric)) is not None for layer in layers)


def _of_group(run: Run, phase: str, dataset: str, metric: str, name: str, num_exits: int) -> Value | None:
    """A group's average of one run: the file's, else the mean of its exits (all of them must be there)."""
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
    return Value(after.mean - before.mean) if before is not None and after is not None else None


def _index(order: Sequence[str], name: str) -> int:
    return order.index(name) if name in order else len(order)
