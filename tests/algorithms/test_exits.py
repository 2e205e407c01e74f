"""Exit schedules."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from icet_jax.algorithms import exits
from icet_jax.config.names import EXIT_SCHEDULES
from icet_jax.errors import UserError


def draw(schedule, seed=0, batch=10, num_exits=8, default_exit=7, **options):
    key = jax.random.key(seed)
    drawer = exits.schedule(schedule, num_exits=num_exits, default_exit=default_exit, **options)
    return np.asarray(drawer.draw(key, drawer.initial_state(), batch=batch))


@pytest.mark.parametrize("schedule", EXIT_SCHEDULES)
@pytest.mark.parametrize("num_exits", [1, 2, 3, 8, 24])
def test_every_schedule_stays_in_range_reaches_every_exit_and_repeats(schedule, num_exits):
    seen = set()
    for seed in range(40):
        drawn = draw(schedule, seed, 12, num_exits, num_exits)
        assert drawn.dtype == np.int32 and drawn.shape == (12,)
        np.testing.assert_array_equal(drawn, draw(schedule, seed, 12, num_exits, num_exits))
        seen |= set(drawn.tolist())
    assert seen <= set(range(1, num_exits + 1))
    if schedule == "fixed":
        assert seen == {num_exits}
    elif schedule != "per_batch" or num_exits <= 8:
        assert seen == set(range(1, num_exits + 1))


def test_fixed_and_per_batch_are_one_exit():
    assert set(draw("fixed")) == {7} and set(draw("fixed", fixed_exit=2)) == {2}
    assert len(set(draw("per_batch"))) == 1
    assert len(set(draw("per_example", batch=64))) > 1


@pytest.mark.parametrize("batch", [1, 3, 10, 64])
@pytest.mark.parametrize("num_exits", [3, 8, 24])
def test_stratified_covers_the_paper_groups_evenly(batch, num_exits):
    extra = np.zeros(3)
    for seed in range(30):
        drawn = draw("stratified", seed, batch, num_exits, num_exits)
        counts = [np.isin(drawn, group).sum() for group in np.array_split(np.arange(1, num_exits + 1), 3)]
        assert max(counts) - min(counts) <= 1
        extra += np.asarray(counts) - min(counts)
    if batch % 3:
        assert np.all(extra > 0)  # which group gets a row more is drawn anew


def test_stratified_works_under_jit():
    drawer = exits.schedule("stratified", num_exits=8, default_exit=7)
    jitted = jax.jit(lambda key: drawer.draw(key, None, batch=6))
    np.testing.assert_array_equal(jitted(jax.random.key(3)), draw("stratified", 3, batch=6))


def test_bad_input_is_one_line():
    for bad in (0, 9, -1):
        with pytest.raises(UserError, match=f"exit {bad} is out of range.*1..8"):
            draw("fixed", fixed_exit=bad)
    with pytest.raises(UserError, match="unknown schedule 'every'"):
        draw("every")


NARROWED = [name for name in EXIT_SCHEDULES if name != "fixed"]


@pytest.mark.parametrize("name", NARROWED)
def test_only_train_exits_are_drawn_and_all_of_them(name):
    drawn = [draw(name, seed, 12, train_exits=(7, 1, 2)) for seed in range(20)]
    assert set(np.concatenate(drawn).tolist()) == {1, 2, 7}


@pytest.mark.parametrize("name", ["per_batch", "per_example", "stratified"])
def test_all_exits_named_is_the_same_draw_as_none_named(name):
    for seed in range(5):
        np.testing.assert_array_equal(draw(name, seed), draw(name, seed, train_exits=tuple(range(1, 9))))


def test_uniform_draws_are_those_of_jax():
    key = jax.random.key(5)
    np.testing.assert_array_equal(draw("per_example", 5), jax.random.randint(key, (10,), 1, 9))
    assert set(draw("per_batch", 5)) == {int(jax.random.randint(key, (), 1, 9))}


def test_stratified_leaves_out_a_group_without_train_exits():
    drawn = draw("stratified", batch=20, train_exits=(1, 8))
    assert sorted(np.unique(drawn, return_counts=True)[1]) == [10, 10]


def test_adaptive_draws_failing_exits_more_often_and_every_exit_sometimes():
    drawer = exits.schedule("adaptive", num_exits=4, default_exit=3)
    state, rng = drawer.initial_state(), np.random.default_rng(0)
    counts = np.zeros(4)
    for seed in range(60):
        exit_layers = drawer.draw(jax.random.key(seed), state, batch=16)
        drawn = np.asarray(exit_layers)
        failures = np.where(drawn == 2, 1.0, 0.0)  # exit 2 never refuses
        failures[rng.random(16) < 0.3] = np.nan  # rows of other kinds
        state = drawer.observe(state, exit_layers, jnp.asarray(failures, jnp.float32))
        if seed >= 30:
            counts += np.bincount(drawn - 1, minlength=4)
    assert counts[1] > 2 * max(counts[[0, 2, 3]])
    assert min(counts) > 0.03 * sum(counts)


def test_adaptive_follows_its_formula():
    drawer = exits.schedule("adaptive", num_exits=8, default_exit=7, train_exits=(2, 5, 6))
    state, expected = drawer.initial_state(), np.zeros((2, 3))
    np.testing.assert_array_equal(jax.device_get(state), expected)
    for drawn, failures in [((2, 2, 6, 6), (1, np.nan, 0, 1)), ((5, 2, 5, 5), (0, 0, 1, np.nan))]:
        state = drawer.observe(state, jnp.asarray(drawn, jnp.int32), jnp.asarray(failures, jnp.float32))
        expected *= 0.9
        for exit_layer, failure in zip(drawn, failures, strict=True):
            if np.isfinite(failure):
                expected[:, (2, 5, 6).index(exit_layer)] += (failure, 1)
    np.testing.assert_allclose(jax.device_get(state), expected, rtol=1e-6)
    weights = 0.1 + (expected[0] + 1) / (expected[1] + 1)
    drawn = np.asarray(drawer.draw(jax.random.key(0), state, batch=3000))
    shares = [np.mean(drawn == exit_layer) for exit_layer in (2, 5, 6)]
    np.testing.assert_allclose(shares, weights / weights.sum(), atol=1 / 3000 + 1e-6)
