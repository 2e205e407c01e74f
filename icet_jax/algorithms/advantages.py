"""Advantages: generalised advantage estimation and masked whitening."""

import jax
import jax.numpy as jnp

from icet_jax.typing import Array, ArrayLike, Bool, Float, Scalar

WHITEN_EPS = 1e-8


def gae(
    rewards: Float[ArrayLike, "B A"],
    values: Float[ArrayLike, "B A"],
    mask: Bool[ArrayLike, "B A"],
    *,
    gamma: Scalar,
    lam: Scalar,
) -> tuple[Float[Array, "B A"], Float[Array, "B A"]]:
    """Generalised advantage estimation (Schulman et al. 2016, eq. 16) over responses of different lengths.

        delta_t = r_t + gamma * V_{t+1} - V_t;    A_t = delta_t + gamma * lam * A_{t+1};    returns = A + V

    The last true position of a row is terminal: nothing is bootstrapped beyond it, with or without an EOS.

    Args:
      rewards: per-token rewards; entries outside the mask may be anything, NaN included.
      values: the value head's output at the position that predicts token t; likewise.
      mask: true on the response tokens, a prefix of each row, possibly empty.
      gamma: discount per token.
      lam: GAE's lambda.

    Returns:
      (advantages, returns), float32, zero outside the mask.
    """
    mask = jnp.asarray(mask, bool)
    rewards = jnp.where(mask, jnp.asarray(rewards, jnp.float32), 0.0)
    values = jnp.where(mask, jnp.asarray(values, jnp.float32), 0.0)
    next_values = jnp.pad(values[:, 1:], ((0, 0), (0, 1)))
    deltas = jnp.where(mask, rewards + gamma * next_values - values, 0.0)

    def step(later: Array, delta: Array) -> tuple[Array, Array]:
        advantage = delta + gamma * lam * later
        return advantage, advantage

    start = jnp.zeros(deltas.shape[0], jnp.float32)
    _, advantages = jax.lax.scan(step, start, deltas.T, reverse=True)
    advantages = jnp.where(mask, advantages.T, 0.0)
    return advantages, advantages + values


def whiten(
    x: Float[ArrayLike, "B A"],
    mask: Bool[ArrayLike, "B A"],
    *,
    shift_mean: bool = True,
    rows: Bool[ArrayLike, " B"] | None = None,
) -> Float[Array, "B A"]:
    """Gives the entries inside the mask mean 0 and variance 1 (biased variance, eps 1e-8 under the root).

    Call it on the whole global rollout batch, so that mini-batches and devices share one mean and one variance.

    Args:
      x: values; entries outside the mask may be anything, NaN included.
      mask: true where `x` counts.
      shift_mean: False adds the mean back afterwards, as is usual for rewards (TRL's `whiten_rewards`).
      rows: rows that are whitened, all of them if None. The others enter neither mean nor variance and keep their
        values, neither shifted nor scaled: a row without a reward must not be told that it beats the rewarded ones.

    Returns:
      float32, zero outside the mask.
    """
    mask = jnp.asarray(mask, bool)
    x = jnp.where(mask, jnp.asarray(x, jnp.float32), 0.0)
    counted = mask if rows is None else mask & jnp.asarray(rows, bool)[:, None]
    count = jnp.maximum(jnp.sum(counted), 1)
    mean = jnp.sum(jnp.where(counted, x, 0.0)) / count
    centred = jnp.where(counted, x - mean, 0.0)
    variance = jnp.sum(jnp.square(centred)) / count
    scaled = centred * jax.lax.rsqrt(variance + WHITEN_EPS)
    return jnp.where(counted, scaled if shift_mean else scaled + mean, x)
