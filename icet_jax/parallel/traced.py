"""Controls inside compiled functions how activations are split over the mesh, and when weights are gathered.

The mesh is taken from the type of a traced array, so that models need not be given one. On one device these functions
return their input.
"""

import functools
from collections.abc import Iterator, Sequence
from typing import Any

import jax
from jax.sharding import AbstractDevice, AbstractMesh, NamedSharding, PartitionSpec

from icet_jax.parallel.sharding import ROWS, fit, partition_spec, path_name, row_shards
from icet_jax.typing import Array, ArrayLike, Float, Int, PyTree, Shaped

P = PartitionSpec
_MAX_SEND_BYTES = 1 << 28  # largest number of bytes that each device sends at a time


def mesh_of(*arrays: Any) -> AbstractMesh | None:
    """Returns the mesh of the first array that has one; None on one device or outside compiled functions."""
    return next((mesh for mesh in _meshes(arrays) if mesh.size > 1), None)


def target_device(*arrays: Any) -> AbstractDevice | None:
    """Returns the kind of device for which a function of these arrays is compiled; None if that is the default device.

    A mesh names its devices, even if it has only one. An `AbstractMesh` that was made without devices names none.
    """
    devices = (mesh.abstract_device for mesh in _meshes(arrays))
    return next((device for device in devices if device is not None), None)


def _meshes(arrays: Sequence[Any]) -> Iterator[AbstractMesh]:
    """Yields the meshes of traced arrays, also those of one device."""
    for array in arrays:
        if isinstance(array, jax.core.Tracer):
            mesh = jax.typeof(array).sharding.mesh
            if not mesh.empty:
                yield mesh


def by_rows(x: Float[Array, "B T E"]) -> Float[Array, "B T E"]:
    """Returns activations with a constraint that splits them over the mesh's row axes and along no other axis.

    Without the constraint, the compiler may split E as `fsdp` splits the weights: every device then computes all rows,
    and devices exchange partial sums as large as the activations. That is faster for few rows, as in a decoding step.
    This function therefore returns its input unchanged if there are few rows, or if they cannot be divided evenly.
    """
    mesh = _mesh_if_gathering_is_cheaper(x)
    return x if mesh is None else jax.lax.with_sharding_constraint(x, NamedSharding(mesh, P(ROWS)))


def gather_weights(weights: PyTree, x: Float[Array, "B T E"], stack: str = "layers") -> PyTree:
    """Gathers one layer's weights over `fsdp` if that moves fewer bytes than exchanging the activations `x`.

    Args:
      weights: one layer's slice of a stack of layers, or of its adapters (which may be None or empty).
      x: the layer's input.
      stack: name of the stack, which `sharding.RULES` expect before the paths in `weights`.

    Returns:
      The weights, gathered or unchanged; their gradients are split as the weights were.
    """
    mesh = _mesh_if_gathering_is_cheaper(x)
    if mesh is None:
        return weights

    def gather(path: tuple[Any, ...], leaf: Any) -> Any:
        return _gather_fsdp(leaf, P(*partition_spec(f"{stack}/{path_name(path)}")[1:]), mesh)

    return jax.tree_util.tree_map_with_path(gather, weights)


def gather_kernel(kernel: Float[Array, "..."], x: Shaped[ArrayLike, "B ..."], name: str) -> Float[Array, "..."]:
    """Gathers a weight matrix over `fsdp`, before a loop over parts of `x` that would gather it in each iteration.

    Args:
      kernel: the weight matrix or table.
      x: the rows that use it; if they cannot be divided evenly over the mesh, nothing is gathered.
      name: path of the matrix, as in `sharding.RULES`.

    Returns:
      The matrix, gathered or unchanged; its gradient is split as the matrix was.
    """
    mesh = mesh_of(x)
    return kernel if mesh is None or x.shape[0] % row_shards(mesh) else _gather_fsdp(kernel, partition_spec(name), mesh)


