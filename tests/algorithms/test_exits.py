"""Exit schedules."""

import jax
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
