"""The table of docs/scaling.md: it is what docs/scaling.json renders to, and its arithmetic."""

import importlib.util
import json
from pathlib import Path

import pytest

from icet_jax.parallel import topology
from icet_jax.runs.config_files import load

ROOT = Path(__file__).parents[2]
SPEC = importlib.util.spec_from_file_location("plan_table", ROOT / "benchmarks" / "plan_table.py")
plan_table = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(plan_table)


def test_the_page_is_what_the_results_render_to():
    page = plan_table.PAGE.read_text(encoding="utf-8")
    assert page == plan_table.render(plan_table.read()), "run python benchmarks/plan_table.py --render"
    assert page.count("\n") < 270 and "Not compiled yet" not in page


def test_every_cell_is_a_config_whose_rows_spread():
    cells = plan_table.cells()
    assert len(cells) == len({cell.key for cell in cells}) == 4 * 4 * 2 and cells[0].key == "LLaVA-1.5-7B v5e:4x4 LoRA"
    for cell in cells:
        fields = cell.fields()
        config = load(f"configs/{plan_table.MODELS[cell.model].config}", [(name, str(fields[name])) for name in fields])
        assert topology.parse(cell.topology).count == cell.chips == plan_table._chips(fields)
        assert config.data.batch_size == 4 * cell.chips and (config.lora.rank == 0) == (cell.training == "full")
        slices = config.lppo.accumulation * config.lppo.minibatches
        assert config.data.batch_size % (slices * config.mesh.data * config.mesh.fsdp) == 0


def cell(chips, rows, **bounds):
    """A result whose phases all take `bounds` seconds."""
    phases = [{"phase": name, "bounds": bounds} for name in ("sweep: fill", "rollout", "prepare", "update")]
    return {"fields": {"mesh.data": chips, "mesh.fsdp": 1, "mesh.tensor": 1, "data.batch_size": rows}, "phases": phases}


def test_weak_scaling_is_the_cost_of_a_row_on_few_chips_over_that_on_many():
    few, many = cell(16, 64, products=1.0, links=0.5), cell(64, 256, products=1.0, links=2.0)
    assert plan_table.seconds(few) == 3.0 and plan_table.seconds(few, overlapped=False) == 4.5
    assert plan_table.efficiency(few, many) == 0.5 and plan_table.efficiency(few, many, overlapped=False) == 0.5
    assert plan_table.efficiency(few, cell(64, 512, products=1.0, links=0.0)) == 2.0


@pytest.fixture
def table(tmp_path, monkeypatch):
    """The script with its own results and a first cell that takes no time."""
    monkeypatch.setattr(plan_table, "RESULTS", tmp_path / "scaling.json")
    monkeypatch.setattr(plan_table, "PAGE", tmp_path / "scaling.md")
    asked = []

    def run(command, **_):
        key, part = command[-3], command[-1]
        asked.append((key, part))
        if key.endswith("v5e:8x8 LoRA") and part == "plan":
            return type("Done", (), {"returncode": 1, "stdout": "", "stderr": "a crash"})
        found = {"rows": 64, "next": 96, "unit": 16} if part == "largest" else planned(key)
        return type("Done", (), {"returncode": 0, "stdout": f"noise\n{json.dumps(found)}\n", "stderr": ""})

    monkeypatch.setattr(plan_table.subprocess, "run", run)
    return asked


def planned(key):
    (cell,) = (cell for cell in plan_table.cells() if cell.key == key)
    lines = [
        {"phase": name, "weights": 2**30, "trained": 0, "judges": 0, "inputs": 0, "cache": 0, "temporaries": 2**30,
         "total": 2**31, "work": {"flops": 10**15, "steps": 1, "read": 1}, "moved": 2**30, "refused": "", "fits": True,
         "bounds": {"products": 1.0, "memory": 0.1, "links": 0.2}}
        for name in ("rollout", "prepare", "update")
    ]  # fmt: skip
    return {"fields": cell.fields(), "source": plan_table.source_hash(), "jax": "0", "room": 2**34, "phases": lines,
            "mend": []}  # fmt: skip


def test_only_what_is_missing_is_made_and_a_crash_costs_one_cell(table, capsys):
    plan_table.fill("LLaVA-1.5-7B v5e", False, True)
    assert [part for _, part in table].count("plan") == 6 and "failed (1): a crash" in capsys.readouterr().out
    assert (
        len(plan_table.read()) == 5 and "Not compiled yet: LLaVA-1.5-7B v5e:8x8 LoRA; " in plan_table.PAGE.read_text()
    )
    assert "64 (not 96)" in plan_table.PAGE.read_text() and "| 100 / 100 % |" in plan_table.PAGE.read_text()
    table.clear()
    plan_table.fill("LLaVA-1.5-7B v5e", True, True)
    assert table == [("LLaVA-1.5-7B v5e:8x8 LoRA", "plan")], "nothing else is missing or old"
