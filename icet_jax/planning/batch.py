"""The largest batch that fits: a line through what programs of two sizes take, and programs of the size it leads to."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ml_collections import ConfigDict

from icet_jax.errors import UserError
from icet_jax.parallel.mesh import mesh_shape
from icet_jax.parallel.topology import Topology

FIELDS = {"data.batch_size": "training", "sweep.batch_size": "sweep"}
"""Batches that are looked for, and the part of the plan that each is of."""
_MOST = 4  # sizes that are compiled beside the first: each takes minutes
_PART = 4  # the answer may be short by one part in so many: programs take less where less is left, so no line is exact


@dataclasses.dataclass(frozen=True)
class Largest:
    """What was found.

    Attributes:
      field: of the config.
      rows: the largest batch that was compiled and fits; None if not even the smallest does.
      unit: what it is a multiple of, so that every chip has as many rows in every slice.
      next: the least larger batch that was compiled and does not fit; None if there is none.
      bound: the phase that the next batch would not fit; "" if none was found.
      compiled: how many sizes were.
    """

    field: str
    rows: int | None
    unit: int
    next: int | None
    bound: str
    compiled: int

    def __str__(self) -> str:
        if self.rows is None:
            return f"config.{self.field}: not even {self.next} rows fit ({self.bound}; multiples of {self.unit})"
        more = "" if self.next is None else f"; {self.next} do not"
        bound = f", bound by {self.bound}" if self.bound else ""
        return (
            f"config.{self.field}: {self.rows} rows fit (compiled){more}{bound}; "
            f"multiples of {self.unit}, {self.compiled} sizes compiled"
        )


def check(topology: Topology) -> None:
    """Raises a `UserError` where the largest batch cannot be found: there is no compiler, or no end of the memory."""
    if topology.chip.options is None:
        raise UserError(f"--largest-batch: what fits {topology.chip.name} chips is not known; it is for TPUs")


def unit_of(config: ConfigDict, count: int, field: str) -> int:
    """What a batch on `count` chips is a multiple of."""
    data, fsdp, _ = mesh_shape(count, **config.mesh)
    slices = config.lppo.minibatches * config.lppo.accumulation
    return data * fsdp * (slices if FIELDS[field] == "training" else 1)


def largest(
    config: ConfigDict, topology: Topology, field: str, planned: Sequence[Any],
    plan: Callable[[ConfigDict, str], Sequence[Any]],
) -> Largest:  # fmt: skip
    """The largest batch of `field` on the topology.

    Args:
      config: of the run.
      topology: TPUs.
      field: one of `FIELDS`.
      planned: lines of the plan of `config` itself, which need not be compiled again.
      plan: gives the lines of a part of the plan of a config.
    """
    part = FIELDS[field]
    section, name = field.split(".")

    def sizes(rows: int) -> dict[str, int | None]:
        if rows == config[section][name]:
            lines = [line for line in planned if line.phase.startswith("sweep") == (part == "sweep")]
        else:
            changed = config.copy_and_resolve_references()
            changed[section][name] = rows
            lines = list(plan(changed, part))
        return {line.phase: None if line.temporaries is None else line.total for line in lines}

    room, unit = topology.chip.memory or 0.0, unit_of(config, topology.count, field)
    return search(sizes, field=field, unit=unit, first=config[section][name], room=float(room))


def search(
    sizes: Callable[[int], Mapping[str, int | None]], *, field: str, unit: int, first: int, room: float
) -> Largest:
    """See the module.

    Args:
      sizes: of so many rows, bytes per chip by phase; None for a phase that the compiler refuses.
      field: for the result.
      unit: rows are multiples of it.
      first: a size to begin with, rounded up to such a multiple.
      room: bytes of a chip.
    """
    found: dict[int, Mapping[str, int | None]] = {}

    def fits(rows: int) -> bool:
        return all(size is not None and size <= room for size in found[rows].values())

    rows: int | None = -(-first // unit) * unit
    while rows is not None and len(found) <= _MOST:
        found[rows] = sizes(rows)
        rows = _next(found, fits, unit, room)
    good = [rows for rows in found if fits(rows)]
    bad = [rows for rows in found if not fits(rows) and rows > max(good, default=0)]
    best, worse = max(good, default=None), min(bad, default=None)
    return Largest(field, best, unit, worse, _bound(found, worse or best, unit, room), len(found))


def _next(
    found: Mapping[int, Mapping[str, int | None]], fits: Callable[[int], bool], unit: int, room: float
) -> int | None:
    """The size to compile next, None if the answer is known well enough."""
    low = max((rows for rows in found if fits(rows)), default=0)
    high = min((rows for rows in found if not fits(rows) and rows > low), default=None)
    if high is not None and high - low <= unit:
        return None
    more = max(low // (_PART * unit), 1) * unit
    guess = _line(found, unit, room)
    if high is None:  # at most eight times as far as was seen
        return 2 * low if guess is None else min(max(guess, low + more), 8 * low)
    if high - low <= more:
        return None
    half = (low + high) // (2 * unit) * unit
    return half if guess is None or not low + more <= guess < high else guess


def _line(found: Mapping[int, Mapping[str, int | None]], unit: int, room: float) -> int | None:
    """The most rows that all phases' lines, through their two largest sizes, leave room for."""
    most: list[float] = []
    for phase in next(iter(found.values())):
        points = sorted((rows, size[phase]) for rows, size in found.items() if size[phase] is not None)[-2:]
        if len(points) < 2:
            return None
        (few, small), (many, large) = points
        if large > small:  # type: ignore[operator]
            most.append(many + (room - large) * (many - few) / (large - small))  # type: ignore[operator]
    return max(int(min(most)) // unit * unit, 0) if most else None


def _bound(found: Mapping[int, Mapping[str, int | None]], rows: int | None, unit: int, room: float) -> str:
    """The phase that takes most at so many rows, one that the compiler refuses before all others."""
    if rows is None:
        return ""
    refused = [phase for phase, size in found[rows].items() if size is None]
    return refused[0] if refused else max(found[rows], key=lambda phase: found[rows][phase] or 0)
