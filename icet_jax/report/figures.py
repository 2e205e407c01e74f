"""The same curves as PNG files, for papers and README pages."""

import io
import math
import re
from pathlib import Path
from typing import Any

from icet_jax.files import write_bytes_atomic
from icet_jax.report.policies import ordered
from icet_jax.report.schema import metric_family
from icet_jax.report.study import Study, dataset_name
from icet_jax.report.widgets import family_title

_TONES = {"before": "#bf4417", "after": "#10697f"}
_FAMILIES = (
    *("asr", "p_unsafe", "tr", "ts", "refusal", "refusal_unsafe", "vqa", "accuracy"),
    *("degenerate", "empty", "truncated", "length"),
)


def write_figures(study: Study, folder: Path) -> list[Path]:
    """Writes one PNG per data set and metric, one of the first judge's shares by policy, and `geometry.png`.

    Returns their paths. Files are called `DATASET.METRIC[.policies].png`, with every sign that is not a letter, digit,
    dot or dash as `_`.
    """
    written = []
    for dataset in study.datasets:
        for metric in study.metrics(dataset):
            if metric.partition("/")[0] in _FAMILIES and len(study.layers(dataset)) > 1:
                written.append(folder / f"{_file_name(dataset, metric)}.png")
                write_bytes_atomic(written[-1], _metric_png(study, dataset, metric))
        for metric in study.judges(dataset)[:1]:
            if study.policies(dataset, metric) and len(study.layers(dataset)) > 1:
                written.append(folder / f"{_file_name(dataset, metric)}.policies.png")
                write_bytes_atomic(written[-1], _policies_png(study, dataset, metric))
    if study.first.geometry:
        written.append(folder / "geometry.png")
        write_bytes_atomic(written[-1], _geometry_png(study))
    return written


def _metric_png(study: Study, dataset: str, metric: str) -> bytes:
    """Before and after over exits."""
    figure, axes = new_figure(1)
    axes = axes[0]
    family = metric_family(metric)
    scale = 100.0 if family.share else 1.0
    for phase in study.phases(dataset):
        curve = study.curve(phase, dataset, metric)
        exits = [layer for layer, _ in curve]
        for seed in range(len(study.runs)) if study.several else ():
            values = [study.seeds(phase, dataset, metric, layer)[seed] for layer in exits]
            known = [(layer, scale * value) for layer, value in zip(exits, values, strict=True) if value is not None]
            axes.plot(*zip(*known, strict=True), color=_TONES[phase], linewidth=0.8, alpha=0.45)
        axes.plot(
            exits,
            [scale * value.mean for _, value in curve],
            color=_TONES[phase],
            label=phase,
            marker="o",
            markersize=4.5,
            linestyle="--" if phase == "before" else "-",
            markerfacecolor="white" if phase == "before" else _TONES[phase],
        )
        ranged = [
            (layer, scale * value.low, scale * value.high)
            for layer, value in curve
            if value.low is not None and value.high is not None
        ]
        if ranged:
            axes.fill_between(*zip(*ranged, strict=True), color=_TONES[phase], alpha=0.14, linewidth=0)
    axes.set_title(f"{family_title(metric)}: {metric}, {dataset_name(dataset)}", loc="left", fontsize=10)
    axes.set_ylabel("%" if family.share else "")
    if metric.partition("/")[0] in ("asr", "p_unsafe", "refusal", "refusal_unsafe", "vqa", "accuracy"):
        axes.set_ylim(-2, 102)
    _mark_exits(study, axes)
    axes.legend(frameon=False, fontsize=9)
    return to_png(figure)


def _policies_png(study: Study, dataset: str, metric: str) -> bytes:
    """Exit by policy, one panel per phase."""
    policies, layers, phases = ordered(study, dataset, metric), study.layers(dataset), study.phases(dataset)
    figure, panels = new_figure(len(phases), width=5.2, height=1.2 + 0.22 * len(policies))
    for phase, axes in zip(phases, panels, strict=True):
        shares = [dict(study.policy_curve(phase, dataset, metric, policy)) for policy in policies]
        table = [[100 * row[layer].mean if layer in row else math.nan for layer in layers] for row in shares]
        drawn = axes.imshow(table, vmin=0, vmax=100, cmap="Oranges", aspect="auto", interpolation="nearest")
        axes.grid(visible=False)
        axes.set_title(f"{phase}: {metric}, {dataset_name(dataset)}", loc="left", fontsize=10)
        axes.set_xticks(range(0, len(layers), 2), [str(layer) for layer in layers[::2]])
        axes.set_yticks(range(len(policies)), [policy[:40] for policy in policies] if phase == phases[0] else [])
    figure.colorbar(drawn, ax=panels, label="%", shrink=0.8)
    return to_png(figure)


def _file_name(dataset: str, metric: str) -> str:
    return re.sub(r"[^A-Za-z0-9.-]+", "_", f"{dataset_name(dataset)}.{metric}")[:120]


def _geometry_png(study: Study) -> bytes:
    """Norm ratio, cosine and CKA to the default exit."""
    names = ("norm_ratio", "cosine", "cka")
    figure, panels = new_figure(len(names))
    for axes, name in zip(panels, names, strict=True):
        known = [(exit_layer, value.mean) for exit_layer, value in study.geometry(name)]
        if known:
            axes.plot(*zip(*known, strict=True), color="#4c4a7d", marker="o", markersize=4)
        axes.set_title(f"geometry/{name}", loc="left", fontsize=10)
        _mark_exits(study, axes)
    return to_png(figure)


def new_figure(count: int, *, width: float | None = None, height: float = 3.0) -> tuple[Any, Any]:
    """A figure with `count` panels side by side, independent of any display and of pyplot's global state."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    size = (6.4, 3.6) if count == 1 and width is None else ((width or 3.6) * count, height)
    figure = Figure(figsize=size, dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, count, squeeze=False)[0]
    for axes in panels:
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", color="#ece8dd")
        axes.set_axisbelow(True)
        axes.tick_params(labelsize=9)
        axes.set_xlabel("exit", fontsize=9)
    return figure, panels


def _mark_exits(study: Study, axes: Any) -> None:
    """The default exit as a dotted line, planted exits shaded, whole numbers on the axis."""
    axes.set_xticks(range(1, study.num_exits + 1, 1 if study.num_exits <= 16 else 2))
    axes.set_xlim(0.5, study.num_exits + 0.5)
    for exit_layer in study.planted:
        label = "planted exit" if exit_layer == study.planted[0] else None
        axes.axvspan(exit_layer - 0.4, exit_layer + 0.4, color="#b08a15", alpha=0.13, linewidth=0, label=label)
    if study.default_exit is not None:
        axes.axvline(study.default_exit, color="#1e1d1a", linestyle=":", linewidth=1, label="default exit")


def to_png(figure: Any) -> bytes:
    """The figure as a PNG file's bytes."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()
