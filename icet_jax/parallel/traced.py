"""Functions for use inside compiled functions: on which mesh an array is, how activations are split, and when weights
are gathered.

A traced array's type carries its mesh, so models need not be given one. On one device these functions return their
input.
"""

import functools
from typing import Any

import jax
from jax.sharding import AbstractMesh, NamedSharding, PartitionSpec

from icet_jax.parallel.sharding import ROWS, fit, partition_spec, path_name, row_shards

P = PartitionSpec
_MAX_SEND_BYTES = 1 << 28  # most bytes that each device sends at once


def mesh_of(*arrays: Any) -> AbstractMesh | None:
    """Returns the mesh on which traced arrays are; None on one device or outside compiled functions."""
    for array in arrays:
        mesh = jax.typeof(array).sharding.mesh if isinstance(array, jax.core.Tracer) else None
        if mesh is not None and mesh.size > 1:
            return mesh
    return None


def by_rows(x: Any) -> Any:
    """Splits activations `[B, T, E]` over the mesh's row axes, so that each row is whole on its devices.

    Without this constraint the compiler may split E in the way `fsdp` splits the kernels. Every device then computes
    all rows, and partial sums as large as the activations are exchanged. That is the better choice when there are few
    rows, as in a decoding step; this function then returns its input, as it does when the rows cannot be divided
    evenly.
    """
    mesh = _mesh_if_gathering_pays(x)
    return x if mesh is None else jax.lax.with_sharding_constraint(x, NamedSharding(mesh, P(ROWS)))


def gather_weights(weights: Any, x: Any, stack: str = "layers") -> Any:
    """Gathers one layer's weights over `fsdp` if that is cheaper than exchanging the activations `x [B, T, E]`.

    Args:
      weights: one layer's slice of a stack of layers, or of adapters (which may be None or empty); paths as in
        `sharding.RULES`.
      x: the layer's input.
      stack: name of the stack, for those rules.

    Returns:
      The weights; their gradients are split as the weights were.
    """
    mesh = _mesh_if_gathering_pays(x)
    if mesh is None:
        return weights

    def gather(path: tuple[Any, ...], leaf: Any) -> Any:
        return _gather_fsdp(leaf, P(*partition_spec(f"{stack}/{path_name(path)}")[1:]), mesh)

    return jax.tree_util.tree_map_with_path(gather, weights)


def gather_kernel(kernel: Any, x: Any, name: str) -> Any:
    """Gathers a kernel or table over `fsdp` once, for a loop over parts of `x [B, ...]` that would gather it each time.

    Args:
      kernel: kernel of one layer.
      x: the rows that use it; if they cannot be divided evenly nothing is done.
      name: path of the kernel, as in `sharding.RULES`.

    Returns:
      The kernel; its gradient is split as the kernel was.
    """
    mesh = mesh_of(x)
    return kernel if mesh is None or x.shape[0] % row_shards(mesh) else _gather_fsdp(kernel, partition_spec(name), mesh)


def take_exit_states(states: Any, layers: Any, numbers: Any) -> Any:
    """Returns `states[layers, numbers]`, split over the mesh's row axes as the images of `states [X, I, P, D]` are.

    Each device sends the states it has and receives those of its own rows. Without this function the compiler would
    bring all of `states` to every device.

    Args:
      states: states of I images at X exits.
      layers: index of the exit of each of the N results, int.
      numbers: number of the image of each result, int; a negative number gives a meaningless result. None takes every
        image in order.

    Returns:
      The states `[N, P, D]`.
    """
    if numbers is None:
        return jax.vmap(lambda own, layer: own[layer], in_axes=(1, 0))(states, layers)  # nothing is exchanged
    mesh = mesh_of(states, layers)
    if mesh is None or states.shape[1] % row_shards(mesh) or numbers.shape[0] % row_shards(mesh):
        return states[layers, numbers]
    size = numbers.shape[0] * states[0, 0].size * states.dtype.itemsize
    parts = next(n for n in range(1, states.shape[2] + 1) if n * _MAX_SEND_BYTES >= size and states.shape[2] % n == 0)

    def take(states: Any, layers: Any, numbers: Any) -> Any:
        own = numbers - jax.lax.axis_index(ROWS) * states.shape[1]
        is_local = ((own >= 0) & (own < states.shape[1]))[:, None, None]

        def exchange(piece: Any) -> Any:
            return jax.lax.psum_scatter(jax.numpy.where(is_local, piece[layers, own], 0), ROWS, tiled=True)

        pieces = states.reshape(*states.shape[:2], parts, -1, states.shape[3])
        if parts == 1:
            return exchange(pieces[:, :, 0])
        results = jax.lax.map(lambda number: exchange(pieces[:, :, number]), jax.numpy.arange(parts))
        return results.swapaxes(0, 1).reshape(-1, *states.shape[2:])

    return jax.shard_map(
        take, mesh=mesh, in_specs=(P(None, ROWS), P(), P()), out_specs=P(ROWS), check_vma=False
    )(states, layers, numbers)  # fmt: skip


def _gather_fsdp(x: Any, spec: PartitionSpec, mesh: AbstractMesh) -> Any:
    split = fit(spec, x.shape, mesh)
    others = (tuple(name for name in axis if name != "fsdp") if isinstance(axis, tuple) else axis for axis in split)
    whole = P(*(None if axis in ("fsdp", ()) else axis for axis in others))
    return x if whole == split else _reshard(NamedSharding(mesh, split), NamedSharding(mesh, whole), x)


def _mesh_if_gathering_pays(x: Any) -> AbstractMesh | None:
    """Returns the mesh if gathering kernels of about [E, E] moves less data than exchanging activations [B, T, E]."""
    mesh = mesh_of(x)
    if mesh is None or x.shape[0] % row_shards(mesh) or x.shape[0] * x.shape[1] <= x.shape[2]:
        return None
    return mesh


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _reshard(split: NamedSharding, whole: NamedSharding, x: Any) -> Any:
    """Returns `x` with the sharding `whole`; its gradient gets the sharding `split`."""
    # `x` is constrained too: the compiler merges equal slices of a stack and would otherwise keep all of them whole,
    # for example in a decoding loop, which would then hold the full weights of all layers.
    return jax.lax.with_sharding_constraint(jax.lax.with_sharding_constraint(x, split), whole)


_reshard.defvjp(
    lambda split, whole, x: (_reshard(split, whole, x), None),
    lambda split, whole, _, dx: (jax.lax.with_sharding_constraint(dx, split),),
)
