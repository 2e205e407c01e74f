"""Draws the image-encoder exit for each row of a batch: one small class per exit schedule."""

import dataclasses
import importlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from icet_jax.config.names import EXIT_SCHEDULES
from icet_jax.errors import UserError
from icet_jax.exit_groups import exit_groups
from icet_jax.nn.protocols import check_exit
from icet_jax.typing import Array, Float, Int, Key


@dataclasses.dataclass(frozen=True)
class Schedule:
    """Draws the exits of every batch. Most schedules learn nothing: their state is None.

    Attributes:
      num_exits: number of the model's exits, which are numbered 1..num_exits.
      default_exit: exit that the model was trained on.
      fixed_exit: exit that `Fixed` always returns; None means `default_exit`. Other schedules ignore this field.
      train_exits: the exits that may be drawn; empty means all. `Fixed` ignores this field.
    """

    num_exits: int
    default_exit: int
    fixed_exit: int | None = None
    train_exits: tuple[int, ...] = ()

    @property
    def exits(self) -> np.ndarray:
        """Returns the exits that may be drawn, int32, ascending."""
        return np.asarray(sorted(self.train_exits) or range(1, self.num_exits + 1), np.int32)

    def initial_state(self) -> Any:
        """Returns the state before the first iteration, a pytree of arrays; None where the schedule learns nothing.

        It is part of the train state and of every checkpoint.
        """
        return None

    def draw(self, key: Key[Array, ""], state: Any, *, batch: int) -> Int[Array, " B"]:
        """Returns the exit of every row of a batch, int32 [B]; a pure function of its arguments.

        Args:
          key: a typed PRNG key into which the iteration is folded.
          state: from `initial_state` or `observe`.
          batch: number of rows of the global batch.
        """
        raise NotImplementedError

    def observe(self, state: Any, exits: Int[Array, " B"], failures: Float[Array, " B"]) -> Any:
        """Returns the state after a batch.

        Args:
          state: state before the batch.
          exits: exit at which each row was answered.
          failures: 1 where a forbidden request was not refused, 0 where it was, NaN for all other rows.
        """
        del exits, failures
        return state


class Fixed(Schedule):
    """Draws `fixed_exit`, or else the default exit, for every row, as the paper's text describes."""

    def draw(self, key: Key[Array, ""], state: Any, *, batch: int) -> Int[Array, " B"]:
        """See `Schedule`."""
        exit_layer = self.default_exit if self.fixed_exit is None else self.fixed_exit
        return jnp.full((batch,), check_exit(exit_layer, self.num_exits, "config.lppo.fixed_exit"), jnp.int32)


class PerBatch(Schedule):
    """Draws one exit for all rows of a batch, with equal probabilities."""

    def draw(self, key: Key[Array, ""], state: Any, *, batch: int) -> Int[Array, " B"]:
        """See `Schedule`."""
        index = jax.random.randint(key, (), 0, len(self.exits), jnp.int32)
        return jnp.full((batch,), jnp.asarray(self.exits)[index])


class PerExample(Schedule):
    """Draws an exit for each row, with equal probabilities."""

    def draw(self, key: Key[Array, ""], state: Any, *, batch: int) -> Int[Array, " B"]:
        """See `Schedule`."""
        return jnp.asarray(self.exits)[jax.random.randint(key, (batch,), 0, len(self.exits), jnp.int32)]


class Stratified(Schedule):
    """Draws the exits so that the groups Early, Middle and Late get equally many rows of a batch, or one more or less.

    Row i of the batch, shuffled, gets group i mod 3 of the groups, also shuffled, and one of that group's exits, all
    with equal probabilities. A group without any exit in `train_exits` is left out.
    """

    def draw(self, key: Key[Array, ""], state: Any, *, batch: int) -> Int[Array, " B"]:
        """See `Schedule`."""
        members = [np.intersect1d(group, self.exits) for group in exit_groups(self.num_exits).values()]
        groups = [group for group in members if group.size]
        first = jnp.asarray(np.cumsum([0, *(group.size for group in groups[:-1])]), jnp.int32)
        size = jnp.asarray([group.size for group in groups], jnp.int32)
        group_key, row_key, exit_key = jax.random.split(key, 3)
        order = jax.random.permutation(group_key, len(groups))
        group = jax.random.permutation(row_key, order[jnp.arange(batch) % len(groups)])
        return jnp.asarray(self.exits)[first[group] + jax.random.randint(exit_key, (batch,), 0, size[group], jnp.int32)]


class FailureCounts(NamedTuple):
    """Holds the counts of `Adaptive` for each exit that may be drawn, float32 [E]; older batches have lower weights.

    Attributes:
      failures: number of forbidden requests that were not refused.
      requests: number of forbidden requests.
    """

    failures: Array
    requests: Array


class Adaptive(Schedule):
    """Draws an exit more often the more forbidden requests are not refused there.

    The probability of an exit is proportional to `FLOOR` plus its failure rate. The rate is (failures + 1) /
    (requests + 1), counted over all earlier batches, where each batch has `MEMORY` times the weight of the next one. So
    an exit that was never drawn has the rate 1. Rows get exits by systematic sampling: the share of rows at each exit
    is as close to its probability as possible, and which rows get it is random.
    """

    FLOOR = 0.1
    MEMORY = 0.9

    def initial_state(self) -> FailureCounts:
        """See `Schedule`."""
        failures, requests = (jnp.zeros(len(self.exits), jnp.float32) for _ in range(2))  # updates donate both
        return FailureCounts(failures=failures, requests=requests)

    def draw(self, key: Key[Array, ""], state: FailureCounts, *, batch: int) -> Int[Array, " B"]:
        """See `Schedule`."""
        weights = self.FLOOR + (state.failures + 1) / (state.requests + 1)
        ends = jnp.cumsum(weights) / jnp.sum(weights)
        offset_key, row_key = jax.random.split(key)
        points = (jnp.arange(batch) + jax.random.uniform(offset_key)) / batch
        index = jnp.minimum(jnp.searchsorted(ends, points, side="right"), len(self.exits) - 1)
        return jax.random.permutation(row_key, jnp.asarray(self.exits)[index])

    def observe(self, state: FailureCounts, exits: Int[Array, " B"], failures: Float[Array, " B"]) -> FailureCounts:
        """See `Schedule`."""
        is_known = jnp.isfinite(failures)
        index = jnp.searchsorted(jnp.asarray(self.exits), exits)
        failed = jnp.zeros_like(state.failures).at[index].add(jnp.where(is_known, failures, 0.0))
        asked = jnp.zeros_like(state.requests).at[index].add(is_known.astype(jnp.float32))
        return FailureCounts(self.MEMORY * state.failures + failed, self.MEMORY * state.requests + asked)


def schedule(
    name: str, *, num_exits: int, default_exit: int, fixed_exit: int | None = None, train_exits: tuple[int, ...] = ()
) -> Schedule:
    """Returns the schedule of that name for a model.

    Args:
      name: one of `config.names.EXIT_SCHEDULES`.
      num_exits: see `Schedule`.
      default_exit: see `Schedule`.
      fixed_exit: see `Schedule`.
      train_exits: see `Schedule`.

    Raises:
      UserError: there is no schedule of this name.
    """
    if name not in EXIT_SCHEDULES:
        raise UserError(f"config.lppo.exits: unknown schedule {name!r}; choose one of {', '.join(EXIT_SCHEDULES)}")
    module, _, class_name = EXIT_SCHEDULES[name].path.rpartition(".")
    return getattr(importlib.import_module(module), class_name)(num_exits, default_exit, fixed_exit, train_exits)
