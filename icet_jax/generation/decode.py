"""Reads the prompts of a batch into a cache (prefill) and then samples the responses token by token.

`generate` runs a batch to its end in one program. `generation.engine` keeps rows in slots and starts a new row when a
response has ended. Both use `prefill`, `begin` and `advance`.
"""

from typing import Any, NamedTuple

import flax
import jax
import jax.numpy as jnp

from icet_jax.generation.sampling import Sampling, is_eos, sample_tokens
from icet_jax.nn.layers import Lora
from icet_jax.nn.protocols import Cache, LanguageModel, Visual
from icet_jax.typing import Array, Bool, Float, Int, Key


class Generation(NamedTuple):
    """Holds the responses of a batch.

    Attributes:
      tokens: Int[B, A]; `pad_id` after the end of a response.
      log_probs: Float32[B, A]; log-probs of the sampled tokens in nats (see `sample_tokens`); 0 after the end.
      mask: Bool[B, A]; True at the response up to and including its EOS.
    """

    tokens: Array
    log_probs: Array
    mask: Array


@flax.struct.dataclass
class DecodingState:
    """Holds the state of B rows that are being decoded; they may have sampled different numbers of tokens.

    Attributes:
      cache: KV cache of the prompt and of all sampled tokens except the last.
      keys: one typed key per row.
      tokens, log_probs: sampled tokens and their log-probs, `[B, A]`, as in `Generation`.
      count: number of sampled tokens, `[B]`.
      limit: largest number of tokens of the response, `[B]`; 0 for a row without a prompt.
      done: True if the response has ended or its limit is 0, `[B]`.
    """

    cache: Cache
    keys: Any
    tokens: Any
    log_probs: Any
    count: Any
    limit: Any
    done: Any

    def generation(self) -> Generation:
        """Returns the tokens sampled so far."""
        mask = jnp.arange(self.tokens.shape[1]) < self.count[:, None]
        return Generation(tokens=self.tokens, log_probs=self.log_probs, mask=mask)


