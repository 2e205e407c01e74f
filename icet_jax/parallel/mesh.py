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
    count: int, *, data: int = -1, fsdp: int = 1, tensor: int = 1, devices: str = ""
) -> tuple[int, int, int]:  # fmt: skip
    """Returns how many of `count` devices there are along each of `AXES`.

    Args:
      count: number of devices.
      data: number of devices along the axis `data`; -1 for as many as the other axes leave.
      fsdp: the same along the axis `fsdp`.
      tensor: the same along the axis `tensor`.
      devices: description of the devices for error messages, appended to their number.

    Raises:
      UserError: a size is neither positive nor -1, several are -1, or the sizes do not multiply to `count`.
    """
    sizes = dict(zip(AXES, (data, fsdp, tensor), strict=True))
    description = ", ".join(f"{axis}={size}" for axis, size in sizes.items())
    for axis, size in sizes.items():
        if size < 1 and size != -1:
            raise UserError(f"mesh.{axis}={size}: must be a positive number of devices, or -1 for the rest")
    free = [axis for axis, size in sizes.items() if size == -1]
    if len(free) > 1:
        raise UserError(f"mesh ({description}): only one axis may be -1")
    product = math.prod(size for size in sizes.values() if size != -1)
    if count % product or (not free and product != count):
        named = [f"config.mesh.{axis}={size}" for axis, size in sizes.items() if size not in (1, -1)]
        raise UserError(
            f"{', '.join(named) or 'config.mesh.data=1'}: mesh ({description}) does not fit {count} "
            f"device{'s' * (count != 1)}{devices}; the sizes must multiply to that number, and one of them may be -1, "
            "which takes the rest"
        )
    for axis in free:
        sizes[axis] = count // product
    return sizes["data"], sizes["fsdp"], sizes["tensor"]


def make_mesh(*, data: int = -1, fsdp: int = 1, tensor: int = 1, devices: Sequence[Any] | None = None) -> Mesh:
    """Returns a mesh with the axes `AXES`, along which the compiler shards arrays automatically.

    Args:
      data: see `mesh_shape`.
      fsdp: see `mesh_shape`.
      tensor: see `mesh_shape`.
      devices: the devices; None for all of this run, in all processes.

    Raises:
      UserError: see `mesh_shape`.
    """
    devices = jax.devices() if devices is None else devices
    shape = mesh_shape(len(devices), data=data, fsdp=fsdp, tensor=tensor)
    automatic = (AxisType.Auto,) * len(AXES)
    try:
        return jax.make_mesh(shape, AXES, axis_types=automatic, devices=devices)
    except NotImplementedError:
        # The size of a mesh axis, such as 8, may not be a product of sizes of physical axes, such as 4 x 4 x 4. Then a
        # physical axis must be split, which jax.make_mesh does only on v5e.
        device_array = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
        return Mesh(device_array, AXES, axis_types=automatic)


def visible_shape(*, data: int = -1, fsdp: int = 1, tensor: int = 1) -> tuple[int, int, int]:
    """Returns `mesh_shape` for all devices of this run, in all processes.

    Raises:
      UserError: see `mesh_shape`.
    """
    devices = f", those that jax sees ({jax.default_backend()})"
    return mesh_shape(jax.device_count(), data=data, fsdp=fsdp, tensor=tensor, devices=devices)


def visible_mesh(*, data: int = -1, fsdp: int = 1, tensor: int = 1) -> Mesh | None:
    """Returns the mesh over all devices of this run, in all processes; None if there is only one device.

    Raises:
      UserError: the sizes do not fit the number of devices, even if there is only one.
    """
    visible_shape(data=data, fsdp=fsdp, tensor=tensor)
    return make_mesh(data=data, fsdp=fsdp, tensor=tensor) if jax.device_count() > 1 else None


def abstract_mesh(shape: tuple[int, ...]) -> AbstractMesh:
    """Returns a mesh like that of `make_mesh`, with `shape` along `AXES`, for devices that need not be present."""
    return AbstractMesh(shape, AXES, axis_types=(AxisType.Auto,) * len(AXES))  # jax 0.12 means Explicit by default
