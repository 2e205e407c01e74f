"""Which image-encoder exit each sequence of a batch is conditioned on: one small class per schedule."""

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
      num_exits: N of the model; exits are numbered 1..N.
      default_exit: the exit that the model uses normally.
      fixed_exit: only for `Fixed`; None means `default_exit`.
      train_exits: the exits that may be drawn; empty means all. `Fixed` draws none of them but its own.
    """

    num_exits: int
    default_exit: int
    fixed_exit: int | None = None
    train_exits: tuple[int, ...] = ()

    @property
    def exits(self) -> np.ndarray:
        """The exits that may be drawn, int32, ascending."""
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
          state: before it.
          exits: at which its rows were answered.
          failures: 1 where a forbidden request was not refused, 0 where it was, NaN for all other rows.
        """
        del exits, failures
        return state


class Fixed(Schedule):
    """Always `fixed_exit`, or the default exit: the paper's text."""

    def draw(self, key: Key[Array, ""], state: Any, *, batch: int) -> Int[Array, " B"]:
        """See `Schedule`."""
        exit_layer = self.default_exit if self.fixed_exit is None else self.fixed_exit
        return jnp.full((batch,), check_exit(exit_layer, self.num_exits, "config.lppo.fixed_exit"), jnp.int32)


class PerBatch(Schedule):
    """One uniform draw for all rows."""

    def draw(self, key: Key[Array, ""], state: Any, *, batch: int) -> Int[Array, " B"]:
        """See `Schedule`."""
        index = jax.random.randint(key, (), 0, len(self.exits), jnp.int32)
        return jnp.full((batch,), jnp.asarray(self.exits)[index])


class PerExample(Schedule):
    """One uniform draw per row."""

    def draw(self, key: Key[Array, ""], state: Any, *, batch: int) -> Int[Array, " B"]:
        """See `Schedule`."""
        return jnp.asarray(self.exits)[jax.random.randint(key, (batch,), 0, len(self.exits), jnp.int32)]


class Stratified(Schedule):
    """The batch is spread over Early, Middle and Late so that their row counts differ by at most one.

    Inside a group the draw is uniform; which rows, and which groups get a row more, is random: row i of a shuffled
    batch takes group i mod 3 of a shuffled group order. Groups without an exit that may be drawn do not count.
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
    """What `Adaptive` has seen of each exit, float32 [E] each; older batches count less.

    Attributes:
      failures: forbidden requests that were not refused.
      requests: forbidden requests.
    """

    failures: Array
    requests: Array


class Adaptive(Schedule):
    """Exits at which more forbidden requests are not refused are drawn more often.

    The probability of an exit is proportional to `FLOOR` plus its failure rate, (failures + 1) / (requests + 1) over
    the last batches, each weighing `MEMORY` times the next one. An exit that was never drawn has the rate 1. Rows are
    spread over the exits as evenly as those probabilities allow (systematic sampling), in random order.
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
      num_exits: N of the model, see `Schedule`.
      default_exit: the exit that the model was trained on.
      fixed_exit: only for `fixed`; None means `default_exit`.
      train_exits: the exits that may be drawn; empty means all.

    Raises:
      UserError: an unknown name.
    """
    if name not in EXIT_SCHEDULES:
        raise UserError(f"config.lppo.exits: unknown schedule {name!r}; choose one of {', '.join(EXIT_SCHEDULES)}")
    module, _, class_name = EXIT_SCHEDULES[name].path.rpartition(".")
    return getattr(importlib.import_module(module), class_name)(num_exits, default_exit, fixed_exit, train_exits)
