"""What the phases are compiled for: one frozen, hashable dataclass, made from a config."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from icet_jax.algorithms.state import OptimizerSettings
from icet_jax.generation.sampling import Sampling


@dataclasses.dataclass(frozen=True)
class Settings:
    """What the phases are compiled for. Fields without a comment are those of `config.lppo` and `config.reward`.

    Attributes:
      sampling: the rollout's; its temperature and suppressed tokens hold for every log-prob.
      optimizer: see `OptimizerSettings`.
      lora_scale: alpha / rank; None is full fine-tuning.
      exits: the schedule, with `fixed_exit`.
    """

    sampling: Sampling
    optimizer: OptimizerSettings
    lora_scale: float | None
    exits: str = "per_example"
    fixed_exit: int | None = None
    kl_kind: str = "k1"
    kl_adaptive: bool = False
    kl_target: float = 6.0
    kl_horizon: float = 10000.0
    gamma: float = 1.0
    lam: float = 0.95
    clip_range: float = 0.2
    value_clip_range: float = 0.0
    value_coef: float = 0.1
    value_stop_gradient: bool = False
    whiten_advantages: bool = True
    whiten_rewards: bool = False
    epochs: int = 4
    minibatches: int = 1
    accumulation: int = 1
    dual_clip: float = 0.0
    target_kl: float = 0.0
    max_ratio: float = 0.0
    max_kl: float = 0.0
    log_prob_chunk: int = 16
    entropy_coef: float = 0.0
    normalise: bool = False
    clip: float = 0.0
    missing_eos_penalty: float = 0.0


def from_config(
    config: Any, *, eos_ids: Sequence[int], suppress_ids: Sequence[int], pad_id: int, iterations: int | None = None
) -> Settings:
    """`Settings` from a whole config; token ids come from the model's generation config and tokenizer.

    Args:
      config: `icet_jax.config`'s tree.
      eos_ids: tokens that end a response.
      suppress_ids: tokens never sampled (`generation.suppress_ids`).
      pad_id: fills responses after their end.
      iterations: length of the run, for the learning-rate schedule; None is `config.lppo.iterations`.
    """
    lppo, rank = config.lppo, config.lora.rank
    steps = (lppo.iterations if iterations is None else iterations) * lppo.epochs * lppo.minibatches
    own = {field.name for field in dataclasses.fields(Settings)} - {"sampling", "optimizer", "lora_scale"}
    shared = {name: section[name] for section in (lppo, config.reward) for name in section if name in own}
    return Settings(
        sampling=Sampling(
            max_new_tokens=lppo.max_new_tokens,
            temperature=lppo.temperature,
            eos_ids=tuple(eos_ids),
            suppress_ids=tuple(suppress_ids),
            pad_id=pad_id,
        ),
        optimizer=OptimizerSettings(
            **dict(config.optimizer),
            total_steps=steps,
            value_learning_rate=lppo.value_learning_rate,
            value_max_grad_norm=lppo.value_max_grad_norm,
            value_warmup_steps=lppo.value_warmup_steps,
        ),
        lora_scale=config.lora.alpha / rank if rank else None,
        **shared,
    )
