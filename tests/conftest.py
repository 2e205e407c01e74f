"""Every test runs on the CPU in full float32, and every array annotation is checked at run time.

Programs of tests run once or twice, so that compiling them is most of the time: XLA is told to optimise nothing
(`XLA_FLAGS` of your own come after, and win), and a program that several tests or processes need is compiled once. The
processes that tests start inherit both.
"""

import os
import tempfile

FASTER = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"

os.environ["JAX_PLATFORMS"] = "cpu"
if FASTER not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = f"{FASTER} {os.environ.get('XLA_FLAGS', '')}".strip()
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:  # workers of pytest-xdist inherit it
    compiled = tempfile.TemporaryDirectory(prefix="icet_compiled_")  # removed when this process ends
    os.environ["JAX_COMPILATION_CACHE_DIR"] = compiled.name
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.05")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from jaxtyping import install_import_hook

if "ICET_FUZZ_EXAMPLES" not in os.environ:  # a campaign of fuzzing reads as users do, and twice as fast
    hook = install_import_hook("icet_jax", "beartype.beartype")

import jax
import pytest

from icet_jax.parallel.programs import keep_traces

jax.config.update("jax_default_matmul_precision", "highest")


@pytest.fixture(autouse=True)
def _no_programs_of_an_earlier_test():
    """A run keeps what it traced from then on, for its process: not for the next test's."""
    yield
    keep_traces(None)
