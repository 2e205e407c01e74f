"""Metrics of a run: metrics.jsonl, TensorBoard's events.* and, if wanted, Weights & Biases."""

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from icet_jax.errors import UserError
from icet_jax.files import parse_json, write_text_atomic
from icet_jax.parallel.distributed import is_writer


def truncate(path: Path, step: int) -> None:
    """Drops the rows of a metrics.jsonl after `step`, and a last line that a kill cut short."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            row = parse_json(line)
        except ValueError:
            continue
        number = row.get("step") if isinstance(row, dict) else None
        if isinstance(number, int) and number <= step:
            kept.append(line + "\n")
    write_text_atomic(path, "".join(kept))


class MetricsLog:
    """Writes one row of numbers per logged step, wherever the config asks for it; of several processes, one does."""

    def __init__(self, workdir: Path, config: ConfigDict, *, step: int):
        """Continues the logs of `workdir` after `step` (the restored one; 0 for a fresh run).

        Raises:
          UserError: Weights & Biases is asked for and not installed.
        """
        path = workdir / "metrics.jsonl" if is_writer() else Path(os.devnull)
        truncate(path, step)
        self._file = path.open("a", encoding="utf-8")
        self._tensorboard: Any = None
        self._wandb: Any = None
        if config.log.tensorboard and is_writer():
            from tensorboardX import SummaryWriter

            self._tensorboard = SummaryWriter(str(workdir), purge_step=step + 1)
        if config.log.wandb and is_writer():
            self._wandb = _start_wandb(workdir, config)

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Appends a row; numbers that are not finite become null (JSON has no NaN)."""
        finite = {name: float(value) for name, value in metrics.items() if math.isfinite(value)}
        row = {"step": step} | {name: finite.get(name) for name in metrics}
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()
        if self._tensorboard is not None:
            for name, value in finite.items():
                self._tensorboard.add_scalar(name, value, step)
        if self._wandb is not None:
            self._wandb.log(finite, step=step)

    def close(self) -> None:
        """Flushes and closes everything."""
        self._file.close()
        if self._tensorboard is not None:
            self._tensorboard.close()
        if self._wandb is not None:
            self._wandb.finish()


def _start_wandb(workdir: Path, config: ConfigDict) -> Any:
    try:
        import wandb
    except ImportError as error:
        raise UserError('config.log.wandb needs Weights & Biases: pip install "icet-jax[wandb]"') from error
    return wandb.init(dir=str(workdir), name=workdir.name, id=workdir.name, resume="allow", config=config.to_dict())
