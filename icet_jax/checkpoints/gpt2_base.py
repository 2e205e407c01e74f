"""Loads the GPT-2 from which the training of a reward model starts: a language model or an earlier reward model."""

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from icet_jax.checkpoints import hf_config, tables
from icet_jax.checkpoints.hf_import import Checkpoint, abstract_params, load_network
from icet_jax.checkpoints.safetensors_io import TensorReader, safetensors_files
from icet_jax.nn.gpt2 import GPT2Backbone, GPT2RewardModel
from icet_jax.parallel import sharding

HEAD_KEY, HEAD_PATH = "score.weight", "score/kernel"
_HEAD_STDDEV = 0.02  # HF `initializer_range`


def load_gpt2_base(
    directory: str | Path, *, dtype: str = "float32", mesh: Mesh | None = None, remat: str = "none", seed: int = 0
) -> Checkpoint:
    """Loads a GPT-2 checkpoint as a reward model with float32 parameters, ready for training.

    A checkpoint of `GPT2LMHeadModel` or `GPT2Model` gets a new score head, drawn from N(0, 0.02^2) as in transformers;
    its language-model head is not used. A checkpoint of `GPT2ForSequenceClassification` keeps its score head.

    Args:
      directory: directory with config.json and safetensors weights, whose keys may have the prefix `transformer.`.
      dtype: compute dtype, "float32" or "bfloat16"; the score head always computes in float32.
      mesh: mesh for the parameters; None for the default device.
      remat: which activations are stored for the backward pass, a key of `icet_jax.nn.layers.REMAT_POLICIES`.
      seed: seed of a new score head.

    Raises:
      UserError: the model is not a GPT-2, has several labels, or its weights do not fit (`load_network`).
    """
    directory = Path(directory)
    values = hf_config.read_hf_config(directory)
    config = hf_config.gpt2_from_hf(values, str(directory / "config.json"))
    table = tables.gpt2_table(config)
    with TensorReader(safetensors_files(directory)) as reader:
        has_head = any(table.normalise(key) == HEAD_KEY for key in reader.shapes)
    load = functools.partial(load_network, directory, dtype=dtype, param_dtype="float32", mesh=mesh)
    build_network = functools.partial(GPT2RewardModel, config, remat=remat)
    if has_head:
        graphdef, params = load(build_network, table)
        return Checkpoint(graphdef, params, config, values, directory)
    headless = tables.Table(tuple(entry for entry in table.entries if entry.key != HEAD_KEY), table.normalise)
    _, backbone = load(functools.partial(GPT2Backbone, config), headless)
    graphdef, abstract = abstract_params(build_network, dtype, "float32")
    leaf_by_path = sharding.flatten_with_names(backbone) | {HEAD_PATH: _new_head(config.n_embd, seed, mesh)}
    leaves = [leaf_by_path[path] for path in sharding.flatten_with_names(abstract)]
    return Checkpoint(graphdef, jax.tree.unflatten(jax.tree.structure(abstract), leaves), config, values, directory)


def _new_head(width: int, seed: int, mesh: Mesh | None) -> jax.Array:
    """Returns random weights `[width, 1]` of a score head, replicated over the mesh."""
    head = _HEAD_STDDEV * jax.random.normal(jax.random.key(seed), (width, 1), jnp.float32)
    return head if mesh is None else jax.device_put(head, sharding.replicated(mesh))
