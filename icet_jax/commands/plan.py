"""`--mode=plan` tells whether a run will fit, and what will limit its speed, for chips that need not be present.

Every phase of a training run, with any algorithm, and the responses of a sweep are compiled ahead of time for the
topology, from shapes alone; the compiler reports the memory of each chip. For GPUs there is no compiler without the
hardware, so only a lower bound from shapes is given. Times are estimates at the chip's published peak, which no run
reaches.
"""

import argparse
import dataclasses
import math
import re
import sys
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from icet_jax.algorithms.base import PlannedPhase
from icet_jax.config import require
from icet_jax.errors import UserError
from icet_jax.parallel import topology as topologies
from icet_jax.parallel.collectives import moved_bytes
from icet_jax.parallel.mesh import abstract_mesh, make_mesh, mesh_shape
from icet_jax.parallel.mesh_fit import check_heads
from icet_jax.planning import advice as plan_advice
from icet_jax.planning import batch as plan_batch
from icet_jax.planning.ahead import AbstractRun, bytes_per_device
from icet_jax.planning.scorers import scorer_bytes
from icet_jax.planning.work import Work, work

_GIB = 2**30


@dataclasses.dataclass(frozen=True)
class PlanLine:
    """Holds one phase of the plan; bytes are per chip, None is unknown.

    Attributes:
      phase: name of the phase.
      weights: bytes of the frozen model.
      trained: bytes of adapters (or float32 masters), value head and optimizer, which stay on the chips in every phase.
      judges: bytes of the weights of judges and reward model, which stay too; without those of unknown size.
      inputs: bytes of batch and features.
      cache: bytes of keys and values, as the sharding rules place them.
      temporaries: all other bytes that the compiled program allocates, results included.
      work: operations and bytes read.
      moved: bytes that a chip exchanges with others.
      refused: message of the compiler if the program does not fit, else "".
    """

    phase: str
    weights: int
    trained: int
    judges: int
    inputs: int
    cache: int
    temporaries: int | None
    work: Work
    moved: int | None
    refused: str = ""

    @property
    def total(self) -> int:
        """Returns the known part of the memory."""
        return self.weights + self.trained + self.judges + self.inputs + self.cache + (self.temporaries or 0)

    def fits(self, chip: topologies.Chip) -> bool | None:
        """Returns whether the phase fits on a chip; None if that is unknown."""
        if self.refused or (chip.memory is not None and self.total > chip.memory):
            return False
        return None if chip.memory is None or self.temporaries is None else True

    def seconds(self, chip: topologies.Chip, count: int) -> tuple[float, str] | None:
        """Returns the time of a phase at the chip's peak, and what limits it; None for a chip without a published
        peak."""
        bounds = self.bounds(chip, count)
        return None if bounds is None else max((time, name) for name, time in bounds.items())

    def bounds(self, chip: topologies.Chip, count: int) -> dict[str, float] | None:
        """Returns the seconds for matrix products, memory reads and exchanges between chips, each at the peak of
        `count` chips."""
        if chip.flops is None or chip.bandwidth is None or chip.links is None:
            return None
        return {
            "products": self.work.flops / (count * chip.flops),
            "memory": self.work.steps * (self.work.read + self.cache) / chip.bandwidth,
            "links": (self.moved or 0) / chip.links,
        }


def run(config: ConfigDict, workdir: Path | None, options: argparse.Namespace) -> int:
    """Prints the plan; returns 0 unless some part of the run does not fit, else 1.

    Args:
      config: config of the run.
      workdir: unused, because a plan writes nothing.
      options: `topology`.

    Raises:
      UserError: the topology is missing or unknown, the mesh does not fit it, the model's sizes are unknown, or libtpu
        is missing.
    """
    require(config, "model.checkpoint")
    if options.topology is None:
        raise UserError("--mode=plan needs --topology, the chips to plan for; type for example --topology=v5e:8x8")
    topology = topologies.parse(options.topology)
    mesh_shape(topology.count, **config.mesh)  # raises errors before jax starts anything
    jax.config.update("jax_platforms", "cpu")  # the planned chips need no local accelerator
    if options.largest_batch:
        plan_batch.check(topology)
    lines, abstract = plan(config, topology)
    print(table(lines, topology))
    print("\n".join(remarks(config, lines, abstract, topology)))
    if options.largest_batch:
        for field in plan_batch.FIELDS:
            print(
                plan_batch.largest(config, topology, field, lines, lambda *given: plan(given[0], topology, given[1])[0])
            )
    return int(any(line.fits(topology.chip) is False for line in lines))


