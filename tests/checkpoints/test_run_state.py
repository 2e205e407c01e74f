"""Run state: bit-exact, atomic, the newest intact save wins."""

import json
import logging
import resource
import subprocess
import sys
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from icet_jax.checkpoints import run_state
from icet_jax.checkpoints.run_state import RunState
from icet_jax.errors import UserError
from tests.devices import emulating

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
    states.wait()
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


def rename_an_array(directory):
    path = directory / "metadata" / "metadata"
    path.write_bytes(path.read_bytes().replace(b"coefficient", b"coefficienu"))


@pytest.mark.parametrize("damage", [flip, truncate, drop_metadata, rename_an_array])
def test_a_damaged_newest_save_falls_back_to_the_one_before(states, damage, caplog):
    for step in (1, 2):
        states.save(step, make_state(step), {"step": step})
    states.wait()
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
    states.wait()
    flip(states.directory / "1")
    with pytest.raises(UserError, match=r"every checkpoint is damaged \(steps \[1\]\)"):
        states.restore(make_state())


def test_an_unfinished_save_is_not_seen(states):
    states.save(1, make_state(1), {})
    states.wait()
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


def test_a_state_may_be_donated_as_soon_as_it_is_being_saved(states):
    state = {"a": jnp.arange(1 << 20, dtype=jnp.float32)}
    advance = jax.jit(lambda tree: jax.tree.map(lambda x: x + 1, tree), donate_argnums=0)
    states.save(1, state, {})
    for _ in range(5):
        state = advance(state)
    jax.block_until_ready(state)
    _, restored, _ = states.restore(state)
    np.testing.assert_array_equal(restored["a"], np.arange(1 << 20, dtype=np.float32))


def test_the_best_is_kept_beside_the_newest(tmp_path):
    states = RunState(tmp_path / "checkpoints", keep=1, keep_best=True)
    for step, value in ((1, 0.5), (2, 3.0), (3, float("nan")), (4, None), (5, 3.0)):
        states.save(step, make_state(step), {})
        states.measure(step, value)
    states.wait()
    assert states.steps == [2, 5]
    states.close()
    again = RunState(tmp_path / "checkpoints", keep=1, keep_best=True)
    assert again.best == 2
    assert again.restore(make_state())[0] == 5
    assert_same(again.restore(make_state(), best=True)[1], make_state(2))
    flip(again.directory / "2")
    assert again.restore(make_state(), best=True)[0] == 5
    again.close()


def test_a_value_that_is_known_late_competes_all_the_same(tmp_path):
    states = RunState(tmp_path / "checkpoints", keep=1, keep_best=True)
    for step, value in ((1, 3.0), (2, 0.5), (3, 1.0)):
        states.save(step, make_state(step), {})
        if step > 1:
            assert states.best == 1 and step not in states.measured
        states.measure(step, value)
    states.wait()
    assert states.steps == [1, 3] and states.measured == {1: 3.0, 3: 1.0}
    states.close()


def test_back_to_the_newest_that_was_measured(tmp_path):
    states = RunState(tmp_path / "checkpoints", keep=1, keep_measured=True)
    for step in (2, 4, 6, 7):
        states.save(step, make_state(step), {})
        if step <= 4:
            states.measure(step, None)
    states.wait()
    assert states.steps == [4, 7]
    states.close()
    again = RunState(tmp_path / "checkpoints", keep=1, keep_measured=True)
    step, state, _ = again.go_back(make_state())
    assert step == 4 and again.steps == [4]
    assert_same(state, make_state(4))
    again.save(7, make_state(7), {})
    assert again.restore(make_state())[0] == 7
    again.close()


def test_without_a_measured_one_all_are_left_behind(states):
    states.save(1, make_state(1), {})
    assert states.go_back(make_state()) is None and states.steps == []


def test_values_that_older_versions_stored_with_a_save_do_not_compete(tmp_path, monkeypatch):
    def dumps(tree):
        return json.dumps(tree | {"value": 9.0} if "user" in tree else tree)

    with monkeypatch.context() as patch:  # as they stored it: of the rollout before the update
        patch.setattr(run_state, "json", SimpleNamespace(dumps=dumps, loads=json.loads))
        states = RunState(tmp_path / "checkpoints", keep=2, keep_best=True)
        states.save(1, make_state(1), {"a": 1})
        states.save(2, make_state(2), {"a": 2})
        states.close()
    again = RunState(tmp_path / "checkpoints", keep=2, keep_best=True)
    assert again.best is None
    step, state, metadata = again.restore(make_state(), best=True)
    assert (step, metadata) == (2, {"a": 2})
    assert_same(state, make_state(2))
    again.close()


def test_without_a_value_the_newest_is_the_best(states):
    states.save(1, make_state(1), {})
    assert states.restore(make_state(), best=True)[0] == 1


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int32", "uint8", "bool"])
def test_a_checksum_is_of_the_bits_alone_wherever_they_lie(dtype):
    values = jax.random.normal(jax.random.key(0), (3, 5, 7)) * 9
    array = values > 0 if dtype == "bool" else values.astype(dtype)
    on_device = run_state._describe_arrays({"a": array})["a"]["checksum"]
    on_host = np.asarray(array)
    assert run_state._describe_arrays({"a": on_host})["a"]["checksum"] == on_device
    changed = on_host.copy()
    changed[2, 3, 4] = ~changed[2, 3, 4] if dtype == "bool" else changed[2, 3, 4] + np.asarray(1, changed.dtype)
    swapped = on_host[:, ::-1]
    assert on_device not in [run_state._describe_arrays({"a": other})["a"]["checksum"] for other in (changed, swapped)]


def test_a_full_disk_is_one_line_and_leaves_what_was_complete(states):
    states.save(1, make_state(1), {})
    states.wait()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))
    try:
        with pytest.raises(UserError, match="a checkpoint cannot be saved") as caught:
            states.save(2, make_state(2), {})
            states.wait()
        states.close()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert caught.value.exit_code == 75
    again = RunState(states.directory, keep=2)
    assert again.restore(make_state())[0] == 1
    again.save(2, make_state(2), {})
    assert again.restore(make_state())[0] == 2
    again.close()


ELSEWHERE = """
import sys
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
from icet_jax.checkpoints.run_state import RunState

def on(devices, spec):
    return NamedSharding(Mesh(np.array(jax.devices()[:devices]), ("x",)), spec)

values = np.arange(16 * 6, dtype=np.float32).reshape(16, 6)
states = RunState(sys.argv[1], keep=9)
layouts = [on(8, P("x")), on(2, P(None, "x")), on(8, P()), on(1, P())]
for step, layout in enumerate(layouts):
    states.save(step, {"a": jax.device_put(values, layout)}, {})
    for other in layouts:
        like = jax.ShapeDtypeStruct(values.shape, values.dtype, sharding=other)
        found, state, _ = states.restore({"a": like})
        assert found == step and state["a"].sharding.is_equivalent_to(other, 2), (layout, other)
        np.testing.assert_array_equal(np.asarray(state["a"]), values)
states.close()
"""


def test_a_state_is_restored_onto_any_mesh(tmp_path):
    environment = emulating(8)
    command = [sys.executable, "-c", ELSEWHERE, str(tmp_path / "checkpoints")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "DAMAGED" not in done.stderr
