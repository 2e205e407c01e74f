"""Compares several runs, whose models may be of different families.

The models may have different numbers of exits. Charts therefore use relative depth: the number of an exit divided by
the number of exits.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from icet_jax.errors import UserError
from icet_jax.report.charts.marks import MOST_RUNS
from icet_jax.report.loading import PHASES, load_runs
from icet_jax.report.method import UNTRAINED, method_name
from icet_jax.report.schema import family_index
from icet_jax.report.study import KINDS, Study, dataset_name


@dataclass(frozen=True)
class Member:
    """Holds one of the compared runs.

    Attributes:
      name: the run's method if the runs were trained with different ones, else `folder`; see `member_names`.
      folder: the last parts of the run's path, as many as are needed to differ from the other runs.
      path: the run directory.
      study: the run's values, which are means over seeds if there are several.
    """

    name: str
    folder: str
    path: Path
    study: Study

    def depth(self, layer: int) -> float:
        """Returns the relative depth of an exit in this run's image encoder, above 0 and at most 1."""
        return layer / self.study.num_exits

    @property
    def exit_definition(self) -> str:
        """The sentence in this run's sweep files that says what exit l is; empty if they have none."""
        return str(self.study.field("exit_definition") or "")

    def source(self, dataset: str) -> str | None:
        """Returns the source string of a data set in this run's config; None if the config does not have it."""
        section = self.study.first_run.config.get("sweep")
        where = {"sweep": "datasets", "utility": "utility"}[dataset.partition("/")[0]]
        sources = section.get(where) if isinstance(section, dict) else None
        source = sources.get(dataset_name(dataset)) if isinstance(sources, dict) else None
        return source if isinstance(source, str) else None


@dataclass(frozen=True)
class Comparison:
    """Holds the compared runs, and finds what they have in common and where they differ."""

    members: tuple[Member, ...]

    @property
    def datasets(self) -> list[str]:
        """Data sets on which two or more runs have a metric in common, forbidden requests first."""
        names = dict.fromkeys(dataset for member in self.members for dataset in member.study.datasets)
        shared = [name for name in names if self.metrics(name)]
        return sorted(shared, key=lambda name: (KINDS.index(self.kind(name)), name))

    def kind(self, dataset: str) -> str:
        """Returns the kind of a data set's rows, from the first run that has the data set."""
        return next(m.study.kind(dataset) for m in self.members if dataset in m.study.datasets)

    def metrics(self, dataset: str) -> list[str]:
        """Returns the names of the metrics that two or more runs measured on a data set, sorted by family.

        Among the attack success rates, those of keyword judges come last.
        """
        counts: dict[str, int] = {}
        for member in self.members:
            for metric in member.study.metrics(dataset):
                counts[metric] = counts.get(metric, 0) + 1
        shared = [metric for metric, count in counts.items() if count > 1]
        return sorted(shared, key=lambda name: (family_index(name), name.startswith("asr/") and "keyword" in name))

    def members_with(self, dataset: str, metric: str) -> list[tuple[int, Member]]:
        """Returns (index among all runs, run) of the runs that measured a metric on a data set."""
        return [(index, m) for index, m in enumerate(self.members) if metric in m.study.metrics(dataset)]

    def phases(self, dataset: str, metric: str) -> list[str]:
        """Returns which of "before" and "after" at least one run measured for a metric on a data set."""
        members = self.members_with(dataset, metric)
        return [phase for phase in PHASES if any(m.study.curve(phase, dataset, metric) for _, m in members)]

    @property
    def headline(self) -> tuple[str, str] | None:
        """(data set, metric) of the first attack success rate that two or more runs measured on the same data set;
        None if they share none."""
        pairs = [
            (dataset, metric)
            for dataset in self.datasets
            if self.kind(dataset) in ("forbidden", "mixed")
            for metric in self.metrics(dataset)
            if metric.startswith("asr/")
        ]
        return pairs[0] if pairs else None

    def alone(self) -> list[tuple[Member, str, list[str]]]:
        """Returns (run, data set, metrics) of the metrics that only this run measured."""
        unshared = []
        for member in self.members:
            for dataset in member.study.datasets:
                metrics = [m for m in member.study.metrics(dataset) if m not in self.metrics(dataset)]
                if metrics:
                    unshared.append((member, dataset, metrics))
        return unshared

    def differing_sources(self) -> dict[str, dict[str, list[str]]]:
        """Returns {data set: {source: names of runs}} for data sets that have different sources in different runs."""
        return self._differing(lambda member, dataset: member.source(dataset))

    def differing_sizes(self) -> dict[str, dict[str, list[str]]]:
        """Returns {data set: {responses per exit: names of runs}} for data sets where runs differ in that number."""
        return self._differing(lambda member, dataset: member.study.responses(dataset))

    def differing_generation(self) -> dict[str, list[str]]:
        """Returns {settings of generation: names of runs}; empty if all runs have the same settings."""
        runs_by_settings: dict[str, list[str]] = {}
        for member in self.members:
            settings = member.study.field("generation")
            if isinstance(settings, dict):
                settings = {"attempts": 1, **settings}  # files of earlier versions do not have this field
                text = ", ".join(f"{name} {value}" for name, value in sorted(settings.items()))
                runs_by_settings.setdefault(text, []).append(member.name)
        return runs_by_settings if len(runs_by_settings) > 1 else {}

    def _differing(self, get_value: Callable[[Member, str], object]) -> dict[str, dict[str, list[str]]]:
        """Returns {data set: {value: names of runs}} for data sets where runs have different values.

        `get_value` takes a run and a data set and returns the value; runs for which it returns None are left out.
        """
        differing = {}
        for dataset in self.datasets:
            runs: dict[str, list[str]] = {}
            for member in self.members:
                value = get_value(member, dataset)
                if value is not None:
                    runs.setdefault(str(value), []).append(member.name)
            if len(runs) > 1:
                differing[dataset] = runs
        return differing


