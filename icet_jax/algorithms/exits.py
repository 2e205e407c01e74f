"""Which image-encoder exit each sequence of a batch is conditioned on."""

import jax
import jax.numpy as jnp
import numpy as np

from icet_jax.config.names import EXIT_SCHEDULES
from icet_jax.errors import UserError
from icet_jax.nn.protocols import check_exit
from icet_jax.typing import Array, Int, Key


def groups(num_exits: int) -> list[np.ndarray]:
    """Early, Middle and Late exits as the paper groups them: `np.array_split(1..N, 3)`, empty groups left out."""
    return [group for group in np.array_split(np.arange(1, num_exits + 1), 3) if group.size]


def sample(
    schedule: str,
    key: Key[Array, ""],
    *,
    batch: int,
    num_exits: int,
    default_exit: int,
    fixed_exit: int | None = None,
) -> Int[Array, " B"]:
    """Draws the exit of every row, numbered 1..num_exits; a pure function of `key`.

    Args:
      schedule: `fixed` (always `fixed_exit`, or the default exit), `per_batch` (one uniform draw for all rows),
        `per_example` (one uniform draw per row) or `stratified` (the batch is spread over Early, Middle and Late so
        that their row counts differ by at most one; uniform inside a group; which rows, and which groups get a row
        more, is random).
      key: a typed PRNG key; fold the iteration in before.
      batch: number of rows of the global batch.
      num_exits: N of the model.
      default_exit: the exit the model uses normally.
      fixed_exit: only for `fixed`; None means `default_exit`.

    Returns:
      int32 [B].

    Raises:
      UserError: an unknown schedule, or an exit outside 1..num_exits.
    """
    if schedule == "fixed":
        exit_layer = check_exit(default_exit if fixed_exit is None else fixed_exit, num_exits, "config.lppo.fixed_exit")
        return jnp.full((batch,), exit_layer, jnp.int32)
    if schedule == "per_batch":
        drawn = jax.random.randint(key, (), 1, num_exits + 1, jnp.int32)
        return jnp.full((batch,), drawn, jnp.int32)
    if schedule == "per_example":
        return jax.random.randint(key, (batch,), 1, num_exits + 1, jnp.int32)
    if schedule == "stratified":
        return _stratified(key, batch, num_exits)
    raise UserError(f"config.lppo.exits: unknown schedule {schedule!r}; choose one of {', '.join(EXIT_SCHEDULES)}")


def _stratified(key: Key[Array, ""], batch: int, num_exits: int) -> Int[Array, " B"]:
    """Row i of a shuffled batch takes group i mod 3 of a shuffled group order."""
    parts = groups(num_exits)
    first = jnp.asarray([part[0] for part in parts], jnp.int32)
    size = jnp.asarray([part.size for part in parts], jnp.int32)
    group_key, row_key, exit_key = jax.random.split(key, 3)
    order = jax.random.permutation(group_key, len(parts))
    group = jax.random.permutation(row_key, order[jnp.arange(batch) % len(parts)])
    return first[group] + jax.random.randint(exit_key, (batch,), 0, size[group], jnp.int32)
