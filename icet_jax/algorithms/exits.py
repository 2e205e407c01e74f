"""Which image-encoder exit each sequence of a batch is conditioned on: one small class per schedule."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from icet_jax.errors import UserError
from icet_jax.nn.protocols import check_exit
from icet_jax.typing import Array, Float, Int, Key


def groups(num_exits: int) -> list[np.ndarray]:
    """Early, Middle and Late exits as the paper groups them: `np.array_split(1..N, 3)`, empty groups left out."""
    return [group for group in np.array_split(np.arange(1, num_exits + 1), 3) if group.size]


@dataclasses.dataclass(frozen=True)
class Schedule:
    """Draws the exits of every batch; this one has no state, and neither have those that do not say otherwise.

    Attributes:
      num_exits: N of the model; exits are numbered 1..N.
      default_exit: the exit that the model uses normally.
      fixed_exit: only for `Fixed`; None means `default_exit`.
    """

    num_exits: int
    default_exit: int
    fixed_exit: int | None = None

    def initial_state(self) -> Any:
        """What a schedule that learns has before the first iteration, a pytree of arrays; None for all others.

        It is part of the train state and of every checkpoint.
        """
        return None

    def draw(self, key: Key[Array, ""], state: Any, *, batch: int) -> Int[Array, " B"]:
        """The exit of every row of a batch, int32 [B]; a pure function of its arguments.

        Args:
          key: a typed PRNG key; fold the iteration in before.
          state: from `initial_state` or `observe`.
          batch: number of rows of the global batch.
        """
        raise NotImplementedError

    def observe(self, state: Any, exits: Int[Array, " B"], failures: Float[Array, " B"]) -> Any:
        """The state after a batch.

        Args:
          state: before it.
          exits: that its rows were answered at.
          failures: 1 where a response was not what it should have been, 0 where it was, NaN where that is not known.
        """
        del exits, failures
        return state


class Fixed(Schedule):
    """Always `fixed_exit`, or the default exit: the paper's text."""

    def draw(self, key: Key[Array, ""], state: Any, *, batch: int) -> Int[Array, " B"]:
        """See `Schedule`."""
        chosen = self.default_exit if self.fixed_exit is None else self.fixed_exit
        return jnp.full((batch,), check_exit(chosen, self.num_exits, "config.lppo.fixed_exit"), jnp.int32)


class PerBatch(Schedule):
    """One uniform draw for all rows."""

    def draw(self, key: Key[Array, ""], state: Any, *, batch: int) -> Int[Array, " B"]:
        """See `Schedule`."""
        return jnp.full((batch,), jax.random.randint(key, (), 1, self.num_exits + 1, jnp.int32), jnp.int32)


class PerExample(Schedule):
    """One uniform draw per row."""

    def draw(self, key: Key[Array, ""], state: Any, *, batch: int) -> Int[Array, " B"]:
        """See `Schedule`."""
        return jax.random.randint(key, (batch,), 1, self.num_exits + 1, jnp.int32)


class Stratified(Schedule):
    """The batch is spread over Early, Middle and Late so that their row counts differ by at most one.

    Inside a group the draw is uniform; which rows, and which groups get a row more, is random: row i of a shuffled
    batch takes group i mod 3 of a shuffled group order.
    """

    def draw(self, key: Key[Array, ""], state: Any, *, batch: int) -> Int[Array, " B"]:
        """See `Schedule`."""
        parts = groups(self.num_exits)
        first = jnp.asarray([part[0] for part in parts], jnp.int32)
        size = jnp.asarray([part.size for part in parts], jnp.int32)
        group_key, row_key, exit_key = jax.random.split(key, 3)
        order = jax.random.permutation(group_key, len(parts))
        group = jax.random.permutation(row_key, order[jnp.arange(batch) % len(parts)])
        return first[group] + jax.random.randint(exit_key, (batch,), 0, size[group], jnp.int32)


SCHEDULES: dict[str, type[Schedule]] = {
    "fixed": Fixed,
    "per_batch": PerBatch,
    "per_example": PerExample,
    "stratified": Stratified,
}
"""By the names that a config has for them (`config.names.EXIT_SCHEDULES`)."""


def schedule(name: str, *, num_exits: int, default_exit: int, fixed_exit: int | None = None) -> Schedule:
    """The schedule of that name for a model.

    Args:
      name: one of `SCHEDULES`.
      num_exits: N of the model, see `Schedule`.
      default_exit: the exit that the model was trained on.
      fixed_exit: only for `fixed`; None means `default_exit`.

    Raises:
      UserError: an unknown name.
    """
    if name not in SCHEDULES:
        raise UserError(f"config.lppo.exits: unknown schedule {name!r}; choose one of {', '.join(SCHEDULES)}")
    return SCHEDULES[name](num_exits, default_exit, fixed_exit)
