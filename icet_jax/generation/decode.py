"""Prefill and decoding: rows that each are at a place of their own in their response, one step of all of them at once.

`generate` runs a batch to its end in one program; `generation.engine` keeps rows in slots and puts new ones where a
response has ended. Both are made of `prefill`, `begin` and `advance`.
"""

from typing import Any, NamedTuple

import flax
import jax
import jax.numpy as jnp

from icet_jax.generation.sampling import Sampling, is_eos, sample_tokens
from icet_jax.nn.layers import Lora
from icet_jax.nn.protocols import Cache, LanguageModel
from icet_jax.typing import Array, Bool, Float, Int, Key


class Generation(NamedTuple):
    """What `generate` returns.

    Attributes:
      tokens: Int[B, A]; `pad_id` after the end of a response.
      log_probs: Float32[B, A] of the sampled tokens, in nats (see `sample_tokens`); 0 after the end.
      mask: Bool[B, A]; a prefix that covers the response up to and including its EOS.
    """

    tokens: Array
    log_probs: Array
    mask: Array


@flax.struct.dataclass
class Rows:
    """Rows in the middle of their responses.

    Attributes:
      cache: of the prompt and of all sampled tokens but the last.
      keys: one typed key per row.
      tokens, log_probs: what was sampled, `[B, A]`, as in `Generation`.
      count: tokens sampled, `[B]`.
      limit: most tokens of a row's response, `[B]`.
      done: the response has ended, or there is no row, `[B]`.
    """

    cache: Cache
    keys: Any
    tokens: Any
    log_probs: Any
    count: Any
    limit: Any
    done: Any

    def generation(self) -> Generation:
        """The responses so far."""
        mask = jnp.arange(self.tokens.shape[1]) < self.count[:, None]
        return Generation(tokens=self.tokens, log_probs=self.log_probs, mask=mask)


def generate(
    model: LanguageModel,
    tokens: Int[Array, "B P"],
    mask: Bool[Array, "B P"],
    visual: Any,
    row_keys: Key[Array, "B"],
    sampling: Sampling,
    lora: Lora | None = None,
) -> Generation:
    """Samples a response per row: `prefill`, then `continue_from` its logits.

    Token t of a row is drawn with `fold_in(row_key, t)`, so a row's response depends on its prompt, images and key
    alone: not on its batch, its place there, its neighbours, or the side and amount of padding. Pure; callers jit it
    with `sampling` static.

    Args:
      model: the network.
      tokens: prompts, padded on either side.
      mask: True at real prompt tokens. A row with none (batch filler) yields an empty response.
      visual: from `model.visual`, or None where no row has an image.
      row_keys: one typed key per row.
      sampling: how tokens are drawn.
      lora: adapters of the decoder; None is the reference.
    """
    logits, cache = prefill(model, tokens, mask, visual, lora)
    return continue_from(model, logits, cache, mask, row_keys, sampling, lora)


def prefill(
    model: LanguageModel,
    tokens: Int[Array, "B P"],
    mask: Bool[Array, "B P"],
    visual: Any,
    lora: Lora | None = None,
    prefix: Cache | None = None,
) -> tuple[Float[Array, "B V"], Cache]:
    """Runs the prompts once: the logits of each row's first new token, and a cache of P columns (and `prefix`'s)."""
    hidden, cache = model.prefill(*_padded_on_the_right(tokens, mask), visual, prefix, lora)
    return model.logits(hidden), cache


def continue_from(
    model: LanguageModel,
    logits: Float[Array, "B V"],
    cache: Cache,
    mask: Bool[Array, "B P"],
    row_keys: Key[Array, "B"],
    sampling: Sampling,
    lora: Lora | None = None,
) -> Generation:
    """Samples one position at a time until all rows are done, from what `prefill` returned for prompts of `mask`.

    Arguments as in `generate`.
    """
    length = sampling.max_new_tokens
    limit = jnp.where(mask.any(axis=1), length, 0).astype(jnp.int32)
    rows = begin(logits, cache.with_room(length), row_keys, limit, sampling)
    return advance_all(model, rows, sampling, model.apart(lora), length - 1).generation()


def advance_all(model: LanguageModel, rows: Rows, sampling: Sampling, apart: Any, steps: int) -> Rows:
    """At most `steps` more tokens of every row, fewer where all are done before; `apart` is the model's."""

    def go_on(state: tuple[Array, Rows]) -> Bool[Array, ""]:
        return (state[0] < steps) & ~jnp.all(state[1].done)

    def step(state: tuple[Array, Rows]) -> tuple[Array, Rows]:
        return state[0] + 1, advance(model, state[1], sampling, apart)

    return jax.lax.while_loop(go_on, step, (jnp.int32(0), rows))[1]


def begin(
    logits: Float[Array, "B V"], cache: Cache, row_keys: Key[Array, "B"], limit: Int[Array, "B"], sampling: Sampling
) -> Rows:
    """Samples each row's first token; a row whose limit is 0 is none."""
    batch, length = logits.shape[0], sampling.max_new_tokens
    rows = Rows(
        cache=cache,
        keys=row_keys,
        tokens=jnp.full((batch, length), sampling.pad_id, dtype=jnp.int32),
        log_probs=jnp.zeros((batch, length), dtype=jnp.float32),
        count=jnp.zeros((batch,), jnp.int32),
        limit=limit,
        done=limit < 1,
    )
    return _sampled(rows, logits, sampling)


def advance(model: LanguageModel, rows: Rows, sampling: Sampling, apart: Any) -> Rows:
    """One more token of every row that is not done."""
    last = jnp.take_along_axis(rows.tokens, jnp.maximum(rows.count - 1, 0)[:, None], axis=1)[:, 0]
    hidden, cache = model.step(last, ~rows.done, rows.cache, apart)
    return _sampled(rows.replace(cache=cache), model.logits(hidden), sampling)  # type: ignore[attr-defined]


def _sampled(rows: Rows, logits: Float[Array, "B V"], sampling: Sampling) -> Rows:
    """Draws the next token of every row that is not done."""
    keys = jax.vmap(jax.random.fold_in)(rows.keys, rows.count)
    token, log_prob = sample_tokens(logits, keys, sampling)
    token = token.astype(jnp.int32)
    here = (jnp.arange(rows.tokens.shape[1]) == rows.count[:, None]) & ~rows.done[:, None]
    count = rows.count + ~rows.done
    return rows.replace(  # type: ignore[attr-defined]
        tokens=jnp.where(here, token[:, None], rows.tokens),
        log_probs=jnp.where(here, log_prob[:, None], rows.log_probs),
        count=count,
        done=rows.done | is_eos(token, sampling.eos_ids) | (count >= rows.limit),
    )


def _padded_on_the_right(tokens: Int[Array, "B P"], mask: Bool[Array, "B P"]) -> tuple[Array, Array]:
    """The same rows with their real tokens first."""
    columns = jnp.arange(mask.shape[1])
    length = mask.sum(axis=1, keepdims=True)
    shifted = jnp.argmax(mask, axis=1)[:, None] + columns
    tokens = jnp.take_along_axis(tokens, jnp.minimum(shifted, mask.shape[1] - 1), axis=1)
    mask = columns < length
    return jnp.where(mask, tokens, 0), mask
