"""Moves tensors between safetensors files and a mesh in small blocks, so that large models fit.

Import allocates each parameter on its final devices and then fills it in place, a block of layers at a time; a process
reads only the parts of a block that its devices need. Export copies one layer of one parameter to the host at a time.
"""

import functools
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from icet_jax.checkpoints.progress import ByteProgress
from icet_jax.checkpoints.safetensors_io import TensorReader, tensor_bytes
from icet_jax.checkpoints.tables import Table, TableEntry
from icet_jax.parallel import sharding
from icet_jax.typing import Array, DType, Shaped

BLOCK_BYTES = 128 * 2**20
"""Size up to which layers of a stacked parameter are moved together; a layer that is larger is moved alone."""

Index = tuple[slice, ...]
ReadBlock = Callable[[Sequence[TableEntry]], list[np.ndarray]]
"""Function that takes table entries of one parameter and returns their tensors, in the parameter's layout."""


def load_params(
    table: Table, abstract: nnx.State, reader: TensorReader, keys: dict[str, str], mesh: Mesh | None,
    delta: Callable[[TableEntry], np.ndarray | None],
) -> nnx.State:  # fmt: skip
    """Returns the parameters, read from files block by block.

    A block is one layer of a parameter, or several layers of up to `BLOCK_BYTES` together. Beside parameters that stay
    on the host, host memory holds about two blocks at a time.

    Args:
      table: key table of the family.
      abstract: parameters as abstract arrays (shapes and dtypes).
      reader: the open files.
      keys: {key of `table`: key in the files}.
      mesh: mesh for the parameters (`icet_jax.parallel.sharding.RULES`), or None for the default device.
      delta: function that returns the float32 update to add to the tensor of an entry, or None for no update.
    """
    entries: dict[str, list[TableEntry]] = defaultdict(list)
    for entry in table.entries:
        entries[entry.path].append(entry)
    shardings = None if mesh is None else sharding.flatten_with_names(sharding.shardings(abstract, mesh))
    file_keys = [keys[entry.key] for entry in table.entries]
    sizes = {key: tensor_bytes(reader.dtypes[key], reader.shapes[key]) for key in file_keys}
    progress = ByteProgress("loading weights", sum(sizes[key] for key in file_keys))

    def read_block(block: Sequence[TableEntry]) -> list[np.ndarray]:
        """Returns the tensors of these entries with their updates, see `ReadBlock`."""
        progress.advance(sum(sizes[keys[entry.key]] for entry in block))
        return [with_delta(entry.transform.to_param(reader.read(keys[entry.key])), delta(entry)) for entry in block]

    leaves = []
    for path, leaf in sharding.flatten_with_names(abstract).items():
        target = None if shardings is None else shardings[path]
        leaves.append(_parameter(leaf.shape, leaf.dtype, target, entries[path], read_block))
    return jax.tree.unflatten(jax.tree.structure(abstract), leaves)


def refill_params(
    params: nnx.State,
    entries: Mapping[str, Sequence[TableEntry]],
    tensor: Callable[[TableEntry], np.ndarray],
    *,
    donate: bool,
) -> nnx.State:
    """Returns parameters like `params`, with new contents for those in `entries`; all others are the same arrays.

    All processes of a run must call this function if `tensor` communicates between processes.

    Args:
      params: the current parameters.
      entries: {path of a parameter with new contents: its table entries}.
      tensor: function that returns an entry's new content, in the layout of the parameter (or of a layer of it).
      donate: whether to delete each old array before the new one is created, even if others use it.
    """

    def read_block(block: Sequence[TableEntry]) -> list[np.ndarray]:
        return [tensor(entry) for entry in block]

    leaves = []
    for path, leaf in sharding.flatten_with_names(params).items():
        if path not in entries:
            leaves.append(leaf)
            continue
        target = leaf.sharding if isinstance(leaf.sharding, NamedSharding) else None
        if donate:
            leaf.delete()
        leaves.append(_parameter(leaf.shape, leaf.dtype, target, entries[path], read_block))
    return jax.tree.unflatten(jax.tree.structure(params), leaves)


def with_delta(tensor: np.ndarray, delta: np.ndarray | None) -> np.ndarray:
    """Returns a tensor plus an update, as float32; the tensor itself if the update is None."""
    return tensor if delta is None else tensor.astype(np.float32) + delta


