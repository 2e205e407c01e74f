"""Scores by exit and training step as an inline SVG heat map."""

from statistics import fmean

from icet_jax.report.text import escape, number
from icet_jax.report.widgets import code

_COLUMNS = 60
_WIDTH, _LEFT, _TOP, _BOTTOM, _ROW = 1080, 46, 6, 24, 18


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
