"""Runs the optimizer steps of an iteration in one scan: epochs, their mini-batches, and the slices of each."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from icet_jax.typing import Array, Int, Key

LossFunction = Callable[[dict[str, Any], Any], tuple[Array, dict[str, Array]]]
"""Function of (trainable, rows) that returns (loss, statistics), both means over tokens.

`rows` is a part of the batch. Statistics whose name ends in `_max` are maxima (0 or more) instead of means: over
several slices or steps, the largest value is kept.
"""


_traced_once = functools.partial(jax.jit, inline=True)
"""Decorator for functions that are also passed to `eval_shape`, so that they are traced only once."""


class UpdateResult(NamedTuple):
    """Holds the result of `optimise`.

    Attributes:
      trainable, opt_state: weights and optimizer state after the last applied step.
      applied: int32, number of applied steps.
      stopped: bool, whether `target_kl` or `max_ratio` was exceeded.
      nonfinite: bool, whether a loss or a gradient was NaN or infinite.
      stats: {statistic: mean (or maximum) over the evaluated steps}.
      evaluated: int32, number of evaluated steps that had a token to learn from.
    """

    trainable: dict[str, Any]
    opt_state: Any
    applied: Array
    stopped: Array
    nonfinite: Array
    stats: dict[str, Array]
    evaluated: Array


def shuffled_order(
    key: Key[Array, ""], *, rows: int, epochs: int, minibatches: int, accumulation: int
) -> Int[Array, "S G M"]:
    """Returns, for every slice of every optimizer step, which rows it takes, as indices for `take_rows`.

    In each epoch, every group of `minibatches` neighbouring rows deals its rows at random, one to each mini-batch.
    Neighbouring rows lie on the same device, and every mini-batch takes one row of each group, so that no row has to
    move to another device; with a free permutation every device would receive the images of all rows. The rows of a
    mini-batch do not depend on the number of slices or devices.

    Returns:
      int32 [S, G, M]: S = `epochs * minibatches` steps, G = `accumulation` slices of each step, and
      M = `rows / (minibatches * accumulation)` rows of each slice.
    """
    neighbours = jnp.broadcast_to(jnp.arange(minibatches, dtype=jnp.int32)[:, None], (minibatches, rows // minibatches))

    def shuffled(epoch: Array) -> Array:
        return jax.random.permutation(jax.random.fold_in(key, epoch), neighbours, independent=True)

    indices = jax.vmap(shuffled)(jnp.arange(epochs)).reshape(epochs * minibatches, -1, accumulation).swapaxes(1, 2)
    return indices + minibatches * jnp.arange(accumulation, dtype=jnp.int32)[:, None]


def take_rows(batch: Any, indices: Int[Array, " M"]) -> Any:
    """Returns a batch of M rows: every leaf is split into M equal parts, and row s is row `indices[s]` of part s.

    `batch` is a pytree whose leaves all have the rows as their first axis.
    """

    def take(leaf: Array) -> Array:
        parts = leaf.reshape(indices.shape[0], -1, *leaf.shape[1:])
        return jax.vmap(lambda part, row: part[row])(parts, indices)

    return jax.tree.map(take, batch)


def _tokens(row_tokens: Int[Array, " B"], slices: Int[Array, "G M"]) -> Int[Array, " G"]:
    """Returns the number of response tokens in each slice; the arguments are those of `gradients`."""
    return jnp.sum(jax.vmap(lambda indices: take_rows(row_tokens, indices))(slices), axis=1)


def gradients(
    loss_function: LossFunction, trainable: dict[str, Any], batch: Any, row_tokens: Array, slices: Array
) -> tuple[Array, dict[str, Array], dict[str, Any]]:
    """Returns (loss, statistics, gradients) of one mini-batch, computed slice by slice.

    All three are means over the slices, weighted by the number of tokens in each slice. For a statistic that is a
    maximum, the largest value is returned.

    Args:
      loss_function: see `LossFunction`.
      trainable: the weights to differentiate with respect to.
      batch: the whole batch.
      row_tokens: [B], number of response tokens of each row.
      slices: int32 [G, M], rows of each of G slices, see `take_rows`.
    """
    counts = _tokens(row_tokens, slices)
    weights = counts / jnp.maximum(jnp.sum(counts), 1)
    evaluate = jax.value_and_grad(loss_function, has_aux=True)

    @_traced_once
    def evaluate_slice(index: Array) -> Any:
        """Returns (weighted loss, means and gradients of a slice; its maxima)."""
        (loss, stats), grads = evaluate(trainable, take_rows(batch, slices[index]))
        largest = {name: stats.pop(name) for name in list(stats) if _is_maximum(name)}
        return jax.tree.map(lambda x: weights[index] * x, (loss, stats, grads)), largest

    def add(total: Any, index: Array) -> tuple[Any, None]:
        weighted, largest = evaluate_slice(index)
        return (jax.tree.map(jnp.add, total[0], weighted), jax.tree.map(jnp.maximum, total[1], largest)), None

    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), jax.eval_shape(evaluate_slice, jnp.int32(0)))
    (loss, stats, grads), largest = jax.lax.scan(add, zeros, jnp.arange(slices.shape[0]))[0]
    return loss, stats | largest, grads


def _is_maximum(stat: str) -> bool:
    """Returns whether a statistic is a maximum, see `LossFunction`."""
    return stat.endswith("_max")


def optimise(
    loss_function: LossFunction,
    optimizer: optax.GradientTransformation,
    trainable: dict[str, Any],
    opt_state: Any,
    batch: Any,
    row_tokens: Int[Array, " B"],
    order: Int[Array, "S G M"],
    *,
    target_kl: float = 0.0,
    max_ratio: float = 0.0,
    scale: Array | None = None,
) -> UpdateResult:
    """Runs the optimizer steps of `order` until one of them gives a reason to stop.

    A step is not applied, and all later ones are skipped, if its `approxkl` exceeds `target_kl` (0 = off), its
    `ratio_max` exceeds `max_ratio` (0 = off), or its loss or gradient is not finite. A step without a token is not
    applied either, because the optimizer's moments and weight decay would change the weights.

    Args:
      loss_function: see `LossFunction`.
      optimizer: the optimizer.
      trainable, opt_state: weights and optimizer state before the steps.
      batch: the whole batch.
      row_tokens: number of response tokens of each row.
      order: result of `shuffled_order`.
      target_kl, max_ratio: limits of a step's statistics.
      scale: factor of every step; None for 1.
    """

    @_traced_once
    def evaluate(carry: Any, slices: Array) -> tuple[Any, Any]:
        trainable, opt_state, applied, stopped, nonfinite = carry
        loss, stats, grads = gradients(loss_function, trainable, batch, row_tokens, slices)
        norm = optax.tree.norm(grads)
        stats = stats | {"loss": loss, "grad_norm": norm}
        is_nonfinite = ~jnp.isfinite(loss) | ~jnp.isfinite(norm)
        exceeds_limit = stats["approxkl"] > target_kl if target_kl else jnp.zeros((), bool)
        exceeds_limit |= stats["ratio_max"] > max_ratio if max_ratio else False

        def apply(_: Any) -> Any:
            updates, new_opt_state = optimizer.update(grads, opt_state, trainable)
            if scale is not None:
                updates = jax.tree.map(lambda update: scale * update, updates)
            return optax.apply_updates(trainable, updates), new_opt_state

        is_applied = ~is_nonfinite & ~exceeds_limit & (jnp.sum(_tokens(row_tokens, slices)) > 0)
        trainable, opt_state = jax.lax.cond(is_applied, apply, lambda _: (trainable, opt_state), None)
        stopped, nonfinite = stopped | (exceeds_limit & ~is_nonfinite), nonfinite | is_nonfinite
        return (trainable, opt_state, applied + is_applied, stopped, nonfinite), stats

    def step(carry: Any, slices: Array) -> tuple[Any, Any]:
        *_, stopped, nonfinite = carry
        halted = stopped | nonfinite
        shapes = jax.eval_shape(evaluate, carry, slices)[1]
        zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
        carry, stats = jax.lax.cond(halted, lambda c: (c, zeros), lambda c: evaluate(c, slices), carry)
        return carry, (stats, ~halted)

    start = (trainable, opt_state, jnp.zeros((), jnp.int32), jnp.zeros((), bool), jnp.zeros((), bool))
    (trainable, opt_state, applied, stopped, nonfinite), (stats, ran) = jax.lax.scan(step, start, order)
    evaluated = jnp.sum(ran)
    means = {name: jnp.max(x) if _is_maximum(name) else jnp.sum(x) / evaluated for name, x in stats.items()}
    learnt_from = jnp.sum(ran & (jax.vmap(lambda slices: jnp.sum(_tokens(row_tokens, slices)))(order) > 0))
    return UpdateResult(trainable, opt_state, applied, stopped, nonfinite, means, learnt_from)
