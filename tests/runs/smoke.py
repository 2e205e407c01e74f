"""A run of every step in seconds: the toy LLaVA-1.5 of `configs/llava15_lppo.py:smoke`, with fewer rows and scorers."""

import json
from pathlib import Path

CONFIG = "configs/llava15_lppo.py:smoke"
SETTINGS = {
    "lppo.iterations": "6",
    "lppo.epochs": "1",
    "lppo.max_new_tokens": "4",
    "lsft.iterations": "6",
    "data.mixture": "{'forbidden': 0.5, 'benign': 0.25, 'vqa': 0.25}",
    "reward.by_kind": "{'forbidden': 'reward_model', 'benign': 'none', 'vqa': 'exact_match'}",
    "data.train": "toy:mixed",
    "reward.model": "toy:reward_model",
    "sweep.datasets": "{'forbidden': 'toy:forbidden', 'benign': 'toy:benign'}",
    "sweep.utility": "{'vqa': 'toy:vqa'}",
    "sweep.scorers": "refusal_keywords,toy:reward_model",
    "sweep.utility_scorers": "()",
    "export.form": "full",
    "sweep.exits": "1,23",
    "sweep.limit": "2",
    "sweep.max_new_tokens": "4",
    "log.tensorboard": "false",
}


def arguments(workdir: Path, **changes: str) -> list[str]:
    """The command line of a small run; `changes` are settings with `__` for the dots."""
    settings = SETTINGS | {name.replace("__", "."): value for name, value in changes.items()}
    return [f"--config={CONFIG}", f"--workdir={workdir}", *(f"--config.{k}={v}" for k, v in settings.items())]


def rows(workdir: Path) -> list[dict]:
    """metrics.jsonl."""
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
