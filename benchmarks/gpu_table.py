"""Plans for one and eight H100 or H200, made without a GPU: tables of docs/scaling.md and docs/performance.md.

    python benchmarks/gpu_table.py                # from shapes: what is missing in docs/gpu_plans.json
    python benchmarks/gpu_table.py --compile --only "LLaVA-1.5-7B h200:1 LoRA"     # compiled, with the plan-gpu extra
    python benchmarks/gpu_table.py --render       # both pages from docs/gpu_plans.json

Every cell is a process of its own, written down when it is done. Compiling one takes minutes of one core. A compiled
cell is not made again from shapes.
"""

import argparse
import dataclasses
import json
from collections.abc import Iterator
from typing import Any

import plan_table
from pages import with_generated

from icet_jax.planning.kernels import REACHED_BANDWIDTH, REACHED_FLOPS

RESULTS, PERFORMANCE = plan_table.ROOT / "docs" / "gpu_plans.json", plan_table.ROOT / "docs" / "performance.md"
_GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Cell:
    """One line of the table of docs/scaling.md."""

    model: str
    topology: str
    training: str

    @property
    def key(self) -> str:
        """Its name in the results."""
        return f"{self.model} {self.topology} {self.training}"

    def fields(self) -> dict[str, int | str]:
        """What differs from the config. Full fine-tuning splits the weights over all GPUs, LoRA does not."""
        chips = int(self.topology.partition(":")[2])
        fsdp = 1 if self.training == "LoRA" else chips
        found: dict[str, int | str] = {"mesh.data": chips // fsdp, "mesh.fsdp": fsdp, "lppo.accumulation": 8}
        return found if self.training == "LoRA" else found | {"lora.rank": 0, "model.remat": "full"}


@dataclasses.dataclass(frozen=True)
class Decoding(Cell):
    """One line of the table of decoding steps: the sweep's program for some number of slots, always compiled."""

    slots: int = 1

    @property
    def key(self) -> str:
        """Its name in the results."""
        return f"{super().key}, {self.slots} slots"

    def fields(self) -> dict[str, int | str]:
        """What differs from the config."""
        return {"sweep.batch_size": self.slots}


def decodings() -> list[Decoding]:
    """The table of decoding steps."""
    return [Decoding("LLaVA-1.5-7B", "h200:1", "LoRA", slots) for slots in (1, 64)]


def cells() -> list[Cell]:
    """The table of docs/scaling.md."""
    models = plan_table.MODELS.items()
    return [Cell(name, gpus, kind) for kind in ("LoRA", "full") for name, model in models for gpus in model.gpus]


def compute(cell: Cell, compiled: bool) -> dict[str, Any]:
    """A cell's plan."""
    import jax

    from icet_jax.commands import plan
    from icet_jax.parallel import gpu_targets
    from icet_jax.parallel import topology as topologies
    from icet_jax.runs.config_files import load

    jax.config.update("jax_platforms", "cpu")
    if not compiled:
        gpu_targets.PACKAGES = ("from.shapes",)  # no such package, so that the plan takes the compiler as missing
    elif not gpu_targets.installed():
        raise SystemExit("--compile needs the extra: pip install -e '.[plan-gpu]'")
    fields = cell.fields()
    path = plan_table.ROOT / "configs" / plan_table.MODELS[cell.model].config
    config = load(str(path), [(name, str(fields[name])) for name in fields])
    topology = topologies.parse(cell.topology)
    chip = topology.chip
    if isinstance(cell, Decoding):
        return decoding(config, topology) | {"fields": fields, "jax": jax.__version__}
    lines, abstract = plan.plan(config, topology)
    return {
        "prompt_flops": prompt_flops(abstract) / topology.count,
        "fields": fields,
        "rows": config.data.batch_size,
        "sweep_rows": config.sweep.batch_size,
        "jax": jax.__version__,
        "room": chip.memory,
        "phases": [
            dataclasses.asdict(line)
            | {"total": line.total, "fits": line.fits(chip), "bounds": line.bounds(chip, topology.count)}
            for line in lines
        ],
    }


def decoding(config: Any, topology: Any) -> dict[str, Any]:
    """What one call of the sweep's decoding program holds."""
    from icet_jax.commands import plan
    from icet_jax.generation.engine import STEPS
    from icet_jax.parallel.mesh import make_mesh
    from icet_jax.planning.ahead import AbstractRun
    from icet_jax.planning.kernels import GpuProgram
    from icet_jax.planning.work import phase_cost

    run = AbstractRun(config, make_mesh(**config.mesh, devices=topology.devices()))
    (phase,) = (phase for phase in run.sweep_phases(lambda phase: None) if phase.name == "sweep: decode")
    program = phase.lower().compile()
    work, cache = phase_cost(run, phase.name), plan.bytes_per_device(phase.cache)
    return {
        "steps": STEPS,
        "program": dataclasses.asdict(GpuProgram(program.as_text()).cost(topology.chip)),
        "temporaries": program.memory_analysis().temp_size_in_bytes,
        "cache": cache,
        "memory": work.steps * (work.read + cache) / topology.chip.bandwidth,
    }


def prompt_flops(run: Any) -> int:
    """What a rollout computes before its first token; `run` is an `AbstractRun`."""
    length, new_tokens = run.config.data.max_prompt_tokens, run.settings.sampling.max_new_tokens
    per_row = run.model.operations(length, length + new_tokens, 1)
    prompts = run.config.data.batch_size // run.group_size
    return prompts * (per_row.encode + per_row.visual + per_row.prefill)


def fill(only: str, compiled: bool) -> None:
    """Makes what is missing, one process each."""
    for cell in _missing(only, compiled):
        print(cell.key, flush=True)
        found = plan_table.computed([__file__, "--cell", cell.key, *["--compile"] * compiled])
        if found is not None:
            plan_table.write(RESULTS, json.dumps(read() | {cell.key: found}, indent=1, sort_keys=True) + "\n")
    render()


def _missing(only: str, compiled: bool) -> Iterator[Cell]:
    for cell in [*cells(), *decodings()] if compiled else cells():
        known = read().get(cell.key)
        done = known is not None and known["fields"] == cell.fields() and not (compiled and not is_compiled(known))
        if only in cell.key and not done:
            yield cell


def is_compiled(found: dict[str, Any]) -> bool:
    """Whether a result is of compiled programs."""
    return all(line["temporaries"] is not None for line in found.get("phases", ()))


def read() -> dict[str, Any]:
    """The results so far."""
    return plan_table.read(RESULTS)


def render() -> None:
    """Writes both pages."""
    for page, part in ((plan_table.PAGE, scaling(read())), (PERFORMANCE, performance(read()))):
        marks = plan_table.GPUS_BEGIN, plan_table.GPUS_END
        plan_table.write(page, with_generated(page.read_text(encoding="utf-8"), *marks, part))


_SCALING = ("model", "GPUs", "training", "data x fsdp", "weights", "trained", "judges", "inputs + cache",
            "temporaries", "GiB of", "fits")  # fmt: skip


def scaling(results: dict[str, Any]) -> str:
    """The table of docs/scaling.md."""
    rows = [_scaling_row(cell, results[cell.key]) for cell in cells() if cell.key in results]
    return plan_table.table(_SCALING, rows)


def _scaling_row(cell: Cell, found: dict[str, Any]) -> tuple[str, ...]:
    worst = max(found["phases"], key=lambda line: line["total"])
    known = is_compiled(found)
    broken = [line["phase"] for line in found["phases"] if line["fits"] is False]
    named = "every phase" if len(broken) == len(found["phases"]) > 1 else ", ".join(broken)
    fits = f"no: {named}" if broken else f"{'yes' if known else 'unknown'} ({worst['phase']})"
    sizes = (worst["weights"], worst["trained"], worst["judges"], worst["inputs"] + worst["cache"])
    fields = found["fields"]
    return (
        cell.model, cell.topology, cell.training, f"{fields['mesh.data']} x {fields['mesh.fsdp']}",
        *(f"{size / _GIB:.1f}" for size in sizes),
        f"{worst['temporaries'] / _GIB:.1f}" if worst["temporaries"] is not None else "-",
        f"{'' if known else '>'}{worst['total'] / _GIB:.1f} of {found['room'] / _GIB:.1f}", fits,
    )  # fmt: skip


_PERFORMANCE = ("program", "GiB", "of it temporaries", "kernels", "a step", "modelled s", "bound s", "ratio")


def performance(results: dict[str, Any]) -> str:
    """The table of docs/performance.md: every program that was compiled."""
    parts = []
    for cell in cells():
        found = results.get(cell.key)
        if found is not None and is_compiled(found):
            rows = [_performance_row(line, bound(found, line)) for line in found["phases"]]
            title = f"{cell.model} on {cell.topology}, {cell.training}, {found['rows']} rows a batch, "
            title += f"{found['sweep_rows']} slots in a sweep (jax {found['jax']}):"
            parts.append(f"{title}\n\n{plan_table.table(_PERFORMANCE, rows)}")
    steps = [_decoding_row(cell, results[cell.key]) for cell in decodings() if cell.key in results]
    if steps:
        parts.append(f"One step of a sweep's decoding, with LoRA:\n\n{plan_table.table(_DECODING, steps)}")
    return "\n\n".join(parts) or "Nothing has been compiled yet."


_DECODING = ("model", "GPU", "slots", "cache, GiB", "kernels", "modelled ms", "bound ms", "ratio")


def _decoding_row(cell: Decoding, found: dict[str, Any]) -> tuple[str, ...]:
    program, least = found["program"], found["memory"] / REACHED_BANDWIDTH
    milliseconds = (1e3 * seconds / found["steps"] for seconds in (program["seconds"], least))
    return (
        cell.model, cell.topology, str(cell.slots), f"{found['cache'] / _GIB:.1f}", f"{program['step_kernels']:,}",
        *(f"{value:.3g}" for value in milliseconds), f"{program['seconds'] / least:.2f}",
    )  # fmt: skip


def bound(found: dict[str, Any], line: dict[str, Any]) -> float:
    """The seconds of a phase if it did its products, or read weights and cache, at the speeds of the model.

    A rollout first does the products of the prompts, then reads weights and cache in every step.
    """
    products, memory = line["bounds"]["products"] / REACHED_FLOPS, line["bounds"]["memory"] / REACHED_BANDWIDTH
    if line["phase"] != "rollout":
        return max(products, memory)
    chips = found["fields"]["mesh.data"] * found["fields"]["mesh.fsdp"]
    return products * found["prompt_flops"] * chips / line["work"]["flops"] + memory


def _performance_row(line: dict[str, Any], least: float) -> tuple[str, ...]:
    program = line["program"]
    return (
        line["phase"], f"{line['total'] / _GIB:.1f}", f"{line['temporaries'] / _GIB:.1f}", f"{program['kernels']:,}",
        f"{program['step_kernels']:,}", f"{program['seconds']:.3g}", f"{least:.3g}",
        f"{program['seconds'] / least:.2f}",
    )  # fmt: skip


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--render", action="store_true", help="write both pages alone")
    parser.add_argument("--only", default="", help="cells whose name contains this, such as 'LLaVA-1.5-7B h200:1'")
    parser.add_argument("--compile", action="store_true", help="compile the programs")
    parser.add_argument("--cell", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.render:
        render()
    elif options.cell:
        (cell,) = (cell for cell in [*cells(), *decodings()] if cell.key == options.cell)
        print(json.dumps(compute(cell, options.compile)))
    else:
        fill(options.only, options.compile)


if __name__ == "__main__":
    main()
