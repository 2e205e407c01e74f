"""Which states a run keeps: its best, and the last within the bound of the KL; with a policy of one number."""

import json

import jax.numpy as jnp
import pytest
from ml_collections import ConfigDict

from icet_jax.algorithms.state import Controls, TrainState
from icet_jax.errors import UserError
from icet_jax.training import loop as training
from icet_jax.training.loop import Trainer
from icet_jax.vlm import VLM
from tests.algorithms import toy


class Killed(Exception):
    """What a test ends a run with at any point."""


class Model(VLM):
    """None: what makes the first state does not ask it."""

    mesh = None

    def __init__(self):
        pass


class Numbers:
    """The KL of a rollout is the policy's one number; the update of iteration n adds `steps[n]` times the scale."""

    settings = toy.SETTINGS

    def __init__(self, steps, max_kl, killed_at, noise):
        self.steps, self.max_kl, self.killed_at, self.noise = steps, max_kl, killed_at, noise
        self.iterations = len(steps)

    def lowered(self, state, batch):
        return iter(())

    def begin(self, state, batch):
        if batch == self.killed_at:
            raise Killed
        return float(state.trainable["w"])

    def finish(self, state, batch, kl):
        number, scale = int(state.iteration), state.controls.learning_rate_scale
        kl, before = kl + self.noise.get(number, 0.0), kl
        scale = 1.0 if scale is None else float(scale)
        beyond = bool(self.max_kl) and kl > self.max_kl
        step = 0.0 if beyond or number >= self.iterations else self.steps[number] * scale
        state.trainable["w"].delete()  # as an update donates it
        after = state._replace(
            trainable={"w": jnp.asarray(before + step)},
            iteration=jnp.asarray(number + 1),
            updates=jnp.asarray(number + 1),
        )
        row = {
            "objective/kl": kl,
            "train/nonfinite": 0.0,
            "train/unstable": float(beyond),
            "train/learning_rate": scale,
        }
        return after, lambda: dict(row)


def first_state(max_kl):
    scale = jnp.ones((), jnp.float32) if max_kl else None
    return TrainState(
        trainable={"w": jnp.zeros(())},
        opt_state=(),
        controls=Controls(kl_coef=jnp.ones(()), normaliser=(), learning_rate_scale=scale),
        iteration=jnp.asarray(0),
        updates=jnp.asarray(0),
    )


@pytest.fixture
def run(tmp_path, monkeypatch):
    def run(steps, *, name="run", max_kl=0.0, killed_at=None, every=1, policy="skip", most=9, best=None, noise=None):
        lppo = {"iterations": len(steps), "on_instability": policy, "max_skipped": most, "max_kl": max_kl}
        log = {"every": 1, "tensorboard": False, "wandb": False}
        checkpoint = {"every": every, "keep": 1, "best": best, "best_is": "lowest"}
        trainer = Trainer.__new__(Trainer)
        trainer._config = ConfigDict({"algorithm": "lppo", "log": log, "checkpoint": checkpoint, "lppo": lppo})
        if best is None:
            with trainer._config.unlocked():
                trainer._config.checkpoint.best = None
        trainer._workdir, trainer._vlm, trainer._first_policy = tmp_path / name, Model(), None
        trainer._workdir.mkdir(exist_ok=True)
        trainer.algorithm = Numbers(steps, max_kl, killed_at, noise or {})
        trainer.batch, trainer._first = (lambda index: index), 0
        trainer._batches_from = lambda start, total: iter(range(start, total))
        trainer._write_device = lambda: None
        monkeypatch.setattr(training, "initial_state", lambda *_: first_state(max_kl))
        monkeypatch.setattr(training, "abstract_state", lambda *_: None)
        monkeypatch.setattr(training, "compile_programs", lambda _, work: work())
        return trainer.run()

    return run


