"""Loads the networks of HF checkpoints, tensor by tensor, directly onto the mesh."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from icet_jax.checkpoints import streaming
from icet_jax.checkpoints.adapter import Adapter
from icet_jax.checkpoints.problems import Problems
from icet_jax.checkpoints.safetensors_io import DTYPES, TensorReader, safetensors_files
from icet_jax.checkpoints.tables import Slot, Table
from icet_jax.files import JsonObject
from icet_jax.parallel import sharding


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """Holds a loaded network, split for pure functions.

    Attributes:
      graphdef: static structure; `nnx.merge(graphdef, params)` is the model.
      params: every parameter, by its path in the network.
      config: config of the network: of a model family, `GPT2Config`, or a scorer's (see `checkpoints.scorers`).
      hf_config: the parsed `config.json`.
      directory: its source; `save_vlm(..., source_dir=directory)` copies what was not changed.
      adapter: adapter that was merged during loading, or None.
    """

    graphdef: nnx.GraphDef
    params: nnx.State
    config: Any
    hf_config: JsonObject
    directory: Path
    adapter: Adapter | None = None

    @property
    def model(self) -> Any:
        """Returns the network with its weights."""
        return nnx.merge(self.graphdef, self.params)


def abstract_params(make: Callable[..., nnx.Module], dtype: str, param_dtype: str) -> tuple[nnx.GraphDef, nnx.State]:
    """Returns structure and shapes of a network, without creating any weight.

    Args:
      make: class of the network with everything except `rngs`, `dtype` and `param_dtype` bound.
      dtype: compute dtype.
      param_dtype: dtype of the parameters.
    """
    dtypes = {"dtype": jnp.dtype(dtype), "param_dtype": jnp.dtype(param_dtype)}
    return nnx.split(nnx.eval_shape(lambda: make(rngs=nnx.Rngs(0), **dtypes)))


def load_network(
    directory: Path, make: Callable[..., nnx.Module], table: Table, *, dtype: str, param_dtype: str, mesh: Mesh | None,
    adapter: Adapter | None = None,
) -> tuple[nnx.GraphDef, nnx.State]:  # fmt: skip
    """Builds a network from the safetensors files of a checkpoint directory; the loaders of all families use it.

    Args:
      directory: directory with safetensors weights, in one file or in shards.
      make: class of the network with everything except `rngs`, `dtype` and `param_dtype` bound.
      table: key table of the family for this config.
      dtype: compute dtype.
      param_dtype: dtype of the parameters, to which tensors are converted when they are read.
      mesh: mesh for the parameters (every path needs a rule in `icet_jax.parallel.sharding`); None for the default
        device.
      adapter: adapter to merge in float32, or None.

    Returns:
      graphdef and parameters; `nnx.merge` of them is the network.

    Raises:
      UserError: files are missing, corrupt or truncated, or tensors do not fit the table (all are listed).
    """
    graphdef, abstract = abstract_params(make, dtype, param_dtype)
    with TensorReader(safetensors_files(directory)) as reader:
        keys = match(table, sharding.flatten_with_names(abstract), reader, str(directory))
        delta = adapter.delta if adapter is not None else lambda slot: None
        return graphdef, streaming.fill(table, abstract, reader, keys, mesh, delta)


def match(table: Table, shapes: JsonObject, reader: TensorReader, where: str) -> dict[str, str]:
    """Finds the file's key of every slot.

    Args:
      table: key table of the family.
      shapes: abstract parameters by path.
      reader: the open files.
      where: their directory, for the error message.

    Returns:
      {old key: key in the file}; a tied slot without a tensor has the key of its fallback.

    Raises:
      UserError: every missing, unexpected, duplicate, mis-shaped or non-floating tensor, in one line.
    """
    problems = Problems()
    keys: dict[str, str] = {}
    for key in reader.duplicates:
        problems.add("in more than one file", key)
    slot_by_key = {slot.key: slot for slot in table.slots}
    for key in reader.shapes:
        old = table.normalise(key)
        if old is None:
            continue
        if old not in slot_by_key:
            problems.add("unexpected", key)
        elif old in keys:
            problems.add("duplicate", f"{key} and {keys[old]}")
        else:
            keys[old] = key
    for slot in table.slots:
        file_key = keys.get(slot.key) or keys.get(slot.fallback or "")
        if file_key is None:
            problems.add("missing", slot.key)
            continue
        keys[slot.key] = file_key
        expected_shape = hf_shape(slot, shapes[slot.path].shape)
        if reader.shapes[file_key] != expected_shape:
            problems.add(f"of shape {list(reader.shapes[file_key])} instead of {list(expected_shape)}", file_key)
        if reader.dtypes[file_key] not in DTYPES:
            problems.add(f"of dtype {reader.dtypes[file_key]} (quantised weights are not supported)", file_key)
    problems.raise_if_any(where, "the weights do not fit config.json")
    return keys


def hf_shape(slot: Slot, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Returns the shape of the tensor that fills (a layer of) a parameter of `shape`."""
    return slot.transform.hf_shape(shape if slot.layer is None else shape[1:])
