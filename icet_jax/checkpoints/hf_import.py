"""Loads the networks of HF checkpoints, tensor by tensor, directly onto the mesh."""

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from icet_jax.checkpoints import streaming
from icet_jax.checkpoints.adapter import Adapter
from icet_jax.checkpoints.problems import Problems
from icet_jax.checkpoints.safetensors_io import DTYPES, TensorReader, safetensors_files
from icet_jax.checkpoints.tables import Table, TableEntry
from icet_jax.files import JsonObject
from icet_jax.parallel import sharding


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """Holds a loaded network, split into structure and parameters for use in pure functions.

    Attributes:
      graphdef: static structure; `nnx.merge(graphdef, params)` is the network.
      params: every parameter, by its path in the network.
      config: sizes of the network: a model family's config, `GPT2Config`, or a scorer's (see `scorers.networks`).
      hf_config: the parsed `config.json`.
      directory: directory of the checkpoint; `save_vlm(..., source_dir=directory)` copies unchanged tensors from there.
      adapter: adapter that was merged into the parameters during loading, or None.
    """

    graphdef: nnx.GraphDef
    params: nnx.State
    config: Any
    hf_config: JsonObject
    directory: Path
    adapter: Adapter | None = None

    @property
    def model(self) -> Any:
        """The network with its weights."""
        return nnx.merge(self.graphdef, self.params)


def abstract_params(
    build_network: Callable[..., nnx.Module], dtype: str, param_dtype: str
) -> tuple[nnx.GraphDef, nnx.State]:
    """Returns the structure of a network and the shapes of its parameters, without creating any weight.

    Args:
      build_network: the network's class with all arguments bound except `rngs`, `dtype` and `param_dtype`.
      dtype: compute dtype.
      param_dtype: dtype of the parameters.
    """
    dtypes = {"dtype": jnp.dtype(dtype), "param_dtype": jnp.dtype(param_dtype)}
    return nnx.split(nnx.eval_shape(lambda: build_network(rngs=nnx.Rngs(0), **dtypes)))


def load_network(
    directory: Path, build_network: Callable[..., nnx.Module], table: Table, *, dtype: str, param_dtype: str,
    mesh: Mesh | None, adapter: Adapter | None = None,
) -> tuple[nnx.GraphDef, nnx.State]:  # fmt: skip
    """Loads a network of any kind from the safetensors files of a checkpoint directory.

    Args:
      directory: directory with safetensors weights, in one file or in shards.
      build_network: the network's class with all arguments bound except `rngs`, `dtype` and `param_dtype`.
      table: key table of the family for this config.
      dtype: compute dtype.
      param_dtype: dtype of the parameters, to which tensors are converted when they are read.
      mesh: mesh for the parameters (every path needs a rule in `icet_jax.parallel.sharding`); None for the default
        device.
      adapter: adapter to merge into the parameters, in float32, or None.

    Returns:
      Structure and parameters; `nnx.merge` of them is the network.

    Raises:
      UserError: files are missing, corrupt or truncated, or tensors do not fit the table (all are listed).
    """
    graphdef, abstract = abstract_params(build_network, dtype, param_dtype)
    with TensorReader(safetensors_files(directory)) as reader:
        keys = match_keys(table, sharding.flatten_with_names(abstract), reader, str(directory))
        delta = adapter.delta if adapter is not None else lambda entry: None
        return graphdef, streaming.load_params(table, abstract, reader, keys, mesh, delta)


def match_keys(table: Table, params: Mapping[str, Any], reader: TensorReader, where: str) -> dict[str, str]:
    """Finds the tensor of every table entry in the files, and checks its shape and dtype.

    Args:
      table: key table of the family.
      params: arrays or abstract arrays by path; only their shapes are used.
      reader: the open files.
      where: directory of the files, for the error message.

    Returns:
      {key in the old layout (see `checkpoints.tables`): key in the files}. An entry whose tensor the files omit has the
      key of its fallback.

    Raises:
      UserError: every missing, unexpected, duplicate, mis-shaped or non-floating tensor, in one line.
    """
    problems = Problems()
    keys: dict[str, str] = {}
    for key in reader.duplicates:
        problems.add("in more than one file", key)
    table_keys = {entry.key for entry in table.entries}
    for key in reader.shapes:
        old = table.normalise(key)  # the key in the old layout
        if old is None:
            continue
        if old not in table_keys:
            problems.add("unexpected", key)
        elif old in keys:
            problems.add("duplicate", f"{key} and {keys[old]}")
        else:
            keys[old] = key
    for entry in table.entries:
        file_key = keys.get(entry.key) or keys.get(entry.fallback or "")
        if file_key is None:
            problems.add("missing", entry.key)
            continue
        keys[entry.key] = file_key
        expected_shape = hf_shape(entry, params[entry.path].shape)
        if reader.shapes[file_key] != expected_shape:
            problems.add(f"of shape {list(reader.shapes[file_key])} instead of {list(expected_shape)}", file_key)
        if reader.dtypes[file_key] not in DTYPES:
            problems.add(f"of dtype {reader.dtypes[file_key]} (quantised weights are not supported)", file_key)
    problems.raise_if_any(where, "the weights do not fit config.json")
    return keys


def hf_shape(entry: TableEntry, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Returns the shape of an entry's HF tensor, which fills a parameter of `shape` or one layer of it."""
    return entry.transform.hf_shape(shape if entry.layer is None else shape[1:])
