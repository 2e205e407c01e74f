"""The train state, which is everything that training changes: its initial value and its optimizer."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from icet_jax.algorithms.rewards import ScoreNormaliser, init_normaliser
from icet_jax.config.names import LEARNING_RATE_SCHEDULES
from icet_jax.errors import UserError
from icet_jax.nn.heads import init_value_head
from icet_jax.nn.layers import Lora
from icet_jax.nn.protocols import POLICY_ROOT, PROJECTOR_ROOT
from icet_jax.typing import Array


@dataclasses.dataclass(frozen=True)
class OptimizerSettings:
    """Holds the settings of AdamW and its learning-rate schedule; fields not listed are those of `config.optimizer`.

    Attributes:
      total_steps: optimizer steps after which the schedules `linear` and `cosine` end.
      final_share: learning rate at the end of `cosine`, as a share of `learning_rate`; `linear` ends at 0.
      value_learning_rate, value_max_grad_norm, value_warmup_steps: settings of the value head (`config.lppo`); None
        takes the policy's setting. If one is set, the norm of the value head's gradient is computed and clipped
        separately.
    """

    learning_rate: float
    schedule: str
    warmup_steps: int
    b1: float
    b2: float
    eps: float
    weight_decay: float
    max_grad_norm: float
    total_steps: int
    final_share: float = 0.0
    value_learning_rate: float | None = None
    value_max_grad_norm: float | None = None
    value_warmup_steps: int | None = None


class Controls(NamedTuple):
    """Holds numbers that control training and change from one iteration to the next.

    Attributes:
      kl_coef: coefficient of the next rollout's KL penalty, per nat.
      normaliser: running statistics of the reward model's scores.
      learning_rate_scale: factor of every optimizer step; None if the run never changes it from 1.
      exits: state of the exit schedule (`exits.Schedule.observe`); None if the schedule learns nothing.
    """

    kl_coef: Array
    normaliser: ScoreNormaliser
    learning_rate_scale: Array | None = None
    exits: Any = None


class TrainState(NamedTuple):
    """Holds everything that a resumed run needs; nothing else changes during training.

    Attributes:
      trainable: float32 `{"policy": ..., "projector": ..., "value_head": ...}`, of which only the trained parts
        (`config.trained_parts`) and, with a critic, the value head are present. The policy is LoRA's `weights` or,
        under full fine-tuning, a nested dict of the parameters under `language_model`; the projector is one of those
        under `projector`.
      opt_state: optax's state of the optimizer.
      controls: see `Controls`.
      iteration: number of completed iterations; the random numbers of the next iteration depend on it.
      updates: number of optimizer steps that were applied.
    """

    trainable: dict[str, Any]
    opt_state: Any
    controls: Controls
    iteration: Array
    updates: Array


def learning_rate(settings: OptimizerSettings) -> optax.Schedule:
    """Returns the learning rate as a function of the step: a linear warm-up from 0, then the schedule of the settings.

    Raises:
      UserError: there is no schedule of this name.
    """
    peak, warmup = settings.learning_rate, settings.warmup_steps
    rest = max(settings.total_steps - warmup, 1)
    if settings.schedule == "constant":
        after = optax.constant_schedule(peak)
    elif settings.schedule == "linear":
        after = optax.linear_schedule(peak, 0.0, rest)
    elif settings.schedule == "cosine":
        after = optax.cosine_decay_schedule(peak, rest, alpha=settings.final_share)
    else:
        raise UserError(
            f"config.optimizer.schedule: unknown schedule {settings.schedule!r}; choose one of "
            f"{', '.join(LEARNING_RATE_SCHEDULES)}"
        )
    return optax.join_schedules([optax.linear_schedule(0.0, peak, warmup), after], [warmup]) if warmup else after


def _value_settings(settings: OptimizerSettings) -> OptimizerSettings | None:
    """Returns the settings of the value head's optimizer; None if it shares the policy's optimizer."""
    head_values = {
        "learning_rate": settings.value_learning_rate,
        "max_grad_norm": settings.value_max_grad_norm,
        "warmup_steps": settings.value_warmup_steps,
    }
    changed: dict[str, Any] = {name: value for name, value in head_values.items() if value is not None}
    return dataclasses.replace(settings, **changed) if changed else None


def make_optimizer(settings: OptimizerSettings) -> optax.GradientTransformation:
    """Returns the optimizer of a run: clipping by the global norm (0 = off), then AdamW.

    If the value head has settings of its own, policy and value head have separate optimizers. The structure of the
    optimizer state is then different.
    """
    value = _value_settings(settings)
    if value is None:
        return _adamw(settings)
    parts = {"policy": _adamw(settings), "value_head": _adamw(value)}
    return optax.partition(
        parts, lambda trainable: {name: name if name == "value_head" else "policy" for name in trainable}
    )


def _adamw(settings: OptimizerSettings) -> optax.GradientTransformation:
    """Returns AdamW, after clipping by the global norm if `max_grad_norm` is not 0."""
    adamw = optax.adamw(
        learning_rate(settings),
        b1=settings.b1,
        b2=settings.b2,
        eps=settings.eps,
        weight_decay=settings.weight_decay,
    )
    if not settings.max_grad_norm:
        return adamw
    return optax.chain(optax.clip_by_global_norm(settings.max_grad_norm), adamw)


def init_state(
    params: Any, lora: Lora | None, *, hidden_size: int, optimizer: OptimizerSettings, kl_coef: float,
    value_head: bool = True, exits: Any = None, trained: Sequence[str] = ("policy",),
) -> TrainState:  # fmt: skip
    """Returns the train state before the first iteration.

    It shares no buffer with `params` or `lora`, so that it can be donated.

    Args:
      params: parameters of the whole model, from `nnx.split`; not used if adapters alone are trained.
      lora: new adapters; None for full fine-tuning, which trains a float32 copy of the decoder's weights.
      hidden_size: width of the decoder, for the value head.
      optimizer: see `OptimizerSettings`.
      kl_coef: initial coefficient of the KL penalty.
      value_head: whether the state has a value head.
      exits: initial state of the exit schedule, from `exits.Schedule.initial_state`.
      trained: parts of `TrainState.trainable` that are trained, beside a value head.
    """
    sources: dict[str, Any] = {}
    if "policy" in trained:
        sources["policy"] = pure_dict(params[POLICY_ROOT]) if lora is None else lora.weights
    if "projector" in trained:
        sources["projector"] = pure_dict(params[PROJECTOR_ROOT])
    trainable: dict[str, Any] = jax.tree.map(lambda leaf: jnp.array(leaf, jnp.float32, copy=True), sources)
    if value_head:
        trainable["value_head"] = init_value_head(hidden_size)
    return TrainState(
        trainable=trainable,
        opt_state=make_optimizer(optimizer).init(trainable),
        controls=Controls(kl_coef=jnp.asarray(kl_coef, jnp.float32), normaliser=init_normaliser(), exits=exits),
        iteration=jnp.zeros((), jnp.int32),
        updates=jnp.zeros((), jnp.int32),
    )


def pure_dict(state: Any) -> dict[Any, Any]:
    """Returns an nnx state (or a nested dict) as a nested dict of arrays."""
    return {
        key: pure_dict(value) if isinstance(value, Mapping) else getattr(value, "get_value", lambda v=value: v)()
        for key, value in state.items()
    }
