"""What conftest.py sets up holds in the processes that tests start as well."""

import os
import subprocess
import sys
from pathlib import Path

import jaxtyping
import numpy as np
import pytest

from icet_jax.algorithms import advantages
from icet_jax.nn import llama
from tests.annotations import with_array_annotations
from tests.conftest import LONG, pytest_collection_modifyitems
from tests.devices import emulating

PROGRAM = """
import jax
print(jax.device_count(), jax.default_backend(), jax.config.jax_compilation_cache_dir)
"""


def test_a_process_with_three_devices_compiles_as_the_tests_do_and_shares_their_programs():
    environment = emulating(3)
    assert environment["XLA_FLAGS"].startswith(os.environ["XLA_FLAGS"])
    assert "--xla_backend_optimization_level=" in environment["XLA_FLAGS"]
    done = subprocess.run([sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    count, backend, folder = done.stdout.split(maxsplit=2)
    assert (count, backend) == ("3", "cpu")
    assert Path(folder.strip()).is_dir() and folder.strip() == os.environ["JAX_COMPILATION_CACHE_DIR"]


def test_shapes_are_checked_in_every_module_that_annotates_arrays():
    with pytest.raises(jaxtyping.TypeCheckError):
        advantages.whiten(np.zeros((2, 3), np.float32), np.ones((2, 4), bool))
    assert {advantages.__name__, llama.__name__} < set(with_array_annotations())
    assert "icet_jax.report.study" not in with_array_annotations()


class Item:
    """What pytest collects, as far as its order needs it."""

    def __init__(self, nodeid):
        self.nodeid = nodeid


def test_files_that_take_long_start_first_and_exist():
    root = Path(__file__).parents[1]
    assert all((root / name).is_file() for name in LONG) and len(set(LONG)) == len(LONG)
    short = [f"tests/data/test_x.py::test_{name}" for name in "ba"]
    items = [*map(Item, short), *(Item(f"{name}::test_it[{number}]") for name in reversed(LONG) for number in (2, 1))]
    pytest_collection_modifyitems(items)
    assert [item.nodeid for item in items] == [*(f"{n}::test_it[{k}]" for n in LONG for k in (2, 1)), *short]
