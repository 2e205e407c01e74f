"""The device mesh: `data` splits rows, `fsdp` rows and weights, `tensor` heads and feed-forward columns."""

import math
from collections.abc import Sequence
from typing import Any

import jax
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh

from icet_jax.errors import UserError

AXES = ("data", "fsdp", "tensor")


def mesh_shape(
    count: int, *, data: int = -1, fsdp: int = 1, tensor: int = 1, seen: str = ""
) -> tuple[int, int, int]:  # fmt: skip
    """Devices along `AXES` for `count` devices in all; one size may be -1 and takes what the others leave.

    Args:
      count: of the devices.
      data: devices along the axis of that name.
      fsdp: the same.
      tensor: the same.
      seen: what the devices are and how to have others, for the error where they do not fit.

    Raises:
      UserError: a size is neither positive nor -1, several are -1, or the sizes do not multiply to `count`.
    """
    sizes = dict(zip(AXES, (data, fsdp, tensor), strict=True))
    asked = ", ".join(f"{axis}={size}" for axis, size in sizes.items())
    for axis, size in sizes.items():
        if size < 1 and size != -1:
            raise UserError(f"mesh.{axis}={size}: must be a positive number of devices, or -1 for the rest")
    free = [axis for axis, size in sizes.items() if size == -1]
    if len(free) > 1:
        raise UserError(f"mesh ({asked}): only one axis may be -1")
    taken = math.prod(size for size in sizes.values() if size != -1)
    if count % taken or (not free and taken != count):
        named = [f"config.mesh.{axis}={size}" for axis, size in sizes.items() if size not in (1, -1)]
        raise UserError(
            f"{', '.join(named) or 'config.mesh.data=1'}: mesh ({asked}) does not fit {count} "
            f"device{'s' * (count != 1)}{seen}; the sizes must multiply to that number, and one of them may be -1, "
            "which takes the rest"
        )
    for axis in free:
        sizes[axis] = count // taken
    return sizes["data"], sizes["fsdp"], sizes["tensor"]


def make_mesh(*, data: int = -1, fsdp: int = 1, tensor: int = 1, devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh over `devices` (all of this job's by default) with automatic sharding along `AXES`.

    Raises:
      UserError: see `mesh_shape`.
    """
    devices = jax.devices() if devices is None else devices
    shape = mesh_shape(len(devices), data=data, fsdp=fsdp, tensor=tensor)
    automatic = (AxisType.Auto,) * len(AXES)
    try:
        return jax.make_mesh(shape, AXES, axis_types=automatic, devices=devices)
    except NotImplementedError:
        # A size that no whole axes of the chips' torus make up, such as 8 of 4 x 4 x 4: split one of them, as
        # jax.make_mesh does on v5e alone.
        places = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
        return Mesh(places, AXES, axis_types=automatic)


def visible_shape(*, data: int = -1, fsdp: int = 1, tensor: int = 1) -> tuple[int, int, int]:
    """`mesh_shape` of all of this job's devices.

    Raises:
      UserError: see `mesh_shape`.
    """
    seen = f", those that jax sees ({jax.default_backend()})"
    return mesh_shape(jax.device_count(), data=data, fsdp=fsdp, tensor=tensor, seen=seen)


def visible_mesh(*, data: int = -1, fsdp: int = 1, tensor: int = 1) -> Mesh | None:
    """The mesh over all of this job's devices; None where that is one device, which needs none.

    Raises:
      UserError: the sizes do not fit these devices, one device included.
    """
    visible_shape(data=data, fsdp=fsdp, tensor=tensor)
    return make_mesh(data=data, fsdp=fsdp, tensor=tensor) if jax.device_count() > 1 else None


def abstract_mesh(shape: tuple[int, ...]) -> AbstractMesh:
    """A mesh of `shape` along `AXES` whose devices are not here, sharded automatically as `make_mesh`'s."""
    return AbstractMesh(shape, AXES, axis_types=(AxisType.Auto,) * len(AXES))  # jax 0.12 means Explicit by default
