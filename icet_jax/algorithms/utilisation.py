"""Computes model FLOPs utilisation (MFU): the operations that an iteration needs, divided by what the devices could do.

Only the operations of real tokens (not of padding) count, and each only once: what is recomputed to save memory does
not count (Chowdhery et al. 2022, appendix B). With N weights, a forward pass takes 2 N operations per token, a LoRA
update 4 N (frozen weights have no gradients, and those of the adapters are left out) and a full update 6 N. Attention
counts as if each token attended to all positions, once in a forward pass and three times in an update. The head counts
only where its logits are needed.
"""

import time
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from icet_jax.algorithms.settings import Settings
from icet_jax.nn.flops import logits
from icet_jax.parallel import topology
from icet_jax.parallel.speed import product_speed

_CPU_SIZE, _SIZE = 1024, 8192  # size of the matrices whose product is timed if no peak speed is published


class Peak(NamedTuple):
    """Holds the peak speed of the devices of a run.

    Attributes:
      device: kind of the devices, as jax names it.
      devices: number of devices.
      flops: operations per second of all devices together.
      source: source of the number.
    """

    device: str
    devices: int
    flops: float
    source: str

    def __str__(self) -> str:
        return f"{self.devices} x {self.device}, {self.flops / 1e12:.3g} TFLOP/s ({self.source})"


def device_peak(devices: Sequence[Any], dtype: str) -> Peak:
    """Returns the peak speed of devices of one kind.

    It is the chip's published speed for bfloat16 or, for an unknown chip, a speed that is measured in `dtype`.
    """
    kind, count = devices[0].device_kind, len(devices)
    chip = topology.chip_of(kind)
    if chip is not None and chip.flops is not None:
        return Peak(kind, count, count * chip.flops, f"bfloat16, dense; {chip.source}")
    on_cpu = devices[0].platform == "cpu"
    size = _CPU_SIZE if on_cpu else _SIZE
    factor = 1 if on_cpu else count  # the CPU devices of one process share its cores
    measured = factor * product_speed(size, size, size, dtype)
    return Peak(kind, count, measured, f"measured: {dtype} products of {size} x {size} matrices")


class Stopwatch:
    """Measures the times of consecutive phases, each from the end of the previous one."""

    def __init__(self) -> None:
        self._last: float | None = None

    def start(self) -> None:
        """Starts the first phase; later calls do nothing."""
        self._last = time.perf_counter() if self._last is None else self._last

    def lap(self) -> float:
        """Returns the seconds since the last call of `lap`, or since `start` if it is the first; 0 before `start`."""
        before, self._last = self._last, time.perf_counter()
        return 0.0 if before is None else self._last - before


class IterationOperations(NamedTuple):
    """Holds how many tokens and operations an iteration has if its updates do not stop early.

    Attributes:
      rows: number of rows with a response.
      sampled: number of sampled response tokens; 0 if the responses were not sampled.
      trained: number of positions of prompts and responses, counted once per epoch.
      flops: {phase: operations}.
      update_flops: operations of the optimizer steps, a part of `flops["update"]`.
    """

    rows: int
    sampled: int
    trained: int
    flops: dict[str, int]
    update_flops: int


