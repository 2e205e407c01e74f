"""Sets the safety that training gained against the utility that it lost."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

from icet_jax.report.charts.figures import Figure, Panel
from icet_jax.report.charts.scatter import Scatter, Spot
from icet_jax.report.comparison import Comparison
from icet_jax.report.method import is_trained
from icet_jax.report.study import ExitValue, Study, Value, dataset_name
from icet_jax.report.text import percent, points
from icet_jax.report.values import axis_number, axis_percent

UTILITY_LOST = (
    "Utility lost is the larger of two: the accuracy lost on questions about images at the default exit, and the rise "
    "of refusals of benign requests at the exit where it is largest, both in percentage points."
)
_TITLE = "ASR at the worst exit against lost utility"


class UtilityLost(NamedTuple):
    """Holds the utility that training lost, as a share, with its interval, and what it was lost in."""

    value: Value
    what: str


def utility_lost(study: Study) -> UtilityLost | None:
    """Returns the utility that a run lost by `UTILITY_LOST`; negative if both measures improved.

    Each measure is the first such metric of the first data set that has one. Returns None if the run lacks one of the
    two measures, or the values before or after training.
    """
    accuracy, refusals = _lost_accuracy(study), _more_refusals(study)
    if accuracy is None or refusals is None:
        return None
    return max(accuracy, refusals, key=lambda lost: lost.value.mean)


def _lost_accuracy(study: Study) -> UtilityLost | None:
    """Returns the accuracy that was lost on questions about images at the default exit."""
    for dataset in study.of_kind("vqa"):
        for metric in (*study.metrics(dataset, "vqa"), *study.metrics(dataset, "accuracy")):
            change = study.value("difference", dataset, metric, study.default_exit)
            if change is not None:
                return UtilityLost(_negative(change), "accuracy at the default exit")
    return None


def _more_refusals(study: Study) -> UtilityLost | None:
    """Returns the rise of refusals of benign requests at the exit where it is largest."""
    for dataset in study.of_kind("benign", "mixed"):
        for metric in study.metrics(dataset, "refusal"):
            rises = study.curve("difference", dataset, metric)
            if rises:
                layer, rise = max(rises, key=lambda item: item[1].mean)
                return UtilityLost(rise, f"benign refusals at exit {layer}")
    return None


def pareto_front(points: Sequence[tuple[float, float]]) -> list[int]:
    """Returns the indices of the points (x, y) that no other point beats, in ascending order of x.

    A point beats another if it is smaller in one coordinate and not larger in the other.
    """
    front: list[int] = []
    for index in sorted(range(len(points)), key=lambda index: points[index]):
        if not front or points[index][1] < points[front[-1]][1] or points[index] == points[front[-1]]:
            front.append(index)
    return front


def _negative(value: Value) -> Value:
    """Returns a value with the opposite sign."""
    low, high = (None if end is None else -end for end in (value.high, value.low))
    return Value(-value.mean, low, high, value.n, value.n_error)


def tradeoff_figure(comparison: Comparison) -> Figure | None:
    """Returns the figure of ASR at the worst exit against lost utility, a point per run, after training; an untrained
    run has lost nothing. None if fewer than two runs have both values."""
    if comparison.headline is None:
        return None
    dataset, judge = comparison.headline
    spots = []
    for index, member in comparison.members_with(dataset, judge):
        study = member.study
        worst = study.worst(study.phases(dataset)[-1], dataset, judge)
        lost = utility_lost(study) if is_trained(study) else UtilityLost(Value(0.0), "nothing was trained")
        if worst is not None and lost is not None:
            spots.append(_spot(member.name, f"run-{index}", worst, lost))
    if len(spots) < 2:
        return None
    return Figure(_TITLE, judge, (Panel(tradeoff_chart(spots)),), source=dataset_name(dataset), wide=True)


def tradeoff_chart(spots: Sequence[Spot]) -> Scatter:
    """Returns the chart of ASR at the worst exit against lost utility with the Pareto front.

    Args:
      spots: one point per method; x is the lost utility and y the ASR, both as shares.
    """
    front = pareto_front([(spot.x, spot.y) for spot in spots])
    return Scatter(
        title=_TITLE,
        spots=spots,
        front=[(spots[index].x, spots[index].y) for index in front],
        x_title="utility lost, points",
        y_title="ASR, worst exit (square-root scale)",
        show_x=lambda x: axis_number(100 * x),
        show_y=axis_percent,
    )


def _spot(name: str, tone: str, worst: ExitValue, lost: UtilityLost) -> Spot:
    """Returns the point of a run."""
    tip = (
        f"{name}\nASR {percent(worst.value.mean)}{_range_text(worst.value, percent)}, exit {worst.layer}\n"
        f"utility lost {points(lost.value.mean)}{_range_text(lost.value, points)}, {lost.what}"
    )
    return Spot(name, tone, lost.value.mean, worst.value.mean, _range(lost.value), _range(worst.value), tip)


def _range(value: Value) -> tuple[float, float] | None:
    return None if value.low is None or value.high is None else (value.low, value.high)


def _range_text(value: Value, show_number: Callable[[float], str]) -> str:
    return (
        "" if value.low is None or value.high is None else f" ({show_number(value.low)} to {show_number(value.high)})"
    )
