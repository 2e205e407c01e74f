"""Teacher forcing: the one function that gives old, reference and new log-probs, and the values."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from icet_jax.generation.sampling import distribution_kl, token_log_probs
from icet_jax.nn.heads import value
from icet_jax.nn.layers import Lora
from icet_jax.nn.protocols import POLICY_ROOT, VisionLanguageModel
from icet_jax.typing import Array, Bool, Float, Int


class Scored(NamedTuple):
    """Per response token, float32 `[B, A]`: log-prob (nats), entropy of its distribution (nats), state value.

    `anchor_kl` is KL(anchor || policy) of the next token (nats), None without an anchor.
    """

    log_probs: Array
    entropy: Array
    values: Array
    anchor_kl: Array | None = None


class Anchor(NamedTuple):
    """The distribution that a policy is drawn to: that of another network, or of another exit, on the same tokens.

    Attributes:
      model: whose head gives it.
      hidden: [B, A, E], from `response_hidden`; constants.
    """

    model: VisionLanguageModel
    hidden: Array


def with_policy(params: Any, trainable: dict[str, Any], lora_scale: float | None) -> tuple[Any, Lora | None]:
    """The policy as (parameters of the whole model, adapters), from the frozen model and the trainable weights.

    Args:
      params: the frozen model (the reference is `params` with no adapters, under LoRA and full fine-tuning alike).
      trainable: see `TrainState`.
      lora_scale: alpha / rank, or None under full fine-tuning: then the language model of `params` is replaced.
    """
    if lora_scale is not None:
        return params, Lora(weights=trainable["policy"], scale=lora_scale)
    return nnx.State({**params, POLICY_ROOT: trainable["policy"]}), None


def score_responses(
    model: VisionLanguageModel,
    lora: Lora | None,
    value_head: dict[str, Array] | None,
    prompts: Int[Array, "B P"],
    prompt_mask: Bool[Array, "B P"],
    responses: Int[Array, "B A"],
    mask: Bool[Array, "B A"],
    visual: Any,
    *,
    temperature: float,
    suppress_ids: Sequence[int],
    chunk: int,
    value_stop_gradient: bool = False,
    anchor: Anchor | None = None,
) -> Scored:
    """One teacher-forced pass over `[prompt | response]`.

    Prompts are left-padded, so the hidden state that predicts response token t stands at column P - 1 + t; log-prob,
    entropy and value are read there. The last token is not fed: nothing is predicted from it.

    Args:
      model: the network (policy or reference).
      lora: adapters; None is the reference, or full fine-tuning.
      value_head: None gives zero values.
      prompts: left-padded; a filler row has no true mask entry.
      prompt_mask: real prompt tokens.
      responses: sampled or target tokens.
      mask: their prefix mask; what lies outside it is garbage in the result.
      visual: row-aligned, from `model.visual`; no gradient flows into it.
      temperature: divides the logits, as it did in the rollout.
      suppress_ids: tokens with probability 0.
      chunk: response positions whose logits exist at once.
      value_stop_gradient: whether the value head leaves the policy alone.
      anchor: what `Scored.anchor_kl` is measured from; None: nothing.
    """
    hidden = response_hidden(model, lora, prompts, prompt_mask, responses, mask, visual)
    log_probs, entropy = token_log_probs(
        model, hidden, responses, temperature=temperature, suppress_ids=suppress_ids, chunk=chunk
    )
    anchor_kl = None
    if anchor is not None:
        target = jnp.where(mask[:, :, None], anchor.hidden, 0)  # garbage outside the mask must not reach a gradient
        anchor_kl = distribution_kl(
            model, hidden, anchor.model, target, temperature=temperature, suppress_ids=suppress_ids, chunk=chunk
        )
    if value_head is None:
        return Scored(log_probs, entropy, jnp.zeros_like(log_probs), anchor_kl)
    features = jax.lax.stop_gradient(hidden) if value_stop_gradient else hidden
    return Scored(log_probs, entropy, value(value_head, features), anchor_kl)


def response_hidden(
    model: VisionLanguageModel,
    lora: Lora | None,
    prompts: Int[Array, "B P"],
    prompt_mask: Bool[Array, "B P"],
    responses: Int[Array, "B A"],
    mask: Bool[Array, "B A"],
    visual: Any,
) -> Float[Array, "B A E"]:
    """Final hidden states of a teacher-forced pass, at the positions whose logits predict the response tokens.

    The arguments are those of `score_responses`.
    """
    width = prompts.shape[1]
    tokens = jnp.concatenate([prompts, responses[:, :-1]], axis=1)
    token_mask = jnp.concatenate([prompt_mask, mask[:, :-1]], axis=1)
    visual = jax.lax.stop_gradient(visual)
    hidden = model.decode(tokens, model.positions(tokens, token_mask, visual), token_mask, visual, lora)
    return hidden[:, width - 1 :]