class Counter:
    """Counts the operations of iterations, from the lengths of their rows."""

    def __init__(self, model: Any, settings: Settings):
        """Stores the sizes of a `VisionLanguageModel` and the run's settings that determine the operations."""
        self._model = model
        self._head = logits(model.hidden_size, model.vocab_size)
        self._passes = 3 if "policy" in settings.trained and settings.lora_scale is None else 2
        self._trains_projector = "projector" in settings.trained
        self._epochs, self._steps = settings.epochs, settings.epochs * settings.minibatches

    def count(
        self, prompts: np.ndarray, answers: np.ndarray, images: np.ndarray, *, sampled: bool = True, passes: int = 0,
        group_size: int = 1,
    ) -> IterationOperations:  # fmt: skip
        """Returns the operations of one iteration with these rows.

        Args:
          prompts: number of prompt positions of each row, int [B].
          answers: number of response tokens of each row, int [B], or of K answers to each row's prompt, int [B, K]; 0
            for a filler.
          images: number of images of each row, int [B].
          sampled: whether the answers were sampled in a rollout; otherwise they came with the data.
          passes: number of teacher-forced passes over every row before the updates.
          group_size: number of consecutive rows with the same prompt, for which encoder and prefill run only once.
        """
        answers_per_prompt = answers.size // len(prompts)
        columns = (np.repeat(prompts, answers_per_prompt), answers.ravel(), np.repeat(images, answers_per_prompt))
        rows = [row for row in zip(*(column.tolist() for column in columns), strict=True) if row[1]]
        project = sum(self._project(prompt, count) for prompt, _, count in rows) if self._trains_projector else 0
        update = self._epochs * (sum(self._backward(*row) for row in rows) + 3 * project)
        evaluate = passes * sum(sum(self._forward(*row)) for row in rows)
        if sampled:
            prefill = sum(self._prefill(prompt, count) for prompt, _, count in rows[::group_size])
            flops = {"rollout": prefill + sum(self._decode(*row) for row in rows), "update": evaluate + update}
        else:
            encode = sum(self._encode(prompt, count) for prompt, _, count in rows) // answers_per_prompt - project
            flops = {"update": encode + evaluate + update}
        tokens = sum(answer for _, answer, _ in rows) if sampled else 0
        return IterationOperations(len(rows), tokens, self._positions(rows), flops, update)

    def evaluated(self, metrics: Mapping[str, float]) -> float:
        """Returns the share of an iteration's optimizer steps that were computed, from its metrics.

        A step that stops the iteration is computed but not applied.
        """
        stops = metrics.get("policy/early_stop", 0.0) + metrics["train/nonfinite"]
        return (metrics["train/updates"] + stops) / self._steps

    # The following methods take the number of prompt positions, answer tokens and images of a row, and return
    # operations, except `_positions`.

    def _positions(self, rows: list[tuple[int, int, int]]) -> int:
        """Returns the number of positions that pass through all epochs of updates."""
        return self._epochs * sum(prompt + answer - 1 for prompt, answer, _ in rows)

    def _encode(self, prompt: int, images: int) -> int:
        operations = self._model.operations(prompt, prompt, images)
        return images * (operations.encode + operations.visual)

    def _project(self, prompt: int, images: int) -> int:
        return images * self._model.operations(prompt, prompt, images).project

    def _prefill(self, prompt: int, images: int) -> int:
        return self._encode(prompt, images) + self._model.operations(prompt, prompt, images).prefill

    def _decode(self, prompt: int, answer: int, images: int) -> int:
        # The cost of a step is linear in the number of positions it attends to, so all steps cost as the middle one.
        middle = self._model.operations(1, prompt + (answer + 1) // 2, images)
        return (answer - 1) * middle.step

    def _forward(self, prompt: int, answer: int, images: int) -> tuple[int, int]:
        """Returns the operations of one pass without the last token, with the answer's logits: (weights, attention)."""
        length = prompt + answer - 1
        total, weights = (self._model.operations(length, cached, images).forward for cached in (length, 0))
        return weights + answer * self._head, total - weights

    def _backward(self, prompt: int, answer: int, images: int) -> int:
        """Returns the operations of a forward pass and the gradients."""
        weights, attention = self._forward(prompt, answer, images)
        return self._passes * weights + 3 * attention


def speeds(
    operations: IterationOperations, seconds: Mapping[str, float], evaluated: float, peak: Peak
) -> dict[str, float]:  # fmt: skip
    """Returns the metrics `perf/...` of an iteration.

      perf/time_PHASE: seconds of a phase: `rollout`, `score`, and `update`, which includes computing the old and the
        reference log-probs. Together they are the time of the iteration.
      perf/samples_per_sec: rows with a response per second of the whole iteration.
      perf/tokens_per_sec: sampled tokens per second of the whole iteration.
      perf/tokens_per_sec_rollout: sampled tokens per second of sampling.
      perf/tokens_per_sec_update: prompt and response positions per second of the update phase.
      perf/tokens, perf/flops: number of sampled tokens, and number of operations.
      perf/mfu: the iteration's operations divided by what the devices could have done in its time. Scoring takes time,
        but its operations do not count.
      perf/mfu_PHASE: the same for the operations and the time of one phase.

    Args:
      operations: operations of the iteration if its updates do not stop early.
      seconds: {phase: seconds}.
      evaluated: fraction of the planned optimizer steps that were run; below 1 if the updates stopped early.
      peak: peak speed of the devices.
    """
    total = sum(seconds.values())
    flops: dict[str, float] = dict(operations.flops)
    flops["update"] -= (1 - evaluated) * operations.update_flops  # without the planned steps that were not run
    row = {f"perf/time_{phase}": spent for phase, spent in seconds.items()}
    row["perf/samples_per_sec"] = operations.rows / total
    if operations.sampled:
        row["perf/tokens_per_sec"] = operations.sampled / total
        row["perf/tokens_per_sec_rollout"] = operations.sampled / seconds["rollout"]
    row["perf/tokens_per_sec_update"] = evaluated * operations.trained / seconds["update"]
    row["perf/tokens"], row["perf/flops"] = float(operations.sampled), float(sum(flops.values()))
    row["perf/mfu"] = row["perf/flops"] / (total * peak.flops)
    return row | {f"perf/mfu_{phase}": count / (seconds[phase] * peak.flops) for phase, count in flops.items()}
