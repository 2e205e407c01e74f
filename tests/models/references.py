"""What the package writes and computes, a second way: merged adapters, and the value head beside a model."""

from pathlib import Path

import jax
import jax.numpy as jnp
from safetensors.numpy import load_file

from icet_jax.checkpoints.folder import VALUE_HEAD
from icet_jax.nn.protocols import lora_key
from icet_jax.parallel.sharding import path_name


def merge_lora(params, lora):
    """The parameters with `scale * a @ b`, computed in float32, added to the adapted kernels; their dtypes stay."""

    def add(path, leaf):
        adapter = lora.weights.get(lora_key(path_name(path)) or "")
        if adapter is None:
            return leaf
        a, b = (adapter[side].astype(jnp.float32) for side in "ab")
        delta = jnp.einsum("lir,lro->lio", a, b, precision=jax.lax.Precision.HIGHEST)
        return (leaf.astype(jnp.float32) + lora.scale * delta).astype(leaf.dtype)

    return jax.tree_util.tree_map_with_path(add, params)


def load_value_head(directory):
    """The value head beside a model: float32 `kernel [E, 1]` and `bias [1]`."""
    return load_file(Path(directory) / VALUE_HEAD)
