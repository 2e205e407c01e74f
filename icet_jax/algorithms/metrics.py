"""Computes the metrics of the phases, under TRL's names, and brings them to the host."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from icet_jax.algorithms.losses import masked_mean
from icet_jax.algorithms.state import OptimizerSettings, TrainState, learning_rate
from icet_jax.algorithms.updates import UpdateResult
from icet_jax.parallel.distributed import fetch
from icet_jax.typing import Array, Bool, Float, Int

# Prefixes of metrics that are means over the steps of an update; the metrics in `_COUNTS` are counts, not means.
_OF_STEPS = ("policy/", "loss/", "rewards/", "val/ratio", "val/clipfrac_avg", "train/grad_norm")
_COUNTS = ("policy/early_stop",)
_FLAT = 1e-6  # scores of a group with a smaller standard deviation count as equal


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
    """Returns {metric: mean over the scored sequences}; "exit" has sums by exit, which `host_metrics` unpacks.

      objective/kl: mean of k1 summed over the sequence.
      objective/scores: mean raw score.
      objective/rlhf_reward: mean of the shaped score plus the KL terms.
      val/sampler_gap: mean absolute difference, in nats per token, between the log-prob computed for training and the
        sampler's.
      val/sampler_ess: see `effective_share`.
      val/truncated: share of sequences that did not end with an EOS.

    The arguments are those of `rollouts.EvaluatedRollout` and `Rollout`; `unscored` marks rows with a response but
    without a score, and `sampled_log_probs` are the log-probs of the sampler.
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
    """Returns metrics of how well the value head predicts the returns.

    `advantages` are not whitened: `returns` minus the old values. `val/explained_variance` is 1 - var(advantages) /
    var(returns) over all tokens: 1 if the values equal the returns, 0 if a constant would predict as well.
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
    """Returns metrics of how different the scores of a group's responses are.

      val/group_std: mean over groups of the standard deviation (n - 1) of a group's shaped scores.
      val/flat_groups: share of groups whose scores are all equal, from which only the KL is learnt.
      val/advantages_std: standard deviation of the advantages of the compared responses.

    Groups with fewer than two scored responses are left out of the first two.

    Args:
      scores: shaped scores.
      advantages, compared: results of `advantages.group_advantages`.
      group_size: number of rows of a group, which are neighbours.
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
    """Returns the (biased) variance of the values inside the mask."""
    return masked_mean(jnp.square(x - masked_mean(x, mask)), mask)


def effective_share(log_weights: Float[Array, " B"], counted: Bool[Array, " B"]) -> Float[Array, ""]:
    """Returns the effective sample size of the counted sequences as a share of their number n (Kish).

    It is (sum w)^2 / (n sum w^2) with the importance weights w = exp(`log_weights`) of the sequences. A log-weight is
    the sum over a sequence's tokens of the log-prob computed for training minus the sampler's. The share is 1 if the
    two log-probs agree, 1 / n if one sequence outweighs all others, and 0 if no sequence is counted.
    """
    log_weights = jnp.where(counted, log_weights, -jnp.inf)
    largest = jnp.max(log_weights)
    weights = jnp.exp(log_weights - jnp.where(jnp.isfinite(largest), largest, 0.0))  # in proportion, without overflow
    squares = jnp.maximum(jnp.sum(jnp.square(weights)), 1e-30)
    return jnp.square(jnp.sum(weights)) / (squares * jnp.maximum(jnp.sum(counted), 1))


def policy_metrics(outcome: UpdateResult) -> dict[str, Any]:
    """Returns TRL's statistics of clipped updates: means over the evaluated steps, but the maximum for `ratio_max`.

    Metrics of terms that the algorithm's loss does not have (value head, anchor, KL) are left out.
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
    """Returns the metrics of updates that every algorithm has.

    `train/nonfinite` is 1 if a loss or gradient was not finite. `steps` is the number of steps over which means are
    computed. `host_metrics` removes the entry `steps` and, if it is 0, the means.
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
    """Returns {metric: float} from the metrics of several phases, with `exit/<layer>/kl` for the exits of the batch.

    Means over the steps of an update are left out if no step had a token to learn from.
    """
    merged = {name: value for part in fetch(parts) for name, value in part.items()}
    by_exit, steps = merged.pop("exit", None), merged.pop("steps", None)
    if steps is not None and not steps:
        merged = {name: value for name, value in merged.items() if not name.startswith(_OF_STEPS) or name in _COUNTS}
    flat = {name: float(value) for name, value in merged.items()}
    for layer in np.flatnonzero(by_exit["n"]) if by_exit is not None else ():
        flat[f"exit/{layer}/kl"] = float(by_exit["kl"][layer] / by_exit["n"][layer])
    return flat


def instability(metrics: dict[str, float]) -> str | None:
    """Returns why the updates of an iteration with these metrics were not applied; None if they were."""
    if metrics["train/nonfinite"]:
        return "the loss or its gradient is NaN or infinite"
    if metrics.get("train/unstable"):
        return f"the KL to the reference is {metrics['objective/kl']:.3g} nats per sequence, beyond config.lppo.max_kl"
    return None
