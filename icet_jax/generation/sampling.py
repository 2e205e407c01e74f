"""Samples the next token, and computes log-probs under the same distribution for training."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from icet_jax.errors import UserError
from icet_jax.nn.protocols import VisionLanguageModel
from icet_jax.typing import Array, Bool, Float, Int, Key, Shaped


@dataclass(frozen=True)
class Sampling:
    """Defines how a response is drawn; it is hashable because it is a static argument of jitted functions.

    Attributes:
      max_new_tokens: A, at least 1.
      temperature: divides the logits; 0 means greedy.
      top_k: only the k most probable tokens are kept; 0 = off.
      top_p: only the most probable tokens that together reach this probability are kept; 1 = off.
      eos_ids: tokens that end a response.
      suppress_ids: tokens that are never sampled (see the function `suppress_ids`).
      pad_id: token after the end of a response.
    """

    max_new_tokens: int
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    eos_ids: tuple[int, ...] = (2,)
    suppress_ids: tuple[int, ...] = ()
    pad_id: int = 0

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise UserError(f"max_new_tokens: {self.max_new_tokens} given; at least 1 is needed")
        if not 0 <= self.temperature < float("inf"):
            raise UserError(f"temperature: {self.temperature} given; use 0 (greedy) or a positive number")
        if self.top_k < 0:
            raise UserError(f"top_k: {self.top_k} given; use 0 (off) or a positive number")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top_p: {self.top_p} given; use a number above 0 and up to 1 (off)")


def suppress_ids(image_token: int, pad_id: int | None, eos_ids: Sequence[int]) -> tuple[int, ...]:
    """Returns the tokens that a model must never sample: the image placeholder, and the padding unless it is an EOS."""
    if pad_id is None or pad_id in eos_ids:
        return (image_token,)
    return (image_token, pad_id)


def process_logits(
    logits: Float[Array, "*rows V"], temperature: float, suppress_ids: Sequence[int]
) -> Float[Array, "*rows V"]:
    """Returns the logits of the sampling distribution: divided by the temperature (unless it is 0), with some tokens
    suppressed.

    The logit of a suppressed token becomes the lowest finite number of the dtype, whose probability is exactly 0 and
    which keeps entropies and gradients finite. It is set after the division, which could turn it into -inf.
    """
    if temperature > 0:
        logits = logits / temperature
    vocab_size = logits.shape[-1]
    suppressed = np.zeros(vocab_size, dtype=bool)
    # A placeholder may have no logit at all (Llama 3.2), so there is nothing to suppress.
    suppressed[[token for token in suppress_ids if 0 <= token < vocab_size]] = True
    return jnp.where(suppressed, jnp.finfo(logits.dtype).min, logits)


def truncate_logits(logits: Float[Array, "*rows V"], top_k: int = 0, top_p: float = 1.0) -> Float[Array, "*rows V"]:
    """Returns the logits with all but the most probable tokens set to -inf.

    First only the `top_k` most probable tokens are kept (0 keeps all). Of these, only the most probable ones are kept
    whose probabilities reach `top_p` together (1 keeps all). Order and thresholds are those of HF's TopKLogitsWarper
    and TopPLogitsWarper. Tokens that tie with the last kept token are kept.
    """
    if 0 < top_k < logits.shape[-1]:
        threshold = jax.lax.top_k(logits, top_k)[0][..., -1:]
        logits = jnp.where(logits < threshold, -jnp.inf, logits)
    if top_p < 1:
        descending = jnp.flip(jnp.sort(logits, axis=-1), axis=-1)
        probabilities = jax.nn.softmax(descending, axis=-1)
        # A token is kept while the mass of the tokens before it is below top_p, so the first one always is.
        is_kept = jnp.cumsum(probabilities, axis=-1) - probabilities < top_p
        threshold = jnp.min(jnp.where(is_kept, descending, jnp.inf), axis=-1, keepdims=True)
        logits = jnp.where(logits < threshold, -jnp.inf, logits)
    return logits


def sample_tokens(
    logits: Float[Array, "B V"], keys: Key[Array, "B"], sampling: Sampling
) -> tuple[Int[Array, "B"], Float[Array, "B"]]:
    """Returns one token per row, drawn with the row's own key, and the log-prob of each.

    The log-prob is that of the distribution of `process_logits` without truncation (temperature 1 when greedy): top-k
    and top-p affect which token is chosen, not the reported log-prob. It is NaN if a logit that is not suppressed is
    NaN or +inf, which is how the host detects a damaged model (`check_log_probs`).
    """
    logits = process_logits(logits, sampling.temperature, sampling.suppress_ids)
    if sampling.temperature == 0:
        tokens = jnp.argmax(logits, axis=-1)
    else:
        truncated = truncate_logits(logits, sampling.top_k, sampling.top_p)
        tokens = jax.vmap(jax.random.categorical)(keys, truncated)
    return tokens, _select(jax.nn.log_softmax(logits, axis=-1), tokens)


def check_log_probs(log_probs: np.ndarray, place: str) -> None:
    """Raises an error if log-probs of a response are not finite, because its tokens are then meaningless.

    Args:
      log_probs: log-probs of the tokens of one response, on the host.
      place: the exit and the row, which the message begins with ("exit 3, row 0").

    Raises:
      UserError: a log-prob is NaN or infinite.
    """
    if not np.isfinite(log_probs).all():
        raise UserError(
            f"{place}: the model's logits are NaN or infinite; the checkpoint is damaged or the dtype overflows: check "
            "it with --mode=verify, or try --config.model.dtype=float32"
        )


def token_log_probs(
    model: VisionLanguageModel,
    hidden: Float[Array, "B A E"],
    targets: Int[Array, "B A"],
    *,
    temperature: float,
    suppress_ids: Sequence[int],
    chunk: int,
) -> tuple[Float[Array, "B A"], Float[Array, "B A"]]:
    """Returns the log-probs of `targets` and the entropy at each position, in nats, under the sampling distribution.

    The head runs on `chunk` response positions at a time and is recomputed in the backward pass, so that no array of
    shape [B, A, V] is ever created.

    Args:
      model: the network; only its head (hidden states to logits) is used.
      hidden: hidden states after the final norm, at the positions whose logits predict `targets`.
      targets: token ids; where they are meaningless (after the end of a response), so is the result.
      temperature: temperature of the rollout; 0 (greedy) counts as 1.
      suppress_ids: as in `process_logits`.
      chunk: response positions per step, at least 1.

    Returns:
      (log_probs, entropy), float32.
    """
    head = model.head_for(hidden)

    def score(block: tuple[Array, Array]) -> tuple[Array, Array]:
        states, tokens = block
        logits = process_logits(model.logits(states, head), temperature, suppress_ids)
        log_probs = jax.nn.log_softmax(logits, axis=-1)
        return _select(log_probs, tokens), -jnp.sum(jnp.exp(log_probs) * log_probs, axis=-1)

    return _in_chunks(score, (hidden, targets), chunk)


def distribution_kl(
    model: VisionLanguageModel,
    hidden: Float[Array, "B A E"],
    reference: VisionLanguageModel,
    reference_hidden: Float[Array, "B A E"],
    *,
    temperature: float,
    suppress_ids: Sequence[int],
    chunk: int,
) -> Float[Array, "B A"]:
    """Returns the exact KL(reference || model) of the next token at every position, in nats, over the whole vocabulary.

    The reference's distribution gets no gradient. As in `token_log_probs`, no array of shape [B, A, V] is created.

    Args:
      model: the network; only its head is used.
      hidden: hidden states of `model` after the final norm, at the positions whose logits predict a token.
      reference: the network whose distribution is the target; only its head is used.
      reference_hidden: hidden states of `reference` after the final norm, at the same positions.
      temperature, suppress_ids, chunk: see `token_log_probs`.

    Returns:
      float32, 0 or more up to rounding.
    """
    head, reference_head = model.head_for(hidden), reference.head_for(reference_hidden)

    def diverge(block: tuple[Array, Array]) -> Array:
        log_probs, target = (
            jax.nn.log_softmax(process_logits(logits, temperature, suppress_ids), axis=-1)
            for logits in (model.logits(block[0], head), reference.logits(block[1], reference_head))
        )
        target = jax.lax.stop_gradient(target)
        return jnp.sum(jnp.exp(target) * (target - log_probs), axis=-1)

    return _in_chunks(diverge, (hidden, reference_hidden), chunk)


def _in_chunks(function: Callable[[Any], Any], arrays: tuple[Array, ...], chunk: int) -> Any:
    """Applies `function` to `chunk` positions of the arrays [B, A, ...] at a time, and joins the results to [B, A].

    The backward pass computes `function` again instead of storing its intermediate arrays.
    """
    batch, length = arrays[0].shape[:2]
    chunk = min(chunk, length)
    count = -(-length // chunk)

    def split(x: Shaped[Array, "B A ..."]) -> Shaped[Array, "C B chunk ..."]:
        padding = ((0, 0), (0, count * chunk - length), *[(0, 0)] * (x.ndim - 2))
        return jnp.pad(x, padding).reshape(batch, count, chunk, *x.shape[2:]).swapaxes(0, 1)

    def join(x: Float[Array, "C B chunk"]) -> Float[Array, "B A"]:
        return x.swapaxes(0, 1).reshape(batch, -1)[:, :length]

    return jax.tree.map(join, jax.lax.map(jax.checkpoint(function), jax.tree.map(split, arrays)))


def is_eos(tokens: Int[Array, "B"], eos_ids: Sequence[int]) -> Bool[Array, "B"]:
    """Returns for each token whether it ends its response."""
    return jnp.isin(tokens, jnp.asarray(eos_ids, dtype=tokens.dtype))


def _select(values: Float[Array, "*rows V"], tokens: Int[Array, "*rows"]) -> Float[Array, "*rows"]:
    return jnp.take_along_axis(values, tokens[..., None], axis=-1, mode="clip")[..., 0]
