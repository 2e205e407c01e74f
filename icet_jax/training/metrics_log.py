"""Writes a run's metrics to metrics.jsonl and, if the config says so, for TensorBoard and Weights & Biases."""

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
    """Removes from a metrics.jsonl the rows after `step`, and incomplete lines that a killed process left."""
    if not path.exists():
        return
    lines = []
    for line in read_text(path, "replace").splitlines():
        try:
            row = parse_json(line)
        except ValueError:
            continue
        row_step = row.get("step") if isinstance(row, dict) else None
        if isinstance(row_step, int) and row_step <= step:
            lines.append(line + "\n")
    write_text_atomic(path, "".join(lines))


class MetricsLog:
    """Writes one row of metrics per logged step to every log that the config names.

    Of several processes only the first writes; in the others, all methods do nothing.
    """

    def __init__(self, workdir: Path, config: ConfigDict, *, step: int):
        """Opens the logs in `workdir` and removes what an earlier process logged after `step`.

        Args:
          workdir: run directory.
          config: config of the run.
          step: step of the restored checkpoint; 0 for a new run.

        Raises:
          UserError: the config names Weights & Biases and it is not installed, or the directory cannot be written to.
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
        """Appends a row; a metric that is not finite becomes null in metrics.jsonl (JSON has no NaN).

        Raises:
          UserError: the row cannot be written, for example because the disk is full.
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
        """Closes all logs; nothing that `write` has written is lost."""
        if self._tensorboard is not None:
            self._tensorboard.close()
        if self._wandb is not None:
            self._wandb.finish()


class _Events:
    """Writes TensorBoard's events.*; an event is completely in the file when `write` returns.

    tensorboardX's `SummaryWriter` cannot be used, because its `flush` does not wait for its thread: right after a
    flush, 1,694 of the 2,130 bytes of a row of 40 metrics were in the file. A run that is killed and resumed would lack
    the rest.
    """

    def __init__(self, workdir: Path, first_step: int):
        """Opens a new file; TensorBoard will ignore the events of `first_step` and later steps in earlier files."""
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto import event_pb2, summary_pb2

        self._event, self._summary = event_pb2.Event, summary_pb2.Summary
        self._path = workdir / "events"
        start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
        with self._named_errors():
            self._writer = EventsWriter(str(self._path))
            self._add(self._event(step=first_step, session_log=start))

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Writes one scalar per metric."""
        scalars = [self._summary.Value(tag=name, simple_value=value) for name, value in values.items()]
        with self._named_errors():
            self._add(self._event(step=step, summary=self._summary(value=scalars)))

    def close(self) -> None:
        """Closes the file, which already contains every event."""
        with contextlib.suppress(OSError):
            self._writer.close()

    def _add(self, event: Any) -> None:
        """Writes one protocol buffer of the type `Event` to the file."""
        event.wall_time = time.time()
        self._writer.write_event(event)
        self._writer.flush()

    @contextlib.contextmanager
    def _named_errors(self) -> Iterator[None]:
        """Turns an `OSError` inside the block into a `UserError` that names the file."""
        try:
            yield
        except OSError as error:
            raise write_error(f"{self._path}.*", error) from error


def _start_wandb(workdir: Path, config: ConfigDict) -> Any:
    """Returns the Weights & Biases run named like `workdir`, continued if it exists."""
    try:
        import wandb
    except ImportError as error:
        raise UserError("config.log.wandb needs Weights & Biases: pip install wandb") from error
    return wandb.init(dir=str(workdir), name=workdir.name, id=workdir.name, resume="allow", config=config.to_dict())