def take_exit_states(
    states: Float[Array, "X I P D"], layers: Int[Array, " N"], numbers: Int[Array, " N"] | None
) -> Float[Array, "N P D"]:
    """Returns `states[layers, numbers]`: for each of N results, the state of one image at one exit.

    The N results are split over the mesh's row axes, as the images are. Each device sends the states that it holds and
    receives those of its own results; without this function the compiler would copy all of `states` to every device.

    Args:
      states: hidden states of I images at X exits.
      layers: index of each result's exit.
      numbers: index of each result's image; a negative index gives a meaningless result. None takes every image in
        order.
    """
    if numbers is None:
        # Each image's states are on the device that needs them, so nothing is exchanged.
        return jax.vmap(lambda states_of_image, layer: states_of_image[layer], in_axes=(1, 0))(states, layers)
    mesh = mesh_of(states, layers)
    if mesh is None or states.shape[1] % row_shards(mesh) or numbers.shape[0] % row_shards(mesh):
        return states[layers, numbers]
    size = numbers.shape[0] * states[0, 0].size * states.dtype.itemsize
    parts = next(n for n in range(1, states.shape[2] + 1) if n * _MAX_SEND_BYTES >= size and states.shape[2] % n == 0)

    def take(states: Array, layers: Array, numbers: Array) -> Array:
        """Computes one device's results; `states` has the images of this device, the other arguments are complete."""
        local_numbers = numbers - jax.lax.axis_index(ROWS) * states.shape[1]
        is_local = ((local_numbers >= 0) & (local_numbers < states.shape[1]))[:, None, None]

        def exchange(piece: Array) -> Array:
            local_states = jax.numpy.where(is_local, piece[layers, local_numbers], 0)
            return jax.lax.psum_scatter(local_states, ROWS, tiled=True)

        pieces = states.reshape(*states.shape[:2], parts, -1, states.shape[3])
        if parts == 1:
            return exchange(pieces[:, :, 0])
        results = jax.lax.map(lambda index: exchange(pieces[:, :, index]), jax.numpy.arange(parts))
        return results.swapaxes(0, 1).reshape(-1, *states.shape[2:])

    return jax.shard_map(
        take, mesh=mesh, in_specs=(P(None, ROWS), P(), P()), out_specs=P(ROWS), check_vma=False
    )(states, layers, numbers)  # fmt: skip


def _gather_fsdp(x: Array, spec: PartitionSpec, mesh: AbstractMesh) -> Array:
    """Returns the array `x`, whose sharding is `spec`, with the same sharding except that `fsdp` splits no axis."""
    split = fit(spec, x.shape, mesh)
    others = (tuple(name for name in axis if name != "fsdp") if isinstance(axis, tuple) else axis for axis in split)
    gathered = P(*(None if axis in ("fsdp", ()) else axis for axis in others))
    return x if gathered == split else _reshard(NamedSharding(mesh, split), NamedSharding(mesh, gathered), x)


def _mesh_if_gathering_is_cheaper(x: Float[Array, "B T E"]) -> AbstractMesh | None:
    """Returns the mesh of `x` if gathering a weight matrix [E, E] moves fewer bytes than exchanging `x`; else None.

    The result is also None on one device, and if the rows of `x` cannot be divided evenly.
    """
    mesh = mesh_of(x)
    if mesh is None or x.shape[0] % row_shards(mesh) or x.shape[0] * x.shape[1] <= x.shape[2]:
        return None
    return mesh


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _reshard(before: NamedSharding, after: NamedSharding, x: Array) -> Array:
    """Returns `x` with the sharding `after`; its gradient gets the sharding `before`."""
    # `x` is constrained to `before`, too. Otherwise the compiler would merge equal slices of a stack and gather all
    # layers at once, for example before a decoding loop.
    return jax.lax.with_sharding_constraint(jax.lax.with_sharding_constraint(x, before), after)


_reshard.defvjp(
    lambda before, after, x: (_reshard(before, after, x), None),
    lambda before, after, _, dx: (jax.lax.with_sharding_constraint(dx, before),),
)
