"""Run state: bit-exact, atomic, the newest intact save wins."""

import logging

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from icet_jax.checkpoints.run_state import RunState
from icet_jax.errors import UserError

# Orbax abandons its other reads when one fails.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


def make_state(seed=0):
    """A pytree with everything that a run may hold."""
    params = {"z": {"b": jax.random.normal(jax.random.key(seed), (300, 40)), "a": jnp.zeros((2,), jnp.bfloat16)}}
    return {
        "params": params,
        "optimizer": optax.adamw(1e-3).init(params),
        "key": jax.random.key_data(jax.random.key(seed + 1)),
        "step": jnp.int32(seed),
        "host": np.arange(5, dtype=np.int64),
        "coefficient": 0.1 + seed,
        "finished": seed,
        "whole": True,
    }


def assert_same(left, right):
    assert jax.tree.structure(left) == jax.tree.structure(right)
    for a, b in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
        assert type(a) is type(b)
        assert np.asarray(a).dtype == np.asarray(b).dtype
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


@pytest.fixture
def states(tmp_path):
    opened = RunState(tmp_path / "checkpoints", keep=2)
    yield opened
    opened.close()


def reopened(states):
    states.close()
    return RunState(states.directory, keep=2)


def test_nothing_saved_restores_nothing(states):
    assert states.restore(make_state()) is None


def test_restore_is_bit_exact_and_only_the_newest_are_kept(states):
    for step in (1, 2, 10):
        states.save(step, make_state(step), {"position": step, "note": "kept"})
    assert states.steps == [2, 10]
    again = reopened(states)
    step, state, metadata = again.restore(like=make_state())
    assert (step, metadata) == (10, {"position": 10, "note": "kept"})
    assert_same(state, make_state(10))
    assert not state["params"]["z"]["b"].committed, "a restored array must not be pinned to a device"
    again.close()


def test_abstract_arrays_will_do(states):
    states.save(1, make_state(1), {})
    like = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype) if isinstance(x, jax.Array) else x, make_state()
    )
    _, state, _ = states.restore(like)
    np.testing.assert_array_equal(np.asarray(state["params"]["z"]["b"]), np.asarray(make_state(1)["params"]["z"]["b"]))


def largest_file(directory):
    return max((path for path in directory.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)


def flip(directory):
    path = largest_file(directory)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0x10
    path.write_bytes(data)


def truncate(directory):
    path = largest_file(directory)
    path.write_bytes(path.read_bytes()[:100])


def drop_metadata(directory):
    (directory / "metadata" / "metadata").unlink()


@pytest.mark.parametrize("damage", [flip, truncate, drop_metadata])
def test_a_damaged_newest_save_falls_back_to_the_one_before(states, damage, caplog):
    for step in (1, 2):
        states.save(step, make_state(step), {"step": step})
    damage(states.directory / "2")
    again = reopened(states)
    with caplog.at_level(logging.ERROR):
        step, state, metadata = again.restore(make_state())
    assert (step, metadata) == (1, {"step": 1})
    assert_same(state, make_state(1))
    assert "CHECKPOINT OF STEP 2 IS DAMAGED" in caplog.text
    again.save(2, make_state(2), {"step": 2})
    assert again.restore(make_state())[0] == 2
    again.close()


def test_only_damaged_saves_are_an_error(states):
    states.save(1, make_state(1), {})
    flip(states.directory / "1")
    with pytest.raises(UserError, match=r"every checkpoint is damaged \(steps \[1\]\)"):
        states.restore(make_state())


def test_an_unfinished_save_is_not_seen(states):
    states.save(1, make_state(1), {})
    finished = states.directory / "1"
    unfinished = states.directory / "2.orbax-checkpoint-tmp"
    unfinished.mkdir()
    (unfinished / "state").mkdir()
    (unfinished / "state" / "_METADATA").write_bytes((finished / "state" / "_METADATA").read_bytes())
    again = reopened(states)
    assert again.steps == [1]
    again.save(2, make_state(2), {})
    assert again.restore(make_state())[0] == 2
    again.close()


def test_a_save_of_another_config_is_refused_and_kept(states):
    states.save(1, {"a": jnp.zeros((2, 3)), "b": jnp.zeros(2)}, {})
    with pytest.raises(UserError) as caught:
        states.restore({"a": jnp.zeros((2, 4)), "c": jnp.zeros(2)})
    line = str(caught.value)
    assert "another config" in line and "c is missing" in line and "b is not part of this run" in line
    assert "a is float32 [2, 3], not float32 [2, 4]" in line
    assert states.steps == [1]


def test_a_directory_that_cannot_be_made_is_one_line(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="cannot be written"):
        RunState(tmp_path / "file" / "checkpoints", keep=1)
