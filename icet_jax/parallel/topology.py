"""Describes chips that need not be present: their speeds, and the devices of a named topology, to compile for."""

import dataclasses
import importlib.util
import math
import os
import re

import jax

from icet_jax.errors import UserError
from icet_jax.parallel import gpu_targets

_GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """Describes one kind of chip; a number that is None is unknown.

    Attributes:
      name: name in a topology, such as "v5e" in "v5e:8x8".
      memory: bytes that a program may use.
      flops: peak number of dense bfloat16 operations per second.
      bandwidth: bytes per second between the chip and its memory.
      links: bytes per second that a chip sends to its neighbours over all links.
      source: where `flops`, `bandwidth` and `links` are published.
      options: options of libtpu with which one device is one chip; None if the chip is not a TPU.
      target: description of the GPU for XLA; None if the chip is not a GPU.
    """

    name: str
    memory: float | None = None
    flops: float | None = None
    bandwidth: float | None = None
    links: float | None = None
    source: str = ""
    options: dict[str, str] | None = None
    target: gpu_targets.GpuTarget | None = None

    @property
    def compute_capability(self) -> float:
        """The compute capability of a GPU, such as 9.0; 0 for other chips."""
        return 0.0 if self.target is None else float(".".join(map(str, self.target.capability)))


def _gpu(name: str, memory: float, flops: float, bandwidth: float, links: float) -> Chip:
    """Returns a GPU with the numbers of its data sheet."""
    return Chip(name, memory, flops, bandwidth, links, _NVIDIA_SOURCE, target=gpu_targets.TARGETS[name])


_TPU_SOURCE = "Google Cloud's TPU documentation (system architecture, per chip)"
_NVIDIA_SOURCE = "NVIDIA's data sheet (SXM, dense)"
# The memory of a TPU is what libtpu's compiler allows for a program, a little less than the chip has.
CHIPS = {
    chip.name: chip
    for chip in (
        Chip("v4", 30.75 * _GIB, 275e12, 1228e9, 300e9, _TPU_SOURCE, {"chip_config_name": "megacore"}),
        Chip("v5e", 15.75 * _GIB, 197e12, 819e9, 200e9, _TPU_SOURCE, {}),
        Chip("v5p", 95.73 * _GIB, 459e12, 2765e9, 600e9, _TPU_SOURCE, {}),
        Chip("v6e", 31.24 * _GIB, 918e12, 1640e9, 448e9, _TPU_SOURCE, {}),
        _gpu("a100", 80e9, 312e12, 2039e9, 300e9),
        _gpu("h100", 80e9, 989e12, 3350e9, 450e9),
        _gpu("h200", 141e9, 989e12, 4800e9, 450e9),
        _gpu("b200", 180e9, 2250e12, 8000e9, 900e9),
        Chip("cpu"),
    )
}


@dataclasses.dataclass(frozen=True)
class Topology:
    """Describes several chips of one kind, as named by the user.

    Attributes:
      name: the user's text: "v5e:8x8", "h100:8", "cpu:1".
      chip: kind of the chips.
      count: number of chips.
    """

    name: str
    chip: Chip
    count: int

    def devices(self) -> list[jax.Device] | None:
        """Returns a device for each chip, to compile programs for; None if there is no compiler for these GPUs here.

        Raises:
          UserError: libtpu is not installed or does not know the topology, there are fewer CPU devices than requested,
            or the installed compiler for GPUs does not work.
        """
        if self.chip.name == "cpu":
            return _cpu_devices(self)
        if self.chip.target is not None:
            return _gpu_devices(self, self.chip.target) if gpu_targets.installed() else None
        return _tpu_devices(self)


def parse(text: str) -> Topology:
    """Returns the topology named `CHIP:AxB[xC]` (TPUs) or `CHIP:COUNT` (GPUs and CPUs).

    Raises:
      UserError: the chip or the shape is unknown.
    """
    name, _, shape = text.partition(":")
    known = ", ".join(CHIPS)
    if name not in CHIPS:
        raise UserError(f"--topology={text}: unknown chip '{name}'; known are {known}; type for example v5e:8x8")
    chip = CHIPS[name]
    tpu = chip.options is not None
    pattern, example = (r"[1-9]\d*(x[1-9]\d*){1,2}", f"{name}:4x4") if tpu else (r"[1-9]\d*", f"{name}:8")
    if not re.fullmatch(pattern, shape):
        raise UserError(f"--topology={text}: '{shape}' is not a shape of {name} chips; type for example {example}")
    return Topology(text, chip, math.prod(int(size) for size in shape.split("x")))


# {pattern of `jax.Device.device_kind`: name of the chip}. GPUs of the same name in another form (PCIe, NVL) are slower.
_KINDS = {
    r"TPU v4": "v4",
    r"TPU v5( lite|e)": "v5e",
    r"TPU v5p?": "v5p",
    r"TPU v6( lite|e)": "v6e",
    r"NVIDIA A100.*": "a100",
    r"NVIDIA H100(?!.*(PCIe|NVL)).*": "h100",
    r"NVIDIA H200(?!.*NVL).*": "h200",
    r"NVIDIA B200.*": "b200",
}


def chip_of(device_kind: str) -> Chip | None:
    """Returns the chip that jax calls `device_kind` (an attribute of `jax.Device`); None if it is not in `CHIPS`."""
    return next((CHIPS[name] for pattern, name in _KINDS.items() if re.fullmatch(pattern, device_kind)), None)


def _cpu_devices(topology: Topology) -> list[jax.Device]:
    """Returns as many of this process's CPU devices as the topology has."""
    devices = jax.devices("cpu")
    if len(devices) < topology.count:
        raise UserError(
            f"--topology={topology.name}: {len(devices)} CPU devices here; set "
            f"XLA_FLAGS=--xla_force_host_platform_device_count={topology.count}"
        )
    return devices[: topology.count]


def _tpu_devices(topology: Topology) -> list[jax.Device]:
    """Returns libtpu's descriptions of the topology's devices, which need not be present."""
    if importlib.util.find_spec("libtpu") is None:
        raise UserError(f"--topology={topology.name}: compiling for TPUs needs the `tpu` extra: pip install 'jax[tpu]'")
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # otherwise libtpu queries the metadata service of TPU machines
    # Otherwise libtpu would wait for another process of this machine that uses a TPU. Nothing here runs on a TPU.
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    from jax.experimental import topologies

    try:
        description = topologies.get_topology_desc(topology.name, platform="tpu", **(topology.chip.options or {}))
    except Exception as error:  # jax raises exceptions of several types
        reason = str(error).splitlines()[0]
        raise UserError(f"--topology={topology.name}: libtpu does not know it ({reason})") from error
    if len(description.devices) != topology.count:
        raise UserError(f"--topology={topology.name}: libtpu has {len(description.devices)} devices for it")
    return list(description.devices)


def _gpu_devices(topology: Topology, target: gpu_targets.GpuTarget) -> list[jax.Device]:
    """Returns XLA's descriptions of the topology's GPUs, all in one machine, which need not be present."""
    from jax.experimental import topologies

    shape = f"1x1x{topology.count}"  # partitions, machines in each, GPUs in each
    try:
        description = topologies.get_topology_desc(
            platform="cuda", target_config=gpu_targets.target_config(target), topology=shape
        )
    except Exception as error:  # jax raises exceptions of several types
        reason = str(error).splitlines()[0]
        raise UserError(
            f"--topology={topology.name}: jax {jax.__version__} cannot compile for GPUs here ({reason}); "
            "install the extra again: pip install 'icet-jax[plan-gpu]'"
        ) from error
    return list(description.devices)
