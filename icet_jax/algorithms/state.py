"""What training changes: the explicit train state, how it starts, and how it becomes plain arrays for a checkpoint."""

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from icet_jax.algorithms.rewards import ScoreNormaliser, init_normaliser
from icet_jax.config.names import LEARNING_RATE_SCHEDULES
from icet_jax.errors import UserError
from icet_jax.nn.heads import init_value_head
from icet_jax.nn.layers import Lora
from icet_jax.nn.protocols import POLICY_ROOT
from icet_jax.typing import Array


@dataclasses.dataclass(frozen=True)
class OptimizerSettings:
    """AdamW and its schedule; the fields are those of `config.optimizer`, whose defaults hold, plus the run's length.

    Attributes:
      total_steps: optimizer steps after which `linear` reaches zero, and `cosine` `final_share`.
      final_share: where the cosine ends, as a share of `learning_rate`.
      value_learning_rate, value_max_grad_norm, value_warmup_steps: those of the value head, as `config.lppo` has them;
        None is what the policy has. With any of them the head's gradient is clipped by a norm of its own.
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
    """The numbers that steer the reward from one iteration to the next.

    Attributes:
      kl_coef: the coefficient of the next rollout's KL penalty, per nat.
      normaliser: running statistics of the reward model's scores.
      learning_rate_scale: multiplies every optimizer step; None is 1, and the same program as without it.
      exits: what the exit schedule has learnt (`exits.Schedule.observe`); None where it learns nothing.
    """

    kl_coef: Array
    normaliser: ScoreNormaliser
    learning_rate_scale: Array | None = None
    exits: Any = None


class TrainState(NamedTuple):
    """Everything that a resumed run needs; nothing else changes during training.

    Attributes:
      trainable: `{"policy": ..., "value_head": ...}`, float32; without a value head where the algorithm has no critic.
        The policy is LoRA's `weights`, or under full fine-tuning the parameters under `language_model` as a pure dict.
      opt_state: optax's.
      controls: see `Controls`.
      iteration: rollouts (or supervised batches) finished; it seeds what the next one draws.
      updates: optimizer steps applied.
    """

    trainable: dict[str, Any]
    opt_state: Any
    controls: Controls
    iteration: Array
    updates: Array


def learning_rate(settings: OptimizerSettings) -> optax.Schedule:
    """Linear warm-up from 0 to the peak, then constant, or linear to 0 or cosine to `final_share` at the end.

    Raises:
      UserError: an unknown schedule.
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
    """The value head's own optimizer; None where it shares the policy's."""
    own = {
        "learning_rate": settings.value_learning_rate,
        "max_grad_norm": settings.value_max_grad_norm,
        "warmup_steps": settings.value_warmup_steps,
    }
    changed: dict[str, Any] = {name: value for name, value in own.items() if value is not None}
    return dataclasses.replace(settings, **changed) if changed else None


def make_optimizer(settings: OptimizerSettings) -> optax.GradientTransformation:
    """Clipping by global norm (0 = off), then AdamW; apart for `policy` and `value_head` where the head has settings.

    The optimizer's state has one structure without such settings and another with them.
    """
    value = _value_settings(settings)
    if value is None:
        return _adamw(settings)
    parts = {"policy": _adamw(settings), "value_head": _adamw(value)}
    return optax.partition(parts, lambda trainable: {name: name for name in trainable})


def _adamw(settings: OptimizerSettings) -> optax.GradientTransformation:
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
    value_head: bool = True, exits: Any = None,
) -> TrainState:  # fmt: skip
    """The state before the first iteration; it shares no buffer with `params` or `lora`, so that it can be donated.

    Args:
      params: the whole model as `nnx.split` gives it; read only under full fine-tuning.
      lora: fresh adapters, or None for full fine-tuning, which copies the language model into float32 masters.
      hidden_size: the decoder's width, for the value head.
      optimizer: see `OptimizerSettings`.
      kl_coef: initial coefficient of the KL penalty.
      value_head: whether there is one.
      exits: of the exit schedule, from `exits.Schedule.initial_state`.
    """
    source = pure_dict(params[POLICY_ROOT]) if lora is None else lora.weights
    policy = jax.tree.map(lambda leaf: jnp.array(leaf, jnp.float32, copy=True), source)
    trainable = {"policy": policy} | ({"value_head": init_value_head(hidden_size)} if value_head else {})
    return TrainState(
        trainable=trainable,
        opt_state=make_optimizer(optimizer).init(trainable),
        controls=Controls(kl_coef=jnp.asarray(kl_coef, jnp.float32), normaliser=init_normaliser(), exits=exits),
        iteration=jnp.zeros((), jnp.int32),
        updates=jnp.zeros((), jnp.int32),
    )


def pure_dict(state: Any) -> dict[Any, Any]:
    """A nested dict of arrays from an nnx state (or from such a dict)."""
    return {
        key: pure_dict(value) if isinstance(value, Mapping) else getattr(value, "get_value", lambda v=value: v)()
        for key, value in state.items()
    }
