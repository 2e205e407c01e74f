"""Inside compiled functions: the mesh on which an array lies, where activations belong, and when weights travel.

Types of traced arrays tell their mesh, so that models need not be told; on one device nothing here does anything.
"""

import functools
from typing import Any

import jax
from jax.sharding import AbstractMesh, NamedSharding, PartitionSpec

from icet_jax.parallel.sharding import ROWS, fit, partition_spec, path_name, row_shards

P = PartitionSpec


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
    """A kernel, whole over `fsdp`, for a loop over parts of activations `x [B, ...]`, each of which would gather it.

    Args:
      kernel: of one layer.
      x: what all turns of the loop take together; where its rows do not divide nothing is done.
      name: path of the kernel, as in `sharding.RULES`.

    Returns:
      The kernel; its gradient is split as it was.
    """
    mesh = mesh_of(x)
    return kernel if mesh is None or x.shape[0] % row_shards(mesh) else _whole(kernel, partition_spec(name), mesh)


def _whole(x: Any, spec: PartitionSpec, mesh: AbstractMesh) -> Any:
    split = fit(spec, x.shape, mesh)
    whole = P(*(None if axis == "fsdp" else axis for axis in split))
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
