"""Runs scorers' networks on numpy rows, and checks their parameters at full size without making them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from icet_jax.checkpoints.hf_import import abstract_params
from icet_jax.nn.protocols import count_parameters
from icet_jax.parallel import sharding
from icet_jax.parallel.mesh import AXES


@functools.partial(jax.jit, static_argnums=0)
def _run(graphdef, params, ids, mask):
    return nnx.merge(graphdef, params)(ids, mask)


def ours(checkpoint, ids, mask):
    """What a loaded network says of rows of ids."""
    return np.asarray(_run(checkpoint.graphdef, checkpoint.params, jnp.asarray(ids, jnp.int32), jnp.asarray(mask)))


def theirs(model, ids, mask):
    """What transformers says: logits."""
    import torch

    with torch.no_grad():
        return model(torch.from_numpy(ids), attention_mask=torch.from_numpy(mask).long()).logits.numpy()


def alone(checkpoint, ids, mask):
    """Every row of a right-padded batch by itself, without padding."""
    lengths = mask.sum(1)
    return np.stack([ours(checkpoint, ids[i : i + 1, :n], mask[i : i + 1, :n])[0] for i, n in enumerate(lengths)])


def assert_full_size(module, config, published):
    """The network has the published number of parameters, and a rule for each that divides its axes."""
    params = abstract_params(functools.partial(module, config), "bfloat16", "bfloat16")[1]
    assert count_parameters(params) == published
    for shape in [(8, 1, 1), (1, 8, 1), (1, 1, 8), (2, 2, 2), (1, 4, 2)]:
        mesh = jax.sharding.AbstractMesh(shape, AXES)
        for name, leaf in sharding.flatten_with_names(params).items():
            spec = sharding.partition_spec(name)
            assert sharding.fit(spec, leaf.shape, mesh) == spec, name