def plan(
    config: ConfigDict, topology: topologies.Topology, part: str | None = None
) -> tuple[list[PlanLine], AbstractRun]:  # fmt: skip
    """Returns the phases of a run of `config` on `topology`, compiled if a compiler is available.

    Args:
      config: config of the run.
      topology: the chips.
      part: "sweep" or "training", for only the phases of one of them.

    Raises:
      UserError: see `run`.
    """
    devices = topology.devices()
    if devices is None:
        mesh: Any = abstract_mesh(mesh_shape(topology.count, **config.mesh))
    else:
        mesh = make_mesh(**config.mesh, devices=devices)
    abstract = AbstractRun(config, mesh)
    check_heads(mesh.shape["tensor"], abstract.vlm.config)
    judges = sum(size or 0 for size in scorer_bytes(config, mesh).values())
    phases = {None: abstract.phases, "sweep": abstract.sweep_phases, "training": abstract.training_phases}[part]
    programs: dict[str, Any] = {}
    lines = []
    for phase in phases(lambda phase: programs.get(phase.name)):
        program, refused = None, ""
        if devices is not None:
            print(f"icet-jax: compiling {phase.name} for {topology.name}", file=sys.stderr)
            program, refused = _compile(phase, room(topology.chip, phase, judges))
            programs[phase.name] = program
        lines.append(_line(abstract, phase, judges, program, refused))
    return lines, abstract


def room(chip: topologies.Chip, phase: PlannedPhase, judges: int) -> int | None:
    """Returns the bytes of a chip that a phase's program may use; None if that is unknown.

    Without this limit the compiler uses all of a chip if that is faster, for weights gathered ahead of time, because it
    does not know of weights and training state on the chip that do not belong to the program.
    """
    return None if chip.memory is None else max(int(chip.memory) - judges - bytes_per_device(phase.beside), 0)


def _compile(phase: PlannedPhase, room: int | None = None) -> tuple[Any, str]:
    """Returns the program, limited to `room` bytes, or the compiler's reason why no chip can hold it."""
    options = {} if room is None else {"xla_tpu_max_hbm_size_mib": max(room >> 20, 1)}
    try:
        return phase.lower().compile(compiler_options=options), ""
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        match = re.search(r"(\S*)\) exceeds available HBM", str(error))
        return None, f"the compiler needs {match[1].lstrip('(')}iB for it" if match else str(error).splitlines()[0]


def _line(abstract: AbstractRun, phase: PlannedPhase, judges: int, program: Any, refused: str) -> PlanLine:
    cache, temporaries, moved = bytes_per_device(phase.cache), None, None
    if program is not None:
        memory = program.memory_analysis()
        results = memory.output_size_in_bytes - memory.alias_size_in_bytes
        allocated = memory.temp_size_in_bytes + memory.generated_code_size_in_bytes + max(results, 0)
        cache_in_program = 0 if phase.held else min(cache, allocated)
        cache = cache if phase.held else cache_in_program
        temporaries = allocated - cache_in_program
        moved = _moved(program)
    return PlanLine(
        phase=phase.name,
        weights=bytes_per_device(abstract.vlm.params),
        trained=bytes_per_device(abstract.state),
        judges=judges,
        inputs=bytes_per_device(phase.inputs),
        cache=cache,
        temporaries=temporaries,
        work=work(abstract, phase.name),
        moved=moved,
        refused=refused,
    )


def _moved(program: Any) -> int | None:
    """Returns the bytes that a chip exchanges with others, or None if the program's text does not show them."""
    try:
        return moved_bytes(program.as_text())
    except jax.errors.JaxRuntimeError:  # some libtpu write what jaxlib's older XLA cannot read
        return None


_HEAD = (
    "phase", "weights", "trained", "judges", "inputs", "cache", "temporaries", "GiB/chip", "fits", "Tflop/chip",
    "moved GiB", "seconds", "bound by",
)  # fmt: skip


