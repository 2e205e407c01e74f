"""Operations of a run's phases, counted from sizes: matrix products and attention, recomputation included."""

import dataclasses

from icet_jax.algorithms.base import PhaseWork
from icet_jax.evaluation.queue import group_sizes
from icet_jax.generation.engine import STEPS
from icet_jax.nn.protocols import POLICY_ROOT
from icet_jax.parallel.sharding import flatten_with_names
from icet_jax.planning.ahead import AbstractRun, bytes_per_device


@dataclasses.dataclass(frozen=True)
class Work:
    """What a phase does.

    Attributes:
      flops: of all chips together, every answer as long as allowed.
      steps: how often, one after the other, it reads its weights.
      read: bytes of them on each chip, at every step; of an embedding few rows are read, which are left out.
    """

    flops: int
    steps: int
    read: int


def work(run: AbstractRun, phase: str) -> Work:
    """The work of the phase of that name.

    Raises:
      KeyError: there is none.
    """
    config, model = run.config, run.model
    length = config.data.max_prompt_tokens
    slots, together = group_sizes(config.sweep.batch_size, run.mesh)
    swept = model.operations(length, length + config.sweep.max_new_tokens, 1)
    flops, steps = {
        "sweep: encode": PhaseWork(together * swept.encode, 1),
        "sweep: fill": PhaseWork(together * (swept.visual + swept.prefill), 1),
        "sweep: decode": PhaseWork(STEPS * slots * swept.step, STEPS),
        **run.algorithm.work(run),
    }[phase]
    return Work(flops, steps, _read(run, policy=phase != "sweep: encode"))


def _read(run: AbstractRun, *, policy: bool) -> int:
    """Bytes on each chip of the decoder's kernels, or of the image encoder's and the projector's."""
    named = flatten_with_names(run.vlm.params).items()
    return sum(
        bytes_per_device(leaf)
        for name, leaf in named
        if name.startswith(f"{POLICY_ROOT}/") == policy and "embed" not in name
    )
