"""When the training loop reads metrics: after the next iteration has begun, and before it keeps anything."""

import itertools

import pytest
from ml_collections import ConfigDict

from icet_jax.checkpoints.run_state import RunState
from icet_jax.errors import UserError
from icet_jax.lppo.state import TrainState
from icet_jax.runs.metrics_log import MetricsLog
from icet_jax.runs.training import Trainer

BEFORE = TrainState(trainable={}, opt_state=None, controls=None, iteration=0, updates=0)


class Algorithm:
    """Three iterations of nothing; writes down what is asked of it."""

    iterations = 3

    def __init__(self, events, broken=None):
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
            return {"train/nonfinite": float(number == self.broken)}

        return BEFORE._replace(iteration=number), read


class Log(MetricsLog):
    def __init__(self, events):
        self.events = events

    def write(self, step, metrics):
        self.events.append(f"log {step}")


class Kept(RunState):
    def __init__(self, events):
        self.events = events

    def save(self, step, state, metrics):
        assert state.iteration == step
        self.events.append(f"save {step}")


class Batches:
    def load(self, make, start, stop):
        return iter(range(start, stop))


def iterate(events, **options):
    trainer = Trainer.__new__(Trainer)
    trainer._config = ConfigDict({"algorithm": "lppo", "log": {"every": 1}, "checkpoint": {"every": 2}})
    trainer.algorithm, trainer._batches = Algorithm(events, **options), Batches()
    trainer.batch = trainer._arrays = lambda index: index
    return trainer._iterate(BEFORE, Kept(events), Log(events))


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
        iterate(events, broken=2)
    assert events[-2:] == ["begin 3", "read 2"] and "save 2" not in events
