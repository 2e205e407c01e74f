"""What the phases report, under TRL's names, and how it reaches the host."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from icet_jax.algorithms.losses import masked_mean
from icet_jax.algorithms.state import OptimizerSettings, TrainState, learning_rate
from icet_jax.algorithms.updates import UpdateResult
from icet_jax.parallel.distributed import fetch
from icet_jax.typing import Array, Bool, Float, Int

# Prefixes of what is a mean over the steps of an update, and what under them is none.
_OF_STEPS = ("policy/", "loss/", "rewards/", "val/ratio", "val/clipfrac_avg", "train/grad_norm")
_COUNTS = ("policy/early_stop",)
_FLAT = 1e-6  # standard deviation of a group's scores below which they are equal


def rollout_metrics(
    *,
    exits: Int[Array, " B"],
    num_exits: int,
    mask: Bool[Array, "B A"],
    scored: Bool[Array, " B"],
    unscored: Bool[Array, " B"],
    has_eos: Bool[Array, " B"],
    scores: Float[Array, " B"],
    shaped: Float[Array, " B"],
    kl: Float[Array, "B A"],
    sequence_kl: Float[Array, " B"],
    kl_coef: Float[Array, ""],
    log_probs: Float[Array, "B A"],
    sampled_log_probs: Float[Array, "B A"],
) -> dict[str, Any]:
    """Means over the scored sequences, and sums by exit (under `exit`, which `host_metrics` unpacks).

    `objective/kl` is the mean of the summed k1, `objective/scores` the scorer's own scale, `objective/rlhf_reward` the
    shaped score plus the KL terms, `val/sampler_gap` the mean |teacher-forced - sampled| log-prob per token, in nats,
    `val/sampler_ess` see `effective_share`, `val/truncated` the share of sequences that did not end with an EOS.
    """
    count = jnp.maximum(jnp.sum(scored), 1)

    def row_mean(per_row: Array) -> Array:
        return jnp.sum(jnp.where(scored, per_row, 0.0)) / count

    def row_sums(per_token: Array) -> Array:
        return jnp.sum(jnp.where(mask, per_token, 0.0), axis=1)

    def by_exit(per_row: Array) -> Array:
        return jax.ops.segment_sum(jnp.where(scored, per_row, 0.0), exits, num_exits + 1)

    non_score = row_mean(-kl_coef * row_sums(kl))
    return {
        "objective/kl": row_mean(sequence_kl),
        "objective/entropy": row_mean(-row_sums(log_probs)),
        "objective/non_score_reward": non_score,
        "objective/rlhf_reward": non_score + row_mean(shaped),
        "objective/scores": row_mean(scores),
        "objective/shaped_scores": row_mean(shaped),
        "objective/kl_coef": kl_coef,
        "objective/unscored": jnp.sum(unscored),
        "val/num_eos_tokens": jnp.sum(has_eos),
        "val/response_length": row_mean(jnp.sum(mask, axis=1)),
        "val/truncated": row_mean(~has_eos),
        "val/sampler_gap": masked_mean(jnp.abs(log_probs - sampled_log_probs), mask),
        "val/sampler_ess": effective_share(row_sums(log_probs - sampled_log_probs), scored),
        "exit": {"n": by_exit(jnp.ones_like(scores)), "kl": by_exit(sequence_kl)},
    }


def value_metrics(
    advantages: Float[Array, "B A"], returns: Float[Array, "B A"], mask: Bool[Array, "B A"]
) -> dict[str, Any]:  # fmt: skip
    """How well the value head foretells the returns.

    `advantages`, not whitened, are `returns` minus the old values. `val/explained_variance` is 1 - var(advantages) /
    var(returns) over all tokens: 1 where the values foretell the returns, 0 where a constant would do as well.
    """
    unexplained, variance = _variance(advantages, mask), _variance(returns, mask)
    return {
        "val/advantages_std": jnp.sqrt(unexplained),
        "val/returns_std": jnp.sqrt(variance),
        "val/explained_variance": jnp.where(variance > 0, 1 - unexplained / jnp.where(variance > 0, variance, 1), 0.0),
    }


def group_metrics(
    scores: Float[Array, " B"], advantages: Float[Array, " B"], compared: Bool[Array, " B"], *, group_size: int
) -> dict[str, Any]:  # fmt: skip
    """What groups of responses teach.

    `val/group_std` is the mean over groups of the standard deviation (n - 1) of their shaped scores, `val/flat_groups`
    the share of groups whose scores are all equal: these teach nothing but the KL. Groups with fewer than two scored
    responses are left out of both. `val/advantages_std` is over the compared responses.

    Args:
      scores: shaped scores.
      advantages, compared: of `advantages.group_advantages`.
      group_size: of the groups, whose rows are neighbours.
    """
    inside = compared.reshape(-1, group_size)
    grouped = scores.reshape(inside.shape)
    count = jnp.sum(inside, axis=1, keepdims=True)
    centred = grouped - jnp.sum(jnp.where(inside, grouped, 0.0), axis=1, keepdims=True) / jnp.maximum(count, 1)
    variance = jnp.sum(jnp.where(inside, jnp.square(centred), 0.0), axis=1, keepdims=True) / jnp.maximum(count - 1, 1)
    return {
        "val/group_std": masked_mean(jnp.sqrt(variance), count > 0),
        "val/flat_groups": masked_mean(jnp.sqrt(variance) < _FLAT, count > 0),
        "val/advantages_std": jnp.sqrt(_variance(advantages[:, None], compared[:, None])),
    }


def _variance(x: Float[Array, "B A"], mask: Bool[Array, "B A"]) -> Float[Array, ""]:
    return masked_mean(jnp.square(x - masked_mean(x, mask)), mask)


def effective_share(log_weights: Float[Array, " B"], counted: Bool[Array, " B"]) -> Float[Array, ""]:
    """Effective sample size of the counted sequences over their number: (sum w)^2 / (n sum w^2) (Kish).

    w = exp(`log_weights`), with the sum over a sequence of the recomputed minus the sampled log-probs: the importance
    weights of sequences that the sampler drew, for the policy that is updated. 1 where the two agree, 1 / n where one
    sequence outweighs all others, 0 where nothing is counted.
    """
    log_weights = jnp.where(counted, log_weights, -jnp.inf)
    largest = jnp.max(log_weights)
    weights = jnp.exp(log_weights - jnp.where(jnp.isfinite(largest), largest, 0.0))  # in proportion, without overflow
    squares = jnp.maximum(jnp.sum(jnp.square(weights)), 1e-30)
    return jnp.square(jnp.sum(weights)) / (squares * jnp.maximum(jnp.sum(counted), 1))


def policy_metrics(outcome: UpdateResult) -> dict[str, Any]:
    """TRL's statistics of the clipped updates: means over the evaluated steps; of `ratio_max` the largest.

    What the algorithm has no term for (value head, anchor) is left out.
    """
    stats = outcome.stats
    optional = {
        "loss/value_avg": "value",
        "val/clipfrac_avg": "value_clipfrac",
        "loss/anchor_avg": "anchor",
        "loss/kl_avg": "kl",
    }
    return {
        "policy/approxkl_avg": stats["approxkl"],
        "policy/clipfrac_avg": stats["clipfrac"],
        "policy/entropy_avg": stats["entropy"],
        "policy/early_stop": outcome.stopped,
        "loss/policy_avg": stats["policy"],
        "val/ratio": stats["ratio"],
        "val/ratio_var": stats["ratio_var"],
        "val/ratio_max": stats["ratio_max"],
    } | {metric: stats[name] for metric, name in optional.items() if name in stats}


def step_metrics(state: TrainState, outcome: UpdateResult, optimizer: OptimizerSettings) -> dict[str, Any]:
    """What every algorithm reports of its updates; `train/nonfinite` is 1 where a loss or gradient was not a number.

    `steps` is how many steps the means are over; `host_metrics` leaves them out where there was none.
    """
    rate = jnp.asarray(learning_rate(optimizer)(state.updates), jnp.float32)
    scale = state.controls.learning_rate_scale
    return {
        "steps": outcome.evaluated,
        "loss/total_avg": outcome.stats["loss"],
        "train/grad_norm": outcome.stats["grad_norm"],
        "train/updates": outcome.applied,
        "train/learning_rate": rate if scale is None else rate * scale,
        "train/nonfinite": outcome.nonfinite,
    }


def host_metrics(*parts: dict[str, Any]) -> dict[str, float]:
    """One flat dict of floats from the phases' metrics, with `exit/<layer>/kl` of the exits drawn.

    Means over the steps of an update are left out where no step had a token to learn from.
    """
    merged = {name: value for part in fetch(parts) for name, value in part.items()}
    by_exit, steps = merged.pop("exit", None), merged.pop("steps", None)
    if steps is not None and not steps:
        merged = {name: value for name, value in merged.items() if not name.startswith(_OF_STEPS) or name in _COUNTS}
    flat = {name: float(value) for name, value in merged.items()}
    for layer in np.flatnonzero(by_exit["n"]) if by_exit is not None else ():
        flat[f"exit/{layer}/kl"] = float(by_exit["kl"][layer] / by_exit["n"][layer])
    return flat


def instability(row: dict[str, float]) -> str | None:
    """Why an iteration taught nothing, in words; None where it did. What met it was not applied."""
    if row["train/nonfinite"]:
        return "the loss or its gradient is NaN or infinite"
    if row.get("train/unstable"):
        return f"the KL to the reference is {row['objective/kl']:.3g} nats per sequence, beyond config.lppo.max_kl"
    return None
