"""Every test runs on the CPU in full float32, and every array annotation is checked at run time."""

import os

os.environ["JAX_PLATFORMS"] = "cpu"
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
