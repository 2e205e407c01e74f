"""Run directories of invented numbers with any number of exits, for comparisons."""

import json
import math
from pathlib import Path
from typing import Any

from tests.report.synthetic import estimate

JUDGE = "asr/refusal_keywords"
DEFINITIONS = {
    24: "hidden_states[l] of the CLIP tower through the unchanged projector (ICET-l)",
    32: "E1: local blocks after l skipped, intermediates of skipped blocks replaced by the state of block l",
}


def write_run(
    path: Path,
    *,
    exits: int,
    default: int,
    after: bool = True,
    layers: tuple[int, ...] | None = None,
    rows: int = 100,
    datasets: tuple[str, ...] = ("forbidden", "benign"),
    more: tuple[str, ...] = (),
    source: str | None = None,
) -> Path:
    """A run whose ASR falls from early to late exits before training and is low after; `more` are further metrics."""
    for phase in ("before", "after") if after else ("before",):
        for dataset in datasets:
            table = {
                "schema": 1,
                "model": f"model-of-{path.name}",
                "dataset": dataset,
                "kind": dataset if dataset in ("forbidden", "benign", "vqa") else "forbidden",
                "exit_definition": DEFINITIONS.get(exits, "hidden_states[l]"),
                "num_exits": exits,
                "default_exit": default,
                "seed": 0,
                "generation": {"temperature": 0.0, "max_new_tokens": 16},
                "layers": [
                    {"layer": x, "n": rows, "metrics": _metrics(dataset, phase, x / exits, rows, more)}
                    for x in layers or range(1, exits + 1)
                ],
            }
            write_json(path / "sweeps" / f"{phase}.{dataset}.json", table)
    config: dict[str, Any] = {"algorithm": "lppo", "lppo": {"exits": "per_example"}}
    if source is not None:
        config["sweep"] = {"datasets": dict.fromkeys(datasets, source), "utility": {}}
    write_json(path / "config.json", config)
    write_json(
        path / "geometry.json",
        {
            "schema": 1,
            "num_exits": exits,
            "default_exit": default,
            "n_images": 8,
            "layers": [
                {"layer": x, "norm_ratio": 0.4 + x / exits, "cosine": 1 - abs(x - default) / exits, "cka": x / exits}
                for x in range(1, exits + 1)
            ],
        },
    )
    return path


def asr(phase: str, depth: float) -> float:
    """The invented attack success rate at a relative depth."""
    return round(0.9 / (1 + math.exp(14 * (depth - 0.5))) + 0.03, 3) if phase == "before" else 0.02


def _metrics(dataset: str, phase: str, depth: float, rows: int, more: tuple[str, ...]) -> dict[str, Any]:
    if dataset == "benign":
        shares = {"refusal/refusal_keywords": 0.05 + 0.03 * (phase == "after")}
    else:
        shares = {JUDGE: asr(phase, depth)}
    metrics = {name: estimate(share, rows) for name, share in (shares | dict.fromkeys(more, 0.4)).items()}
    score = 1 - 2 * asr(phase, depth)
    metrics["tr/reward_model"] = {"mean": score, "ci95": [score - 0.2, score + 0.2], "n_error": 0}
    metrics["length"] = {"mean": 9.0 + depth, "ci95": None, "n_error": 0}
    return metrics


def write_json(path: Path, value: Any) -> None:
    """Writes a file, and the folders above it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value), encoding="utf-8")
