"""What the phases are compiled for: one frozen, hashable dataclass, made from a config."""

import dataclasses
from typing import Any

from icet_jax.algorithms.state import OptimizerSettings
from icet_jax.config.names import KINDS
from icet_jax.generation.sampling import Sampling


@dataclasses.dataclass(frozen=True)
class Settings:
    """What the phases are compiled for.

    Fields not listed here are those of the algorithm's own section, `config.lppo` and `config.reward`. No field has a
    default: a setting's default stands in `icet_jax.config` alone, and `from_config` reads it.

    Attributes:
      sampling: the rollout's; its temperature and suppressed tokens hold for every log-prob.
      optimizer: see `OptimizerSettings`.
      lora_scale: alpha / rank; None is full fine-tuning.
      exits: name of the exit schedule, which `fixed_exit` and `train_exits` belong to.
      kl_factors: of `config.lppo.kl_coef_by_kind`, in the order of `config.names.KINDS`.
    """

    sampling: Sampling
    optimizer: OptimizerSettings
    lora_scale: float | None
    exits: str
    fixed_exit: int | None
    train_exits: tuple[int, ...]
    kl_factors: tuple[float, ...]
    kl_kind: str
    kl_adaptive: bool
    kl_target: float
    kl_horizon: float
    gamma: float
    lam: float
    clip_range: float
    value_clip_range: float
    value_coef: float
    value_stop_gradient: bool
    whiten_advantages: bool
    whiten_rewards: bool
    baseline: str
    baseline_min_rows: int
    baseline_min_std: float
    epochs: int
    minibatches: int
    accumulation: int
    dual_clip: float
    target_kl: float
    max_ratio: float
    max_kl: float
    log_prob_chunk: int
    entropy_coef: float
    anchor_coef: float
    normalise: bool
    clip: float
    missing_eos_penalty: float


def from_config(config: Any, sampling: Sampling) -> Settings:
    """`Settings` of the algorithm that a whole config names.

    Its own section decides where it has a field; every other comes from `config.lppo` and `config.reward`.

    Args:
      config: `icet_jax.config`'s tree.
      sampling: how rollouts are drawn, with `config.lppo`'s length and temperature and the model's own token ids
        (`VLM.sampling`).
    """
    lppo, rank, section = config.lppo, config.lora.rank, config[config.algorithm]
    steps = section.iterations * lppo.epochs * lppo.minibatches
    own = {field.name for field in dataclasses.fields(Settings)} - {"sampling", "optimizer", "lora_scale"}
    shared = {name: part[name] for part in (lppo, config.reward, section) for name in part if name in own}
    return Settings(
        sampling=sampling,
        optimizer=OptimizerSettings(
            **dict(config.optimizer),
            total_steps=steps,
            value_learning_rate=lppo.value_learning_rate,
            value_max_grad_norm=lppo.value_max_grad_norm,
            value_warmup_steps=lppo.value_warmup_steps,
        ),
        lora_scale=config.lora.alpha / rank if rank else None,
        kl_factors=tuple(lppo.kl_coef_by_kind.get(kind, 1.0) for kind in KINDS),
        **shared,
    )
