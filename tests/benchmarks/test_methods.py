"""The comparison of methods: cells that are different runs, and numbers of a run."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest

import icet_jax
from icet_jax.config.names import ALGORITHMS
from icet_jax.organism import weights_directory

SCRIPT = Path(__file__).parents[2] / "benchmarks/methods.py"


@pytest.fixture(scope="module")
def methods():
    spec = importlib.util.spec_from_file_location("methods", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules["methods"] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules["methods"]


def test_cells_of_different_names_are_different_runs(methods):
    cells = {methods.run_of(cell): cell for cell in methods.cells() if cell.seed == 0}
    configs = {
        name: json.dumps(icet_jax.load_config(methods.ORGANISMS[cell.organism], methods.fields(cell)).to_dict())
        for name, cell in cells.items()
    }
    assert len(set(configs.values())) == len(configs)
    assert {json.loads(config)["algorithm"] for config in configs.values()} == set(ALGORITHMS)


def test_the_second_table_has_three_organisms_and_five_seeds(methods):
    cells = [cell for cell in methods.cells() if cell.table == "second"]
    assert len({(cell.organism, cell.seed) for cell in cells}) == 15 and len(cells) == 15 * len(methods.BEST)


@pytest.mark.parametrize(("trained", "moved"), [("vlm", False), ("control", True)])
def test_the_kl_at_the_default_exit_is_zero_for_the_same_weights_only(methods, tmp_path, trained, moved):
    (tmp_path / "config.json").write_text(json.dumps({"model": {"checkpoint": "organism:vlm"}}))
    (tmp_path / "hf").symlink_to(weights_directory(trained), target_is_directory=True)
    kl = methods.kl_at_the_default_exit(tmp_path, rows=4)
    assert kl > 1e-6 if moved else kl == 0.0


def test_a_table_has_the_mean_and_the_range_of_seeds(methods):
    numbers = dict.fromkeys(methods.COLUMNS, 1.0)
    rows = [{"method": "lppo", **numbers, "asr_worst": value} for value in (1.0, 4.0)]
    line = methods.table(rows).splitlines()[-1]
    assert line.startswith("| L-PPO, stratified exits | 2 | 2.5 (1.0 to 4.0) | 1.0 (1.0 to 1.0) |")
