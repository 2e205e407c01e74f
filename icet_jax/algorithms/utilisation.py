"""Model FLOPs utilisation by the public definitions: what an iteration needs over what the devices could do.

Needed are those of real tokens (padding is none) through weights and attention, once: what is computed again to save
memory does not count (Chowdhery et al. 2022, appendix B). With N weights a forward pass takes 2 N per token, a LoRA
update 4 N (no gradients of frozen weights; the adapters' own are left out), a full update 6 N; attention counts all
places before and after a token, forward 1, update 3 times. The head counts where its logits are needed.
"""

import time
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from icet_jax.algorithms.settings import Settings
from icet_jax.nn.flops import logits
from icet_jax.parallel import topology
from icet_jax.parallel.speed import product_speed

_CPU_SIZE, _SIZE = 1024, 8192  # of the product that is timed where no peak is published


class Peak(NamedTuple):
    """What the devices of a run could do.

    Attributes:
      device: their kind, as jax names it.
      devices: how many.
      flops: operations a second, all devices together.
      source: where the number is from.
    """

    device: str
    devices: int
    flops: float
    source: str

    def __str__(self) -> str:
        return f"{self.devices} x {self.device}, {self.flops / 1e12:.3g} TFLOP/s ({self.source})"


def device_peak(devices: Sequence[Any], dtype: str) -> Peak:
    """Peak of devices of one kind: published for bfloat16 where it is, else measured here in `dtype`."""
    kind, count = devices[0].device_kind, len(devices)
    chip = topology.chip_of(kind)
    if chip is not None and chip.flops is not None:
        return Peak(kind, count, count * chip.flops, f"bfloat16, dense; {chip.source}")
    on_cpu = devices[0].platform == "cpu"
    size = _CPU_SIZE if on_cpu else _SIZE
    several = 1 if on_cpu else count  # the CPU devices of one process share its cores
    measured = several * product_speed(size, size, size, dtype)
    return Peak(kind, count, measured, f"measured: {dtype} products of {size} x {size} matrices")


class Stopwatch:
    """Cuts a run into laps without gaps."""

    def __init__(self) -> None:
        self._last: float | None = None

    def start(self) -> None:
        """The first call starts the first lap; the others do nothing."""
        self._last = time.perf_counter() if self._last is None else self._last

    def lap(self) -> float:
        """Seconds since the last lap's end."""
        before, self._last = self._last, time.perf_counter()
        return 0.0 if before is None else self._last - before


class IterationOperations(NamedTuple):
    """What an iteration has done if it was not stopped.

    Attributes:
      rows: with a response.
      sampled: response tokens; none where none are sampled.
      trained: positions of prompts and responses, counted once per epoch.
      flops: needed by each phase.
      update_flops: the part of `flops["update"]` that falls away where an iteration's updates stop early.
    """

    rows: int
    sampled: int
    trained: int
    flops: dict[str, int]
    update_flops: int