def rows(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("every", [1, 2])
def test_a_damaging_step_is_not_kept_as_the_best(run, every):
    # What is to be low is the policy's number: 5 steps down, one far up, and one more.
    state = run([-1.0, -1.0, -1.0, -1.0, 90.0, 1.0], best="objective/kl", every=every)
    assert (int(state.iteration), float(state.trainable["w"])) == (4, -4.0)


def test_the_last_state_is_measured_too(run, tmp_path, capsys):
    state = run([1.0, 1.0, -9.0], best="objective/kl")
    assert (int(state.iteration), float(state.trainable["w"])) == (3, -7.0)
    assert "one more iteration measures the last state" in capsys.readouterr().err
    assert len(rows(tmp_path / "run")) == 3
    assert float(run([1.0, 1.0, -9.0], best="objective/kl", killed_at=3).trainable["w"]) == -7.0, "measured once"


def test_a_last_step_that_damages_is_not_the_best(run):
    state = run([-1.0, -1.0, 90.0], best="objective/kl")
    assert (int(state.iteration), float(state.trainable["w"])) == (2, -2.0)


@pytest.mark.parametrize("killed_at", [2, 4, 5, 6])
@pytest.mark.parametrize(("every", "max_kl"), [(1, 0.0), (1, 2.5), (2, 2.5)])
def test_a_run_that_was_killed_keeps_the_same(run, tmp_path, killed_at, every, max_kl):
    steps = [1.0, 1.0, 1.0, 1.0, -1.0, 1.0]
    how = {"best": "objective/kl", "every": every, "max_kl": max_kl}
    whole = run(steps, name="whole", **how)
    with pytest.raises(Killed):
        run(steps, killed_at=killed_at, **how)
    again = run(steps, **how)
    assert float(again.trainable["w"]) == float(whole.trainable["w"])
    assert int(again.iteration) == int(whole.iteration)
    assert rows(tmp_path / "run") == rows(tmp_path / "whole")
    measured = [(tmp_path / name / "checkpoints" / "measured.json").read_text() for name in ("run", "whole")]
    assert measured[0] == measured[1]


def test_beyond_max_kl_the_run_goes_back_and_on_more_slowly(run, tmp_path, capsys):
    state = run([1.0, 1.0, 1.0, 1.0, 0.5, 0.5], max_kl=2.5)
    # 1, 2, 3: too far; back to 2, and half of each step from there.
    assert [row["objective/kl"] for row in rows(tmp_path / "run")] == [0, 1, 2, 3, 2, 2.25]
    assert [row["train/rollbacks"] for row in rows(tmp_path / "run")] == [0, 0, 0, 1, 1, 1]
    assert [row["train/learning_rate"] for row in rows(tmp_path / "run")] == [1, 1, 1, 1, 0.5, 0.5]
    assert (float(state.trainable["w"]), int(state.iteration)) == (2.5, 6)
    assert "back to the state of iteration 2, at 0.5 of config.optimizer.learning_rate" in capsys.readouterr().err


def test_without_a_checkpoint_within_bounds_it_starts_anew_more_slowly(run, tmp_path):
    run([4.0, 4.0, 1.0, 1.0], max_kl=2.5, every=4)
    assert [row["objective/kl"] for row in rows(tmp_path / "run")] == [0, 4, 0, 0.5]


def test_a_run_that_stops_beyond_max_kl_goes_on_when_it_is_started_again(run, tmp_path):
    how = {"max_kl": 2.5, "policy": "stop"}
    steps = [1.0, 1.0, 1.0, 1.0, 0.5, 0.5]
    with pytest.raises(UserError, match="iteration 4: the KL .* 3 nats .* the same command goes on from there at 0.5"):
        run(steps, **how)
    state = run(steps, **how)
    assert [row["objective/kl"] for row in rows(tmp_path / "run")] == [0, 1, 2, 3, 2, 2.25]
    assert (float(state.trainable["w"]), int(state.iteration)) == (2.5, 6)


def test_a_last_state_beyond_max_kl_is_not_what_the_run_ends_with(run):
    state = run([1.0, 1.0, 9.0], max_kl=2.5)
    assert (float(state.trainable["w"]), int(state.iteration)) == (2.0, 3)
    assert float(run([1.0, 1.0, 9.0], max_kl=2.5, killed_at=0).trainable["w"]) == 2.0, "it is finished"


def test_too_many_in_a_row_beyond_max_kl_end_the_run(run):
    how = {"max_kl": 2.5, "most": 1, "noise": {2: 9.0, 3: 9.0, 4: 9.0}}
    with pytest.raises(UserError, match="beyond config.lppo.max_kl, as in the 1 before it.* goes on .* at 0.25"):
        run([1.0] * 6, **how)
    assert float(run([1.0] * 6, **how).trainable["w"]) == 1.125, "one more rollout beyond it is not too many again"
