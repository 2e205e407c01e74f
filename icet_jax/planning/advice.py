"""Advises what to change in a config whose run does not fit on the chips."""

import math
from typing import Any

from ml_collections import ConfigDict

from icet_jax.config import group_size, trained_parts
from icet_jax.parallel.mesh import abstract_mesh
from icet_jax.parallel.sharding import placed, row_shards, shardings
from icet_jax.planning.ahead import AbstractRun, bytes_per_device

_MORE_CHIPS = "more chips along mesh.fsdp or mesh.tensor: each has one row at a time already"
_FIXED_SHARE = 0.6  # share of a chip's memory that weights and train state may take; the phases need the rest


def fixes(
    config: ConfigDict, run: AbstractRun, broken: list[str], fixed: int, memory: float | None
) -> list[str]:  # fmt: skip
    """Returns lines that name the phases that do not fit, and changes to the config that may help.

    The list is empty if `broken` is. A changed config must be planned again.

    Args:
      config: config of the run.
      run: the run as it was planned.
      broken: names of the phases that do not fit.
      fixed: bytes of weights and train state on each chip.
      memory: bytes of memory of a chip; None if that is unknown.
    """
    if not broken:
        return []
    lines = [f"does not fit: {', '.join(broken)}"]
    if memory is not None and fixed > _FIXED_SHARE * memory:
        return [*lines, f"fix (then plan again): {_split_more(config, run, _FIXED_SHARE * memory)}"]
    shards = row_shards(run.mesh)
    return lines + [f"fix {phase} (then plan again): {_reduce_phase(config, phase, shards)}" for phase in broken]


def _split_more(config: ConfigDict, run: AbstractRun, limit: float) -> str:
    """Returns advice after which weights and train state take at most `limit` bytes per chip."""
    sizes = run.mesh.shape
    count = math.prod(sizes.values())
    chips = count // sizes["tensor"]
    for fsdp in range(sizes["fsdp"] + 1, chips + 1):
        if chips % fsdp == 0 and _fixed_bytes(run, (chips // fsdp, fsdp, sizes["tensor"])) <= limit:
            return f"split weights and train state over more chips: --config.mesh.data=-1 --config.mesh.fsdp={fsdp}"
    adapters = (
        ""
        if config.lora.rank or "policy" not in trained_parts(config)
        else ", or train adapters (config.lora.rank above 0)"
    )
    return f"{count} chips do not hold weights and train state; take more chips{adapters}"


def _fixed_bytes(run: AbstractRun, mesh_sizes: tuple[int, int, int]) -> int:
    """Returns the bytes per chip of weights and train state on a mesh of the sizes (data, fsdp, tensor)."""
    mesh = abstract_mesh(mesh_sizes)
    trees: tuple[Any, ...] = (run.vlm.params, run.state)
    return sum(bytes_per_device(placed(tree, shardings(tree, mesh))) for tree in trees)


def _reduce_phase(config: ConfigDict, phase: str, shards: int) -> str:
    """Returns a change to the config that makes a phase take less memory.

    `shards` is the number of chips over which the rows are split.
    """
    if phase.startswith("sweep"):
        rows = config.sweep.batch_size
        return _MORE_CHIPS if rows % (2 * shards) else f"--config.sweep.batch_size={rows // 2}"
    lppo, rows = config.lppo, config.data.batch_size
    if phase == "rollout":
        smaller = f"a smaller batch, --config.data.batch_size={rows // 2}, or more chips"
        return _MORE_CHIPS if rows % (2 * math.lcm(lppo.minibatches, group_size(config)) * shards) else smaller
    if phase == "update" and config.model.remat != "full":
        return "--config.model.remat=full"
    slices = lppo.minibatches * lppo.accumulation
    return _MORE_CHIPS if rows % (2 * slices * shards) else f"--config.lppo.accumulation={2 * lppo.accumulation}"
