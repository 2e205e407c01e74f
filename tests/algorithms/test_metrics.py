"""Metrics of the rollout against float64 loops, and what becomes of the updates' statistics."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from icet_jax.algorithms.metrics import effective_share, rollout_metrics, value_metrics
from icet_jax.algorithms.updates import optimise, shuffled_order
from tests.algorithms import references as ref

CLOSE = dict(rtol=1e-4, atol=1e-6)


def case(seed):
    """A random rollout, float64."""
    (log_probs, noise, advantages, values), mask, rng = ref.random_case(seed)
    scored = mask.any(1)
    return dict(
        mask=mask,
        scored=scored,
        has_eos=scored & (rng.random(len(mask)) < 0.5),
        log_probs=log_probs,
        sampled_log_probs=log_probs + 0.1 * noise,
        advantages=np.where(mask, advantages, 0),
        returns=np.where(mask, advantages + values, 0),
    )


def measured(rollout):
    rows = len(rollout["mask"])
    arrays = {name: jnp.asarray(x, jnp.float32 if x.dtype == float else x.dtype) for name, x in rollout.items()}
    nothing = jnp.zeros(rows, jnp.float32)
    of_values = value_metrics(arrays.pop("advantages"), arrays.pop("returns"), arrays["mask"])
    return of_values | rollout_metrics(
        **arrays,
        exits=jnp.ones(rows, jnp.int32),
        num_exits=2,
        unscored=jnp.zeros(rows, bool),
        scores=nothing,
        shaped=nothing,
        kl=jnp.zeros(rollout["mask"].shape, jnp.float32),
        sequence_kl=nothing,
        kl_coef=jnp.float32(0.1),
    )


@pytest.mark.parametrize("seed", range(5))
def test_spread_explained_variance_and_truncation(seed):
    rollout = case(seed)
    got = measured(rollout)
    advantages, returns = (rollout[name][rollout["mask"]] for name in ("advantages", "returns"))
    np.testing.assert_allclose(got["val/advantages_std"], np.std(advantages), **CLOSE)
    np.testing.assert_allclose(got["val/returns_std"], np.std(returns), **CLOSE)
    np.testing.assert_allclose(got["val/explained_variance"], 1 - np.var(advantages) / np.var(returns), **CLOSE)
    np.testing.assert_allclose(got["val/truncated"], np.mean(~rollout["has_eos"][rollout["scored"]]), **CLOSE)


def test_perfect_values_explain_everything_and_equal_returns_nothing():
    rollout, zero = case(0), np.zeros((7, 6))
    rising = np.where(rollout["mask"], np.arange(42.0).reshape(7, 6), 0)
    for advantages, returns, explained in ((zero, rising, 1), (rising, rising, 0), (zero, zero, 0)):
        got = measured(rollout | dict(advantages=advantages, returns=returns))
        np.testing.assert_allclose(got["val/explained_variance"], explained, atol=1e-6)


@pytest.mark.parametrize("seed", range(5))
def test_effective_sample_size_of_the_sampler(seed):
    rollout = case(seed)
    log_ratio = np.where(rollout["mask"], rollout["log_probs"] - rollout["sampled_log_probs"], 0)
    weights = [np.exp(sum(log_ratio[row])) for row in np.flatnonzero(rollout["scored"])]
    want = sum(weights) ** 2 / (len(weights) * sum(weight**2 for weight in weights))
    np.testing.assert_allclose(measured(rollout)["val/sampler_ess"], want, rtol=1e-4)


def test_effective_share_at_its_limits():
    every = jnp.ones(4, bool)
    np.testing.assert_allclose(effective_share(jnp.full(4, 500.0), every), 1)  # without overflow
    np.testing.assert_allclose(effective_share(jnp.array([0.0, -90, -90, -90]), every), 0.25)
    np.testing.assert_allclose(effective_share(jnp.array([0.0, 50, 0, 0]), jnp.arange(4) != 1), 1)
    assert effective_share(jnp.zeros(4), ~every) == 0


RATIOS = np.array([1.0, 3.0, 1.5, 0.5, 2.0, 0.25, 1.0, 1.0], np.float32)


def updated(**options):
    """Result of two epochs of two steps of two slices over eight rows of one token each, whose ratios are known."""

    def loss(trainable, rows):
        mean, largest = jnp.mean(rows["ratio"]), jnp.max(rows["ratio"])
        return jnp.sum(trainable["w"]) * mean, {"approxkl": 0 * mean, "ratio": mean, "ratio_max": largest}

    optimizer, trainable = optax.sgd(0.1), {"w": jnp.ones(2)}
    order = shuffled_order(jax.random.key(0), rows=8, epochs=2, minibatches=2, accumulation=2)
    tokens = jnp.ones(8, jnp.int32)
    batch = {"ratio": jnp.asarray(RATIOS)}
    return optimise(loss, optimizer, trainable, optimizer.init(trainable), batch, tokens, order, **options)


def test_the_largest_ratio_is_that_of_all_slices_and_steps_and_the_mean_stays_a_mean():
    outcome = updated()
    assert outcome.applied == 4
    assert outcome.stats["ratio_max"] == 3
    np.testing.assert_allclose(outcome.stats["ratio"], RATIOS.mean(), rtol=1e-6)


def test_a_step_beyond_the_largest_ratio_ends_the_updates_and_is_not_applied():
    """Whatever the mean is: rows 0 and 1, of ratios 1 and 3, are never in the same step."""
    free, guarded = updated(), updated(max_ratio=2.9)
    assert guarded.stopped and not free.stopped and not guarded.nonfinite
    assert guarded.applied < 2 and guarded.stats["ratio_max"] == 3
    within = updated(max_ratio=3.1)
    assert within.applied == 4 and not within.stopped
    np.testing.assert_array_equal(within.trainable["w"], free.trainable["w"])
