"""When the training loop reads metrics: after the next iteration has begun, and before it keeps anything."""

import itertools
import os
import signal

import pytest
from ml_collections import ConfigDict

from icet_jax.algorithms.state import Controls, TrainState
from icet_jax.checkpoints.run_state import RunState
from icet_jax.errors import StopRun, UserError
from icet_jax.training.loop import Trainer
from icet_jax.training.metrics_log import MetricsLog
from icet_jax.training.signals import handle_signals
from icet_jax.training.stability import Stability

BEFORE = TrainState(trainable={}, opt_state=None, controls=Controls(1.0, None), iteration=0, updates=0)


class Algorithm:
    """Three iterations of nothing; writes down what is asked of it."""

    iterations = 3

    def __init__(self, events, broken=()):
        self.events, self.broken, self.numbers = events, broken, itertools.count(1)

    def lowered(self, state, batch):
        return iter(())

    def begin(self, state, batch):
        number = next(self.numbers)
        self.events.append(f"begin {number}")
        return number

    def finish(self, state, batch, number):
        self.events.append(f"finish {number}")

        def read():
            self.events.append(f"read {number}")
            return {"train/nonfinite": float(number in self.broken)}

        return BEFORE._replace(iteration=number), read


class Log(MetricsLog):
    def __init__(self, events):
        self.events = events

    def write(self, step, metrics):
        self.events.append(f"log {step}")


class Kept(RunState):
    def __init__(self, events):
        self.events = events

        self.values = {}

    def save(self, step, state, metadata):
        assert state.iteration == step
        self.events.append(f"save {step}")
        self.metadata = metadata

    def measure(self, step, value):
        self.values[step] = value

    def wait(self):
        self.events.append("wait")


class Batches:
    def load(self, make, start, stop):
        return iter(range(start, stop))


def iterate(events, kept=None, skip=False, checkpoint=None, algorithm=Algorithm, **options):
    trainer = Trainer.__new__(Trainer)
    lppo = {"on_instability": "skip" if skip else "stop", "max_skipped": 1, "max_kl": 0.0}
    checkpoint = {"every": 2, "best": None, "best_is": "highest"} | (checkpoint or {})
    trainer._config = ConfigDict({"algorithm": "lppo", "log": {"every": 1}, "checkpoint": checkpoint, "lppo": lppo})
    trainer.algorithm, trainer._batches = algorithm(events, **options), Batches()
    trainer._arrays, trainer._first = (lambda index: index), 0
    stability = Stability(trainer._config, {})
    return trainer._iterate(BEFORE, Kept(events) if kept is None else kept, Log(events), stability)


def test_metrics_are_read_while_the_next_iteration_runs():
    events = []
    assert iterate(events).iteration == 3
    assert events == [
        "begin 1", "finish 1",
        "begin 2", "read 1", "log 1", "finish 2",
        "begin 3", "read 2", "log 2", "save 2", "finish 3",
        "read 3", "log 3", "save 3",
    ]  # fmt: skip


def test_an_iteration_that_is_not_finite_is_neither_logged_nor_kept():
    events = []
    with pytest.raises(UserError, match="iteration 2: the loss"):
        iterate(events, broken=[2])
    assert events[-2:] == ["begin 3", "read 2"] and "save 2" not in events


def test_an_unstable_iteration_may_be_skipped_and_is_counted():
    events = []
    kept = Kept(events)
    assert iterate(events, kept, skip=True, broken=[2]).iteration == 3
    assert "log 2" in events and kept.metadata == {"skipped": {"in_a_row": 0, "in_all": 1, "rollbacks": 0}}


def test_too_many_in_a_row_stop_the_run():
    events = []
    with pytest.raises(UserError, match="iteration 3: the loss .* as in the 1 before it"):
        iterate(events, skip=True, broken=[2, 3])
    assert events[-1] == "read 3"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_what_is_finished_and_stops(number):
    events = []
    kept = Kept(events)

    class Told(Algorithm):
        def begin(self, state, batch):
            if batch == 1:
                os.kill(os.getpid(), number)
            return super().begin(state, batch)

    with handle_signals(), pytest.raises(StopRun) as caught:
        iterate(events, kept, algorithm=Told, checkpoint={"every": 100, "best": "train/nonfinite"})
    assert caught.value.line == f"{number.name}: iteration 2 is saved; the same command goes on from there"
    assert caught.value.code == 75
    assert events[-2:] == ["save 2", "wait"] and not kept.values, "signals must not decide what competes"


def test_the_value_of_a_checkpoint_is_the_metric_that_the_config_names():
    for best_is, sign in (("highest", 1), ("lowest", -1)):
        kept = Kept([])
        iterate([], kept, skip=True, broken=[3], checkpoint={"best": "train/skipped", "best_is": best_is})
        assert kept.values == {2: sign * 1}, "iteration 3 is the first that the state of iteration 2 made a rollout for"
    with pytest.raises(UserError, match="has no such metric, but train/nonfinite, train/skipped"):
        iterate([], checkpoint={"best": "objective/nothing"})
