"""Every test runs on the CPU in full float32, and every array annotation is checked at run time.

Modules without array annotations are left to mypy: the check costs 50 microseconds a call, which was nine tenths of the
time of some tests of reports.

Programs of tests run once or twice, so that compiling them is most of the time: XLA is told to optimise nothing
(`FASTER`; `XLA_FLAGS` of your own come after, and win), and a program that several tests or processes need is compiled
once. The processes that tests start inherit both.
"""

import gc
import os
import tempfile

from tests.devices import FASTER

gc.disable()  # until everything is imported, see pytest_collection_finish

os.environ["JAX_PLATFORMS"] = "cpu"
if FASTER not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = f"{FASTER} {os.environ.get('XLA_FLAGS', '')}".strip()
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:  # workers of pytest-xdist inherit it
    compiled = tempfile.TemporaryDirectory(prefix="icet_compiled_")  # removed when this process ends
    os.environ["JAX_COMPILATION_CACHE_DIR"] = compiled.name
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.05")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # torch's threads wait for each other's tiny products in busy loops
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from jaxtyping import install_import_hook

from tests.annotations import with_array_annotations

if "ICET_FUZZ_EXAMPLES" not in os.environ:  # a campaign of fuzzing reads as users do, and twice as fast
    hook = install_import_hook(with_array_annotations(), "beartype.beartype")

import jax
import pytest

from icet_jax.parallel.programs import keep_traces

jax.config.update("jax_default_matmul_precision", "highest")

# Files that take longest, in that order. They start first (`--no-loadscope-reorder` in the Makefile): a file that takes
# minutes and starts last would leave the other workers idle.
LONG = (
    "tests/parallel/test_parity.py",
    "tests/training/test_restore.py",
    "tests/launch/test_local_processes.py",
    "tests/training/test_resume.py",
    "tests/algorithms/test_anchor.py",
    "tests/runs/test_faults.py",
    "tests/runs/test_families.py",
    "tests/commands/test_align.py",
    "tests/algorithms/test_learner.py",
    "tests/notebooks/test_notebooks.py",
    "tests/release/test_package.py",
    "tests/evaluation/test_sweep.py",
    "tests/parallel/test_programs.py",
    "tests/organism/test_build.py",
    "tests/parallel/test_mesh_of_eight.py",
    "tests/models/test_mllama_parity.py",
    "tests/models/test_families.py",
    "tests/generation/test_decode.py",
    "tests/generation/test_engine.py",
    "tests/checkpoints/test_on_a_mesh.py",
    "tests/parallel/test_compilations.py",
    "tests/algorithms/test_mesh.py",
    "tests/scorers/test_decoder_judge.py",
    "tests/test_out_of_memory.py",
)


def pytest_collection_modifyitems(items):
    """Puts the tests of `LONG` files first; the others stay in order."""
    places = {name: place for place, name in enumerate(LONG)}
    items.sort(key=lambda item: places.get(item.nodeid.partition("::")[0], len(places)))


def pytest_collection_finish():
    """Turns the garbage collector on again. It runs seldom, and leaves out the modules, which took long to search."""
    gc.freeze()
    gc.set_threshold(50_000, 20, 20)
    gc.enable()


@pytest.fixture(autouse=True)
def _no_programs_of_an_earlier_test():
    """A run keeps what it traced from then on, for its process: not for the next test's."""
    yield
    keep_traces(None)
