"""Advantages, rewards and losses against float64 references, values and gradients, with garbage outside the masks."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from icet_jax import algorithms
from icet_jax.algorithms.advantages import group_advantages, whiten, whiten_cells
from tests.algorithms import references as ref

SEEDS = range(20)
TOLERANCE = dict(rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("seed", SEEDS)
def test_gae_matches_the_double_sum(seed):
    (rewards, values, weight, other), mask, rng = ref.random_case(seed)
    gamma, lam = rng.uniform(0.8, 1.0), rng.uniform(0.5, 1.0)
    want = ref.gae(rewards, values, mask, gamma, lam)
    got = algorithms.gae(
        ref.poison(rewards, mask, rng), ref.poison(values, mask, rng), mask, gamma=gamma, lam=jnp.float32(lam)
    )
    for mine, theirs in zip(got, want, strict=True):
        assert mine.dtype == jnp.float32
        np.testing.assert_allclose(mine, theirs, **TOLERANCE)


@pytest.mark.parametrize("seed", SEEDS)
def test_gae_gradients_are_linear_and_clean(seed):
    """GAE is linear, so the reference applied to unit vectors is its Jacobian."""
    (rewards, values, weight, other), mask, rng = ref.random_case(seed, rows=4, length=5)

    def weighted(rewards, values):
        advantages, returns = algorithms.gae(rewards, values, mask, gamma=0.97, lam=0.9)
        return jnp.sum(advantages * weight) + jnp.sum(returns * other)

    got = jax.grad(weighted, (0, 1))(ref.poison(rewards, mask, rng), ref.poison(values, mask, rng))
    zero = np.zeros(mask.shape)
    for which, gradient in enumerate(got):
        want = np.zeros(mask.shape)
        for b, t in zip(*np.nonzero(mask), strict=True):
            unit = zero.copy()
            unit[b, t] = 1.0
            advantages, returns = ref.gae(*((unit, zero) if which == 0 else (zero, unit)), mask, 0.97, 0.9)
            want[b, t] = np.sum(np.where(mask, advantages * weight + returns * other, 0.0))
        np.testing.assert_allclose(gradient, want, **TOLERANCE)


@pytest.mark.parametrize("shift_mean", [True, False])
@pytest.mark.parametrize("seed", SEEDS)
def test_whiten_and_its_gradient(seed, shift_mean):
    (x, weight, *_), mask, rng = ref.random_case(seed)
    poisoned = ref.poison(3 * x + 1, mask, rng)
    np.testing.assert_allclose(
        whiten(poisoned, mask, shift_mean=shift_mean), ref.whiten(3 * x + 1, mask, shift_mean), **TOLERANCE
    )
    got = jax.grad(lambda x: jnp.sum(whiten(x, mask, shift_mean=shift_mean) * weight))(poisoned)
    want, step = np.zeros(mask.shape), 1e-5
    for b, t in zip(*np.nonzero(mask), strict=True):
        ends = []
        for sign in (1, -1):
            moved = 3 * x + 1
            moved[b, t] += sign * step
            ends.append(np.sum(ref.whiten(moved, mask, shift_mean) * weight))
        want[b, t] = (ends[0] - ends[1]) / (2 * step)
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)


def test_whiten_without_tokens_is_zero():
    empty = np.zeros((3, 4), bool)
    garbage = np.full((3, 4), np.nan, np.float32)
    assert not np.any(whiten(garbage, empty))
    assert not np.any(jax.grad(lambda x: jnp.sum(whiten(x, empty)))(garbage))


@pytest.mark.parametrize("shift_mean", [True, False])
@pytest.mark.parametrize("seed", SEEDS)
def test_rows_that_are_not_rewarded_neither_whiten_nor_are_whitened(seed, shift_mean):
    (x, *_), mask, rng = ref.random_case(seed)
    rows = rng.random(len(mask)) < 0.6
    got = np.asarray(whiten(ref.poison(3 * x + 1, mask, rng), mask, shift_mean=shift_mean, rows=rows))
    np.testing.assert_allclose(got, ref.whiten(3 * x + 1, mask, shift_mean, rows), **TOLERANCE)
    np.testing.assert_array_equal(got[~rows], np.where(mask, 3 * x + 1, 0).astype(np.float32)[~rows])
    gradient = jax.grad(lambda x: jnp.sum(whiten(x, mask, shift_mean=shift_mean, rows=rows) ** 2))
    assert np.all(np.isfinite(gradient(ref.poison(x, mask, rng))))


def test_whitening_without_a_rewarded_row_changes_nothing():
    x, mask = np.array([[2.0, 3.0]], np.float32), np.ones((1, 2), bool)
    np.testing.assert_array_equal(whiten(x, mask, rows=np.zeros(1, bool)), x)


@pytest.mark.parametrize("seed", range(5))
def test_each_exit_and_kind_is_whitened_by_itself_where_it_has_enough_rows(seed):
    (x, *_), mask, rng = ref.random_case(seed, rows=40)
    exits, kinds, rows = rng.integers(1, 4, 40), rng.choice(3, 40, p=[0.7, 0.25, 0.05]), rng.random(40) < 0.8
    x = np.where(kinds[:, None] == 1, 0.01 * x, 3 * x + exits[:, None])  # a kind that hardly differs: the least std
    sizes = dict(min_rows=5, min_std=0.2)
    got = whiten_cells(
        ref.poison(x, mask, rng), mask, exits=exits, kinds=kinds, num_exits=3, num_kinds=3, rows=rows, **sizes
    )
    want = ref.whiten_cells(x, mask, exits, kinds, rows=rows, **sizes)
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("scaled", [False, True], ids=["rloo", "grpo"])
@pytest.mark.parametrize("seed", range(5))
def test_a_response_is_compared_with_the_others_of_its_group(seed, scaled):
    rng = np.random.default_rng(seed)
    rewards, valid = 3 * rng.normal(size=24) + 5, rng.random(24) < 0.6
    rewards[:4], valid[:4], valid[4:8], valid[8:12] = 2.0, True, [True, False, False, False], False
    poisoned = np.where(valid, rewards, np.nan).astype(np.float32)
    got = group_advantages(poisoned, valid, group_size=4, scaled=scaled)
    for mine, theirs in zip(got, ref.group_advantages(rewards, valid, 4, scaled), strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-4, atol=1e-5)
    assert not np.any(got[0][:12]) and np.all(got[1][:4]) and not np.any(got[1][4:12])


@pytest.mark.parametrize("kind", ["k1", "k2", "k3"])
@pytest.mark.parametrize("seed", SEEDS)
def test_kl_and_token_rewards(seed, kind):
    (log_probs, ref_log_probs, weight, _), mask, rng = ref.random_case(seed)
    scores = rng.normal(size=mask.shape[0])
    want = ref.token_rewards(scores, log_probs, ref_log_probs, mask, 0.13, kind)
    inputs = ref.poison(log_probs, mask, rng), ref.poison(ref_log_probs, mask, rng)
    poisoned_scores = np.where(mask.any(1), scores, np.nan).astype(np.float32)

    def rewards(log_probs, ref_log_probs, scores):
        kl = algorithms.kl_penalty(log_probs, ref_log_probs, kind=kind)
        return algorithms.token_rewards(scores, kl, mask, kl_coef=0.13)

    np.testing.assert_allclose(rewards(*inputs, poisoned_scores), want, **TOLERANCE)
    got = jax.grad(lambda *a: jnp.sum(rewards(*a) * weight), (0, 1, 2))(*inputs, poisoned_scores)
    d = log_probs - ref_log_probs
    slope = {"k1": np.ones_like(d), "k2": d, "k3": 1 - np.exp(-d)}[kind]
    by_log_prob = np.where(mask, -0.13 * slope * weight, 0.0)
    by_score = [weight[b, mask[b].sum() - 1] if mask[b].any() else 0.0 for b in range(mask.shape[0])]
    for mine, theirs in zip(got, (by_log_prob, -by_log_prob, by_score), strict=True):
        np.testing.assert_allclose(mine, theirs, **TOLERANCE)


def test_k3_is_accurate_near_zero():
    d = np.linspace(-1e-3, 1e-3, 41)
    got = np.asarray(algorithms.kl_penalty(d.astype(np.float32), np.zeros(41, np.float32), kind="k3"))
    np.testing.assert_allclose(got, ref.kl(d, 0.0, "k3"), rtol=0, atol=1e-9)


@pytest.mark.parametrize("dual_clip", [None, 1.5])
@pytest.mark.parametrize("seed", SEEDS)
def test_policy_loss_and_its_gradient(seed, dual_clip):
    (log_probs, old, advantages, _), mask, rng = ref.random_case(seed)
    old = log_probs + 0.4 * old
    want, want_gradient, want_stats = ref.policy_loss(log_probs, old, advantages, mask, 0.2, dual_clip)
    inputs = [ref.poison(x, mask, rng) for x in (log_probs, old, advantages)]
    (loss, stats), gradient = jax.value_and_grad(
        lambda lp: algorithms.policy_loss(
            lp, inputs[1], inputs[2], mask, clip_range=jnp.float32(0.2), dual_clip=dual_clip
        ),
        has_aux=True,
    )(inputs[0])
    np.testing.assert_allclose(loss, want, **TOLERANCE)
    np.testing.assert_allclose(gradient, want_gradient, **TOLERANCE)
    assert stats.keys() == want_stats.keys()
    for name, value in want_stats.items():
        np.testing.assert_allclose(stats[name], value, **TOLERANCE)
    clean = jax.grad(lambda *a: algorithms.policy_loss(*a, mask, clip_range=0.2, dual_clip=dual_clip)[0], (1, 2))(
        *inputs
    )
    assert all(np.all(np.isfinite(g)) and not np.any(g[~mask]) for g in clean)


def test_the_dual_clip_bounds_what_one_token_can_cost():
    """A token that became e^5 times as likely, and was worse than expected."""
    one, mask = np.ones((1, 1), np.float32), np.ones((1, 1), bool)
    free, _ = algorithms.policy_loss(5 * one, 0 * one, -one, mask, clip_range=0.2)
    bounded, _ = algorithms.policy_loss(5 * one, 0 * one, -one, mask, clip_range=0.2, dual_clip=3.0)
    np.testing.assert_allclose([free, bounded], [np.exp(5), 3], rtol=1e-5)
    rewarded, _ = algorithms.policy_loss(5 * one, 0 * one, one, mask, clip_range=0.2, dual_clip=3.0)
    np.testing.assert_allclose(rewarded, -1.2, rtol=1e-6)


@pytest.mark.parametrize("clip", [None, 0.3])
@pytest.mark.parametrize("seed", SEEDS)
def test_value_loss_and_its_gradient(seed, clip):
    (values, old, returns, _), mask, rng = ref.random_case(seed)
    old = values + 0.5 * old
    want, want_gradient, want_clipfrac = ref.value_loss(values, old, returns, mask, clip)
    inputs = [ref.poison(x, mask, rng) for x in (values, old, returns)]
    (loss, stats), gradient = jax.value_and_grad(
        lambda v: algorithms.value_loss(v, inputs[1], inputs[2], mask, clip_range=clip), has_aux=True
    )(inputs[0])
    np.testing.assert_allclose(loss, want, **TOLERANCE)
    np.testing.assert_allclose(gradient, want_gradient, **TOLERANCE)
    np.testing.assert_allclose(stats["clipfrac"], want_clipfrac, **TOLERANCE)


def test_everything_works_under_jit_with_traced_scalars():
    (rewards, values, old, log_probs), mask, _ = ref.random_case(0)
    arrays = [x.astype(np.float32) for x in (rewards, values, old, log_probs)]

    @jax.jit
    def all_of_it(rewards, values, old, log_probs, mask, gamma, lam, eps, coef):
        kl = algorithms.kl_penalty(log_probs, old, kind="k3")
        rewards = algorithms.token_rewards(rewards[:, 0], kl, mask, kl_coef=coef)
        advantages, returns = algorithms.gae(rewards, values, mask, gamma=gamma, lam=lam)
        policy, _ = algorithms.policy_loss(log_probs, old, algorithms.whiten(advantages, mask), mask, clip_range=eps)
        return policy + algorithms.value_loss(values, old, returns, mask, clip_range=eps)[0]

    assert np.isfinite(all_of_it(*arrays, mask, 1.0, 0.95, 0.2, 0.1))
