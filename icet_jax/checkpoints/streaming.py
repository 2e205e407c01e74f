"""Moves tensors between safetensors files and a mesh, a few at a time, so that no parameter is ever whole on one host
or device.

Import allocates each parameter on its final devices and fills it block by block (some layers of a stacked one) with
updates that donate the old buffer; a process reads only the part of a block that its own devices hold. Export brings
one layer of one parameter to the host at a time.
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
from icet_jax.checkpoints.tables import Slot, Table
from icet_jax.parallel import sharding
from icet_jax.typing import Array, DType, Shaped

BLOCK_BYTES = 128 * 2**20
"""Layers of a stacked parameter are moved together up to this size; a larger layer is moved alone."""

Index = tuple[slice, ...]


def fill(
    table: Table, abstract: nnx.State, reader: TensorReader, keys: dict[str, str], mesh: Mesh | None,
    delta: Callable[[Slot], np.ndarray | None],
) -> nnx.State:  # fmt: skip
    """Reads every tensor into its parameter; apart from the arrays themselves the host holds about two blocks.

    Args:
      table: key table of the family.
      abstract: shapes and dtypes of the parameters.
      reader: the open files.
      keys: {old key: key in the file}.
      mesh: mesh for the parameters (`icet_jax.parallel.sharding.RULES`), or None for the default device.
      delta: function that returns the float32 update of the parameter (of that layer) that a slot fills, or None.
    """
    slots: dict[str, list[Slot]] = defaultdict(list)
    for slot in table.slots:
        slots[slot.path].append(slot)
    placed = None if mesh is None else sharding.flatten_with_names(sharding.shardings(abstract, mesh))
    sizes = {slot.key: _bytes(reader, keys[slot.key]) for slot in table.slots}
    progress = ByteProgress("loading weights", sum(sizes.values()))

    def parts(block: Sequence[Slot]) -> list[np.ndarray]:
        progress.advance(sum(sizes[slot.key] for slot in block))
        return [with_delta(slot.transform.to_param(reader.read(keys[slot.key])), delta(slot)) for slot in block]

    leaves = []
    for path, leaf in sharding.flatten_with_names(abstract).items():
        where = None if placed is None else placed[path]
        leaves.append(_parameter(leaf.shape, leaf.dtype, where, slots[path], parts))
    return jax.tree.unflatten(jax.tree.structure(abstract), leaves)


def replace(
    params: nnx.State, slots: Mapping[str, Sequence[Slot]], tensor: Callable[[Slot], np.ndarray], *, donate: bool
) -> nnx.State:
    """Returns parameters of which some are filled anew, with the same dtypes and devices; the others are shared.

    With several processes all of them must call it if `tensor` is collective.

    Args:
      params: the current parameters.
      slots: slots of each parameter to fill anew, by its path.
      tensor: function that returns the new content of (a layer of) the parameter, in the parameter's own layout.
      donate: whether each old array is deleted before the new one is created, whoever else uses it.
    """

    def parts(block: Sequence[Slot]) -> list[np.ndarray]:
        return [tensor(slot) for slot in block]

    leaves = []
    for path, leaf in sharding.flatten_with_names(params).items():
        if path not in slots:
            leaves.append(leaf)
            continue
        where = leaf.sharding if isinstance(leaf.sharding, NamedSharding) else None
        if donate:
            leaf.delete()
        leaves.append(_parameter(leaf.shape, leaf.dtype, where, slots[path], parts))
    return jax.tree.unflatten(jax.tree.structure(params), leaves)


def _bytes(reader: TensorReader, key: str) -> int:
    return tensor_bytes(reader.dtypes[key], reader.shapes[key])


def with_delta(tensor: np.ndarray, delta: np.ndarray | None) -> np.ndarray:
    """Returns a tensor plus an update added in float32; the tensor itself if there is none."""
    return tensor if delta is None else tensor.astype(np.float32) + delta


def _parameter(
    shape: tuple[int, ...], dtype: DType, where: NamedSharding | None, slots: Sequence[Slot],
    parts: Callable[[Sequence[Slot]], list[np.ndarray]],
) -> jax.Array:  # fmt: skip
    """Returns one parameter, filled from its slots: a single one, or one per layer."""
    if slots[0].layer is None:
        (whole,) = parts(slots)
        return jax.block_until_ready(_place(shape, where, lambda index: np.array(whole[index], dtype, order="C")))
    slots = sorted(slots, key=lambda slot: slot.layer or 0)
    if [slot.layer for slot in slots] != list(range(shape[0])):
        raise ValueError(f"{slots[0].path}: the table must give each of its {shape[0]} layers once")
    depth = min(shape[0], max(1, BLOCK_BYTES // (int(np.prod(shape[1:])) * np.dtype(dtype).itemsize)))
    array = None if depth == shape[0] else _zeros(shape, np.dtype(dtype), where)()
    for start in range(0, shape[0], depth):
        tensors = parts(slots[start : start + depth])
        block = _place((len(tensors), *shape[1:]), where, functools.partial(_stack, tensors, dtype))
        # The block was created while the previous update was still running; waiting keeps their number at one.
        jax.block_until_ready(array)
        array = block if array is None else _update(where)(array, block, jnp.int32(start))
    return jax.block_until_ready(array)


def _stack(tensors: Sequence[np.ndarray], dtype: DType, index: Index) -> np.ndarray:
    """Returns the part `index` of the stack of `tensors`, whose first axis is always taken completely."""
    first = tensors[0][index[1:]]
    out = np.empty((len(tensors), *first.shape), dtype)
    for layer, tensor in enumerate(tensors):
        out[layer] = tensor[index[1:]]
    return out


def _place(shape: tuple[int, ...], where: NamedSharding | None, part: Callable[[Index], np.ndarray]) -> jax.Array:
    """Returns an array of which every device gets `part(its index)`; equal parts are created once.

    `part` must return new memory, because on the CPU the array may use that memory, which must not be the mapped file.
    """
    if where is None:
        return jax.device_put(part((slice(None),) * len(shape)))
    parts: dict[str, np.ndarray] = {}

    def once(index: Index | None) -> np.ndarray:
        assert index is not None  # None occurs only for arrays without axes
        key = str(index)
        if key not in parts:
            parts[key] = part(index)
        return parts[key]

    return jax.make_array_from_callback(shape, where, once)


@functools.cache
def _zeros(shape: tuple[int, ...], dtype: np.dtype, where: NamedSharding | None) -> Callable[[], jax.Array]:
    """Returns a function that allocates zeros directly on the devices."""
    return jax.jit(lambda: jnp.zeros(shape, dtype), out_shardings=where)


@functools.cache
def _update(where: NamedSharding | None) -> Callable[[jax.Array, jax.Array, jax.Array], jax.Array]:
    """Returns a function for `array[start : start + len(block)] = block` in place; the axis of layers is never
    split."""

    def update(array: jax.Array, block: jax.Array, start: jax.Array) -> jax.Array:
        return jax.lax.dynamic_update_slice_in_dim(array, block, start, axis=0)

    return jax.jit(update, donate_argnums=0, out_shardings=where)


def to_host(array: Shaped[Array, "..."], layer: int | None) -> Shaped[np.ndarray, "..."]:
    """Returns an array, or one layer of it, on this host; with several processes all of them must call it in the same
    order.

    If other processes hold parts of it, only this one piece is replicated.
    """
    replicate = not array.is_fully_addressable
    piece = _piece(_piece_sharding(array, layer, replicate), layer is not None)(array, jnp.int32(layer or 0))
    return np.asarray(piece.addressable_data(0) if replicate else piece)


def _piece_sharding(array: jax.Array, layer: int | None, replicate: bool) -> NamedSharding | None:
    where = array.sharding
    if not isinstance(where, NamedSharding):
        return None
    spec = PartitionSpec() if replicate else where.spec if layer is None else PartitionSpec(*where.spec[1:])
    return NamedSharding(where.mesh, spec)


@functools.cache
def _piece(where: NamedSharding | None, stacked: bool) -> Callable[[jax.Array, jax.Array], jax.Array]:
    """Returns a function that copies a piece to new memory, so that it is freed together with the host's copy."""

    def piece(array: jax.Array, layer: jax.Array) -> jax.Array:
        return jax.lax.dynamic_index_in_dim(array, layer, keepdims=False) if stacked else jnp.copy(array)

    return jax.jit(piece, out_shardings=where)
