"""Inside compiled functions: the mesh on which an array lies, where activations belong, and when weights travel.

Types of traced arrays tell their mesh, so that models need not be told; on one device nothing here does anything.
"""

import functools
from typing import Any

import jax
from jax.sharding import AbstractMesh, NamedSharding, PartitionSpec

from icet_jax.parallel.sharding import ROWS, fit, partition_spec, path_name, row_shards

P = PartitionSpec
_TAKEN_AT_ONCE = 1 << 28  # bytes of what each device gives away at once


def mesh_of(*arrays: Any) -> AbstractMesh | None:
    """The mesh of several devices on which traced arrays lie; None on one device and outside of compiled functions."""
    for array in arrays:
        mesh = jax.typeof(array).sharding.mesh if isinstance(array, jax.core.Tracer) else None
        if mesh is not None and mesh.size > 1:
            return mesh
    return None


def by_rows(x: Any) -> Any:
    """Activations `[B, T, E]` split over the mesh's row axes, each row whole on its devices.

    Left to itself the compiler may split E as `fsdp` splits the kernels: every device then computes all rows, and they
    add up partial sums as large as the activations. Where those are few, in a decoding step, that is right: the kernels
    stay where they are, and nothing is done here. So it is where the rows do not divide.
    """
    mesh = _mesh_of_many(x)
    return x if mesh is None else jax.lax.with_sharding_constraint(x, NamedSharding(mesh, P(ROWS)))


def gathered(weights: Any, x: Any, stack: str = "layers") -> Any:
    """One layer's weights, whole over `fsdp` if it is they that travel to the activations `x [B, T, E]`, see `by_rows`.

    Args:
      weights: a slice of a stack of layers, or of adapters (then also None or empty); paths as in `sharding.RULES`.
      x: the layer's input.
      stack: name of the stack, for those rules.

    Returns:
      The weights; their gradients are split as the weights were.
    """
    mesh = _mesh_of_many(x)
    if mesh is None:
        return weights

    def gather(path: tuple[Any, ...], leaf: Any) -> Any:
        return _whole(leaf, P(*partition_spec(f"{stack}/{path_name(path)}")[1:]), mesh)

    return jax.tree_util.tree_map_with_path(gather, weights)


def gathered_once(kernel: Any, x: Any, name: str) -> Any:
    """A kernel or a table, whole over `fsdp`: for a loop over parts of `x [B, ...]`, each of which would gather it.

    Args:
      kernel: of one layer.
      x: the rows that take it; where they do not divide nothing is done.
      name: path of the kernel, as in `sharding.RULES`.

    Returns:
      The kernel; its gradient is split as it was.
    """
    mesh = mesh_of(x)
    return kernel if mesh is None or x.shape[0] % row_shards(mesh) else _whole(kernel, partition_spec(name), mesh)


def taken(states: Any, layers: Any, numbers: Any) -> Any:
    """`states[layers, numbers]` of `states [X, I, P, D]` whose I lie over the mesh's row axes, as the N taken will.

    Each device gives what it has and gets what is its own. Left to itself the compiler would bring all of `states` to
    every device.

    Args:
      states: of I images at X exits.
      layers: of each of the N, int.
      numbers: of each, int; what one below 0 gets is meaningless. None takes every image in its place.

    Returns:
      [N, P, D].
    """
    if numbers is None:
        return jax.vmap(lambda own, layer: own[layer], in_axes=(1, 0))(states, layers)  # nothing travels
    mesh = mesh_of(states, layers)
    if mesh is None or states.shape[1] % row_shards(mesh) or numbers.shape[0] % row_shards(mesh):
        return states[layers, numbers]
    size = numbers.shape[0] * states[0, 0].size * states.dtype.itemsize
    parts = next(n for n in range(1, states.shape[2] + 1) if n * _TAKEN_AT_ONCE >= size and states.shape[2] % n == 0)

    def take(states: Any, layers: Any, numbers: Any) -> Any:
        own = numbers - jax.lax.axis_index(ROWS) * states.shape[1]
        here = ((own >= 0) & (own < states.shape[1]))[:, None, None]

        def part(cut: Any) -> Any:
            return jax.lax.psum_scatter(jax.numpy.where(here, cut[layers, own], 0), ROWS, tiled=True)

        cuts = states.reshape(*states.shape[:2], parts, -1, states.shape[3])
        if parts == 1:
            return part(cuts[:, :, 0])
        found = jax.lax.map(lambda number: part(cuts[:, :, number]), jax.numpy.arange(parts))
        return found.swapaxes(0, 1).reshape(-1, *states.shape[2:])

    return jax.shard_map(
        take, mesh=mesh, in_specs=(P(None, ROWS), P(), P()), out_specs=P(ROWS), check_vma=False
    )(states, layers, numbers)  # fmt: skip


def _whole(x: Any, spec: PartitionSpec, mesh: AbstractMesh) -> Any:
    split = fit(spec, x.shape, mesh)
    others = (tuple(name for name in axis if name != "fsdp") if isinstance(axis, tuple) else axis for axis in split)
    whole = P(*(None if axis in ("fsdp", ()) else axis for axis in others))
    return x if whole == split else _move(NamedSharding(mesh, split), NamedSharding(mesh, whole), x)


def _mesh_of_many(x: Any) -> AbstractMesh | None:
    """The mesh, if gathering kernels of about [E, E] moves less than exchanging activations [B, T, E] does."""
    mesh = mesh_of(x)
    if mesh is None or x.shape[0] % row_shards(mesh) or x.shape[0] * x.shape[1] <= x.shape[2]:
        return None
    return mesh


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _move(split: NamedSharding, whole: NamedSharding, x: Any) -> Any:
    """`x` as `whole` has it; its gradient as `split` has it."""
    # Said of `x` too: the compiler makes one of equal slices of a stack, and would leave all of them whole, for example
    # a decoding loop's, which then holds the weights of all layers.
    return jax.lax.with_sharding_constraint(jax.lax.with_sharding_constraint(x, split), whole)


_move.defvjp(
    lambda split, whole, x: (_move(split, whole, x), None),
    lambda split, whole, _, dx: (jax.lax.with_sharding_constraint(dx, split),),
)
