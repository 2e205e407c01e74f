"""Formats measured values: shares in percent, other values as plain numbers; with intervals, and as changes."""

from collections.abc import Callable

from icet_jax.report.blocks import Span, Text, remark, text
from icet_jax.report.schema import metric_family
from icet_jax.report.study import Study, Value
from icet_jax.report.text import number, percent, points, signed

MAIN_FAMILIES = ("asr", "asr@k", "tr", "ts", "refusal", "refusal_unsafe", "vqa", "accuracy")
"""Metric families that say how safe or useful a model is; `FORM_FAMILIES` only describe the form of responses."""
USEFUL_FAMILIES = ("refusal", "refusal_unsafe", "vqa", "accuracy")
FORM_FAMILIES = ("degenerate", "empty", "truncated", "length")
ARROW = Span(" → ", "arrow")


def family_title(metric: str) -> str:
    """Returns the title of a chart of the metric, such as "Attack success rate" for "asr/keywords"."""
    return metric_family(metric).title


def title_on(study: Study, dataset: str, metric: str) -> str:
    """Returns the title of a chart of a metric on a data set.

    It is `family_title`, except that the family "refusal" has the title "Refusals of safe requests" on a data set whose
    rows are of several kinds.
    """
    safe = study.kind(dataset) == "mixed" and metric.startswith("refusal/")
    return family_title(metric) + (" of safe requests" if safe else "")


def show(metric: str, value: float | None) -> str:
    """Returns a metric's value as text: percent for a share, else a plain number."""
    return percent(value) if metric_family(metric).share else number(value)


def show_change(metric: str, value: float | None) -> str:
    """Returns a difference of a metric's values as text with its sign: percentage points for a share."""
    return points(value) if metric_family(metric).share else signed(value)


def value_text(metric: str, value: Value | None) -> Text:
    """Returns a mean with its interval, such as "2.3% (0.9% to 5.0%)"."""
    return with_interval(value, lambda x: show(metric, x))


def difference_text(metric: str, value: Value | None) -> Text:
    """Returns a difference with its interval, such as "−97.3 (−99.1 to −94.0)"."""
    return with_interval(value, lambda x: show_change(metric, x))


def change_text(metric: str, before: Value | None, after: Value | None) -> Text:
    """Returns "64.6% → 38.0%" in the colours of the charts; one value if only one is known, and "–" without values."""
    sides = (("before", before), ("after", after))
    shown = [Span(show(metric, value.mean), phase) for phase, value in sides if value is not None]
    return (shown[0], ARROW, shown[1]) if len(shown) == 2 else tuple(shown) or text("–")


def with_interval(value: Value | None, show_number: Callable[[float], str]) -> Text:
    """Returns a mean and, if it is known, its interval in small letters, as `show_number` writes them; "–" for None."""
    if value is None:
        return text("–")
    if value.low is None or value.high is None:
        return text(show_number(value.mean))
    return text(show_number(value.mean), " ", remark(f"({show_number(value.low)} to {show_number(value.high)})"))


def axis_number(value: float) -> str:
    """Returns a number with at most six significant digits and no trailing zeros."""
    return f"{value:.6g}".replace("-", "−")


def axis_percent(share: float) -> str:
    """Returns a share in percent with at most six significant digits and no trailing zeros."""
    return f"{axis_number(100 * share)}%"
