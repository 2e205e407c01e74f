"""A checkpoint loaded onto eight (emulated) devices computes what it computes on one."""

import os
import subprocess
import sys

import pytest

from tests import tiny

pytest.importorskip("torch")

PROGRAM = """
import sys
import jax, jax.numpy as jnp, numpy as np
from icet_jax.checkpoints.hf_import import load_vlm
from icet_jax.models.layers import positions_from_mask
from icet_jax.parallel.mesh import make_mesh
assert jax.device_count() == 8
alone = load_vlm(sys.argv[1])
tokens = jnp.asarray(np.random.default_rng(0).integers(3, 250, (8, 12)), jnp.int32)
mask = jnp.ones((8, 12), bool)
def logits(checkpoint):
    model = checkpoint.model
    return np.asarray(model.logits(model.decode(tokens, positions_from_mask(mask), mask)[0]))
for sizes in ({}, {"data": 2, "fsdp": 2, "tensor": 2}):
    spread = load_vlm(sys.argv[1], mesh=make_mesh(**sizes))
    kernel = spread.params["language_model"]["layers"]["q_proj"]["kernel"].get_value()
    assert len(kernel.sharding.device_set) == 8
    assert not sizes or kernel.addressable_shards[0].data.size * 4 == kernel.size
    np.testing.assert_allclose(logits(spread), logits(alone), atol=1e-5)
print("agreed")
"""


def test_spread_weights_give_the_same_logits(tmp_path):
    directory = tiny.save_llava(tmp_path, processor=False)
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_force_host_platform_device_count=8"}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(directory)], env=environment, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "agreed" in done.stdout
