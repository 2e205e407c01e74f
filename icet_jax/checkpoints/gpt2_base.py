"""Where a reward model starts from: a GPT-2 language model, whose head is new, or another reward model."""

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
    """Loads a GPT-2 of any head as a reward model with float32 parameters, ready to be trained.

    `GPT2LMHeadModel` and bare `GPT2Model` files get a new score head (N(0, 0.02^2), as transformers does) and lose
    their language-model head; `GPT2ForSequenceClassification` files keep theirs.

    Args:
      directory: with config.json and safetensors weights, with or without the `transformer.` prefix in its keys.
      dtype: compute dtype, "float32" or "bfloat16"; the head's is always float32.
      mesh: where to put the parameters; None for the default device.
      remat: what the backward pass keeps, see `icet_jax.nn.layers.REMAT_POLICIES`.
      seed: of a new head.

    Raises:
      UserError: another model type, several labels, or weights that do not fit (`load_network`).
    """
    directory = Path(directory)
    values = hf_config.read_hf_config(directory)
    config = hf_config.gpt2_from_hf(values, str(directory / "config.json"))
    table = tables.gpt2_table(config)
    with TensorReader(safetensors_files(directory)) as reader:
        has_head = any(table.normalise(key) == HEAD_KEY for key in reader.shapes)
    placed: dict[str, Any] = {"dtype": dtype, "param_dtype": "float32", "mesh": mesh}
    make = functools.partial(GPT2RewardModel, config, remat=remat)
    if has_head:
        graphdef, params = load_network(directory, make, table, **placed)
        return Checkpoint(graphdef, params, config, values, directory)
    body = tables.Table(tuple(slot for slot in table.slots if slot.key != HEAD_KEY), table.normalise)
    _, loaded = load_network(directory, functools.partial(GPT2Backbone, config), body, **placed)
    graphdef, abstract = abstract_params(make, dtype, "float32")
    found = sharding.flatten_with_names(loaded) | {HEAD_PATH: _new_head(config.n_embd, seed, mesh)}
    leaves = [found[path] for path in sharding.flatten_with_names(abstract)]
    return Checkpoint(graphdef, jax.tree.unflatten(jax.tree.structure(abstract), leaves), config, values, directory)


def _new_head(width: int, seed: int, mesh: Mesh | None) -> jax.Array:
    head = _HEAD_STDDEV * jax.random.normal(jax.random.key(seed), (width, 1), jnp.float32)
    return head if mesh is None else jax.device_put(head, sharding.replicated(mesh))
