"""Loss functions of arrays: those of L-PPO are means over tokens inside the mask, that of L-DPO a mean over pairs.

All return (loss, statistics).
"""

import jax
import jax.numpy as jnp

from icet_jax.typing import Array, ArrayLike, Bool, Float, Scalar, Shaped

Stats = dict[str, Array]


def masked_mean(x: Shaped[Array, "B A"], mask: Bool[Array, "B A"]) -> Float[Array, ""]:
    """Returns the mean of `x` over the true positions of the mask, 0 if there are none.

    Gradients are only correct if `x` is finite everywhere.
    """
    return jnp.sum(jnp.where(mask, x, 0.0)) / jnp.maximum(jnp.sum(mask), 1)


def policy_loss(
    log_probs: Float[ArrayLike, "B A"],
    old_log_probs: Float[ArrayLike, "B A"],
    advantages: Float[ArrayLike, "B A"],
    mask: Bool[ArrayLike, "B A"],
    *,
    clip_range: Scalar,
    dual_clip: Scalar | None = None,
) -> tuple[Float[Array, ""], Stats]:
    """Returns PPO's clipped loss (paper; Schulman et al. 2017, eq. 7): a mean over tokens with advantage A.

        E[max(-K A, -clip(K, 1 - eps, 1 + eps) A)]  with  K = exp(log_probs - old_log_probs)

    For a negative A this has no upper limit: -K A grows with K. With `dual_clip` c it is at most -c A (Ye et al. 2020,
    "Mastering Complex Control in MOBA Games with Deep Reinforcement Learning", eq. 5).

    Args:
      log_probs: log-probs of the response tokens under the policy being updated, at the row's exit.
      old_log_probs: log-probs of the same tokens under the policy that sampled them, at the same exit.
      advantages: advantage of each token; constants.
      mask: true on the response tokens; entries outside it may be anything, NaN included.
      clip_range: eps.
      dual_clip: c, above 1; None is off.

    Returns:
      (loss, stats). `stats` has the scalar token means `ratio`, `ratio_var`, `clipfrac` (share of tokens where the
      clipped term is the larger) and `approxkl` (TRL's: mean of half the squared log-ratio), and `ratio_max`, the
      largest K (0 without a token).
    """
    mask = jnp.asarray(mask, bool)
    # Zeroed before exp as well as after: 0 * NaN in the backward pass is NaN.
    log_ratio = jnp.where(mask, jnp.asarray(log_probs, jnp.float32), 0.0) - jnp.where(
        mask, jnp.asarray(old_log_probs, jnp.float32), 0.0
    )
    advantages = jnp.where(mask, jnp.asarray(advantages, jnp.float32), 0.0)
    ratio = jnp.exp(log_ratio)
    unclipped = -ratio * advantages
    clipped = -jnp.clip(ratio, 1.0 - clip_range, 1.0 + clip_range) * advantages
    per_token = jnp.maximum(unclipped, clipped)
    if dual_clip is not None:
        per_token = jnp.where(advantages < 0, jnp.minimum(per_token, -dual_clip * advantages), per_token)
    loss = masked_mean(per_token, mask)
    mean_ratio = masked_mean(ratio, mask)
    stats = {
        "ratio": mean_ratio,
        "ratio_var": masked_mean(jnp.square(ratio - mean_ratio), mask),
        "ratio_max": jnp.max(jnp.where(mask, ratio, 0.0), initial=0.0),
        "clipfrac": masked_mean(clipped > unclipped, mask),
        "approxkl": 0.5 * masked_mean(jnp.square(log_ratio), mask),
    }
    return loss, stats


def value_loss(
    values: Float[ArrayLike, "B A"],
    old_values: Float[ArrayLike, "B A"],
    returns: Float[ArrayLike, "B A"],
    mask: Bool[ArrayLike, "B A"],
    *,
    clip_range: Scalar | None = None,
) -> tuple[Float[Array, ""], Stats]:
    """Returns the mean of (V - returns)^2 over tokens, without a factor 1/2 (paper).

    With `clip_range` c, a token's loss is the larger of (V - returns)^2 and
    (clip(V, V_old - c, V_old + c) - returns)^2, as in OpenAI's baselines.

    Args:
      values: V, values of the value head being updated.
      old_values: V_old, values at the time of the rollout; only used with `clip_range`.
      returns: returns from `gae`; constants.
      mask: true on the response tokens; entries outside it may be anything, NaN included.
      clip_range: None is off.

    Returns:
      (loss, stats): stats has the scalar `clipfrac`, the share of tokens where the clipped error is the larger.
    """
    mask = jnp.asarray(mask, bool)
    values = jnp.where(mask, jnp.asarray(values, jnp.float32), 0.0)
    returns = jnp.where(mask, jnp.asarray(returns, jnp.float32), 0.0)
    error = jnp.square(values - returns)
    if clip_range is None:
        return masked_mean(error, mask), {"clipfrac": jnp.zeros((), jnp.float32)}
    old_values = jnp.where(mask, jnp.asarray(old_values, jnp.float32), 0.0)
    clipped_values = jnp.clip(values, old_values - clip_range, old_values + clip_range)
    clipped_error = jnp.square(clipped_values - returns)
    stats = {"clipfrac": masked_mean(clipped_error > error, mask)}
    return masked_mean(jnp.maximum(error, clipped_error), mask), stats


def dpo_loss(
    log_probs: Float[ArrayLike, "B 2"],
    ref_log_probs: Float[ArrayLike, "B 2"],
    mask: Bool[ArrayLike, "B"],
    *,
    beta: Scalar,
) -> tuple[Float[Array, ""], Stats]:
    """Returns the DPO loss (Rafailov et al. 2023, eq. 7), a mean over pairs.

        E[-log sigmoid(r_chosen - r_rejected)]  with  r = beta (log_probs - ref_log_probs)

    Args:
      log_probs: log-probs of each pair's chosen and rejected answer under the policy, summed over tokens, in nats.
      ref_log_probs: log-probs of the same answers under the reference; constants.
      mask: true where there is a pair; other rows may be anything, NaN included.
      beta: factor of the log-ratio; with a smaller one the policy may go farther from the reference.

    Returns:
      (loss, stats): stats are scalar means over the pairs under TRL's names, `chosen`, `rejected` (both r), `margins`
      (their difference) and `accuracies` (share of pairs with a positive margin).
    """
    pairs = jnp.asarray(mask, bool)[:, None]
    # Zeroed before the logarithm as well as after: 0 * NaN in the backward pass is NaN.
    gaps = jnp.where(pairs, jnp.asarray(log_probs, jnp.float32), 0.0) - jnp.where(
        pairs, jnp.asarray(ref_log_probs, jnp.float32), 0.0
    )
    rewards = beta * gaps
    margins = rewards[:, :1] - rewards[:, 1:]
    stats = {
        "chosen": masked_mean(rewards[:, :1], pairs),
        "rejected": masked_mean(rewards[:, 1:], pairs),
        "margins": masked_mean(margins, pairs),
        "accuracies": masked_mean(margins > 0, pairs),
    }
    return masked_mean(-jax.nn.log_sigmoid(margins), pairs), stats
