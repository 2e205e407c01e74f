"""Compiles a run's programs for an H200 that is not here, with two layers, and prints what is in them as JSON.

    python -m tests.planning.gpu_programs FOLDER [field=value ...]

It is a process of its own, because the tests' own process computes in float32 and lets XLA optimise nothing. FOLDER
gets the config.json of LLaVA-1.5-7B with two layers in the image encoder and in the decoder.
"""

import json
import os
import sys
from pathlib import Path

from icet_jax.checkpoints.published import PUBLISHED
from icet_jax.commands import plan
from icet_jax.parallel import topology as topologies
from icet_jax.parallel.mesh import make_mesh
from icet_jax.planning.ahead import AbstractRun
from icet_jax.planning.kernels import GpuProgram
from icet_jax.planning.work import phase_cost
from icet_jax.runs.config_files import load

MODEL = "llava-hf/llava-1.5-7b-hf"
LIMIT = 20 * 2**20  # bytes that a loop may copy, convert or join at a time
FIELDS = {
    "data.batch_size": 8, "data.max_prompt_tokens": 640, "lppo.max_new_tokens": 64, "lppo.epochs": 1,
    "lppo.accumulation": 2,
    "sweep.batch_size": 8, "sweep.max_new_tokens": 64,
}  # fmt: skip


def checkpoint(folder: Path) -> Path:
    values = json.loads(json.dumps(PUBLISHED[MODEL]))
    values["text_config"]["num_hidden_layers"] = values["vision_config"]["num_hidden_layers"] = 2
    (folder / "config.json").write_text(json.dumps(values))
    return folder


def measured(program: GpuProgram) -> dict[str, object]:
    chip = topologies.CHIPS["h200"]
    rearranged = [
        f"{kernel.instruction.name} {kernel.instruction.shape} {kernel.instruction.source}"
        for loop in program.loops()
        for kernel in program.loop_kernels(loop)
        if kernel.kind == "rearrangement" and kernel.written > LIMIT
    ]
    cost = program.cost(chip)
    return {
        "kernels": cost.kernels, "step_kernels": cost.step_kernels, "flops": cost.flops, "seconds": cost.seconds,
        "bytes": cost.bytes, "rearranged": rearranged,
        "attention": sum(kernel.kind == "attention" for kernel in program.kernels),
        "attention_flops": sum(kernel.runs * kernel.flops for kernel in program.kernels if kernel.kind == "attention"),
    }  # fmt: skip


def main(folder: str, *changes: str) -> None:
    fields = {"model.checkpoint": str(checkpoint(Path(folder))), **FIELDS}
    fields |= dict(change.split("=", 1) for change in changes)
    config = load("configs/llava15_lppo.py", [(name, str(value)) for name, value in fields.items()])
    mesh = make_mesh(**config.mesh, devices=topologies.parse("h200:1").devices())
    abstract, programs, results = AbstractRun(config, mesh), {}, {}
    for phase in abstract.phases(lambda phase: programs.get(phase.name)):
        programs[phase.name], _ = plan._compile(phase)
        text, memory = programs[phase.name].as_text(), programs[phase.name].memory_analysis()
        if "ICET_HLO" in os.environ:
            Path(os.environ["ICET_HLO"], phase.name.replace(": ", "-") + ".hlo").write_text(text)
        results[phase.name] = measured(GpuProgram(text)) | {
            "work": phase_cost(abstract, phase.name).flops,
            "temporaries": memory.temp_size_in_bytes,
            "aliased": memory.alias_size_in_bytes,
            "cache": plan.bytes_per_device(phase.cache),
        }
    print(json.dumps(results))


if __name__ == "__main__":
    main(*sys.argv[1:])
