"""Draws heat maps: scores by exit and training step; and shares by part of a data set and exit."""

import math
from collections.abc import Mapping, Sequence
from statistics import fmean

from icet_jax.report.charts.marks import Box, Drawing, Label, Layer, Mark
from icet_jax.report.study import Value
from icet_jax.report.text import number, percent

_MOST_COLUMNS = 60
_WIDTH, _LEFT, _TOP, _BOTTOM, _ROW = 1080, 46, 6, 24, 18  # pixels of the drawing, its margins and one row
_LABELS, _GAP, _WIDEST = 216, 26, 34  # pixels for the names of parts, between two panels, and of the widest cell
_LONGEST_NAME = 34  # largest number of characters of a part's name that are shown


def step_map(cells: Mapping[tuple[int, float], float], num_exits: int, title: str) -> tuple[Drawing, float, float]:
    """Returns a heat map of scores by exit and training step, and the range of its values.

    There is one row per exit, exit 1 at the top. Each of the at most 60 columns covers the same number of steps, and a
    cell shows the mean score of these steps. A cell is blank if its exit was not sampled in these steps.

    Args:
      cells: {(exit, step): score}; must not be empty.
      num_exits: number of rows.
      title: text for screen readers.

    Returns:
      The drawing, and the lowest and highest mean score in it.
    """
    steps = sorted({step for _, step in cells})
    num_steps = max(1.0, steps[-1] - steps[0] + 1)
    columns = min(_MOST_COLUMNS, int(num_steps))
    scores: dict[tuple[int, int], list[float]] = {}
    for (exit_layer, step), score in cells.items():
        scores.setdefault((exit_layer, int((step - steps[0]) / num_steps * columns)), []).append(score)
    means = {key: fmean(values) for key, values in scores.items()}
    low, high = min(means.values()), max(means.values())
    cell_width = (_WIDTH - _LEFT) / columns
    height = _TOP + num_exits * _ROW + _BOTTOM
    axes: list[Mark] = [
        Label(_LEFT - 8, _TOP + (exit_layer - 1) * _ROW + 13, str(exit_layer), "end")
        for exit_layer in range(1, num_exits + 1)
    ]
    for step in sorted({round(steps[0] + share * (steps[-1] - steps[0])) for share in (0.0, 0.25, 0.5, 0.75, 1.0)}):
        x = _LEFT + (int((step - steps[0]) / num_steps * columns) + 0.5) * cell_width
        axes.append(Label(round(x), height - 6, str(step), "middle"))
    axes.append(Label(_LEFT - 8, height - 6, "step", "end"))
    boxes = []
    for (exit_layer, column), score in sorted(means.items()):
        opacity = 0.1 + 0.9 * (score - low) / (high - low) if high > low else 0.6
        step = steps[0] + (column + 0.5) / columns * num_steps
        x, y = _LEFT + column * cell_width, _TOP + (exit_layer - 1) * _ROW + 1
        tip = f"exit {exit_layer}, step {int(step)}: {number(score)}"
        boxes.append(Box(x, y, max(cell_width - 1, 0.5), _ROW - 2, "cell", tip, opacity=opacity))
    layers = [Layer("axes", axes), Layer("cells", boxes, "after")]
    return Drawing(_WIDTH, height, title, layers, "heat"), low, high


def share_map(
    panels: Mapping[str, Mapping[tuple[str, int], Value]],
    parts: Sequence[str],
    exits: Sequence[int],
    *,
    title: str,
    tone: str,
    default_exit: int | None,
) -> Drawing:
    """Returns heat maps of shares before and after training side by side: rows are parts of a data set, columns exits.

    Args:
      panels: {"before" or "after": {(part, exit): share}}; a missing share leaves a blank cell.
      parts: names of the rows, from the top.
      exits: exits of the columns, from the left.
      title: text for screen readers.
      tone: name in `marks.TONES` that gives the colour of the cells.
      default_exit: the exit whose number is printed bold; None for none.
    """
    width = min(_WIDEST, (_WIDTH - _LABELS - _GAP * (len(panels) - 1)) / len(panels) / len(exits))
    height = 2 * _BOTTOM + len(parts) * _ROW
    names = [Label(_LABELS - 8, _BOTTOM + row * _ROW + 13, _short(part), "end") for row, part in enumerate(parts)]
    layers = [Layer("axes", names)]
    boxes: list[Mark] = []
    spacing = max(1, math.ceil(18 / width))  # so that two digits fit
    anchor = exits.index(default_exit) if default_exit in exits else 0
    for panel, (side, values) in enumerate(panels.items()):
        left = _LABELS + panel * (width * len(exits) + _GAP)
        axes = [Label(round(left, 1), _BOTTOM - 9, side, style="phase")]
        for column, exit_layer in enumerate(exits):
            x = left + column * width
            if (column - anchor) % spacing == 0:
                style = "tick-default" if exit_layer == default_exit else "label"
                axes.append(Label(round(x + width / 2, 1), height - 8, str(exit_layer), "middle", style))
            for row, part in enumerate(parts):
                value = values.get((part, exit_layer))
                if value is not None:
                    tip = f"{side}, exit {exit_layer}: {percent(value.mean)}\n{part}{_rows_and_interval(value)}"
                    y, opacity, place = _BOTTOM + row * _ROW + 1, 0.07 + 0.93 * value.mean, ("exit", str(exit_layer))
                    boxes.append(Box(x, y, width - 1, _ROW - 2, "cell", tip, place, opacity))
        layers.append(Layer("axes", axes, side))
    return Drawing(_WIDTH, height, title, [*layers, Layer("cells", boxes, tone)], "heat parts")


def _rows_and_interval(value: Value) -> str:
    """Returns a line of a tooltip with the number of rows and the interval of a share; what is unknown is left out."""
    rows = f"\n{value.n} rows" if value.n is not None else ""
    if value.low is None or value.high is None:
        return rows
    return f"{rows}, {percent(value.low)} to {percent(value.high)}"


def _short(part: str) -> str:
    return part if len(part) <= _LONGEST_NAME else part[: _LONGEST_NAME - 1] + "…"
