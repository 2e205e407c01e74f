"""The section on cost: time, speed and compilations of each stage of the run."""

from statistics import fmean

from icet_jax.files import JsonObject
from icet_jax.report.blocks import Block, note, table, text
from icet_jax.report.study import Study, as_value
from icet_jax.report.text import duration, number


def of_study(study: Study) -> list[Block]:
    """Returns a table with a row for each stage of the run (means over seeds), and a line of facts on the machine.

    Returns [] if no run has a cost.json.
    """
    costs = [run.cost for run in study.runs if isinstance(run.cost.get("phases"), list)]
    if not costs:
        return []
    names = list(dict.fromkeys(str(stage.get("name")) for cost in costs for stage in _stages(cost)))
    rows = []
    for name in names:
        stages = [stage for cost in costs for stage in _stages(cost) if str(stage.get("name")) == name]
        seconds, speed, count, compile_seconds = (
            _mean(stages, key) for key in ("seconds", "tokens_per_second", "compilations", "compile_seconds")
        )
        cells = [name.replace("_", " "), _time(seconds), number(speed)]
        cells += ["–" if count is None else f"{count:.4g}", _time(compile_seconds)]
        rows.append([text(cell) for cell in cells])
    head = ["Phase", "Time", "Tokens/s", "Compilations", "Compiling"]
    caption = "By phase, mean over seeds" if study.has_several_seeds else "By phase"
    return [*table(caption, head, rows), note(" · ".join(_facts(costs)))]


def _facts(costs: list[JsonObject]) -> list[str]:
    """Returns total time, device, versions and peak memory as phrases; what no cost.json contains is left out."""
    total, peak = _mean(costs, "total_seconds"), _mean(costs, "peak_bytes")
    facts = [f"Total: {duration(total)}" if total is not None else "", str(costs[0].get("device") or "")]
    versions = costs[0].get("versions")
    if isinstance(versions, dict):
        facts.append(", ".join(f"{name} {version}" for name, version in versions.items()))
    facts.append(f"peak memory {peak / 2**30:.2f} GiB" if peak else "")
    return [fact for fact in facts if fact]


def _time(seconds: float | None) -> str:
    return "–" if seconds is None else duration(seconds)


def _stages(cost: JsonObject) -> list[JsonObject]:
    return [stage for stage in cost["phases"] if isinstance(stage, dict)]


def _mean(rows: list[JsonObject], key: str) -> float | None:
    """Returns the mean of the rows' values under `key`; None if no row has a number there."""
    means = [value.mean for row in rows if (value := as_value(row.get(key))) is not None]
    return fmean(means) if means else None
