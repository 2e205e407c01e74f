"""`--mode=plan` says whether a run will fit on chips that need not be present, and what will limit its speed.

Every phase of a training iteration and of a sweep is compiled ahead of time for the topology, from shapes alone. The
compiler reports how much memory the phase takes on each chip. The compiler for GPUs comes with the extra `plan-gpu`;
without it the plan for GPUs is a lower bound from shapes. Times are estimates at the chip's published peak, which no
run reaches. For GPUs there is also a modelled time of each compiled program (`icet_jax.planning.kernels`).
"""

import argparse
import dataclasses
import math
import re
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import jax
from jax.sharding import AbstractMesh, Mesh
from jax.stages import Compiled
from ml_collections import ConfigDict

from icet_jax.algorithms.base import PlannedPhase
from icet_jax.config import require, warm_start_config
from icet_jax.errors import UserError
from icet_jax.parallel import topology as topologies
from icet_jax.parallel.collectives import moved_bytes
from icet_jax.parallel.mesh import abstract_mesh, make_mesh, mesh_shape
from icet_jax.parallel.mesh_fit import check_heads
from icet_jax.planning import advice as plan_advice
from icet_jax.planning import batch as plan_batch
from icet_jax.planning.ahead import AbstractRun, bytes_per_device
from icet_jax.planning.kernels import REACHED_BANDWIDTH, REACHED_FLOPS, GpuProgram, ProgramCost
from icet_jax.planning.scorers import scorer_bytes
from icet_jax.planning.work import PhaseCost, phase_cost

_GIB = 2**30
_FIRST = "warm start: "  # begins the names of the phases of the algorithm that a run trains first


@dataclasses.dataclass(frozen=True)
class PlanLine:
    """Holds the memory and the cost of one phase; bytes are per chip, None means unknown.

    Attributes:
      phase: name of the phase.
      weights: bytes of the frozen model.
      trained: bytes of adapters (or of the float32 copies of all trained weights), value head and optimizer state,
        which stay on the chips in every phase.
      judges: bytes of the weights of judges and reward model, which also stay on the chips in every phase; models of
        unknown size are not counted.
      inputs: bytes of batch and image features.
      cache: bytes of the KV cache, as the sharding rules place it.
      temporaries: all other bytes that the compiled program allocates, results included.
      work: operations, and bytes of weights read.
      moved: bytes that a chip exchanges with others.
      refused: message of the compiler if the program does not fit, else "".
      program: kernels and modelled time of the compiled program; None if it was not compiled for a GPU.
    """

    phase: str
    weights: int
    trained: int
    judges: int
    inputs: int
    cache: int
    temporaries: int | None
    work: PhaseCost
    moved: int | None
    refused: str = ""
    program: ProgramCost | None = None

    @property
    def total(self) -> int:
        """The known bytes per chip: all bytes, or all except the temporaries if these are unknown."""
        return self.weights + self.trained + self.judges + self.inputs + self.cache + (self.temporaries or 0)

    def fits(self, chip: topologies.Chip) -> bool | None:
        """Returns whether the phase fits into the memory of each chip; None if that is unknown."""
        if self.refused or (chip.memory is not None and self.total > chip.memory):
            return False
        return None if chip.memory is None or self.temporaries is None else True

    def seconds(self, chip: topologies.Chip, count: int) -> tuple[float, str] | None:
        """Returns (seconds of the phase at the peak speed of `count` chips, name of the bound that determines them).

        Returns None for a chip without a published peak. For the bounds see `bounds`.
        """
        bounds = self.bounds(chip, count)
        return None if bounds is None else max((time, name) for name, time in bounds.items())

    def bounds(self, chip: topologies.Chip, count: int) -> dict[str, float] | None:
        """Returns the seconds that three kinds of work each take at the peak speed of `count` chips.

        They are matrix products ("products"), memory reads ("memory") and exchanges between chips ("links"). Returns
        None for a chip without a published peak.
        """
        if chip.flops is None or chip.bandwidth is None or chip.links is None:
            return None
        return {
            "products": self.work.flops / (count * chip.flops),
            "memory": self.work.steps * (self.work.read + self.cache) / chip.bandwidth,
            "links": (self.moved or 0) / chip.links,
        }


