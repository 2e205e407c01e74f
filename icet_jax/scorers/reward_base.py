"""Loads the network from which the training of a reward model starts: a language model or an earlier reward model."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from icet_jax.checkpoints import hf_config, tables
from icet_jax.checkpoints.hf_import import Checkpoint, abstract_params, load_network
from icet_jax.checkpoints.safetensors_io import TensorReader, safetensors_files
from icet_jax.parallel import sharding
from icet_jax.scorers.networks import trainable_family

HEAD_KEY, HEAD_PATH = "score.weight", "score/kernel"
_HEAD_STDDEV = 0.02  # HF `initializer_range`
_ONE_LABEL = {"id2label": {"0": "LABEL_0"}}


def load_reward_base(
    directory: str | Path, *, dtype: str = "float32", mesh: Mesh | None = None, remat: str = "none", seed: int = 0
) -> Checkpoint:
    """Loads a checkpoint as a reward model with float32 parameters, ready for training.

    A language model (`...LMHeadModel`, `...ForCausalLM` or `...Model`) gets a new score head, drawn from N(0, 0.02^2)
    as in transformers; its language-model head is not used. A `...ForSequenceClassification` keeps its score head.

    Args:
      directory: directory with config.json and safetensors weights, whose keys may lack the prefix of the network.
      dtype: compute dtype, "float32" or "bfloat16"; the score head always computes in float32.
      mesh: mesh for the parameters; None for the default device.
      remat: which activations are stored for the backward pass, a key of `icet_jax.nn.layers.REMAT_POLICIES`.
      seed: seed of a new score head.

    Raises:
      UserError: no reward model of this `model_type` can be trained, there are several labels, or the weights do not
        fit (`load_network`).
    """
    directory = Path(directory)
    where = str(directory / "config.json")
    values = hf_config.read_hf_config(directory)
    family = trainable_family(values, where)
    with TensorReader(safetensors_files(directory)) as reader:
        keys = set(reader.shapes)
    # A language model's config.json has no labels, of which transformers' default is two.
    has_labels = "id2label" in values or "num_labels" in values
    config: Any = family.from_hf(values if has_labels else values | _ONE_LABEL, where)
    table = family.table(config)
    load = functools.partial(load_network, directory, dtype=dtype, param_dtype="float32", mesh=mesh)
    build_network = functools.partial(family.network, config, remat=remat)
    if any(table.normalise(key) == HEAD_KEY for key in keys):
        graphdef, params = load(build_network, table)
        return Checkpoint(graphdef, params, config, values, directory)
    headless = tables.Table(tuple(entry for entry in table.entries if entry.key != HEAD_KEY), table.normalise)
    _, backbone = load(_without_head(build_network), headless)
    graphdef, abstract = abstract_params(build_network, dtype, "float32")
    leaf_by_path = sharding.flatten_with_names(backbone)
    width = sharding.flatten_with_names(abstract)[HEAD_PATH].shape[0]
    leaf_by_path[HEAD_PATH] = _new_head(width, seed, mesh)
    leaves = [leaf_by_path[path] for path in sharding.flatten_with_names(abstract)]
    return Checkpoint(graphdef, jax.tree.unflatten(jax.tree.structure(abstract), leaves), config, values, directory)


def _without_head(build_network: Callable[..., nnx.Module]) -> Callable[..., nnx.Module]:
    """Returns a function that builds the same network without its score head."""

    def build(**arguments: Any) -> nnx.Module:
        network: Any = build_network(**arguments)
        del network.score
        return network

    return build


def _new_head(width: int, seed: int, mesh: Mesh | None) -> jax.Array:
    """Returns random weights `[width, 1]` of a score head, replicated over the mesh."""
    head = _HEAD_STDDEV * jax.random.normal(jax.random.key(seed), (width, 1), jnp.float32)
    return head if mesh is None else jax.device_put(head, sharding.replicated(mesh))
