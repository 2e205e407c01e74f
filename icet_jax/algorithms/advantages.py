"""Computes advantages: generalised advantage estimation, whitening, and comparison within a group of responses."""

import jax
import jax.numpy as jnp

from icet_jax.typing import Array, ArrayLike, Bool, Float, Int, Scalar

WHITEN_EPS = 1e-8
_GROUP_EPS = 1e-4  # added to the standard deviation of a group, as in TRL's GRPO


def gae(
    rewards: Float[ArrayLike, "B A"],
    values: Float[ArrayLike, "B A"],
    mask: Bool[ArrayLike, "B A"],
    *,
    gamma: Scalar,
    lam: Scalar,
) -> tuple[Float[Array, "B A"], Float[Array, "B A"]]:
    """Returns advantages by generalised advantage estimation (Schulman et al. 2016, eq. 16), and returns.

        delta_t = r_t + gamma * V_{t+1} - V_t;    A_t = delta_t + gamma * lam * A_{t+1};    returns = A + V

    The last true position of a row is terminal: no value is bootstrapped beyond it, with or without an EOS.

    Args:
      rewards: per-token rewards; entries outside the mask may be anything, NaN included.
      values: the value head's output at the position that predicts token t; outside the mask also anything.
      mask: true on the response tokens, which are the first ones of a row; a row may have none.
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
    """Returns the values shifted and scaled so that those inside the mask have mean 0 and (biased) variance 1.

    1e-8 is added to the variance under the root.

    Call it on the whole global rollout batch, so that mini-batches and devices share one mean and one variance.

    Args:
      x: values; entries outside the mask may be anything, NaN included.
      mask: true where `x` counts.
      shift_mean: False adds the mean back afterwards, as is usual for rewards (TRL's `whiten_rewards`).
      rows: rows that are whitened, all of them if None. The other rows do not enter mean and variance and keep their
        values. Otherwise a row without a reward could get a higher advantage than the rewarded ones.

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


def whiten_cells(
    x: Float[ArrayLike, "B A"],
    mask: Bool[ArrayLike, "B A"],
    *,
    exits: Int[ArrayLike, " B"],
    kinds: Int[ArrayLike, " B"],
    num_exits: int,
    num_kinds: int,
    min_rows: int,
    min_std: float,
    rows: Bool[ArrayLike, " B"] | None = None,
) -> Float[Array, "B A"]:
    """Returns values whitened with the token mean and standard deviation of all rows with the same exit and kind.

        A_t = (x_t - mean) / max(std, min_std)

    Statistics of few rows are uncertain. Where an exit and kind together have fewer than `min_rows` rows, the
    statistics of the kind over all exits are used instead, and where the kind too has fewer, those of all rows.

    Source: this package. TRL's PPO whitens over the whole rollout, as `whiten` does.

    Args:
      x: values; entries outside the mask may be anything, NaN included.
      mask: true where `x` counts.
      exits: exit of each row, from 1 to `num_exits`.
      kinds: kind of each row, from 0 to `num_kinds` - 1.
      num_exits: number of the model's exits.
      num_kinds: number of kinds.
      min_rows: a group's own statistics are used only if at least this many of its rows have an unmasked token.
      min_std: smallest divisor, above 0, so that noise is not amplified where all rows are nearly equal.
      rows: rows that are whitened, as in `whiten`; the others keep their values.

    Returns:
      float32, zero outside the mask.
    """
    mask, exits, kinds = jnp.asarray(mask, bool), jnp.asarray(exits), jnp.asarray(kinds)
    x = jnp.where(mask, jnp.asarray(x, jnp.float32), 0.0)
    counted = mask if rows is None else mask & jnp.asarray(rows, bool)[:, None]
    # From the coarsest division into cells to the finest: all rows, each kind, each exit and kind. Exits start at 1.
    divisions = (jnp.zeros_like(kinds), 1), (kinds, num_kinds), (exits * num_kinds + kinds, (num_exits + 1) * num_kinds)
    mean = std = jnp.zeros(x.shape[0], jnp.float32)
    for fineness, (cell, count) in enumerate(divisions):
        size, cell_mean, cell_std = _cell_statistics(x, counted, cell, count)
        applies = (size >= min_rows) | (fineness == 0)
        mean, std = jnp.where(applies, cell_mean, mean), jnp.where(applies, cell_std, std)
    whitened = (x - mean[:, None]) / jnp.maximum(std, min_std)[:, None]
    return jnp.where(counted, whitened, x)


def _cell_statistics(
    x: Float[Array, "B A"], counted: Bool[Array, "B A"], cell: Int[Array, " B"], count: int
) -> tuple[Array, Array, Array]:
    """Returns (number of rows, mean, biased standard deviation) of the cell that each row belongs to, each [B].

    Only the tokens in `counted`, and rows with at least one of them, enter these statistics.

    Args:
      x: values of the tokens.
      counted: tokens to include.
      cell: index of each row's cell, from 0 to `count` - 1.
      count: number of cells.
    """

    def total(per_token: Array) -> Array:
        """Returns for each row the sum of the token values of all rows in its cell."""
        return jax.ops.segment_sum(jnp.sum(per_token, axis=1), cell, count)[cell]

    size = jax.ops.segment_sum(jnp.any(counted, axis=1).astype(jnp.int32), cell, count)[cell]
    tokens = jnp.maximum(total(counted.astype(jnp.float32)), 1.0)
    mean = total(jnp.where(counted, x, 0.0)) / tokens
    variance = total(jnp.where(counted, jnp.square(x - mean[:, None]), 0.0)) / tokens
    return size, mean, jnp.sqrt(variance)


def group_advantages(
    rewards: Float[ArrayLike, " B"], valid: Bool[ArrayLike, " B"], *, group_size: int, scaled: bool
) -> tuple[Float[Array, " B"], Bool[Array, " B"]]:
    """Returns how much better each response is than the others of its group; the rows of a group are consecutive.

        not scaled:  A_i = R_i - mean over j != i of R_j        (RLOO: Ahmadian et al. 2024, "Back to Basics", eq. 8)
        scaled:      A_i = (R_i - mean(R)) / (std(R) + 1e-4)    (GRPO: Shao et al. 2024, "DeepSeekMath", section 4.1)

    The standard deviation has n - 1 in the denominator, as in TRL.

    Args:
      rewards: one per response; entries that are not valid may be anything, NaN included.
      valid: responses that count; the others enter no mean.
      group_size: k, which divides B.
      scaled: which of the two formulas to use.

    Returns:
      (advantages, whether each response was compared). A response that is not valid, or whose group has no other valid
      response, has the advantage 0 and was not compared.
    """
    valid = jnp.asarray(valid, bool).reshape(-1, group_size)
    grouped = jnp.where(valid, jnp.asarray(rewards, jnp.float32).reshape(valid.shape), 0.0)
    count = jnp.sum(valid, axis=1, keepdims=True)
    others = jnp.maximum(count - 1, 1)
    centred = jnp.where(valid, grouped - jnp.sum(grouped, axis=1, keepdims=True) / jnp.maximum(count, 1), 0.0)
    if scaled:
        std = jnp.sqrt(jnp.sum(jnp.square(centred), axis=1, keepdims=True) / others)
        advantages = centred / (std + _GROUP_EPS)
    else:
        advantages = centred * count / others  # R_i - mean of the others = (R_i - mean of all) * n / (n - 1)
    compared = valid & (count > 1)
    return jnp.where(compared, advantages, 0.0).reshape(-1), compared.reshape(-1)
