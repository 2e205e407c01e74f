"""Several runs, of one model or of several families, side by side.

Their exits differ in number, so they share an axis of relative depth: an exit's number over how many exits there are.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from icet_jax.errors import UserError
from icet_jax.evaluation.combined import family_of
from icet_jax.report.charts.marks import MOST_RUNS
from icet_jax.report.loading import PHASES, load_runs
from icet_jax.report.schema import METRIC_FAMILIES
from icet_jax.report.study import KINDS, Study, dataset_name


@dataclass(frozen=True)
class Member:
    """One of the compared runs.

    Attributes:
      name: the shortest end of its path that no other member has.
      path: its directory.
      study: its numbers, over its seeds if it has several.
    """

    name: str
    path: Path
    study: Study

    def depth(self, layer: int) -> float:
        """Where in this run's encoder an exit is, above 0 and at most 1."""
        return layer / self.study.num_exits

    @property
    def exit_definition(self) -> str:
        """What its sweeps say an exit is; empty where they do not say."""
        return str(self.study.field("exit_definition") or "")

    def source(self, dataset: str) -> str | None:
        """The source string of one of its data sets; None where its config is not there or does not name it."""
        section = self.study.first.config.get("sweep")
        where = {"sweep": "datasets", "utility": "utility"}[dataset.partition("/")[0]]
        sources = section.get(where) if isinstance(section, dict) else None
        source = sources.get(dataset_name(dataset)) if isinstance(sources, dict) else None
        return source if isinstance(source, str) else None


@dataclass(frozen=True)
class Comparison:
    """What the runs have in common."""

    members: tuple[Member, ...]

    @property
    def datasets(self) -> list[str]:
        """Data sets on which two or more runs have a metric in common, forbidden requests first."""
        names = dict.fromkeys(dataset for member in self.members for dataset in member.study.datasets)
        shared = [name for name in names if self.metrics(name)]
        return sorted(shared, key=lambda name: (KINDS.index(self.kind(name)), name))

    def kind(self, dataset: str) -> str:
        """What the rows of a data set ask for, as the first run that has it says."""
        return next(m.study.kind(dataset) for m in self.members if dataset in m.study.datasets)

    def metrics(self, dataset: str) -> list[str]:
        """Metrics that two or more runs measured on a data set, in the families' order; keyword judges last."""
        counts: dict[str, int] = {}
        for member in self.members:
            for metric in member.study.metrics(dataset):
                counts[metric] = counts.get(metric, 0) + 1
        order = list(METRIC_FAMILIES)
        shared = [metric for metric, count in counts.items() if count > 1]
        return sorted(shared, key=lambda name: (_place(order, name), name.startswith("asr/") and "keyword" in name))

    def holders(self, dataset: str, metric: str) -> list[tuple[int, Member]]:
        """The runs that measured a metric on a data set, with their places among all."""
        return [(place, m) for place, m in enumerate(self.members) if metric in m.study.metrics(dataset)]

    def phases(self, dataset: str, metric: str) -> list[str]:
        """Which of "before" and "after" any of the runs measured."""
        holders = self.holders(dataset, metric)
        return [phase for phase in PHASES if any(m.study.curve(phase, dataset, metric) for _, m in holders)]

    @property
    def headline(self) -> tuple[str, str] | None:
        """(data set, judge) of the first attack success rate that runs share; None where they share none."""
        pairs = [
            (dataset, metric)
            for dataset in self.datasets
            if self.kind(dataset) in ("forbidden", "mixed")
            for metric in self.metrics(dataset)
            if metric.startswith("asr/")
        ]
        return pairs[0] if pairs else None

    def alone(self) -> list[tuple[Member, str, list[str]]]:
        """(run, data set, metrics) of what only one run measured."""
        unshared = []
        for member in self.members:
            for dataset in member.study.datasets:
                metrics = [m for m in member.study.metrics(dataset) if m not in self.metrics(dataset)]
                if metrics:
                    unshared.append((member, dataset, metrics))
        return unshared

    def differing_sources(self) -> dict[str, dict[str, list[str]]]:
        """{data set: {source: runs}} of sets that share a name but do not come from the same place."""
        return self._differing(lambda member, dataset: member.source(dataset))

    def differing_sizes(self) -> dict[str, dict[str, list[str]]]:
        """{data set: {responses per exit: runs}} of sets of which the runs answered different numbers of rows."""
        return self._differing(lambda member, dataset: member.study.responses(dataset))

    def differing_generation(self) -> dict[str, list[str]]:
        """{how responses were generated: runs} where that differs, else empty."""
        ways: dict[str, list[str]] = {}
        for member in self.members:
            way = member.study.field("generation")
            if isinstance(way, dict):
                way = {"attempts": 1, **way}  # earlier versions made one
                text = ", ".join(f"{name} {value}" for name, value in sorted(way.items()))
                ways.setdefault(text, []).append(member.name)
        return ways if len(ways) > 1 else {}

    def _differing(self, fact: Callable[[Member, str], object]) -> dict[str, dict[str, list[str]]]:
        """{data set: {fact: runs}} of sets about which the runs, as far as they say, do not say the same."""
        differing = {}
        for dataset in self.datasets:
            runs: dict[str, list[str]] = {}
            for member in self.members:
                value = fact(member, dataset)
                if value is not None:
                    runs.setdefault(str(value), []).append(member.name)
            if len(runs) > 1:
                differing[dataset] = runs
        return differing


def load_comparison(run_dirs: Sequence[Path]) -> Comparison:
    """Reads the runs.

    Raises:
      UserError: fewer than two runs or too many, one given twice, a directory without a sweep or with a broken file,
        or runs that measured nothing in common.
    """
    if len(run_dirs) < 2:
        raise UserError(
            "--mode=compare needs two or more run directories; type: --mode=compare runs/a runs/b --out DIR"
        )
    if len(run_dirs) > MOST_RUNS:
        raise UserError(f"--mode=compare tells at most {MOST_RUNS} runs apart, but {len(run_dirs)} are given")
    resolved = [path.resolve() for path in run_dirs]
    for place, path in enumerate(resolved):
        if path in resolved[:place]:
            raise UserError(f"{run_dirs[place]}: given twice; name each run once")
    studies = [Study(load_runs(path)) for path in run_dirs]
    members = map(Member, short_names(resolved), run_dirs, studies)
    comparison = Comparison(tuple(members))
    if not comparison.datasets:
        had = "; ".join(f"{m.name} has {', '.join(map(dataset_name, m.study.datasets))}" for m in comparison.members)
        raise UserError(f"these runs share no metric on a data set of one name: {had}; sweep the same sets")
    return comparison


def short_names(paths: Sequence[Path]) -> list[str]:
    """The shortest end of each path, of whole parts, that no other path ends in."""
    names = []
    for path in paths:
        others = [other for other in paths if other != path]
        length = next(
            (n for n in range(1, len(path.parts)) if all(other.parts[-n:] != path.parts[-n:] for other in others)),
            len(path.parts),
        )
        names.append("/".join(path.parts[-length:]))
    return names


def _place(order: Sequence[str], metric: str) -> int:
    family = family_of(metric)
    return order.index(family) if family in order else len(order)
