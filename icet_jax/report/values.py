"""Measured numbers as text: percent for shares, plain numbers for the rest, intervals and changes."""

from collections.abc import Callable

from icet_jax.report.blocks import Span, Text, remark, text
from icet_jax.report.schema import metric_family
from icet_jax.report.study import Study, Value
from icet_jax.report.text import number, percent, points, signed

MAIN_FAMILIES = ("asr", "asr@k", "tr", "ts", "refusal", "refusal_unsafe", "vqa", "accuracy")
"""Families that say how safe or useful a model is; those of `FORM_FAMILIES` describe the form of its responses."""
USEFUL_FAMILIES = ("refusal", "refusal_unsafe", "vqa", "accuracy")
FORM_FAMILIES = ("degenerate", "empty", "truncated", "length")
ARROW = Span(" → ", "arrow")


def family_title(metric: str) -> str:
    """What a chart of the metric is called."""
    return metric_family(metric).title


def title_on(study: Study, dataset: str, metric: str) -> str:
    """`family_title`, saying whose refusals they are where a data set has requests that should be refused too."""
    safe = study.kind(dataset) == "mixed" and metric.startswith("refusal/")
    return family_title(metric) + (" of safe requests" if safe else "")


def show(metric: str, value: float | None) -> str:
    """A metric's number as its family is read: percent for shares, else a plain number."""
    return percent(value) if metric_family(metric).share else number(value)


def show_change(metric: str, value: float | None) -> str:
    """A difference as its family is read: percentage points for shares, always signed."""
    return points(value) if metric_family(metric).share else signed(value)


def value_text(metric: str, value: Value | None) -> Text:
    """The mean with its interval: "2.3% (0.9% to 5.0%)"."""
    return with_interval(value, lambda x: show(metric, x))


def difference_text(metric: str, value: Value | None) -> Text:
    """A difference with its interval: "−97.3 (−99.1 to −94.0)"."""
    return with_interval(value, lambda x: show_change(metric, x))


def change_text(metric: str, before: Value | None, after: Value | None) -> Text:
    """ "64.6% → 38.0%", coloured like the charts; one number where only one was measured."""
    sides = (("before", before), ("after", after))
    shown = [Span(show(metric, value.mean), phase) for phase, value in sides if value is not None]
    return (shown[0], ARROW, shown[1]) if len(shown) == 2 else tuple(shown) or text("–")


def with_interval(value: Value | None, show_number: Callable[[float], str]) -> Text:
    """A number and, where it is known, its interval in small letters."""
    if value is None:
        return text("–")
    if value.low is None or value.high is None:
        return text(show_number(value.mean))
    return text(show_number(value.mean), " ", remark(f"({show_number(value.low)} to {show_number(value.high)})"))


def axis_number(value: float) -> str:
    """A number with no more digits than it needs."""
    return f"{value:.6g}".replace("-", "−")


def axis_percent(share: float) -> str:
    """A share in percent with no more digits than it needs."""
    return f"{axis_number(100 * share)}%"