def run(config: ConfigDict, workdir: Path | None, options: argparse.Namespace) -> int:
    """Prints the plan; returns 1 if some phase does not fit, else 0.

    Args:
      config: config of the run.
      workdir: unused, because a plan writes nothing.
      options: `topology`, the chips, such as "v5e:8x8"; `largest_batch`, whether to search for the largest batches too.

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
    print("\n".join(_wrapped(line) for line in remarks(config, lines, abstract, topology)))
    if options.largest_batch:
        for field in plan_batch.FIELDS:
            print(plan_batch.largest(config, topology, field, lines, lambda cfg, part: plan(cfg, topology, part)[0]))
    return int(any(line.fits(topology.chip) is False for line in lines))


def plan(
    config: ConfigDict, topology: topologies.Topology, part: str | None = None
) -> tuple[list[PlanLine], AbstractRun]:  # fmt: skip
    """Plans a run of `config` on `topology`, with compiled programs if there is a compiler for these chips.

    Args:
      config: config of the run.
      topology: the chips.
      part: "sweep" or "training" to plan the phases of one of them; None for all.

    Returns:
      One line per phase, and the run as shapes.

    Raises:
      UserError: see `run`.
    """
    devices = topology.devices()
    mesh: Mesh | AbstractMesh
    if devices is None:
        mesh = abstract_mesh(mesh_shape(topology.count, **config.mesh))
    else:
        mesh = make_mesh(**config.mesh, devices=devices)
    abstract = AbstractRun(config, mesh)
    check_heads(mesh.shape["tensor"], abstract.vlm.config)
    judges = sum(size or 0 for size in scorer_bytes(config, mesh).values())
    lines = _plan_phases(abstract, topology, part, judges)
    first = warm_start_config(config)
    if first is not None and part != "sweep":
        first_lines = _plan_phases(AbstractRun(first, mesh), topology, "training", judges)
        lines += [dataclasses.replace(line, phase=_FIRST + line.phase) for line in first_lines]
    return lines, abstract


def _plan_phases(
    abstract: AbstractRun, topology: topologies.Topology, part: str | None, judges: int
) -> list[PlanLine]:  # fmt: skip
    """Returns the lines of one part of a run, see `plan`; `judges` are the bytes of the judges' weights on a chip."""
    phases = {None: abstract.phases, "sweep": abstract.sweep_phases, "training": abstract.training_phases}[part]
    programs: dict[str, Compiled | None] = {}
    lines = []
    for phase in phases(lambda phase: programs.get(phase.name)):
        program, refused = None, ""
        if abstract.devices is not None:
            print(f"icet-jax: compiling {phase.name} for {topology.name}", file=sys.stderr)
            limit = None if topology.chip.options is None else memory_limit(topology.chip, phase, judges)
            program, refused = _compile(phase, limit)
            programs[phase.name] = program
        lines.append(_line(abstract, phase, judges, program, refused, topology.chip))
    return lines


def memory_limit(chip: topologies.Chip, phase: PlannedPhase, judges: int) -> int | None:
    """Returns the bytes of a chip that the program of a phase may use; None if the chip's memory is unknown.

    The compiler does not know of other data on the chip: weights and train state that the program does not use, and the
    judges (`judges` bytes). Without this limit the compiler would assume that their memory is free.
    """
    return None if chip.memory is None else max(int(chip.memory) - judges - bytes_per_device(phase.beside), 0)


# Without a GPU on which to try several kernels, XLA takes Triton's for each matrix product. It has none for some small
# ones, and then ends with this message.
_NO_TILES, _WITHOUT_TRITON = "Couldn't find output tile sizes", {"xla_gpu_enable_triton_gemm": False}


def _compile(phase: PlannedPhase, limit: int | None = None) -> tuple[Compiled | None, str]:
    """Compiles a phase for at most `limit` bytes per chip.

    Returns (program, ""), or (None, message of the compiler) if the phase does not fit.
    """
    options: dict[str, int | bool] = {} if limit is None else {"xla_tpu_max_hbm_size_mib": max(limit >> 20, 1)}
    try:
        return phase.lower().compile(compiler_options=options), ""
    except jax.errors.JaxRuntimeError as error:
        if _NO_TILES in str(error):
            return phase.lower().compile(compiler_options=_WITHOUT_TRITON), ""
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        match = re.search(r"(\S*)\) exceeds available HBM", str(error))
        return None, f"the compiler needs {match[1].lstrip('(')}iB for it" if match else str(error).splitlines()[0]


