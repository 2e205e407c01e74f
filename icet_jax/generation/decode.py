"""Prefill and the decode loop on a static cache: of a vision-language model, or of a judge that reads text alone."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from icet_jax.generation.sampling import Sampling, is_eos, sample_tokens
from icet_jax.models.family import Cache, LanguageModel
from icet_jax.models.layers import Lora, positions_from_mask
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


class _State(NamedTuple):
    """The loop's carry: `step` tokens are written, and `logits` are those of the next."""

    step: Int[Array, ""]
    token: Int[Array, "B"]  # the last sampled token, not yet in the cache
    position: Int[Array, "B"]  # its rotary position
    done: Bool[Array, "B"]
    cache: Cache | None
    out: Generation


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
    logits, cache = prefill(model, tokens, mask, visual, sampling.max_new_tokens, lora)
    return continue_from(model, logits, cache, mask, row_keys, sampling, lora)


def prefill(
    model: LanguageModel,
    tokens: Int[Array, "B P"],
    mask: Bool[Array, "B P"],
    visual: Any,
    max_new_tokens: int,
    lora: Lora | None = None,
) -> tuple[Float[Array, "B V"], Cache | None]:
    """Runs the prompts once: the logits of each row's first new token, and a cache with room for `max_new_tokens`."""
    batch, prompt_length = tokens.shape
    empty = model.init_cache(batch, prompt_length + max_new_tokens)
    hidden, cache = model.decode(tokens, positions_from_mask(mask), mask, visual, empty, lora)
    last = prompt_length - 1 - jnp.argmax(jnp.flip(mask, axis=1), axis=1)
    return model.logits(jnp.take_along_axis(hidden, last[:, None, None], axis=1)[:, 0]), cache


def continue_from(
    model: LanguageModel,
    logits: Float[Array, "B V"],
    cache: Cache | None,
    mask: Bool[Array, "B P"],
    row_keys: Key[Array, "B"],
    sampling: Sampling,
    lora: Lora | None = None,
) -> Generation:
    """Samples one position at a time until all rows are done, from what `prefill` returned for prompts of `mask`.

    Arguments as in `generate`.
    """
    batch, length = mask.shape[0], sampling.max_new_tokens
    out = Generation(
        tokens=jnp.full((batch, length), sampling.pad_id, dtype=jnp.int32),
        log_probs=jnp.zeros((batch, length), dtype=jnp.float32),
        mask=jnp.zeros((batch, length), dtype=bool),
    )

    def sample(
        logits: Float[Array, "B V"],
        position: Int[Array, "B"],
        step: Array,
        done: Array,
        cache: Cache | None,
        out: Generation,
    ) -> _State:
        keys = jax.vmap(jax.random.fold_in, in_axes=(0, None))(row_keys, step)
        token, log_prob = sample_tokens(logits, keys, sampling)
        token = jnp.where(done, sampling.pad_id, token).astype(jnp.int32)
        out = Generation(
            tokens=out.tokens.at[:, step].set(token),
            log_probs=out.log_probs.at[:, step].set(jnp.where(done, 0.0, log_prob)),
            mask=out.mask.at[:, step].set(~done),
        )
        return _State(step + 1, token, position, done | is_eos(token, sampling.eos_ids), cache, out)

    def unfinished(state: _State) -> Bool[Array, ""]:
        return (state.step < length) & ~jnp.all(state.done)

    def advance(state: _State) -> _State:
        hidden, cache = model.decode(
            state.token[:, None], state.position[:, None], ~state.done[:, None], None, state.cache, lora
        )
        logits = model.logits(hidden[:, 0])
        return sample(logits, state.position + 1, state.step, state.done, cache, state.out)

    prompt_tokens = mask.sum(axis=1).astype(jnp.int32)
    first = sample(logits, prompt_tokens, jnp.int32(0), ~mask.any(axis=1), cache, out)
    return jax.lax.while_loop(unfinished, advance, first).out
