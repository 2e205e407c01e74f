"""Finds the largest batch that fits, for `--largest-batch`.

Programs are compiled for a few batch sizes. Memory is assumed to grow linearly with the rows, so a straight line
through two compiled sizes predicts which size to compile next. Only a size that was compiled is reported as fitting.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol, runtime_checkable

from ml_collections import ConfigDict

from icet_jax.config import group_size, warm_start_config
from icet_jax.errors import UserError
from icet_jax.parallel import gpu_targets
from icet_jax.parallel.mesh import mesh_shape
from icet_jax.parallel.topology import Topology

Sizes = Mapping[str, int | None]
"""{phase: bytes per chip, or None if the phase does not fit, so that the compiler refuses it}."""

FIELDS = {"data.batch_size": "training", "sweep.batch_size": "sweep"}
"""{config field whose largest value can be searched for: the part of the plan that depends on it}."""
_MAX_COMPILED = 5  # largest number of batch sizes that are compiled, because each takes minutes
_PRECISION = 4  # the search ends when the result is too small by at most 1 / 4, because each step takes minutes


@dataclasses.dataclass(frozen=True)
class LargestBatch:
    """Holds the result of the search for the largest batch.

    Attributes:
      field: config field of the batch size.
      rows: the largest batch that was compiled and fits; None if not even the smallest one fits.
      unit: batch sizes are multiples of this, so that every chip has the same number of rows in every slice.
      next: the smallest larger batch that was compiled and does not fit; None if no such batch was compiled.
      bound: the phase that needs the most memory with `next` rows (or with `rows` rows if `next` is None); "" if both
        are None.
      compiled: number of batch sizes that were compiled.
    """

    field: str
    rows: int | None
    unit: int
    next: int | None
    bound: str
    compiled: int

    def __str__(self) -> str:
        """Returns the result as one line."""
        if self.rows is None:
            return f"config.{self.field}: not even {self.next} rows fit ({self.bound}; multiples of {self.unit})"
        more = "" if self.next is None else f"; {self.next} do not"
        bound = f", bound by {self.bound}" if self.bound else ""
        return (
            f"config.{self.field}: {self.rows} rows fit (compiled){more}{bound}; "
            f"multiples of {self.unit}, {self.compiled} sizes compiled"
        )


def check(topology: Topology) -> None:
    """Raises a `UserError` if the search is impossible, because these chips have no compiler or no known memory."""
    chip = topology.chip
    if chip.options is None and (chip.target is None or not gpu_targets.installed()):
        raise UserError(
            f"--largest-batch: what fits {chip.name} chips is not known; it is for TPUs, and for GPUs with the extra "
            "plan-gpu: pip install 'icet-jax[plan-gpu]'"
        )


def unit_of(config: ConfigDict, count: int, field: str) -> int:
    """Returns the number of which the batch size in `field` must be a multiple on `count` chips."""
    data, fsdp, _ = mesh_shape(count, **config.mesh)
    groups = [group_size(training) for training in (config, warm_start_config(config)) if training is not None]
    slices = math.lcm(config.lppo.minibatches * config.lppo.accumulation, *groups)
    return data * fsdp * (slices if FIELDS[field] == "training" else 1)


@runtime_checkable
class _PlanLine(Protocol):
    """Declares the attributes of a line of the plan (`icet_jax.commands.plan.PlanLine`) that the search reads."""

    @property
    def phase(self) -> str: ...
    @property
    def temporaries(self) -> int | None: ...
    @property
    def total(self) -> int: ...


def largest(
    config: ConfigDict, topology: Topology, field: str, planned: Sequence[_PlanLine],
    plan: Callable[[ConfigDict, str], Sequence[_PlanLine]],
) -> LargestBatch:  # fmt: skip
    """Searches for the largest value of the batch-size field `field` with which the run's programs fit on the topology.

    Args:
      config: config of the run.
      topology: the chips, for which there must be a compiler, see `check`.
      field: name of a batch-size field, one of `FIELDS`.
      planned: lines of the plan of `config` as it stands, whose programs are then not compiled again.
      plan: function of (config, "training" or "sweep") that returns the lines of that part of the config's plan.
    """
    part = FIELDS[field]
    section, name = field.split(".")

    def measure(rows: int) -> Sizes:
        if rows == config[section][name]:
            lines = [line for line in planned if line.phase.startswith("sweep") == (part == "sweep")]
        else:
            changed = config.copy_and_resolve_references()
            changed[section][name] = rows
            lines = list(plan(changed, part))
        return {line.phase: None if line.temporaries is None else line.total for line in lines}

    unit, memory = unit_of(config, topology.count, field), float(topology.chip.memory or 0)
    return search(measure, field=field, unit=unit, first=config[section][name], memory=memory)


def search(measure: Callable[[int], Sizes], *, field: str, unit: int, first: int, memory: float) -> LargestBatch:
    """Searches for the largest number of rows with which all phases fit, and compiles at most five sizes for that.

    Args:
      measure: compiles the phases for a number of rows and returns their bytes per chip.
      field: config field of the batch size, for the result.
      unit: the number of rows must be a multiple of this.
      first: number of rows to begin with; it is rounded up to a multiple of `unit`.
      memory: bytes of a chip.
    """
    measured: dict[int, Sizes] = {}

    def fits(rows: int) -> bool:
        return all(size is not None and size <= memory for size in measured[rows].values())

    rows: int | None = -(-first // unit) * unit
    while rows is not None and len(measured) < _MAX_COMPILED:
        measured[rows] = measure(rows)
        rows = _next_rows(measured, fits, unit, memory)
    fitting = [rows for rows in measured if fits(rows)]
    too_large = [rows for rows in measured if not fits(rows) and rows > max(fitting, default=0)]
    best, next_larger = max(fitting, default=None), min(too_large, default=None)
    limiting_rows = next_larger or best
    bound = "" if limiting_rows is None else _largest_phase(measured[limiting_rows])
    return LargestBatch(field, best, unit, next_larger, bound, len(measured))


def _next_rows(
    measured: Mapping[int, Sizes], fits: Callable[[int], bool], unit: int, memory: float
) -> int | None:  # fmt: skip
    """Returns the number of rows to compile next; None if the largest batch is known precisely enough."""
    low = max((rows for rows in measured if fits(rows)), default=0)
    high = min((rows for rows in measured if not fits(rows) and rows > low), default=None)
    if high is not None and high - low <= unit:
        return None
    smallest_step = max(low // (_PRECISION * unit), 1) * unit
    prediction = _predict(measured, unit, memory)
    if high is None:  # a prediction is not trusted beyond eight times the largest size that was compiled
        return 2 * low if prediction is None else min(max(prediction, low + smallest_step), 8 * low)
    if high - low <= smallest_step:
        return None
    middle = (low + high) // (2 * unit) * unit
    return middle if prediction is None or not low + smallest_step <= prediction < high else prediction


def _predict(measured: Mapping[int, Sizes], unit: int, memory: float) -> int | None:
    """Predicts the largest number of rows at which all phases fit.

    The memory of each phase is extrapolated along the straight line through its two largest compiled sizes. Returns
    None if a phase has fewer than two sizes, or if no phase grows with the rows.
    """
    limits: list[float] = []
    for phase in next(iter(measured.values())):
        points = sorted((rows, size) for rows, sizes in measured.items() if (size := sizes[phase]) is not None)[-2:]
        if len(points) < 2:
            return None
        (few_rows, small), (many_rows, large) = points
        if large > small:
            limits.append(many_rows + (memory - large) * (many_rows - few_rows) / (large - small))
    return max(int(min(limits)) // unit * unit, 0) if limits else None


def _largest_phase(sizes: Sizes) -> str:
    """Returns the phase that needs the most memory: one that the compiler refuses, else the one with most bytes."""
    refused = [phase for phase, size in sizes.items() if size is None]
    return refused[0] if refused else max(sizes, key=lambda phase: sizes[phase] or 0)
