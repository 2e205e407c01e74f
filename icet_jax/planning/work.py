"""Operations of a run's phases, counted from sizes: matrix products and attention, recomputation included."""

import dataclasses

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
    batch, taught = config.data.batch_size, config.lppo.max_new_tokens
    sampled = model.operations(length, length + taught, 1)
    policy, adapters = _forward(run)
    again = int(config.model.remat == "full")  # the forward pass, once more while going back
    weights_too = int(run.settings.lora_scale is None)
    update = config.lppo.epochs * batch * ((2 + weights_too + again) * policy + (3 + again) * adapters)
    flops, steps = {
        "sweep: encode": (together * swept.encode, 1),
        "sweep: fill": (together * (swept.visual + swept.prefill), 1),
        "sweep: decode": (STEPS * slots * swept.step, STEPS),
        "rollout": (
            batch * (sampled.encode + sampled.visual + sampled.prefill + (taught - 1) * sampled.step),
            taught,
        ),
        "prepare": (batch * (2 * policy + adapters), 2 * _slices(run)),
        "update": (update, config.lppo.epochs * _slices(run) * (2 + again)),
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


def _slices(run: AbstractRun) -> int:
    return run.settings.minibatches * run.settings.accumulation


def _forward(run: AbstractRun) -> tuple[int, int]:
    """One teacher-forced pass over a row's prompt and response: the model's operations, and the adapters'."""
    taught = run.config.lppo.max_new_tokens
    length = run.config.data.max_prompt_tokens + taught - 1
    head = 2 * run.vlm.hidden_size * run.vlm.vocab_size
    one = run.model.operations(length, length, 1)
    rank, targets = run.config.lora.rank, run.config.lora.targets
    shapes = run.vlm.lora_shapes.items()
    adapted = sum(
        depth * rank * (size_in + size_out)
        for name, (depth, size_in, size_out) in shapes
        if name.rpartition("/")[2] in targets
    )
    return one.forward + taught * head, 2 * length * adapted
