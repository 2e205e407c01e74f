"""What the run cost: time by phase, speed and compilations."""

from statistics import fmean
from typing import Any

from icet_jax.report.blocks import Block, note, table, text
from icet_jax.report.study import Study, as_value
from icet_jax.report.text import duration, number


def of_study(study: Study) -> list[Block]:
    """Seconds by phase, speed and compile counts; a mean over seeds for several."""
    runs = [run.cost for run in study.runs if isinstance(run.cost.get("phases"), list)]
    if not runs:
        return []
    names = list(dict.fromkeys(str(phase.get("name")) for cost in runs for phase in _phases(cost)))
    rows = []
    for name in names:
        phases = [phase for cost in runs for phase in _phases(cost) if str(phase.get("name")) == name]
        seconds, speed, count, compile_seconds = (
            _mean_of(phases, key) for key in ("seconds", "tokens_per_second", "compilations", "compile_seconds")
        )
        cells = [name.replace("_", " "), _time(seconds), number(speed)]
        cells += ["–" if count is None else f"{count:.4g}", _time(compile_seconds)]
        rows.append([text(cell) for cell in cells])
    head = ["Phase", "Time", "Tokens/s", "Compilations", "Compiling"]
    caption = "By phase, mean over seeds" if study.several else "By phase"
    return [*table(caption, head, rows), note(" · ".join(_facts(runs)))]


def _facts(runs: list[dict[str, Any]]) -> list[str]:
    """Total, device, versions and peak memory, as far as they are known."""
    total, peak = _mean_of(runs, "total_seconds"), _mean_of(runs, "peak_bytes")
    facts = [f"Total: {duration(total)}" if total is not None else "", str(runs[0].get("device") or "")]
    versions = runs[0].get("versions")
    if isinstance(versions, dict):
        facts.append(", ".join(f"{name} {version}" for name, version in versions.items()))
    facts.append(f"peak memory {peak / 2**30:.2f} GiB" if peak else "")
    return [fact for fact in facts if fact]


def _time(seconds: float | None) -> str:
    return "–" if seconds is None else duration(seconds)


def _phases(cost: dict[str, Any]) -> list[dict[str, Any]]:
    return [phase for phase in cost["phases"] if isinstance(phase, dict)]


def _mean_of(rows: list[dict[str, Any]], key: str) -> float | None:
    known = [value.mean for row in rows if (value := as_value(row.get(key))) is not None]
    return fmean(known) if known else None
