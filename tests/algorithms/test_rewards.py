"""Score shaping and KL controllers, and the reward defects found in other systems."""

import jax.numpy as jnp
import numpy as np
import pytest

from icet_jax.algorithms import kl_penalty, policy_loss, token_rewards, value_loss
from icet_jax.algorithms.rewards import (
    adaptive_kl_coef,
    init_normaliser,
    sequence_kl,
    shape_scores,
    update_normaliser,
)
from icet_jax.errors import UserError

ALL = np.ones(4, bool)
ZEROS = np.zeros((1, 3), np.float32)


def shape(scores, **options):
    defaults = dict(has_eos=ALL, normaliser=init_normaliser(), learned=ALL, valid=ALL)
    return shape_scores(np.asarray(scores, np.float32), **(defaults | options))


def test_normaliser_equals_the_statistics_of_everything_seen():
    rng = np.random.default_rng(0)
    seen, state = [], init_normaliser()
    for size in (5, 1, 0, 17):
        scores = rng.normal(3, 2, 20).astype(np.float32)
        valid = np.arange(20) < size
        state = update_normaliser(state, np.where(valid, scores, np.nan).astype(np.float32), valid)
        seen.extend(scores[:size])
        np.testing.assert_allclose(state.mean, np.mean(seen), rtol=1e-5)
        np.testing.assert_allclose(state.m2 / state.seen, np.var(seen), rtol=1e-4, atol=1e-6)


def test_shaping_order_is_normalise_clip_penalty():
    scores = np.array([0.0, 1.0, 2.0, 100.0])
    has_eos = np.array([True, False, True, False])
    got, _ = shape(scores, has_eos=has_eos, normalise=True, clip=0.5, missing_eos_penalty=2.0)
    normalised = (scores - scores.mean()) / np.sqrt(scores.var() + 1e-8)
    np.testing.assert_allclose(got, np.clip(normalised, -0.5, 0.5) - np.where(has_eos, 0.0, 2.0), rtol=1e-5)


def test_only_learned_scores_are_normalised():
    learned = np.array([True, True, False, False])
    got, state = shape([1.0, 3.0, 1.0, 0.0], learned=learned, normalise=True)
    np.testing.assert_allclose(got, [-1.0, 1.0, 1.0, 0.0], rtol=1e-5)
    assert state.seen == 2


def test_rows_without_a_score_come_back_as_zero_and_are_not_counted():
    valid = np.array([True, True, True, False])
    got, state = shape([1.0, 2.0, 3.0, np.nan], valid=valid, normalise=True, missing_eos_penalty=1.0)
    assert got[3] == 0 and np.all(np.isfinite(got)) and state.seen == 3


def test_adaptive_controller():
    """coef *= 1 + clip(kl / target - 1, -0.2, 0.2) * n / horizon."""
    for kl, error in ((6.0, 0.0), (6.6, 0.1), (60.0, 0.2), (0.0, -0.2)):
        got = adaptive_kl_coef(jnp.float32(0.2), jnp.float32(kl), 64, target=6.0, horizon=10000.0)
        np.testing.assert_allclose(got, 0.2 * (1 + error * 64 / 10000), rtol=1e-6)


def test_sequence_kl_sums_k1():
    a, b = np.array([[1.0, 2.0, np.nan]], np.float32), np.array([[0.5, 2.5, 1.0]], np.float32)
    mask = np.array([[True, True, False]])
    np.testing.assert_allclose(sequence_kl(a, b, mask), [0.0], atol=1e-7)


def test_unknown_kl_kind_is_one_line():
    with pytest.raises(UserError, match="lppo.kl_kind.*k4.*k1, k2, k3"):
        kl_penalty(ZEROS, ZEROS, kind="k4")


# Defects found in other systems.


def test_fractional_and_integer_scores_stay_what_they_are():
    """tunix allocated the rewards with the tokens' int32 dtype: 0.7 became 0."""
    rewards = token_rewards(np.array([0.7], np.float32), ZEROS, np.ones((1, 3), bool), kl_coef=0)
    assert rewards.dtype == jnp.float32
    np.testing.assert_allclose(rewards, [[0, 0, 0.7]])


def test_score_lands_on_the_last_response_token_not_in_the_padding():
    """LLaVA-RLHF wrote it in the last padded column; TRL one after EOS."""
    mask = np.arange(5) < np.array([[0], [1], [3], [5]])
    scores = np.array([9.0, 1.0, 2.0, 3.0], np.float32)
    want = np.zeros((4, 5))
    want[1, 0], want[2, 2], want[3, 4] = 1, 2, 3
    np.testing.assert_array_equal(token_rewards(scores, np.zeros((4, 5), np.float32), mask, kl_coef=0.1), want)


def test_score_clip_leaves_the_kl_alone():
    """align-anything clips the whole per-token reward at +-50."""
    scores, _ = shape([80.0, 1.0, 1.0, 1.0], clip=50.0)
    kl = np.full((4, 2), 100.0, np.float32)
    np.testing.assert_allclose(token_rewards(scores, kl, np.ones((4, 2), bool), kl_coef=1.0)[0], [-100.0, -50.0])


def test_k1_may_be_negative():
    """LLaVA-RLHF clamps it at 0, which makes the estimate biased."""
    np.testing.assert_array_equal(kl_penalty(ZEROS - 1, ZEROS), ZEROS - 1)


def test_a_certain_token_counts():
    """align-anything built the response mask from `log_probs != 0`, and lost tokens of probability 1."""
    mask = np.array([[True, True, False]])
    loss, stats = policy_loss(ZEROS, ZEROS, np.array([[1.0, 2.0, 9.0]], np.float32), mask, clip_range=0.2)
    np.testing.assert_allclose(loss, -1.5)
    np.testing.assert_allclose(stats["ratio"], 1.0)


def test_losses_are_means_over_response_tokens_only():
    """LLaVA-RLHF averaged over padding too."""
    mask = np.array([[True, False, False]])
    one = np.ones((1, 3), np.float32)
    assert value_loss(one * 3, one, one, mask)[0] == 4
    assert policy_loss(ZEROS, ZEROS, one, mask, clip_range=0.2)[0] == -1