def _line(
    abstract: AbstractRun, phase: PlannedPhase, judges: int, program: Compiled | None, refused: str,
    chip: topologies.Chip,
) -> PlanLine:  # fmt: skip
    """Returns the line of one phase: sizes from shapes and, if there is a `program`, from the compiler's report."""
    cache, temporaries, moved, cost = bytes_per_device(phase.cache), None, None, None
    memory = None if program is None else program.memory_analysis()
    if program is not None and memory is not None:
        results = memory.output_size_in_bytes - memory.alias_size_in_bytes
        allocated = memory.temp_size_in_bytes + memory.generated_code_size_in_bytes + max(results, 0)
        cache_in_program = 0 if phase.held else min(cache, allocated)
        cache = cache if phase.held else cache_in_program
        temporaries = allocated - cache_in_program
        text = _text(program)
        moved = None if text is None else moved_bytes(text)
        if chip.target is not None and text is not None:
            cost = GpuProgram(text).cost(chip)
    return PlanLine(
        phase=phase.name,
        weights=bytes_per_device(abstract.vlm.params),
        trained=bytes_per_device(abstract.state),
        judges=judges,
        inputs=bytes_per_device(phase.inputs),
        cache=cache,
        temporaries=temporaries,
        work=phase_cost(abstract, phase.name),
        moved=moved,
        refused=refused,
        program=cost,
    )


def _text(program: Compiled) -> str | None:
    """Returns the text of a compiled program; None if it cannot be had."""
    try:
        return program.as_text()
    except jax.errors.JaxRuntimeError:  # some versions of libtpu write programs that jaxlib's older XLA cannot read
        return None


_PER_BLOCK = 6  # phases beside each other
_WIDTH = 100  # columns of the printed plan


def table(lines: list[PlanLine], topology: topologies.Topology) -> str:
    """Returns the plan as a text table with a column per phase: memory of each chip, and seconds at the chips' peak."""
    blocks = [lines[start : start + _PER_BLOCK] for start in range(0, len(lines), _PER_BLOCK)]
    return "\n\n".join(_block(block, topology) for block in blocks)


def _block(lines: list[PlanLine], topology: topologies.Topology) -> str:
    """Returns the columns of some phases; their names stand above them in two lines."""
    groups, names = zip(*(line.phase.rpartition(": ")[::2] for line in lines), strict=True)
    times = [line.seconds(topology.chip, topology.count) for line in lines]
    fits = {None: "unknown", True: "yes", False: "NO"}
    rows: list[tuple[str, ...]] = [
        ("", *groups),
        ("per chip", *names),
        *((f"{name}, GiB", *(_gib(getattr(line, name)) for line in lines)) for name in _MEMORY),
        ("together, GiB", *((">" if line.temporaries is None else "") + _gib(line.total) for line in lines)),
        ("fits", *(fits[line.fits(topology.chip)] for line in lines)),
        ("work, Tflop", *(f"{line.work.flops / topology.count / 1e12:.3g}" for line in lines)),
        ("exchanged, GiB", *(_gib(line.moved) for line in lines)),
        ("seconds", *("-" if time is None else f"{time[0]:.3g}" for time in times)),
        ("bound by", *("-" if time is None else time[1] for time in times)),
    ]
    costs = [line.program for line in lines]
    if any(cost is not None for cost in costs):
        rows += [
            (name, *("-" if cost is None else _PROGRAM[name](cost) for cost in costs)) for name in _PROGRAM
        ]  # fmt: skip
    rows = rows[not any(groups) :]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join(
        "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]).rstrip() for row in rows
    )


_MEMORY = ("weights", "trained", "judges", "inputs", "cache", "temporaries")
"""What takes memory of each chip: attributes of `PlanLine`."""

_PROGRAM: dict[str, Callable[[ProgramCost], str]] = {
    "kernels": lambda cost: str(cost.kernels),
    "kernels / step": lambda cost: str(cost.step_kernels),
    "traffic, GiB": lambda cost: f"{cost.bytes / _GIB:.4g}",
    "modelled s": lambda cost: f"{cost.seconds:.3g}",
}
"""{what is said of a program that was compiled for GPUs: its text}."""


