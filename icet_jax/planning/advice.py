"""What to change in a config whose plan does not fit."""

import math
from typing import Any

from ml_collections import ConfigDict

from icet_jax.parallel.mesh import abstract_mesh
from icet_jax.parallel.sharding import placed, row_shards, shardings
from icet_jax.planning.ahead import AbstractRun, bytes_per_device

_MORE_CHIPS = "more chips along mesh.fsdp or mesh.tensor: each has one row at a time already"
_ROOM = 0.6  # of a chip's memory: what weights and train state may take, so that the phases have the rest


def fixes(
    config: ConfigDict, run: AbstractRun, broken: list[str], fixed: int, memory: float | None
) -> list[str]:  # fmt: skip
    """The verdict, and a line of advice for each phase that does not fit; plan again with what it says.

    Args:
      config: of the run.
      run: as planned.
      broken: names of the phases that do not fit.
      fixed: bytes of weights and train state on each chip.
      memory: of a chip, None if it is not known.
    """
    if not broken:
        return []
    advice = [f"does not fit: {', '.join(broken)}"]
    if memory is not None and fixed > _ROOM * memory:
        return [*advice, f"fix (then plan again): {_more_fsdp(config, run, _ROOM * memory)}"]
    shards = row_shards(run.mesh)
    return advice + [f"fix {phase} (then plan again): {_smaller(config, phase, shards)}" for phase in broken]


def _more_fsdp(config: ConfigDict, run: AbstractRun, room: float) -> str:
    sizes = run.mesh.shape
    count = math.prod(sizes.values())
    chips = count // sizes["tensor"]
    for fsdp in range(sizes["fsdp"] + 1, chips + 1):
        if chips % fsdp == 0 and _fixed_bytes(run, (chips // fsdp, fsdp, sizes["tensor"])) <= room:
            return f"split weights and train state over more chips: --config.mesh.data=-1 --config.mesh.fsdp={fsdp}"
    smaller = "" if config.lora.rank else ", or train adapters (config.lora.rank above 0)"
    return f"{count} chips do not hold weights and train state; take more chips{smaller}"


def _fixed_bytes(run: AbstractRun, sizes: tuple[int, int, int]) -> int:
    mesh = abstract_mesh(sizes)
    trees: tuple[Any, ...] = (run.vlm.params, run.state)
    return sum(bytes_per_device(placed(tree, shardings(tree, mesh))) for tree in trees)


def _smaller(config: ConfigDict, phase: str, shards: int) -> str:
    if phase.startswith("sweep"):
        rows = config.sweep.batch_size
        return _MORE_CHIPS if rows % (2 * shards) else f"--config.sweep.batch_size={rows // 2}"
    lppo, rows = config.lppo, config.data.batch_size
    if phase == "rollout":
        smaller = f"a smaller batch, --config.data.batch_size={rows // 2}, or more chips"
        return _MORE_CHIPS if rows % (2 * lppo.minibatches * shards) else smaller
    if phase == "update" and config.model.remat != "full":
        return "--config.model.remat=full"
    slices = lppo.minibatches * lppo.accumulation
    return _MORE_CHIPS if rows % (2 * slices * shards) else f"--config.lppo.accumulation={2 * lppo.accumulation}"
