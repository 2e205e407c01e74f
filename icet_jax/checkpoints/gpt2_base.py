"""Loads the start of a reward model: a GPT-2 language model, which gets a new head, or another reward model."""

import functools
from pathlib import Path
from typing import Any

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
    """Loads a GPT-2 with any head as a reward model with float32 parameters, ready for training.

    Files of `GPT2LMHeadModel` and bare `GPT2Model` get a new score head (N(0, 0.02^2), as in transformers) and lose
    their language-model head; files of `GPT2ForSequenceClassification` keep theirs.

    Args:
      directory: directory with config.json and safetensors weights, whose keys may have the prefix `transformer.`.
      dtype: compute dtype, "float32" or "bfloat16"; that of the head is always float32.
      mesh: mesh for the parameters; None for the default device.
      remat: what is kept for the backward pass, see `icet_jax.nn.layers.REMAT_POLICIES`.
      seed: seed of a new head.

    Raises:
      UserError: the model type differs, there are several labels, or the weights do not fit (`load_network`).
    """
    directory = Path(directory)
    values = hf_config.read_hf_config(directory)
    config = hf_config.gpt2_from_hf(values, str(directory / "config.json"))
    table = tables.gpt2_table(config)
    with TensorReader(safetensors_files(directory)) as reader:
        has_head = any(table.normalise(key) == HEAD_KEY for key in reader.shapes)
    options: dict[str, Any] = {"dtype": dtype, "param_dtype": "float32", "mesh": mesh}
    build_network = functools.partial(GPT2RewardModel, config, remat=remat)
    if has_head:
        graphdef, params = load_network(directory, build_network, table, **options)
        return Checkpoint(graphdef, params, config, values, directory)
    body = tables.Table(tuple(slot for slot in table.slots if slot.key != HEAD_KEY), table.normalise)
    _, loaded = load_network(directory, functools.partial(GPT2Backbone, config), body, **options)
    graphdef, abstract = abstract_params(build_network, dtype, "float32")
    leaf_by_path = sharding.flatten_with_names(loaded) | {HEAD_PATH: _new_head(config.n_embd, seed, mesh)}
    leaves = [leaf_by_path[path] for path in sharding.flatten_with_names(abstract)]
    return Checkpoint(graphdef, jax.tree.unflatten(jax.tree.structure(abstract), leaves), config, values, directory)


def _new_head(width: int, seed: int, mesh: Mesh | None) -> jax.Array:
    head = _HEAD_STDDEV * jax.random.normal(jax.random.key(seed), (width, 1), jnp.float32)
    return head if mesh is None else jax.device_put(head, sharding.replicated(mesh))
