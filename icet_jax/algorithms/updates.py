"""Epochs x mini-batches x accumulation, as one scan; L-PPO and L-SFT share it."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from icet_jax.typing import Array, Int, Key

LossFunction = Callable[[dict[str, Any], Any], tuple[Array, dict[str, Array]]]
"""(trainable, rows) -> (token-mean loss, stats); `rows` has the batch's fields with fewer rows.

Stats are token means, except those whose name ends in `_max`: the largest of slices and steps is kept (0 or more).
"""


_traced_once = functools.partial(jax.jit, inline=True)
"""For functions that `eval_shape` looks at before they are used: the same program in less than half the start-up."""


class UpdateResult(NamedTuple):
    """What `optimise` returns.

    Attributes:
      trainable, opt_state: after the last applied step.
      applied: int32, steps applied.
      stopped: bool, `target_kl` or `max_ratio` was exceeded.
      nonfinite: bool, a loss or a gradient was NaN or infinite.
      stats: means over the steps that were evaluated; of maxima the largest.
      evaluated: int32, those of them that had a token to learn from.
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
    """What each slice of each step takes; `take_rows` tells the numbers' meaning.

    Of as many neighbours as there are mini-batches, each is in another mini-batch, drawn anew for each epoch. So no row
    leaves the devices that hold its neighbours; were rows permuted freely, every device would receive the images of all
    rows. Which rows make a mini-batch depends neither on its slices nor on the devices.

    Returns:
      int32 [epochs * minibatches, accumulation, rows / (minibatches * accumulation)].
    """
    neighbours = jnp.broadcast_to(jnp.arange(minibatches, dtype=jnp.int32)[:, None], (minibatches, rows // minibatches))

    def drawn(epoch: Array) -> Array:
        return jax.random.permutation(jax.random.fold_in(key, epoch), neighbours, independent=True)

    chosen = jax.vmap(drawn)(jnp.arange(epochs)).reshape(epochs * minibatches, -1, accumulation).swapaxes(1, 2)
    return chosen + minibatches * jnp.arange(accumulation, dtype=jnp.int32)[:, None]


def take_rows(batch: Any, chosen: Int[Array, " M"]) -> Any:
    """Row `chosen[s]` of the s-th of M equal parts of every leaf, for all s.

    All leaves have the batch as their first axis, visual features included.
    """

    def take(leaf: Array) -> Array:
        parts = leaf.reshape(chosen.shape[0], -1, *leaf.shape[1:])
        return jax.vmap(lambda part, row: part[row])(parts, chosen)

    return jax.tree.map(take, batch)


def _tokens(row_tokens: Int[Array, " B"], slices: Int[Array, "G M"]) -> Int[Array, " G"]:
    return jnp.sum(jax.vmap(lambda chosen: take_rows(row_tokens, chosen))(slices), axis=1)


def gradients(
    loss_function: LossFunction, trainable: dict[str, Any], batch: Any, row_tokens: Array, slices: Array
) -> tuple[Array, dict[str, Array], dict[str, Any]]:
    """(loss, stats, gradients) of one mini-batch, slice by slice; each slice weighs by its share of the tokens.

    Of a stat that is a maximum the largest is taken.

    Args:
      loss_function: see `LossFunction`.
      trainable: what to differentiate with respect to.
      batch: the whole rollout batch.
      row_tokens: [B], response tokens of each row.
      slices: int32 [G, M], what each slice takes, see `take_rows`.
    """
    counts = _tokens(row_tokens, slices)
    weights = counts / jnp.maximum(jnp.sum(counts), 1)
    evaluate = jax.value_and_grad(loss_function, has_aux=True)

    @_traced_once
    def one(index: Array) -> Any:
        (loss, stats), grads = evaluate(trainable, take_rows(batch, slices[index]))
        largest = {name: stats.pop(name) for name in list(stats) if _is_maximum(name)}
        return jax.tree.map(lambda x: weights[index] * x, (loss, stats, grads)), largest

    def add(total: Any, index: Array) -> tuple[Any, None]:
        weighted, largest = one(index)
        return (jax.tree.map(jnp.add, total[0], weighted), jax.tree.map(jnp.maximum, total[1], largest)), None

    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), jax.eval_shape(one, jnp.int32(0)))
    (loss, stats, grads), largest = jax.lax.scan(add, zeros, jnp.arange(slices.shape[0]))[0]
    return loss, stats | largest, grads


def _is_maximum(stat: str) -> bool:
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
    """Runs every step of `order`, unless one of them shows a reason to stop.

    A step whose `approxkl` exceeds `target_kl` (0 = off), whose `ratio_max` exceeds `max_ratio` (0 = off), or whose
    loss or gradient is not finite, is not applied, and the remaining steps of this call are skipped: the weights stay
    the last good ones. A step without a token is not applied either: moments and weight decay would move the weights
    all the same. `scale` multiplies every step.
    """

    @_traced_once
    def evaluate(carry: Any, slices: Array) -> tuple[Any, Any]:
        trainable, opt_state, applied, stopped, nonfinite = carry
        loss, stats, grads = gradients(loss_function, trainable, batch, row_tokens, slices)
        norm = optax.tree.norm(grads)
        stats = stats | {"loss": loss, "grad_norm": norm}
        bad = ~jnp.isfinite(loss) | ~jnp.isfinite(norm)
        far = stats["approxkl"] > target_kl if target_kl else jnp.zeros((), bool)
        far |= stats["ratio_max"] > max_ratio if max_ratio else False

        def apply(_: Any) -> Any:
            updates, new_opt_state = optimizer.update(grads, opt_state, trainable)
            if scale is not None:
                updates = jax.tree.map(lambda update: scale * update, updates)
            return optax.apply_updates(trainable, updates), new_opt_state

        good = ~bad & ~far & (jnp.sum(_tokens(row_tokens, slices)) > 0)
        trainable, opt_state = jax.lax.cond(good, apply, lambda _: (trainable, opt_state), None)
        return (trainable, opt_state, applied + good, stopped | (far & ~bad), nonfinite | bad), stats

    def step(carry: Any, slices: Array) -> tuple[Any, Any]:
        halted = carry[3] | carry[4]
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