def _wrapped(text: str) -> str:
    """Returns a line broken at `_WIDTH` columns; the lines after the first are indented."""
    return textwrap.fill(text, _WIDTH, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False)


def _gib(size: int | None) -> str:
    """Returns bytes as GiB with two decimals, "-" for None."""
    return "-" if size is None else f"{size / _GIB:.2f}"


_MEMORY_LIMIT_REMARK = (
    "each program was compiled to leave free what weights and train state outside of it take on its chips; "
    "a run's compiler does so with LIBTPU_INIT_ARGS=--xla_tpu_max_hbm_size_mib=MIB"
)


def _modelled_remark(chip: topologies.Chip) -> str:
    """Returns the sentence about the rows of programs that were compiled for GPUs of this kind."""
    flops, bandwidth = REACHED_FLOPS * (chip.flops or 0), REACHED_BANDWIDTH * (chip.bandwidth or 0)
    return (
        "kernels, traffic (what they read and write) and modelled s are of the compiled program; kernels / step are "
        "those of one iteration of its longest loop; modelled, not measured: every kernel at "
        f"{flops / 1e12:.0f} Tflop/s or {bandwidth / 1e12:.1f} TB/s, one after another, without exchanges; "
        f"jax {jax.__version__}"
    )


def _scorer_remarks(config: ConfigDict, mesh: Mesh | AbstractMesh) -> list[str]:
    """Returns at most two lines: scorers whose weights the plan counts, and those whose size is unknown."""
    sizes = scorer_bytes(config, mesh)
    counted = ", ".join(f"{name} {_gib(size)}" for name, size in sizes.items() if size is not None)
    unknown = ", ".join(name for name, size in sizes.items() if size is None)
    return [f"judges and reward model, GiB of weights per chip: {counted}"] * bool(counted) + [
        f"not counted, of unknown size: {unknown}"
    ] * bool(unknown)


def remarks(
    config: ConfigDict, lines: list[PlanLine], abstract: AbstractRun, topology: topologies.Topology
) -> list[str]:
    """Returns the lines below the table: what it is based on, which phases do not fit, and how to fix that."""
    chip, mesh = topology.chip, dict(abstract.mesh.shape)
    sizes = ", ".join(f"{axis} {size}" for axis, size in mesh.items())
    sentences = ["", f"{config.model.checkpoint} on {topology.name}: {topology.count} chips ({sizes})"]
    if chip.memory is not None:
        sentences.append(f"a program may use {chip.memory / _GIB:.2f} GiB of each {chip.name}")
    if chip.flops is not None:
        sentences.append(f"peak: {chip.flops / 1e12:.0f} Tflop/s, {chip.bandwidth or 0:.3g} B/s memory, ")
        sentences[-1] += f"{chip.links or 0:.3g} B/s links; {chip.source}"
        training = [line for line in lines if not line.phase.startswith(("sweep", _FIRST))]
        iteration = [line.seconds(chip, topology.count) for line in training]
        total = math.fsum(time[0] for time in iteration if time is not None)
        sentences.append(f"one iteration at that peak: about {total:.3g} s, without reward model and host")
    if any(line.temporaries is None and not line.refused for line in lines):
        sentences.append("temporaries and what chips exchange are known only where a compiler is at hand: TPUs, cpu, ")
        sentences[-1] += "and GPUs with the extra plan-gpu (pip install 'icet-jax[plan-gpu]'; Linux, 3 GB, no GPU); "
        sentences[-1] += "without them the memory is a lower bound, and whether a phase fits is unknown"
    if any(line.program is not None for line in lines):
        sentences.append(_modelled_remark(chip))
    if any(line.moved is None and line.temporaries is not None for line in lines):
        sentences.append(
            "exchanged '-': the text of the program does not show it, or a loop that exchanges data has unknown length"
        )
    sentences += _scorer_remarks(config, abstract.mesh)
    if any(line.temporaries is not None for line in lines) and chip.options is not None:
        sentences.append(_MEMORY_LIMIT_REMARK)
    sentences += [f"{line.phase}: {line.refused}" for line in lines if line.refused]
    broken = list(dict.fromkeys(line.phase.removeprefix(_FIRST) for line in lines if line.fits(chip) is False))
    fixed = lines[0].weights + lines[0].trained + lines[0].judges
    return sentences + plan_advice.fixes(config, abstract, broken, fixed, chip.memory)
