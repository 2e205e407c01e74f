"""Computes rewards: KL estimates, shaped scores, rewards per token, and the adaptive KL coefficient."""

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
    """Returns a per-token estimate of KL(policy || reference) in nats, from the sampled token alone.

    With d = log_probs - ref_log_probs:  k1 = d,  k2 = d^2 / 2,  k3 = exp(-d) - 1 + d.
    Source: Schulman, "Approximating KL Divergence", 2020.

    Entries that the caller masks afterwards may be NaN or huge: where the estimate is not finite, its gradient is zero,
    so that such an entry does not make the gradients of the others NaN.

    Raises:
      UserError: `kind` is not "k1", "k2" or "k3".
    """
    d = jnp.asarray(log_probs, jnp.float32) - jnp.asarray(ref_log_probs, jnp.float32)
    if kind == "k1":
        return d
    if kind == "k2":
        return _finite_gradient(lambda x: 0.5 * jnp.square(x), d, jnp.isfinite(d))
    if kind == "k3":
        # expm1 instead of exp: where the two distributions nearly agree, its error is eps * |d| instead of eps.
        return _finite_gradient(lambda x: jnp.expm1(-x) + x, d, jnp.isfinite(d) & (d > -_EXP_LIMIT))
    raise UserError(f"config.lppo.kl_kind: unknown estimator {kind!r}; choose one of {', '.join(KL_KINDS)}")


def _finite_gradient(function: Callable[[Array], Array], x: Array, finite: Array) -> Array:
    """Returns function(x), with gradient zero where `finite` is false."""
    safe = function(jnp.where(finite, x, 0.0))
    return jnp.where(finite, safe, jax.lax.stop_gradient(function(x)))


def token_rewards(
    scores: Float[ArrayLike, " B"],
    kl: Float[ArrayLike, "B A"],
    mask: Bool[ArrayLike, "B A"],
    *,
    kl_coef: Scalar,
) -> Float[Array, "B A"]:
    """Returns the reward of each token: `-kl_coef * kl`, plus the row's score at the row's last token (paper, R).

    Args:
      scores: one (shaped) score per row; may be NaN for an empty row.
      kl: KL estimate of each token in nats; entries outside the mask may be anything, NaN included.
      mask: true on the response tokens up to and including EOS; a row may have none.
      kl_coef: the KL coefficient eta.

    Returns:
      float32; zero outside the mask.
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
    """Returns k1 summed over each response, in nats; zero for empty rows. `adaptive_kl_coef` takes the batch's mean."""
    return jnp.sum(jnp.where(mask, kl_penalty(log_probs, ref_log_probs, "k1"), 0.0), axis=1)


class ScoreNormaliser(NamedTuple):
    """Holds running statistics of all scores so far; part of the train state and of checkpoints."""

    seen: Array  # number of scores
    mean: Array
    m2: Array  # sum of squared deviations from the mean


def init_normaliser() -> ScoreNormaliser:
    """Returns the running statistics before the first score."""
    # Three separate arrays, because the train state is donated, and a buffer may be donated only once.
    return ScoreNormaliser(*(jnp.zeros((), jnp.float32) for _ in range(3)))


def update_normaliser(
    normaliser: ScoreNormaliser, scores: Float[ArrayLike, " B"], valid: Bool[ArrayLike, " B"]
) -> ScoreNormaliser:
    """Returns the running statistics with the `valid` scores of one more batch (Chan et al. 1979)."""
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
    """Returns scores after normalisation, clipping and the missing-EOS penalty, in this order.

    Args:
      scores: raw scores; may be NaN in rows that are not `valid`.
      has_eos: whether the response ended with an EOS.
      normaliser: running statistics of earlier batches. This batch is added before normalising, so that the first batch
        is normalised too.
      learned: rows scored by a reward model. Only these are normalised and counted in the statistics, because an
        exact-match reward has another scale, and a row without a reward must keep the score 0.
      valid: rows that count; the scores of the others become 0.
      normalise: whether to subtract the running mean and divide by the running (biased) standard deviation.
      clip: largest absolute value of a normalised score; 0 is off.
      missing_eos_penalty: subtracted if the response has no EOS.

    Returns:
      (float32 scores, running statistics including this batch).
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
    """Returns the KL coefficient of the next batch (Ziegler et al. 2019, section 2.2).

        kl_coef * (1 + clip(kl / target - 1, -0.2, 0.2) * n_sequences / horizon)

    Args:
      kl_coef: the coefficient of this batch's rewards.
      kl: mean over the batch's sequences of the summed k1, in nats.
      n_sequences: number of sequences in the batch, over all processes.
      target: desired KL, nats per sequence.
      horizon: number of sequences over which a persistent error of 20 % changes the coefficient by about 20 %.
    """
    error = jnp.clip(kl / target - 1.0, -0.2, 0.2)
    return kl_coef * (1.0 + error * n_sequences / horizon)