def load_comparison(run_dirs: Sequence[Path]) -> Comparison:
    """Reads the runs in `run_dirs`, in this order, as a comparison.

    Raises:
      UserError: there are fewer than two or too many runs, a run is named twice, a directory has no sweep or a broken
        file, or the runs have no metric in common.
    """
    if len(run_dirs) < 2:
        raise UserError(
            "--mode=compare needs two or more run directories; type: --mode=compare runs/a runs/b --out DIR"
        )
    if len(run_dirs) > MOST_RUNS:
        raise UserError(f"--mode=compare tells at most {MOST_RUNS} runs apart, but {len(run_dirs)} are given")
    resolved = [path.resolve() for path in run_dirs]
    for index, path in enumerate(resolved):
        if path in resolved[:index]:
            raise UserError(f"{run_dirs[index]}: given twice; name each run once")
    studies = [Study(load_runs(path)) for path in run_dirs]
    folders = short_names(resolved)
    members = map(Member, member_names(studies, folders), folders, run_dirs, studies)
    comparison = Comparison(tuple(members))
    if not comparison.datasets:
        had = "; ".join(f"{m.name} has {', '.join(map(dataset_name, m.study.datasets))}" for m in comparison.members)
        raise UserError(f"these runs share no metric on a data set of one name: {had}; sweep the same sets")
    return comparison


def member_names(studies: Sequence[Study], folders: Sequence[str]) -> list[str]:
    """Returns the name of each run on the page.

    It is the method that trained it if two runs were trained with different methods, else the name of its folder, from
    `folders`. The folder stands behind a method that several runs share, and behind every method if the runs' models
    differ.
    """
    methods = [method_name(study) for study in studies]
    if len({method for method in methods if method != UNTRAINED}) < 2:
        return list(folders)
    is_one_model = len({study.field("model") for study in studies}) == 1
    return [
        method if is_one_model and methods.count(method) == 1 else f"{method} ({folder})"
        for method, folder in zip(methods, folders, strict=True)
    ]


def short_names(paths: Sequence[Path]) -> list[str]:
    """Returns the last parts of each path, as many as are needed so that no other path ends in the same parts."""
    names = []
    for path in paths:
        others = [other for other in paths if other != path]
        length = next(
            (n for n in range(1, len(path.parts)) if all(other.parts[-n:] != path.parts[-n:] for other in others)),
            len(path.parts),
        )
        names.append("/".join(path.parts[-length:]))
    return names
