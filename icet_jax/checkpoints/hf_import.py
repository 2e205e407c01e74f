"""Loads the networks of HF checkpoints, tensor by tensor, straight onto the mesh."""

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
from icet_jax.parallel import sharding


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """A loaded network, split for pure functions.

    Attributes:
      graphdef: static structure; `nnx.merge(graphdef, params)` is the model.
      params: every parameter, under the paths of the models' docstrings.
      config: of the network: that of a model family, `GPT2Config`, or a scorer's (see `checkpoints.scorers`).
      hf_config: the `config.json` as read.
      directory: where it came from; `save_vlm(..., source_dir=directory)` copies what was not changed.
      adapter: what was merged while it was loaded, or None.
    """

    graphdef: nnx.GraphDef
    params: nnx.State
    config: Any
    hf_config: dict[str, Any]
    directory: Path
    adapter: Adapter | None = None

    @property
    def model(self) -> Any:
        """The network with its weights."""
        return nnx.merge(self.graphdef, self.params)


def abstract_params(make: Callable[..., nnx.Module], dtype: str, param_dtype: str) -> tuple[nnx.GraphDef, nnx.State]:
    """Structure and shapes of a network, without any weight.

    Args:
      make: the module's class with everything but `rngs`, `dtype` and `param_dtype` bound.
      dtype: compute dtype.
      param_dtype: dtype of the parameters.
    """
    dtypes = {"dtype": jnp.dtype(dtype), "param_dtype": jnp.dtype(param_dtype)}
    return nnx.split(nnx.eval_shape(lambda: make(rngs=nnx.Rngs(0), **dtypes)))


def load_network(
    directory: Path, make: Callable[..., nnx.Module], table: Table, *, dtype: str, param_dtype: str, mesh: Mesh | None,
    adapter: Adapter | None = None,
) -> tuple[nnx.GraphDef, nnx.State]:  # fmt: skip
    """Builds a network from the safetensors of a checkpoint directory: what the loaders of all families share.

    Args:
      directory: with safetensors weights, one file or shards.
      make: the module's class with everything but `rngs`, `dtype` and `param_dtype` bound.
      table: the family's key table for this config.
      dtype: compute dtype.
      param_dtype: dtype of the parameters; tensors are converted as they are read.
      mesh: where to put the parameters (every path needs a rule in `icet_jax.parallel.sharding`); None for the default
        device.
      adapter: to be merged in float32, or None.

    Returns:
      graphdef and parameters: `nnx.merge` of them is the network.

    Raises:
      UserError: missing, corrupt or truncated files; tensors that do not fit the table, all listed together.
    """
    graphdef, abstract = abstract_params(make, dtype, param_dtype)
    with TensorReader(safetensors_files(directory)) as reader:
        keys = match(table, sharding.flatten_with_names(abstract), reader, str(directory))
        delta = adapter.delta if adapter is not None else lambda slot: None
        return graphdef, streaming.fill(table, abstract, reader, keys, mesh, delta)


def match(table: Table, shapes: dict[str, Any], reader: TensorReader, where: str) -> dict[str, str]:
    """Finds the file's key of every slot.

    Args:
      table: of the family.
      shapes: abstract parameters by path.
      reader: the open files.
      where: their directory, for the error line.

    Returns:
      OLD key -> key in the file; a tied slot without a tensor has its fallback's.

    Raises:
      UserError: every missing, unexpected, duplicate, mis-shaped or non-floating tensor, in one line.
    """
    problems = Problems()
    keys: dict[str, str] = {}
    for key in reader.duplicates:
        problems.add("in more than one file", key)
    wanted = {slot.key: slot for slot in table.slots}
    for key in reader.shapes:
        old = table.normalise(key)
        if old is None:
            continue
        if old not in wanted:
            problems.add("unexpected", key)
        elif old in keys:
            problems.add("duplicate", f"{key} and {keys[old]}")
        else:
            keys[old] = key
    for slot in table.slots:
        found = keys.get(slot.key) or keys.get(slot.fallback or "")
        if found is None:
            problems.add("missing", slot.key)
            continue
        keys[slot.key] = found
        wanted_shape = hf_shape(slot, shapes[slot.path].shape)
        if reader.shapes[found] != wanted_shape:
            problems.add(f"of shape {list(reader.shapes[found])} instead of {list(wanted_shape)}", found)
        if reader.dtypes[found] not in DTYPES:
            problems.add(f"of dtype {reader.dtypes[found]} (quantised weights are not supported)", found)
    problems.raise_if_any(where, "the weights do not fit config.json")
    return keys


def hf_shape(slot: Slot, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Shape of the tensor that fills (a layer of) a parameter of `shape`."""
    return slot.transform.hf_shape(shape if slot.layer is None else shape[1:])
