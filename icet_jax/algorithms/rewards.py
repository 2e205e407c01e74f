"""Rewards: KL estimators, score shaping, per-token rewards and the KL coefficient's controllers."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from icet_jax.config.names import KL_KINDS
from icet_jax.errors import UserError
from icet_jax.typing import Array, ArrayLike, Bool, Float, Scalar

_EXP_LIMIT = 88.0  # exp overflows float32 just above
_NORMALISE_EPS = 1e-8


def kl_penalty(
    log_probs: Float[ArrayLike, "..."], ref_log_probs: Float[ArrayLike, "..."], kind: str = "k1"
) -> Float[Array, "..."]:
    """Per-token estimate of KL(policy || reference) from one sample (Schulman, "Approximating KL Divergence", 2020).

    With d = log_probs - ref_log_probs, in nats:  k1 = d,  k2 = d^2 / 2,  k3 = exp(-d) - 1 + d.

    Entries that a caller masks afterwards may be NaN or huge: where the estimate is not finite its value is what the
    formula gives and its gradient is zero, so that a masked entry cannot poison the gradients of the others.

    Raises:
      UserError: an unknown `kind`.
    """
    d = jnp.asarray(log_probs, jnp.float32) - jnp.asarray(ref_log_probs, jnp.float32)
    if kind == "k1":
        return d
    if kind == "k2":
        return _finite_gradient(lambda x: 0.5 * jnp.square(x), d, jnp.isfinite(d))
    if kind == "k3":
        # expm1: an error of eps * |d| rather than eps, where the two distributions nearly agree.
        return _finite_gradient(lambda x: jnp.expm1(-x) + x, d, jnp.isfinite(d) & (d > -_EXP_LIMIT))
    raise UserError(f"config.lppo.kl_kind: unknown estimator {kind!r}; choose one of {', '.join(KL_KINDS)}")


def _finite_gradient(function: Callable[[Array], Array], x: Array, finite: Array) -> Array:
    """function(x), with no gradient where `finite` is false (the double-where trick)."""
    safe = function(jnp.where(finite, x, 0.0))
    return jnp.where(finite, safe, jax.lax.stop_gradient(function(x)))


def token_rewards(
    scores: Float[ArrayLike, " B"],
    kl: Float[ArrayLike, "B A"],
    mask: Bool[ArrayLike, "B A"],
    *,
    kl_coef: Scalar,
) -> Float[Array, "B A"]:
    """R = r(x, y) - eta * KL (paper): `-kl_coef * kl` per token, plus the score on the last response token.

    Args:
      scores: one (shaped) score per row; of an empty row it may be NaN.
      kl: per-token KL estimates, nats; entries outside the mask may be anything, NaN included.
      mask: true on the response tokens up to and including EOS, a prefix of each row, possibly empty.
      kl_coef: eta.

    Returns:
      float32, whatever dtype the scores had; zero outside the mask.
    """
    mask = jnp.asarray(mask, bool)
    penalty = -kl_coef * jnp.where(mask, jnp.asarray(kl, jnp.float32), 0.0)
    length = jnp.sum(mask, axis=1)
    scores = jnp.where(length > 0, jnp.asarray(scores, jnp.float32), 0.0)
    is_last = mask & (jnp.arange(mask.shape[1]) == length[:, None] - 1)
    return jnp.where(mask, penalty, 0.0) + jnp.where(is_last, scores[:, None], 0.0)


def sequence_kl(
    log_probs: Float[ArrayLike, "B A"], ref_log_probs: Float[ArrayLike, "B A"], mask: Bool[ArrayLike, "B A"]
) -> Float[Array, " B"]:
    """k1 summed over each response, nats; zero for empty rows. Its mean drives the adaptive controller."""
    return jnp.sum(jnp.where(mask, kl_penalty(log_probs, ref_log_probs, "k1"), 0.0), axis=1)


class ScoreNormaliser(NamedTuple):
    """Running mean and squared deviation of the scores seen so far; part of the train state and of checkpoints."""

    seen: Array
    mean: Array
    m2: Array


def init_normaliser() -> ScoreNormaliser:
    """A normaliser that has seen nothing."""
    # Three arrays, not one shared: the train state is donated and a buffer may be donated once.
    return ScoreNormaliser(*(jnp.zeros((), jnp.float32) for _ in range(3)))


def update_normaliser(
    normaliser: ScoreNormaliser, scores: Float[ArrayLike, " B"], valid: Bool[ArrayLike, " B"]
) -> ScoreNormaliser:
    """Merges one batch of scores into the running statistics (Chan et al. 1979); rows not `valid` are not read."""
    scores = jnp.where(valid, jnp.asarray(scores, jnp.float32), 0.0)
    count = jnp.sum(valid).astype(jnp.float32)
    mean = jnp.sum(scores) / jnp.maximum(count, 1.0)
    m2 = jnp.sum(jnp.where(valid, jnp.square(scores - mean), 0.0))
    total = normaliser.seen + count
    safe_total = jnp.maximum(total, 1.0)
    delta = mean - normaliser.mean
    return ScoreNormaliser(
        seen=total,
        mean=normaliser.mean + delta * count / safe_total,
        m2=normaliser.m2 + m2 + jnp.square(delta) * normaliser.seen * count / safe_total,
    )


def shape_scores(
    scores: Float[ArrayLike, " B"],
    has_eos: Bool[ArrayLike, " B"],
    normaliser: ScoreNormaliser,
    *,
    learned: Bool[ArrayLike, " B"],
    valid: Bool[ArrayLike, " B"],
    normalise: bool = False,
    clip: float = 0.0,
    missing_eos_penalty: float = 0.0,
) -> tuple[Float[Array, " B"], ScoreNormaliser]:
    """Normalise, then clip, then subtract the missing-EOS penalty.

    Args:
      scores: raw scores; rows not `valid` may hold NaN.
      has_eos: whether the response ended with an EOS.
      normaliser: running statistics; this batch enters them before they are used, so the first batch is normalised too.
      learned: rows scored by a reward model. Only these enter and undergo normalisation: an exact-match reward is
        on its own scale, and a row without any reward must stay at zero.
      valid: rows that take part; the others come back as zero.
      normalise: whether to subtract the running mean and divide by the running (biased) standard deviation.
      clip: absolute bound of the normalised score; 0 is off.
      missing_eos_penalty: subtracted where the response has no EOS.

    Returns:
      (float32 scores, the normaliser after this batch).
    """
    scores = jnp.where(valid, jnp.asarray(scores, jnp.float32), 0.0)
    if normalise:
        normaliser = update_normaliser(normaliser, scores, valid & learned)
        variance = normaliser.m2 / jnp.maximum(normaliser.seen, 1.0)
        normalised = (scores - normaliser.mean) * jax.lax.rsqrt(variance + _NORMALISE_EPS)
        scores = jnp.where(learned, normalised, scores)
    if clip:
        scores = jnp.clip(scores, -clip, clip)
    scores = scores - jnp.where(has_eos, 0.0, missing_eos_penalty)
    return jnp.where(valid, scores, 0.0), normaliser


def adaptive_kl_coef(
    kl_coef: Scalar,
    kl: Scalar,
    n_sequences: Scalar,
    *,
    target: float,
    horizon: float,
) -> Scalar:
    """coef *= 1 + clip(kl / target - 1, -0.2, 0.2) * n_sequences / horizon (Ziegler et al. 2019, section 2.2).

    Args:
      kl_coef: the coefficient that this batch was rewarded with.
      kl: mean over the batch's sequences of the summed k1, nats.
      n_sequences: sequences in the global batch.
      target: the KL aimed at, nats per sequence.
      horizon: sequences over which a persistent error of 20% changes the coefficient by about 20%.
    """
    error = jnp.clip(kl / target - 1.0, -0.2, 0.2)
    return kl_coef * (1.0 + error * n_sequences / horizon)
