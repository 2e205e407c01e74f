"""Metrics of a run: metrics.jsonl, TensorBoard's events.* and, if wanted, Weights & Biases."""

import contextlib
import json
import math
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from icet_jax.errors import UserError, write_error
from icet_jax.files import append_text, parse_json, read_text, write_text_atomic
from icet_jax.parallel.distributed import is_writer


def truncate(path: Path, step: int) -> None:
    """Drops the rows of a metrics.jsonl after `step`, and a last line that a kill cut short."""
    if not path.exists():
        return
    kept = []
    for line in read_text(path, "replace").splitlines():
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
          UserError: Weights & Biases is asked for and not installed, or the directory cannot be written to.
        """
        path = workdir / "metrics.jsonl"
        if is_writer():
            truncate(path, step)
        self._path = path if is_writer() else None
        self._tensorboard: _Events | None = None
        self._wandb: Any = None
        if config.log.tensorboard and is_writer():
            self._tensorboard = _Events(workdir, step + 1)
        if config.log.wandb and is_writer():
            self._wandb = _start_wandb(workdir, config)

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Appends a row; numbers that are not finite become null (JSON has no NaN).

        Raises:
          UserError: it cannot be written, for example because the disk is full.
        """
        finite = {name: float(value) for name, value in metrics.items() if math.isfinite(value)}
        row = {"step": step} | {name: finite.get(name) for name in metrics}
        if self._path is not None:
            append_text(self._path, json.dumps(row) + "\n")
        if self._tensorboard is not None:
            self._tensorboard.write(step, finite)
        if self._wandb is not None:
            self._wandb.log(finite, step=step)

    def close(self) -> None:
        """Closes everything; what was written is on its way to the disk already."""
        if self._tensorboard is not None:
            self._tensorboard.close()
        if self._wandb is not None:
            self._wandb.finish()


class _Events:
    """TensorBoard's events.*, complete on the disk when `write` returns.

    That is why this is not tensorboardX's `SummaryWriter`, whose `flush` does not wait for its thread: right after it,
    1,694 of the 2,130 bytes of a row of 40 numbers were in the file. A run that is killed and resumed would lack them.
    """

    def __init__(self, workdir: Path, first_step: int):
        """What an earlier process wrote of `first_step` and later is void."""
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto import event_pb2, summary_pb2

        self._event, self._summary = event_pb2.Event, summary_pb2.Summary
        self._path = workdir / "events"
        start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
        with self._named_errors():
            self._writer = EventsWriter(str(self._path))
            self._add(self._event(step=first_step, session_log=start))

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """One scalar of each name."""
        scalars = [self._summary.Value(tag=name, simple_value=value) for name, value in values.items()]
        with self._named_errors():
            self._add(self._event(step=step, summary=self._summary(value=scalars)))

    def close(self) -> None:
        """Closes the file; every event has been flushed."""
        with contextlib.suppress(OSError):
            self._writer.close()

    def _add(self, event: Any) -> None:
        event.wall_time = time.time()
        self._writer.write_event(event)
        self._writer.flush()

    @contextlib.contextmanager
    def _named_errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise write_error(f"{self._path}.*", error) from error


def _start_wandb(workdir: Path, config: ConfigDict) -> Any:
    try:
        import wandb
    except ImportError as error:
        raise UserError("config.log.wandb needs Weights & Biases: pip install wandb") from error
    return wandb.init(dir=str(workdir), name=workdir.name, id=workdir.name, resume="allow", config=config.to_dict())