class Counter:
    """Counts the operations of iterations, from the lengths of their rows."""

    def __init__(self, model: Any, settings: Settings):
        """`model`: a `VisionLanguageModel`; `settings`: of the run, `lora_scale` None is full fine-tuning."""
        self._model = model
        self._head = logits(model.hidden_size, model.vocab_size)
        self._passes = 3 if settings.lora_scale is None else 2
        self._epochs, self._steps = settings.epochs, settings.epochs * settings.minibatches

    def count(
        self, prompts: np.ndarray, answers: np.ndarray, images: np.ndarray, *, sampled: bool = True, passes: int = 0,
        group_size: int = 1,
    ) -> IterationOperations:  # fmt: skip
        """Epochs of updates on rows of so many prompt positions, response tokens and images.

        Args:
          prompts, images: of each row, int [B].
          answers: of each row, int [B], or of several answers to each row's prompt, int [B, K]; one of length 0 is a
            filler.
          sampled: whether the answers were drawn in a rollout, rather than given.
          passes: teacher-forced passes over every row beside those of the updates.
          group_size: neighbouring rows that have one prompt, whose encoder pass and prefill they share in a rollout.
        """
        each = answers.size // len(prompts)
        columns = (np.repeat(prompts, each), answers.ravel(), np.repeat(images, each))
        rows = [row for row in zip(*(column.tolist() for column in columns), strict=True) if row[1]]
        update = self._epochs * sum(self._backward(*row) for row in rows)
        beside = passes * sum(sum(self._forward(*row)) for row in rows)
        if sampled:
            read = sum(self._prefill(prompt, count) for prompt, _, count in rows[::group_size])
            flops = {"rollout": read + sum(self._decode(*row) for row in rows), "update": beside + update}
        else:
            seen = sum(self._encode(prompt, count) for prompt, _, count in rows) // each  # the tower runs once a prompt
            flops = {"update": seen + beside + update}
        tokens = sum(answer for _, answer, _ in rows) if sampled else 0
        return IterationOperations(len(rows), tokens, self._positions(rows), flops, update)

    def evaluated(self, row: Mapping[str, float]) -> float:
        """The share of an iteration's steps that were computed; the one that stops it is not applied."""
        stops = row.get("policy/early_stop", 0.0) + row["train/nonfinite"]
        return (row["train/updates"] + stops) / self._steps

    def _positions(self, rows: list[tuple[int, int, int]]) -> int:
        return self._epochs * sum(prompt + answer - 1 for prompt, answer, _ in rows)

    def _encode(self, prompt: int, images: int) -> int:
        found = self._model.operations(prompt, prompt, images)
        return images * (found.encode + found.visual)

    def _prefill(self, prompt: int, images: int) -> int:
        return self._encode(prompt, images) + self._model.operations(prompt, prompt, images).prefill

    def _decode(self, prompt: int, answer: int, images: int) -> int:
        # A step's cost is linear in the places that it attends to: all steps cost as many times the middle one.
        middle = self._model.operations(1, prompt + (answer + 1) // 2, images)
        return (answer - 1) * middle.step

    def _forward(self, prompt: int, answer: int, images: int) -> tuple[int, int]:
        """One pass over a row without its last token, with the logits of the response: through weights, attention."""
        length = prompt + answer - 1
        whole, weights = (self._model.operations(length, seen, images).forward for seen in (length, 0))
        return weights + answer * self._head, whole - weights

    def _backward(self, prompt: int, answer: int, images: int) -> int:
        """A forward pass and the gradients."""
        weights, attention = self._forward(prompt, answer, images)
        return self._passes * weights + 3 * attention


def speeds(done: IterationOperations, seconds: Mapping[str, float], evaluated: float, peak: Peak) -> dict[str, float]:
    """`perf/...` of an iteration.

    `perf/time_rollout`, `time_score` and `time_update` (old and reference log-probs included) add up to the iteration.
    `perf/tokens_per_sec` are sampled tokens over the whole iteration, `tokens_per_sec_rollout` over sampling them,
    `tokens_per_sec_update` positions of prompt and response passed through an update. `perf/mfu` is the operations that
    the iteration needed over what the devices could have done in its time; scoring takes time and counts no operations.
    `perf/tokens` and `perf/flops` are the sampled tokens and those operations themselves.

    Args:
      done: by the iteration.
      seconds: of each phase.
      evaluated: share of the optimizer steps that were computed.
      peak: of the devices.
    """
    total = sum(seconds.values())
    flops: dict[str, float] = dict(done.flops)
    flops["update"] -= (1 - evaluated) * done.update_flops
    row = {f"perf/time_{phase}": spent for phase, spent in seconds.items()}
    row["perf/samples_per_sec"] = done.rows / total
    if done.sampled:
        row["perf/tokens_per_sec"] = done.sampled / total
        row["perf/tokens_per_sec_rollout"] = done.sampled / seconds["rollout"]
    row["perf/tokens_per_sec_update"] = evaluated * done.trained / seconds["update"]
    row["perf/tokens"], row["perf/flops"] = float(done.sampled), float(sum(flops.values()))
    row["perf/mfu"] = row["perf/flops"] / (total * peak.flops)
    return row | {f"perf/mfu_{phase}": count / (seconds[phase] * peak.flops) for phase, count in flops.items()}
