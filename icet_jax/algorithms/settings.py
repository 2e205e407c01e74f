"""The settings that the phases are compiled for: one frozen, hashable dataclass, created from a config."""

import dataclasses
from typing import Any

from icet_jax.algorithms.state import OptimizerSettings
from icet_jax.config import trained_parts
from icet_jax.config.names import KINDS
from icet_jax.generation.sampling import Sampling


@dataclasses.dataclass(frozen=True)
class Settings:
    """Holds the settings that the phases are compiled for.

    Fields that are not listed here are those of the same name in the algorithm's section of the config, `config.lppo`
    or `config.reward`. No field has a default here: the defaults are in `icet_jax.config`.

    Attributes:
      sampling: how rollouts are sampled; every log-prob uses its temperature and suppressed tokens.
      optimizer: see `OptimizerSettings`.
      trained: the parts of `TrainState.trainable` that are trained, beside a value head.
      lora_scale: alpha / rank; None if the decoder is trained in full, or not at all.
      exits: name of the exit schedule; `fixed_exit` and `train_exits` are its settings.
      kl_factors: factors of the KL coefficient (`config.lppo.kl_coef_by_kind`) in the order of `config.names.KINDS`.
    """

    sampling: Sampling
    optimizer: OptimizerSettings
    trained: tuple[str, ...]
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
    """Returns the `Settings` of the algorithm that a config names.

    A field is taken from the algorithm's own section if that has it, otherwise from `config.lppo` or `config.reward`.

    Args:
      config: config of the run.
      sampling: how rollouts are sampled, from `VLM.sampling` with the length and temperature of `config.lppo`.
    """
    lppo, section, trained = config.lppo, config[config.algorithm], trained_parts(config)
    rank = config.lora.rank if "policy" in trained else 0
    steps = section.iterations * lppo.epochs * lppo.minibatches
    names = {field.name for field in dataclasses.fields(Settings)} - {"sampling", "optimizer", "trained", "lora_scale"}
    values = {name: part[name] for part in (lppo, config.reward, section) for name in part if name in names}
    return Settings(
        sampling=sampling,
        optimizer=OptimizerSettings(
            **dict(config.optimizer),
            total_steps=steps,
            value_learning_rate=lppo.value_learning_rate,
            value_max_grad_norm=lppo.value_max_grad_norm,
            value_warmup_steps=lppo.value_warmup_steps,
        ),
        trained=trained,
        lora_scale=config.lora.alpha / rank if rank else None,
        kl_factors=tuple(lppo.kl_coef_by_kind.get(kind, 1.0) for kind in KINDS),
        **values,
    )
