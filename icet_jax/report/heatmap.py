"""Inline SVG heat maps: scores by exit and training step; shares by policy and exit."""

import math
from collections.abc import Mapping, Sequence
from statistics import fmean

from icet_jax.report.study import Value
from icet_jax.report.text import escape, number, percent
from icet_jax.report.widgets import code

_COLUMNS = 60
_WIDTH, _LEFT, _TOP, _BOTTOM, _ROW = 1080, 46, 6, 24, 18
_LABELS, _GAP, _WIDEST = 216, 26, 34  # policy names; between two panels; widest cell
_LONGEST = 34  # characters of a policy's name


def svg_heatmap(cells: dict[tuple[int, float], float], num_exits: int, *, title: str, name: str) -> str:
    """A figure with one row per exit (1 at the top) and at most 60 columns of steps; gaps are exits not drawn then.

    Args:
      cells: (exit, step) -> score.
      num_exits: rows.
      title, name: caption and metric name, as text.
    """
    if not cells:
        return ""
    steps = sorted({step for _, step in cells})
    span = max(1.0, steps[-1] - steps[0] + 1)
    columns = min(_COLUMNS, int(span))
    binned: dict[tuple[int, int], list[float]] = {}
    for (exit_layer, step), score in cells.items():
        binned.setdefault((exit_layer, int((step - steps[0]) / span * columns)), []).append(score)
    means = {key: fmean(values) for key, values in binned.items()}
    low, high = min(means.values()), max(means.values())
    cell_width = (_WIDTH - _LEFT) / columns
    height = _TOP + num_exits * _ROW + _BOTTOM
    parts = [
        f'<svg class="heat" viewBox="0 0 {_WIDTH} {height}" role="img" aria-label="{escape(title)}"><g class="axes">'
    ]
    for exit_layer in range(1, num_exits + 1):
        y = _TOP + (exit_layer - 1) * _ROW
        parts.append(f'<text x="{_LEFT - 8}" y="{y + 13}" text-anchor="end">{exit_layer}</text>')
    for step in sorted({round(steps[0] + share * (steps[-1] - steps[0])) for share in (0.0, 0.25, 0.5, 0.75, 1.0)}):
        x = _LEFT + (int((step - steps[0]) / span * columns) + 0.5) * cell_width
        parts.append(f'<text x="{x:.0f}" y="{height - 6}" text-anchor="middle">{step}</text>')
    parts.append(f'<text x="{_LEFT - 8}" y="{height - 6}" text-anchor="end">step</text>')
    parts.append('</g><g class="cells">')
    for (exit_layer, column), score in sorted(means.items()):
        depth = 0.1 + 0.9 * (score - low) / (high - low) if high > low else 0.6
        step = steps[0] + (column + 0.5) / columns * span
        parts.append(
            f'<rect x="{_LEFT + column * cell_width:.1f}" y="{_TOP + (exit_layer - 1) * _ROW + 1}" '
            f'width="{max(cell_width - 1, 0.5):.1f}" height="{_ROW - 2}" fill-opacity="{depth:.2f}">'
            f"<title>{escape(f'exit {exit_layer}, step {int(step)}: {number(score)}')}</title></rect>"
        )
    parts.append("</g></svg>")
    key = f'<span class="legend">{escape(number(low))} <span class="ramp"></span> {escape(number(high))}</span>'
    head = f"<figcaption><b>{escape(title)}</b>{code(name)}{key}</figcaption>"
    scroll = f'<div class="scroll" tabindex="0" role="region" aria-label="{escape(title)}">{"".join(parts)}</div>'
    return f'<figure class="chart wide">{head}{scroll}</figure>'


def svg_policies(
    panels: Mapping[str, Mapping[tuple[str, int], Value]],
    policies: Sequence[str],
    layers: Sequence[int],
    *,
    title: str,
    tone: str,
    default_exit: int | None,
) -> str:
    """Shares by policy (rows) and exit (columns), one panel per phase side by side.

    Args:
      panels: phase -> (policy, exit) -> share; a missing one leaves a blank.
      policies: rows from the top.
      layers: exits from the left.
      title: for screen readers.
      tone: CSS class of the cells.
      default_exit: whose number is marked.
    """
    width = min(_WIDEST, (_WIDTH - _LABELS - _GAP * (len(panels) - 1)) / len(panels) / len(layers))
    height = 2 * _BOTTOM + len(policies) * _ROW
    axes, cells = [], []
    for row, policy in enumerate(policies):
        axes.append(
            f'<text x="{_LABELS - 8}" y="{_BOTTOM + row * _ROW + 13}" text-anchor="end">{_short(policy)}</text>'
        )
    step = max(1, math.ceil(18 / width))  # so that two digits fit
    anchor = layers.index(default_exit) if default_exit in layers else 0
    for number_, (phase, values) in enumerate(panels.items()):
        left = _LABELS + number_ * (width * len(layers) + _GAP)
        axes.append(f'<text class="{phase}" x="{left:.1f}" y="{_BOTTOM - 9}">{escape(phase)}</text>')
        for column, layer in enumerate(layers):
            x = left + column * width
            if (column - anchor) % step == 0:
                mark = ' class="tick-default"' if layer == default_exit else ""
                axes.append(f'<text{mark} x="{x + width / 2:.1f}" y="{height - 8}" text-anchor="middle">{layer}</text>')
            for row, policy in enumerate(policies):
                value = values.get((policy, layer))
                if value is not None:
                    text = f"{phase}, exit {layer}: {percent(value.mean)}\n{policy}" + _counts(value)
                    cells.append(
                        f'<rect data-exit="{layer}" x="{x:.1f}" y="{_BOTTOM + row * _ROW + 1}" '
                        f'width="{width - 1:.1f}" height="{_ROW - 2}" fill-opacity="{0.07 + 0.93 * value.mean:.2f}">'
                        f"<title>{escape(text)}</title></rect>"
                    )
    return (
        f'<svg class="heat policies" viewBox="0 0 {_WIDTH} {height}" role="img" aria-label="{escape(title)}">'
        f'<g class="axes">{"".join(axes)}</g><g class="cells {tone}">{"".join(cells)}</g></svg>'
    )


def _counts(value: Value) -> str:
    """ "12 rows, 95% interval ..." as far as it is known."""
    rows = f"\n{value.n} rows" if value.n is not None else ""
    if value.low is None or value.high is None:
        return rows
    return f"{rows}, {percent(value.low)} to {percent(value.high)}"


def _short(policy: str) -> str:
    return escape(policy if len(policy) <= _LONGEST else policy[: _LONGEST - 1] + "…")
