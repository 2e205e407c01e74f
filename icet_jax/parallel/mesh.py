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
    """Returns the number of devices along `AXES` for `count` devices; one size may be -1 and takes the rest.

    Args:
      count: number of devices.
      data: devices along the axis of that name.
      fsdp: the same.
      tensor: the same.
      seen: description of the devices and how to get others, for error messages.

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
    product = math.prod(size for size in sizes.values() if size != -1)
    if count % product or (not free and product != count):
        named = [f"config.mesh.{axis}={size}" for axis, size in sizes.items() if size not in (1, -1)]
        raise UserError(
            f"{', '.join(named) or 'config.mesh.data=1'}: mesh ({asked}) does not fit {count} "
            f"device{'s' * (count != 1)}{seen}; the sizes must multiply to that number, and one of them may be -1, "
            "which takes the rest"
        )
    for axis in free:
        sizes[axis] = count // product
    return sizes["data"], sizes["fsdp"], sizes["tensor"]


def make_mesh(*, data: int = -1, fsdp: int = 1, tensor: int = 1, devices: Sequence[Any] | None = None) -> Mesh:
    """Returns a mesh over `devices` (all of this job by default) with automatic sharding along `AXES`.

    Raises:
      UserError: see `mesh_shape`.
    """
    devices = jax.devices() if devices is None else devices
    shape = mesh_shape(len(devices), data=data, fsdp=fsdp, tensor=tensor)
    automatic = (AxisType.Auto,) * len(AXES)
    try:
        return jax.make_mesh(shape, AXES, axis_types=automatic, devices=devices)
    except NotImplementedError:
        # The size is not a product of whole axes of the chips' torus, such as 8 of 4 x 4 x 4: split one of them, as
        # jax.make_mesh does only on v5e.
        places = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
        return Mesh(places, AXES, axis_types=automatic)


def visible_shape(*, data: int = -1, fsdp: int = 1, tensor: int = 1) -> tuple[int, int, int]:
    """Returns `mesh_shape` for all of this job's devices.

    Raises:
      UserError: see `mesh_shape`.
    """
    seen = f", those that jax sees ({jax.default_backend()})"
    return mesh_shape(jax.device_count(), data=data, fsdp=fsdp, tensor=tensor, seen=seen)


def visible_mesh(*, data: int = -1, fsdp: int = 1, tensor: int = 1) -> Mesh | None:
    """Returns the mesh over all of this job's devices; None for a single device, which needs none.

    Raises:
      UserError: the sizes do not fit these devices, also for a single device.
    """
    visible_shape(data=data, fsdp=fsdp, tensor=tensor)
    return make_mesh(data=data, fsdp=fsdp, tensor=tensor) if jax.device_count() > 1 else None


def abstract_mesh(shape: tuple[int, ...]) -> AbstractMesh:
    """Returns a mesh of `shape` along `AXES` for devices that are not present, sharded automatically as in
    `make_mesh`."""
    return AbstractMesh(shape, AXES, axis_types=(AxisType.Auto,) * len(AXES))  # jax 0.12 means Explicit by default
