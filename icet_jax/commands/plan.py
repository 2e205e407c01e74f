"""`--mode=plan`: will a run fit, and what will bound it? Compiled for chips that need not be here.

Every phase of a training run, whatever its algorithm, and a sweep's answers are compiled ahead of time for the
topology, from shapes alone: what each chip holds is what that compiler says. For GPUs there is no compiler without the
hardware; of them only what follows from shapes is told, as a lower bound. Times are estimates at the chip's published
peak, which no run reaches.
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
class Line:
    """One phase of the plan. Bytes are per chip; None is not known.

    Attributes:
      phase: its name.
      weights: the frozen model.
      trained: adapters (or float32 masters), value head and optimizer, which stay on the chips in every phase.
      judges: weights of judges and reward model, which do as well; without those whose sizes are not known.
      inputs: batch and features.
      cache: of keys and values, as the sharding rules place it.
      temporaries: all else that the compiled program allocates, results included.
      work: what it computes and reads.
      moved: that a chip exchanges with others.
      refused: what the compiler said where the program does not fit, else "".
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
        """What is known of the memory."""
        return self.weights + self.trained + self.judges + self.inputs + self.cache + (self.temporaries or 0)

    def fits(self, chip: topologies.Chip) -> bool | None:
        """Whether it does; None where that is not known."""
        if self.refused or (chip.memory is not None and self.total > chip.memory):
            return False
        return None if chip.memory is None or self.temporaries is None else True

    def seconds(self, chip: topologies.Chip, count: int) -> tuple[float, str] | None:
        """The time of a phase at the chip's peak, and what bounds it; None for a chip without a published peak."""
        bounds = self.bounds(chip, count)
        return None if bounds is None else max((time, name) for name, time in bounds.items())

    def bounds(self, chip: topologies.Chip, count: int) -> dict[str, float] | None:
        """Seconds for matrix products, for reading memory and for what chips exchange, each at `count` chips' peak."""
        if chip.flops is None or chip.bandwidth is None or chip.links is None:
            return None
        return {
            "products": self.work.flops / (count * chip.flops),
            "memory": self.work.steps * (self.work.read + self.cache) / chip.bandwidth,
            "links": (self.moved or 0) / chip.links,
        }


def run(config: ConfigDict, workdir: Path | None, options: argparse.Namespace) -> int:
    """Prints the plan; 0 if nothing in it says that the run does not fit, else 1.

    Args:
      config: of the run.
      workdir: unused; a plan writes nothing.
      options: `topology`.

    Raises:
      UserError: no or an unknown topology, a mesh that does not fit it, a model whose sizes are not known, or no
        libtpu.
    """
    require(config, "model.checkpoint")
    if options.topology is None:
        raise UserError("--mode=plan needs --topology, the chips to plan for; type for example --topology=v5e:8x8")
    topology = topologies.parse(options.topology)
    mesh_shape(topology.count, **config.mesh)  # its errors come before jax starts anything
    jax.config.update("jax_platforms", "cpu")  # the chips planned for need no others
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
) -> tuple[list[Line], AbstractRun]:  # fmt: skip
    """The phases of a run of `config` on `topology`, compiled where a compiler is at hand.

    Args:
      config: of the run.
      topology: the chips.
      part: "sweep" or "training", for the phases of one of them.

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
    """Bytes of a chip that a phase's program may take; None where that is not known.

    Left to itself the compiler takes all of a chip where that is faster, for weights gathered ahead of time: it does
    not know of the weights and the train state that lie there without being the program's own.
    """
    return None if chip.memory is None else max(int(chip.memory) - judges - bytes_per_device(phase.beside), 0)


def _compile(phase: PlannedPhase, room: int | None = None) -> tuple[Any, str]:
    """The program, in `room` bytes, or the compiler's reason why no chip can hold it."""
    options = {} if room is None else {"xla_tpu_max_hbm_size_mib": max(room >> 20, 1)}
    try:
        return phase.lower().compile(compiler_options=options), ""
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        found = re.search(r"(\S*)\) exceeds available HBM", str(error))
        return None, f"the compiler needs {found[1].lstrip('(')}iB for it" if found else str(error).splitlines()[0]


def _line(abstract: AbstractRun, phase: PlannedPhase, judges: int, program: Any, refused: str) -> Line:
    cache, temporaries, moved = bytes_per_device(phase.cache), None, None
    if program is not None:
        memory = program.memory_analysis()
        results = memory.output_size_in_bytes - memory.alias_size_in_bytes
        taken = memory.temp_size_in_bytes + memory.generated_code_size_in_bytes + max(results, 0)
        made = 0 if phase.held else min(cache, taken)
        cache = cache if phase.held else made
        temporaries = taken - made
        moved = _moved(program)
    return Line(
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
    """What a chip exchanges with others, or None where the program's text does not tell."""
    try:
        return moved_bytes(program.as_text())
    except jax.errors.JaxRuntimeError:  # some libtpu write what jaxlib's older XLA cannot read
        return None


_HEAD = (
    "phase", "weights", "trained", "judges", "inputs", "cache", "temporaries", "GiB/chip", "fits", "Tflop/chip",
    "moved GiB", "seconds", "bound by",
)  # fmt: skip


def table(lines: list[Line], topology: topologies.Topology) -> str:
    """The plan as text: memory per chip in GiB, and the time of each phase at peak."""
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
    """Which scorers are counted, and which are not."""
    found = scorer_bytes(config, mesh)
    counted = ", ".join(f"{name} {_gib(size)}" for name, size in found.items() if size is not None)
    unknown = ", ".join(name for name, size in found.items() if size is None)
    return [f"judges and reward model, GiB of weights per chip: {counted}"] * bool(counted) + [
        f"not counted, of unknown size: {unknown}"
    ] * bool(unknown)


def remarks(config: ConfigDict, lines: list[Line], abstract: AbstractRun, topology: topologies.Topology) -> list[str]:
    """What the table rests on, what does not fit and what would mend it."""
    chip, mesh = topology.chip, dict(abstract.mesh.shape)
    sizes = ", ".join(f"{axis} {size}" for axis, size in mesh.items())
    told = ["", f"{config.model.checkpoint} on {topology.name}: {topology.count} chips ({sizes})"]
    if chip.memory is not None:
        told.append(f"a program may use {chip.memory / _GIB:.2f} GiB of each {chip.name}")
    if chip.flops is not None:
        told.append(f"peak: {chip.flops / 1e12:.0f} Tflop/s, {chip.bandwidth or 0:.3g} B/s memory, ")
        told[-1] += f"{chip.links or 0:.3g} B/s links; {chip.source}"
        iteration = [line.seconds(chip, topology.count) for line in lines if not line.phase.startswith("sweep")]
        least = math.fsum(time[0] for time in iteration if time is not None)
        told.append(f"one iteration at that peak: about {least:.3g} s, without reward model and host")
    if any(line.temporaries is None and not line.refused for line in lines):
        told.append("temporaries and what chips exchange are known only where a compiler is at hand: TPUs and cpu")
    if any(line.moved is None and line.temporaries is not None for line in lines):
        told.append("moved '-': the program's text does not tell, or not the length of a loop that holds exchanges")
    told += _judges(config, abstract.mesh)
    if any(line.temporaries is not None for line in lines) and chip.memory is not None:
        told.append(_LEAVES_ROOM)
    told += [f"{line.phase}: {line.refused}" for line in lines if line.refused]
    broken = [line.phase for line in lines if line.fits(chip) is False]
    fixed = lines[0].weights + lines[0].trained + lines[0].judges
    return told + plan_advice.mends(config, abstract, broken, fixed, chip.memory)