def table(lines: list[PlanLine], topology: topologies.Topology) -> str:
    """Returns the plan as text: memory per chip in GiB, and the time of each phase at the peak."""
    chip = topology.chip
    rows: list[tuple[str, ...]] = [_HEAD]
    for line in lines:
        time = line.seconds(chip, topology.count)
        fits = line.fits(chip)
        sizes = (line.weights, line.trained, line.judges, line.inputs, line.cache, line.temporaries)
        least = ">" if line.temporaries is None else ""
        rows.append(
            (
                line.phase,
                *map(_gib, sizes),
                least + _gib(line.total),
                "?" if fits is None else "yes" if fits else "NO",
                f"{line.work.flops / topology.count / 1e12:.3g}",
                _gib(line.moved),
                "-" if time is None else f"{time[0]:.3g}",
                "-" if time is None else time[1],
            )
        )  # fmt: skip
    widths = [max(len(row[column]) for row in rows) for column in range(len(_HEAD))]
    return "\n".join(
        "  ".join(cell.ljust(width) if column in (0, 12) else cell.rjust(width)
                  for column, (cell, width) in enumerate(zip(row, widths, strict=True))).rstrip()
        for row in rows
    )  # fmt: skip


def _gib(size: int | None) -> str:
    return "-" if size is None else f"{size / _GIB:.2f}"


_LEAVES_ROOM = (
    "each program was compiled to leave room for what else lies on its chips; "
    "a run's compiler does so with LIBTPU_INIT_ARGS=--xla_tpu_max_hbm_size_mib=MIB"
)


def _judges(config: ConfigDict, mesh: Any) -> list[str]:
    """Returns which scorers are counted, and which are not."""
    sizes = scorer_bytes(config, mesh)
    counted = ", ".join(f"{name} {_gib(size)}" for name, size in sizes.items() if size is not None)
    unknown = ", ".join(name for name, size in sizes.items() if size is None)
    return [f"judges and reward model, GiB of weights per chip: {counted}"] * bool(counted) + [
        f"not counted, of unknown size: {unknown}"
    ] * bool(unknown)


def remarks(
    config: ConfigDict, lines: list[PlanLine], abstract: AbstractRun, topology: topologies.Topology
) -> list[str]:
    """Returns what the table is based on, what does not fit and how to fix it."""
    chip, mesh = topology.chip, dict(abstract.mesh.shape)
    sizes = ", ".join(f"{axis} {size}" for axis, size in mesh.items())
    sentences = ["", f"{config.model.checkpoint} on {topology.name}: {topology.count} chips ({sizes})"]
    if chip.memory is not None:
        sentences.append(f"a program may use {chip.memory / _GIB:.2f} GiB of each {chip.name}")
    if chip.flops is not None:
        sentences.append(f"peak: {chip.flops / 1e12:.0f} Tflop/s, {chip.bandwidth or 0:.3g} B/s memory, ")
        sentences[-1] += f"{chip.links or 0:.3g} B/s links; {chip.source}"
        iteration = [line.seconds(chip, topology.count) for line in lines if not line.phase.startswith("sweep")]
        least = math.fsum(time[0] for time in iteration if time is not None)
        sentences.append(f"one iteration at that peak: about {least:.3g} s, without reward model and host")
    if any(line.temporaries is None and not line.refused for line in lines):
        sentences.append("temporaries and what chips exchange are known only where a compiler is at hand: TPUs and cpu")
    if any(line.moved is None and line.temporaries is not None for line in lines):
        sentences.append(
            "moved '-': the program's text does not tell, or not the length of a loop that holds exchanges"
        )
    sentences += _judges(config, abstract.mesh)
    if any(line.temporaries is not None for line in lines) and chip.memory is not None:
        sentences.append(_LEAVES_ROOM)
    sentences += [f"{line.phase}: {line.refused}" for line in lines if line.refused]
    broken = [line.phase for line in lines if line.fits(chip) is False]
    fixed = lines[0].weights + lines[0].trained + lines[0].judges
    return sentences + plan_advice.fixes(config, abstract, broken, fixed, chip.memory)