def _parameter(
    shape: tuple[int, ...], dtype: DType, target: NamedSharding | None, entries: Sequence[TableEntry],
    read_block: ReadBlock,
) -> jax.Array:  # fmt: skip
    """Returns one parameter on its devices, filled block by block.

    Args:
      shape: shape of the parameter.
      dtype: dtype of the parameter.
      target: sharding of the parameter; None for the default device.
      entries: its table entry or, if it is stacked, the entries of its layers.
      read_block: called once for each block of entries.
    """
    if entries[0].layer is None:
        (tensor,) = read_block(entries)
        return jax.block_until_ready(_place(shape, target, lambda index: np.array(tensor[index], dtype, order="C")))
    entries = sorted(entries, key=lambda entry: entry.layer or 0)
    if [entry.layer for entry in entries] != list(range(shape[0])):
        raise ValueError(f"{entries[0].path}: the table must have one entry for each of its {shape[0]} layers")
    depth = min(shape[0], max(1, BLOCK_BYTES // (int(np.prod(shape[1:])) * np.dtype(dtype).itemsize)))
    array = None if depth == shape[0] else _zeros(shape, np.dtype(dtype), target)()
    for start in range(0, shape[0], depth):
        tensors = read_block(entries[start : start + depth])
        block = _place((len(tensors), *shape[1:]), target, functools.partial(_stack, tensors, dtype))
        # This block was created while the previous update was running. Waiting here keeps only one update in flight.
        jax.block_until_ready(array)
        array = block if array is None else _update(target)(array, block, jnp.int32(start))
    return jax.block_until_ready(array)


def _stack(tensors: Sequence[np.ndarray], dtype: DType, index: Index) -> np.ndarray:
    """Returns `np.stack(tensors)[index]` as `dtype`; `index` must take all of the first axis."""
    first = tensors[0][index[1:]]
    out = np.empty((len(tensors), *first.shape), dtype)
    for layer, tensor in enumerate(tensors):
        out[layer] = tensor[index[1:]]
    return out


def _place(shape: tuple[int, ...], target: NamedSharding | None, create: Callable[[Index], np.ndarray]) -> jax.Array:
    """Creates an array of `shape` with sharding `target` (None: on the default device).

    `create` takes an index and returns that part of the array. It is called once for each distinct index of the
    devices. It must return newly allocated memory and not a view of the mapped file, because on the CPU the array may
    use that memory directly.
    """
    if target is None:
        return jax.device_put(create((slice(None),) * len(shape)))
    parts: dict[str, np.ndarray] = {}

    def part(index: Index | None) -> np.ndarray:
        assert index is not None  # None occurs only for arrays without axes
        key = str(index)
        if key not in parts:
            parts[key] = create(index)
        return parts[key]

    return jax.make_array_from_callback(shape, target, part)


@functools.cache
def _zeros(shape: tuple[int, ...], dtype: np.dtype, target: NamedSharding | None) -> Callable[[], jax.Array]:
    """Returns a function that allocates zeros directly on the devices of `target`."""
    return jax.jit(lambda: jnp.zeros(shape, dtype), out_shardings=target)


@functools.cache
def _update(target: NamedSharding | None) -> Callable[[jax.Array, jax.Array, jax.Array], jax.Array]:
    """Returns a function of (array, block, start) that sets `array[start : start + len(block)] = block` in place."""

    def update(array: jax.Array, block: jax.Array, start: jax.Array) -> jax.Array:
        return jax.lax.dynamic_update_slice_in_dim(array, block, start, axis=0)

    return jax.jit(update, donate_argnums=0, out_shardings=target)


def to_host(array: Shaped[Array, "..."], layer: int | None) -> Shaped[np.ndarray, "..."]:
    """Copies an array, or one layer of a stacked one, to this host.

    If other processes hold parts of it, they all must call this, in the same order.
    """
    replicate = not array.is_fully_addressable
    copy = _copier(_copy_sharding(array, layer, replicate), layer is not None)(array, jnp.int32(layer or 0))
    return np.asarray(copy.addressable_data(0) if replicate else copy)


def _copy_sharding(array: jax.Array, layer: int | None, replicate: bool) -> NamedSharding | None:
    """Returns the sharding for a copy of an array or of one of its layers; None if the array is not on a mesh.

    The copy is replicated if `replicate`; otherwise it has the sharding of the array.
    """
    sharding = array.sharding
    if not isinstance(sharding, NamedSharding):
        return None
    spec = PartitionSpec() if replicate else sharding.spec if layer is None else PartitionSpec(*sharding.spec[1:])
    return NamedSharding(sharding.mesh, spec)


@functools.cache
def _copier(target: NamedSharding | None, stacked: bool) -> Callable[[jax.Array, jax.Array], jax.Array]:
    """Returns a function of (array, layer) that copies one layer, or the array if it is not stacked, to new memory.

    `array` may share the memory of an array on the host. The result does not, so that it outlives both. It is placed as
    `target` says.
    """

    def copy(array: jax.Array, layer: jax.Array) -> jax.Array:
        return jax.lax.dynamic_index_in_dim(array, layer, keepdims=False) if stacked else jnp.copy(array)

    return jax.jit(copy, out_shardings=target)
