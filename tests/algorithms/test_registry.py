"""An algorithm is one file, one line of the table and one section of the config; an exit schedule is one class."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from icet_jax.algorithms import exits, lppo, phases
from icet_jax.algorithms.base import Algorithm, algorithm_class
from icet_jax.algorithms.reward_by_kind import RewardByKind
from icet_jax.checkpoints.run_state import RunState
from icet_jax.config import default
from icet_jax.config.names import ALGORITHMS, EXIT_SCHEDULES, KINDS, ExitScheduleName
from icet_jax.data.records import Example
from icet_jax.runs.config_files import load
from icet_jax.runs.loading import load as load_vlm
from icet_jax.training import loop
from tests.algorithms import toy


@pytest.mark.parametrize("name", ALGORITHMS)
def test_every_algorithm_is_whole(name):
    found = algorithm_class(name)
    assert issubclass(found, Algorithm) and not found.__abstractmethods__
    assert {"iterations", "exits"} <= set(default()[name])


@pytest.mark.parametrize("name", EXIT_SCHEDULES)
def test_a_schedule_says_truly_whether_it_learns(name):
    drawer = exits.schedule(name, num_exits=8, default_exit=7)
    assert (drawer.initial_state() is not None) == EXIT_SCHEDULES[name].learns


class RoundRobin(exits.Schedule):
    """One exit after the other; the state is the next one, and the sum of what was observed."""

    def initial_state(self):
        return {"next": jnp.ones((), jnp.int32), "failures": jnp.zeros(())}

    def draw(self, key, state, *, batch):
        return jnp.full((batch,), state["next"])

    def observe(self, state, exits, failures):
        failed = jnp.sum(jnp.where(jnp.isfinite(failures), failures, 0.0))
        return {"next": state["next"] % self.num_exits + 1, "failures": state["failures"] + failed}


def test_a_schedule_that_learns_is_one_class_and_its_state_is_the_train_states(monkeypatch):
    path = f"{RoundRobin.__module__}.{RoundRobin.__name__}"
    monkeypatch.setitem(EXIT_SCHEDULES, "round_robin", ExitScheduleName(path, learns=True))
    graphdef, params = toy.model()
    settings = toy.settings(exits="round_robin", epochs=1)
    state = toy.state(params, settings)
    drawer = exits.schedule("round_robin", num_exits=4, default_exit=3)
    state = state._replace(controls=state.controls._replace(exits=drawer.initial_state()))
    run, key = lppo.build(graphdef, settings), jax.random.key(0)
    failures = np.array([1, 0, np.nan, 1, np.nan, 0, 0, 1], np.float32)
    for iteration in range(2):
        drawn = phases.draw_exits(
            settings, key, state.iteration, state.controls.exits, batch=8, num_exits=4, default_exit=3
        )
        assert set(np.asarray(drawn)) == {iteration + 1}
        rollout = run.rollout(params, state, *toy.inputs(), drawn, key)
        state, batch, _ = run.prepare(
            params, state, rollout, toy.token_score(rollout), np.ones(8, bool), failures=failures
        )
        state, _ = run.update(params, state, batch, key)
    assert jax.device_get(state.controls.exits) == {"next": 3, "failures": 6.0}


@pytest.fixture(scope="module")
def organism():
    return load_vlm("organism:vlm")


def lsft_run(organism):
    config = load("configs/organism_lppo.py", [("algorithm", "lsft"), ("data.batch_size", "8")])
    algorithm = algorithm_class("lsft")(config, organism, None)
    return config, algorithm.settings


def test_a_critic_exists_only_where_one_is_trained(organism):
    config, settings = lsft_run(organism)
    assert set(loop.abstract_state(config, organism, settings).trainable) == {"policy"}
    config = load("configs/organism_lppo.py", [("data.batch_size", "8")])
    settings = algorithm_class("lppo")(config, organism, None).settings
    assert set(loop.abstract_state(config, organism, settings).trainable) == {"policy", "value_head"}


def test_a_batch_of_groups_has_one_prompt_for_each_group(organism, tmp_path):
    config = load("configs/organism_lrloo.py", [("data.batch_size", "32"), ("lrloo.group_size", "8")])
    rows = [Example(str(row), "describe this", kind=kind, answer="red") for row in range(2) for kind in KINDS]
    trainer = loop.Trainer(config, tmp_path, organism, rows, RewardByKind({}, None))
    assert [len(trainer.batch(index).examples) for index in (0, 7)] == [4, 4]
    assert set(loop.abstract_state(config, organism, trainer.algorithm.settings).trainable) == {"policy"}


@pytest.mark.parametrize("with_head", [True, False], ids=["from before", "now"])
def test_a_checkpoint_of_lsft_with_a_value_head_still_goes_on(organism, tmp_path, with_head):
    config, settings = lsft_run(organism)
    state = loop.initial_state(config, organism, settings, with_head)._replace(iteration=jnp.asarray(2, jnp.int32))
    checkpoints = RunState(tmp_path, keep=1)
    checkpoints.save(2, state, {"skipped": {}})
    found, _ = loop.newest_state(config, organism, settings, checkpoints)
    checkpoints.close()
    assert ("value_head" in found.trainable) == with_head and int(found.iteration) == 2
    jax.tree.map(np.testing.assert_array_equal, found, state)
