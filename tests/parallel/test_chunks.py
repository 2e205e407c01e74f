"""Chunks of a batch that is split over devices stay where they are."""

import subprocess
import sys

from tests.devices import emulating

PROGRAM = """
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from icet_jax.models.mllama.vision import in_chunks
from icet_jax.parallel.mesh import make_mesh

def scores(x):
    return jax.nn.softmax(x @ jnp.swapaxes(x, 1, 2)) @ x

sharding = NamedSharding(make_mesh(), PartitionSpec("data"))
x = jax.device_put(np.random.default_rng(0).normal(size=(32, 24, 8)).astype(np.float32), sharding)
program = jax.jit(lambda x: in_chunks(scores, 1, x)).lower(x).compile()
text = program.as_text()
assert "while" in text, "not chunked"
assert not any(f"{name}(" in text for name in ("all-gather", "all-to-all", "collective-permute", "all-reduce"))
y = program(x)
assert y.sharding == sharding
np.testing.assert_allclose(y, scores(x), atol=1e-6)
print("chunked over", jax.device_count(), "devices")
"""


def test_chunks_move_nothing_between_devices():
    environment = emulating(8) | {"JAX_DEFAULT_MATMUL_PRECISION": "highest"}
    done = subprocess.run([sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout == "chunked over 8 devices\n"
