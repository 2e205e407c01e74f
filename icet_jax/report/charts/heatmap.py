"""Heat maps: scores by exit and training step; shares by part of a data set and exit."""

import math
from collections.abc import Mapping, Sequence
from statistics import fmean

from icet_jax.report.charts.marks import Box, Drawing, Label, Layer, Mark
from icet_jax.report.study import Value
from icet_jax.report.text import number, percent

_COLUMNS = 60
_WIDTH, _LEFT, _TOP, _BOTTOM, _ROW = 1080, 46, 6, 24, 18
_LABELS, _GAP, _WIDEST = 216, 26, 34  # names of parts; between two panels; widest cell
_LONGEST = 34  # characters of a part's name


def step_map(cells: Mapping[tuple[int, float], float], num_exits: int, title: str) -> tuple[Drawing, float, float]:
    """One row per exit (1 at the top) and at most 60 columns of steps; gaps are exits that were not drawn then.

    Args:
      cells: (exit, step) -> score; at least one.
      num_exits: rows.
      title: for screen readers.

    Returns:
      The drawing, and the lowest and highest score in it.
    """
    steps = sorted({step for _, step in cells})
    span = max(1.0, steps[-1] - steps[0] + 1)
    columns = min(_COLUMNS, int(span))
    scores: dict[tuple[int, int], list[float]] = {}
    for (exit_layer, step), score in cells.items():
        scores.setdefault((exit_layer, int((step - steps[0]) / span * columns)), []).append(score)
    means = {key: fmean(values) for key, values in scores.items()}
    low, high = min(means.values()), max(means.values())
    cell_width = (_WIDTH - _LEFT) / columns
    height = _TOP + num_exits * _ROW + _BOTTOM
    axes: list[Mark] = [
        Label(_LEFT - 8, _TOP + (exit_layer - 1) * _ROW + 13, str(exit_layer), "end")
        for exit_layer in range(1, num_exits + 1)
    ]
    for step in sorted({round(steps[0] + share * (steps[-1] - steps[0])) for share in (0.0, 0.25, 0.5, 0.75, 1.0)}):
        x = _LEFT + (int((step - steps[0]) / span * columns) + 0.5) * cell_width
        axes.append(Label(round(x), height - 6, str(step), "middle"))
    axes.append(Label(_LEFT - 8, height - 6, "step", "end"))
    boxes = []
    for (exit_layer, column), score in sorted(means.items()):
        opacity = 0.1 + 0.9 * (score - low) / (high - low) if high > low else 0.6
        step = steps[0] + (column + 0.5) / columns * span
        x, y = _LEFT + column * cell_width, _TOP + (exit_layer - 1) * _ROW + 1
        tip = f"exit {exit_layer}, step {int(step)}: {number(score)}"
        boxes.append(Box(x, y, max(cell_width - 1, 0.5), _ROW - 2, "cell", tip, opacity=opacity))
    layers = [Layer("axes", axes), Layer("cells", boxes, "after")]
    return Drawing(_WIDTH, height, title, layers, "heat"), low, high


def part_map(
    panels: Mapping[str, Mapping[tuple[str, int], Value]],
    parts: Sequence[str],
    exits: Sequence[int],
    *,
    title: str,
    tone: str,
    default_exit: int | None,
) -> Drawing:
    """Shares by part of a data set (rows) and exit (columns), one panel per phase side by side.

    Args:
      panels: phase -> (part, exit) -> share; a missing one leaves a blank.
      parts: rows from the top.
      exits: columns from the left.
      title: for screen readers.
      tone: of the cells.
      default_exit: the exit whose number is pointed out.
    """
    width = min(_WIDEST, (_WIDTH - _LABELS - _GAP * (len(panels) - 1)) / len(panels) / len(exits))
    height = 2 * _BOTTOM + len(parts) * _ROW
    names = [Label(_LABELS - 8, _BOTTOM + row * _ROW + 13, _short(part), "end") for row, part in enumerate(parts)]
    layers = [Layer("axes", names)]
    boxes: list[Mark] = []
    spacing = max(1, math.ceil(18 / width))  # so that two digits fit
    anchor = exits.index(default_exit) if default_exit in exits else 0
    for place, (phase, values) in enumerate(panels.items()):
        left = _LABELS + place * (width * len(exits) + _GAP)
        axes = [Label(round(left, 1), _BOTTOM - 9, phase, style="phase")]
        for column, exit_layer in enumerate(exits):
            x = left + column * width
            if (column - anchor) % spacing == 0:
                style = "tick-default" if exit_layer == default_exit else "label"
                axes.append(Label(round(x + width / 2, 1), height - 8, str(exit_layer), "middle", style))
            for row, part in enumerate(parts):
                value = values.get((part, exit_layer))
                if value is not None:
                    tip = f"{phase}, exit {exit_layer}: {percent(value.mean)}\n{part}{_counts(value)}"
                    y, opacity, where = _BOTTOM + row * _ROW + 1, 0.07 + 0.93 * value.mean, ("exit", str(exit_layer))
                    boxes.append(Box(x, y, width - 1, _ROW - 2, "cell", tip, where, opacity))
        layers.append(Layer("axes", axes, phase))
    return Drawing(_WIDTH, height, title, [*layers, Layer("cells", boxes, tone)], "heat parts")


def _counts(value: Value) -> str:
    """The rows behind a share, and its interval, as far as they are known."""
    rows = f"\n{value.n} rows" if value.n is not None else ""
    if value.low is None or value.high is None:
        return rows
    return f"{rows}, {percent(value.low)} to {percent(value.high)}"


def _short(part: str) -> str:
    return part if len(part) <= _LONGEST else part[: _LONGEST - 1] + "…"
