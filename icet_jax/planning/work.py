"""Counts the operations of a run's phases from sizes: matrix products and attention, recomputation included."""

import dataclasses

from icet_jax.algorithms.base import PhaseWork
from icet_jax.evaluation.queue import group_sizes
from icet_jax.generation.engine import STEPS
from icet_jax.planning.ahead import AbstractRun, bytes_per_device


@dataclasses.dataclass(frozen=True)
class PhaseCost:
    """Holds what a phase computes and reads.

    Attributes:
      flops: floating-point operations of all chips together, if every answer has the largest allowed length.
      steps: how many times in sequence the phase reads all of its weights.
      read: bytes of weights that each chip reads at every step. Embeddings are not counted, because a step
        reads only a few of their rows.
    """

    flops: int
    steps: int
    read: int


def phase_cost(run: AbstractRun, phase: str) -> PhaseCost:
    """Returns the cost of the phase named `phase`, such as "sweep: decode" or "update".

    Raises:
      KeyError: the run has no such phase.
    """
    config, model = run.config, run.model
    length = config.data.max_prompt_tokens
    slots, group_rows = group_sizes(config.sweep.batch_size, run.mesh)
    per_row = model.operations(length, length + config.sweep.max_new_tokens, 1)
    flops, steps = {
        "sweep: encode": PhaseWork(group_rows * per_row.encode, 1),
        "sweep: fill": PhaseWork(group_rows * (per_row.visual + per_row.prefill), 1),
        "sweep: decode": PhaseWork(STEPS * slots * per_row.step, STEPS),
        **run.algorithm.work(run),
    }[phase]
    weights = run.weights(policy=phase != "sweep: encode")
    read = bytes_per_device({name: leaf for name, leaf in weights.items() if "embed" not in name})
    return PhaseCost(flops, steps, read)
