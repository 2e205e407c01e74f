"""Describes NVIDIA GPUs to XLA, which then compiles programs for them on a machine without a GPU.

XLA takes the description as the text of its protocol buffer `GpuTargetConfigProto`. The numbers are the hardware's, as
XLA's own descriptions of the same cards have them (openxla/xla, `xla/backends/gpu/target_config/specs`).
"""

import dataclasses
import importlib.util

PACKAGES = ("jax_cuda13_plugin", "nvidia.cudnn", "nvidia.cu13")
"""Modules that must be installed to compile for GPUs; all come with the extra `plan-gpu`."""

# XLA's numbers of types (`PrimitiveType`): [operations of one scalar unit, of one matrix unit] in a clock cycle are
# given for int8 and int32, then float16, float32 and float64, then bfloat16, then the kinds of float8 and smaller.
_INTEGERS, _F16, _F32, _F64, _BF16 = (2, 6), 10, 11, 12, 16
_SMALL_FLOATS = (19, 20, 23, 24, 25, 28, 29, 33, 35, 36)


@dataclasses.dataclass(frozen=True)
class GpuTarget:
    """Holds what XLA must know of a GPU; sizes are in bytes.

    Attributes:
      name: name that the driver gives the card (`jax.Device.device_kind`).
      capability: compute capability, (major, minor).
      cores: number of streaming multiprocessors.
      clock: highest clock rate in GHz.
      memory: size of the memory.
      bandwidth: bytes per second between the card and its memory.
      l2_cache: size of the second-level cache.
      shared: shared memory of a multiprocessor; a block may use 1 KiB less.
      scalar_units: float32 units of a multiprocessor.
      matrix_clock: clock rate of the matrix units in GHz; 0 leaves the rates of scalar and matrix units to XLA.
      matrix_ops: bfloat16 operations of one of the four matrix units in a clock cycle.
    """

    name: str
    capability: tuple[int, int]
    cores: int
    clock: float
    memory: int
    bandwidth: int
    l2_cache: int
    shared: int = 233472
    scalar_units: int = 128
    matrix_clock: float = 0.0
    matrix_ops: int = 0


_A100 = GpuTarget(
    "NVIDIA A100-SXM4-80GB", capability=(8, 0), cores=108, clock=1.41, memory=85100068864, bandwidth=2039040000000,
    l2_cache=41943040, shared=167936, scalar_units=64,
)  # fmt: skip
_H200 = GpuTarget(
    "NVIDIA H200", capability=(9, 0), cores=132, clock=1.98, memory=151397597184, bandwidth=4800000000000,
    l2_cache=52428800, matrix_clock=1.8295201, matrix_ops=512,
)  # fmt: skip
_B200 = GpuTarget(
    "NVIDIA B200", capability=(10, 0), cores=148, clock=1.965, memory=191514411008, bandwidth=7672320000000,
    l2_cache=132644864, matrix_clock=1.8353101, matrix_ops=1024,
)  # fmt: skip
TARGETS: dict[str, GpuTarget] = {
    "a100": _A100,
    "h100": dataclasses.replace(_H200, name="NVIDIA H100 80GB HBM3", memory=84942979072, bandwidth=3352320000000),
    "h200": _H200,
    "b200": _B200,
}
"""{name of the chip in a topology: its description}."""


def installed() -> bool:
    """Returns whether programs can be compiled for GPUs here, that is, whether the extra `plan-gpu` is installed."""
    try:
        return all(importlib.util.find_spec(package) is not None for package in PACKAGES)
    except ModuleNotFoundError:  # of the package that contains it
        return False


def target_config(target: GpuTarget) -> str:
    """Returns the description of a GPU as XLA reads it, the text of a `GpuTargetConfigProto`."""
    major, minor = target.capability
    device = {
        "threads_per_block_limit": 1024,
        "threads_per_warp": 32,
        "shared_memory_per_block": 49152,
        "shared_memory_per_core": target.shared,
        "threads_per_core_limit": 2048,
        "core_count": target.cores,
        "fpus_per_core": target.scalar_units,
        "block_dim_limit_x": 2**31 - 1,
        "block_dim_limit_y": 65535,
        "block_dim_limit_z": 65535,
        "memory_bandwidth": target.bandwidth,
        "l2_cache_size": target.l2_cache,
        "clock_rate_ghz": target.clock,
        "device_memory_size": target.memory,
        "shared_memory_per_block_optin": target.shared - 1024,
        "registers_per_core_limit": 65536,
        "registers_per_block_limit": 65536,
        "thread_dim_limit_x": 1024,
        "thread_dim_limit_y": 1024,
        "thread_dim_limit_z": 64,
        "device_address_bits": 64,
    }
    lines = [f"{name}: {value}" for name, value in device.items()]
    features = "ACCELERATED_FEATURES" if major >= 9 else "NONE"
    lines.append(f"cuda_compute_capability {{ major: {major} minor: {minor} feature_extension: {features} }}")
    lines += [f'name: "{target.name}"', 'device_vendor: "NVIDIA Corporation"', *_rates(target)]
    lines += [f'{version}: "12.8.0"' for version in ("runtime_version", "compile_time_toolkit_version")]
    lines += ['driver_version: "13.0.0"', 'dnn_version: "9.10.0"', "device_interconnect_info { active_links: 18 }"]
    return "\n".join([
        f"gpu_device_info {{ {' '.join(lines)} }}",
        'platform_name: "CUDA"',
        "dnn_version_info { major: 9 minor: 10 patch: 0 }",
        "runtime_version { major: 12 minor: 8 patch: 0 }",
        f'device_description_str: "{target.name}"',
    ])  # fmt: skip


def _rates(target: GpuTarget) -> list[str]:
    """Returns the lines with the speeds of scalar and matrix units; none if the target leaves them to XLA."""
    if not target.matrix_ops:
        return []
    scalar = {4: (64, 1), 8: (64, 1), _F16: (128, 2), _F32: (128, 1), _F64: (64, 1), _BF16: (128, 2)}
    half = target.matrix_ops
    matrix = dict.fromkeys((*_INTEGERS, *_SMALL_FLOATS), 2 * half) | {_F16: half, _BF16: half, _F32: half // 2}
    return [
        _unit("scalar", {kind: (target.clock, *rate) for kind, rate in scalar.items()}),
        _unit("matrix", {kind: (target.matrix_clock, 4, ops) for kind, ops in sorted(matrix.items())}),
    ]


def _unit(name: str, rates: dict[int, tuple[float, int, int]]) -> str:
    """Returns the description of one kind of unit from {XLA's number of a type: (GHz, units, operations)}."""
    rows = (
        f"rate_infos {{ key: {kind} value {{ clock_rate_ghz: {clock} units_per_core: {units} ops_per_clock: {ops} }} }}"
        for kind, (clock, units, ops) in rates.items()
    )
    return f"{name}_unit_description {{ {' '.join(rows)} }}"