def generate(
    model: LanguageModel,
    tokens: Int[Array, "B P"],
    mask: Bool[Array, "B P"],
    visual: Visual | None,
    row_keys: Key[Array, "R"],
    sampling: Sampling,
    lora: Lora | None = None,
) -> Generation:
    """Samples one response per key: one for each row or, with k keys per row, k consecutive responses for each row.

    With several keys per row, each prompt and its images are processed once and the cache is repeated.

    Token t of a response is drawn with `fold_in(row_key, t)`. A response therefore depends only on its prompt, images
    and key, not on its batch, its position there, or its padding. This function is pure; callers jit it with `sampling`
    static.

    Args:
      model: the network.
      tokens: prompts, padded on either side.
      mask: True at real prompt tokens; a row without any (a filler) gets an empty response.
      visual: result of `model.visual`, or None if no row has an image.
      row_keys: typed keys, k for each of the B rows; the keys of a row are consecutive.
      sampling: how tokens are sampled.
      lora: adapters of the decoder; None means the reference model.
    """
    prompts = (*prefill(model, tokens, mask, visual, lora), mask)
    logits, cache, repeated_mask = repeat_rows(prompts, row_keys.shape[0] // tokens.shape[0])
    return continue_from(model, logits, cache, repeated_mask, row_keys, sampling, lora)


def repeat_rows(tree: Any, count: int) -> Any:
    """Returns row-aligned arrays with `count` copies of each row next to each other, [B, ...] to [count * B, ...]."""
    return tree if count == 1 else jax.tree.map(lambda leaf: jnp.repeat(leaf, count, axis=0), tree)


def prefill(
    model: LanguageModel,
    tokens: Int[Array, "B P"],
    mask: Bool[Array, "B P"],
    visual: Visual | None,
    lora: Lora | None = None,
    prefix: Cache | None = None,
) -> tuple[Float[Array, "B V"], Cache]:
    """Runs the prompts through the model.

    Args:
      prefix: cache of B rows that the prompts continue, or None. With a prefix, the prompts have no images of their
        own.
      model, tokens, mask, visual, lora: see `generate`.

    Returns:
      (logits of each row's first new token, cache of the columns of `prefix` and the P columns of the prompts).
    """
    hidden, cache = model.prefill(*_pad_right(tokens, mask), visual, prefix, lora)
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
    """Samples the responses of prompts for which `prefill` has returned `logits` and `cache`.

    The other arguments are those of `generate`.
    """
    max_new_tokens = sampling.max_new_tokens
    limit = jnp.where(mask.any(axis=1), max_new_tokens, 0).astype(jnp.int32)
    rows = begin(logits, cache.with_room(max_new_tokens), row_keys, limit, sampling)
    return advance_all(model, rows, sampling, model.unstack_layers(lora), max_new_tokens - 1).generation()


def advance_all(
    model: LanguageModel, rows: DecodingState, sampling: Sampling, unstacked: Any, steps: int
) -> DecodingState:
    """Samples up to `steps` more tokens of every row that is not done, and stops early when all rows are done.

    `unstacked` is the result of `model.unstack_layers`.
    """

    def is_unfinished(state: tuple[Array, DecodingState]) -> Bool[Array, ""]:
        return (state[0] < steps) & ~jnp.all(state[1].done)

    def step(state: tuple[Array, DecodingState]) -> tuple[Array, DecodingState]:
        return state[0] + 1, advance(model, state[1], sampling, unstacked)

    return jax.lax.while_loop(is_unfinished, step, (jnp.int32(0), rows))[1]


def begin(
    logits: Float[Array, "B V"], cache: Cache, row_keys: Key[Array, "B"], limit: Int[Array, "B"], sampling: Sampling
) -> DecodingState:
    """Returns rows whose first token is sampled from `logits`; a row whose `limit` is 0 gets no token.

    `cache` is the prompts' cache with space for the responses.
    """
    batch, max_new_tokens = logits.shape[0], sampling.max_new_tokens
    rows = DecodingState(
        cache=cache,
        keys=row_keys,
        tokens=jnp.full((batch, max_new_tokens), sampling.pad_id, dtype=jnp.int32),
        log_probs=jnp.zeros((batch, max_new_tokens), dtype=jnp.float32),
        count=jnp.zeros((batch,), jnp.int32),
        limit=limit,
        done=limit < 1,
    )
    return _sample_next(rows, logits, sampling)


def advance(model: LanguageModel, rows: DecodingState, sampling: Sampling, unstacked: Any) -> DecodingState:
    """Runs the last token of every row that is not done and samples the next one; for `unstacked` see `advance_all`."""
    last = jnp.take_along_axis(rows.tokens, jnp.maximum(rows.count - 1, 0)[:, None], axis=1)[:, 0]
    hidden, cache = model.step(last, ~rows.done, rows.cache, unstacked)
    return _sample_next(rows.replace(cache=cache), model.logits(hidden), sampling)  # type: ignore[attr-defined]


def _sample_next(rows: DecodingState, logits: Float[Array, "B V"], sampling: Sampling) -> DecodingState:
    """Samples the next token of every row that is not done, from `logits`."""
    keys = jax.vmap(jax.random.fold_in)(rows.keys, rows.count)
    token, log_prob = sample_tokens(logits, keys, sampling)
    token = token.astype(jnp.int32)
    is_next = (jnp.arange(rows.tokens.shape[1]) == rows.count[:, None]) & ~rows.done[:, None]
    count = rows.count + ~rows.done
    return rows.replace(  # type: ignore[attr-defined]
        tokens=jnp.where(is_next, token[:, None], rows.tokens),
        log_probs=jnp.where(is_next, log_prob[:, None], rows.log_probs),
        count=count,
        done=rows.done | is_eos(token, sampling.eos_ids) | (count >= rows.limit),
    )


def _pad_right(tokens: Int[Array, "B P"], mask: Bool[Array, "B P"]) -> tuple[Array, Array]:
    """Returns (tokens, mask) with the real tokens of each row moved to its beginning; padding becomes token 0."""
    columns = jnp.arange(mask.shape[1])
    length = mask.sum(axis=1, keepdims=True)
    source_columns = jnp.argmax(mask, axis=1)[:, None] + columns
    moved_tokens = jnp.take_along_axis(tokens, jnp.minimum(source_columns, mask.shape[1] - 1), axis=1)
    moved_mask = columns < length
    return jnp.where(moved_mask, moved_tokens, 0), moved_mask
