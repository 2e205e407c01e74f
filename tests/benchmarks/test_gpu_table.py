"""The tables of GPUs in docs/scaling.md and docs/performance.md: they are what docs/gpu_plans.json renders to."""

import importlib
from pathlib import Path

import pytest

from icet_jax.parallel import topology
from icet_jax.runs.config_files import load

ROOT = Path(__file__).parents[2]


@pytest.fixture
def gpu_table(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    return importlib.import_module("gpu_table")


def test_both_pages_are_what_the_results_render_to(gpu_table):
    results, pages = gpu_table.read(), (gpu_table.plan_table.PAGE, gpu_table.PERFORMANCE)
    assert results.keys() <= {cell.key for cell in [*gpu_table.cells(), *gpu_table.decodings()]}
    marks = gpu_table.plan_table.GPUS_BEGIN, gpu_table.plan_table.GPUS_END
    for page, part in zip(pages, (gpu_table.scaling(results), gpu_table.performance(results)), strict=True):
        assert gpu_table.plan_table.generated(page.read_text(), *marks) == part, (
            "run python benchmarks/gpu_table.py --render"
        )


def test_every_cell_is_a_config_whose_rows_spread(gpu_table):
    for cell in gpu_table.cells():
        fields = cell.fields()
        name = gpu_table.plan_table.MODELS[cell.model].config
        config = load(f"configs/{name}", [(field, str(value)) for field, value in fields.items()])
        count = topology.parse(cell.topology).count
        assert config.mesh.data * config.mesh.fsdp == count and (config.lora.rank == 0) == (cell.training == "full")
        assert config.data.batch_size % (config.lppo.accumulation * config.lppo.minibatches * count) == 0


def line(**changes):
    sizes = {"weights": 2**30, "trained": 0, "judges": 0, "inputs": 2**30, "cache": 0, "temporaries": None}
    known = {"phase": "update", "fits": None, "total": 2**31, "bounds": {"products": 0.78, "memory": 0.1, "links": 0.0}}
    return {**sizes, **known, **changes}


def result(cell, *phases):
    return {
        cell.key: {
            "fields": cell.fields(), "rows": 64, "sweep_rows": 8, "jax": "0", "room": 2**36, "prompt_flops": 10,
            "phases": list(phases),
        }
    }  # fmt: skip


def test_what_was_not_compiled_is_a_lower_bound_and_what_was_has_its_ratio(gpu_table):
    cell = gpu_table.cells()[0]
    guessed = result(cell, line())
    assert "| - | >2.0 of 64.0 | unknown (update) |" in gpu_table.scaling(guessed)
    assert gpu_table.performance(guessed) == "Nothing has been compiled yet."
    program = {"kernels": 4664, "step_kernels": 564, "flops": 1, "bytes": 1, "seconds": 1.5}
    compiled = result(cell, line(temporaries=2**30, total=3 * 2**30, fits=True, program=program))
    assert "| 1.0 | 3.0 of 64.0 | yes (update) |" in gpu_table.scaling(compiled)
    at_reached_speed = 0.78 * 989 / 780
    assert f"| 4,664 | 564 | 1.5 | {at_reached_speed:.3g} | {1.5 / at_reached_speed:.2f} |" in gpu_table.performance(
        compiled
    )
    bounds = {"products": 0.78, "memory": 0.86, "links": 0.0}
    rollout = line(phase="rollout", work={"flops": 40}, bounds=bounds, program=program, temporaries=0)
    found = result(cell, rollout)[cell.key]
    assert gpu_table.bound(found, rollout) == pytest.approx(at_reached_speed * 10 / 40 + 0.86 * 4.8 / 4.3)
