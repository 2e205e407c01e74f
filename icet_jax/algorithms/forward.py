"""Teacher forcing: the one function that gives old, reference and new log-probs, and the values."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from icet_jax.generation.sampling import token_log_probs
from icet_jax.nn.heads import value
from icet_jax.nn.layers import Lora, positions_from_mask
from icet_jax.nn.protocols import POLICY_ROOT, VisionLanguageModel
from icet_jax.typing import Array, Bool, Int


class Scored(NamedTuple):
    """Per response token, float32 `[B, A]`: log-prob (nats), entropy of its distribution (nats), state value."""

    log_probs: Array
    entropy: Array
    values: Array


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
    """
    width = prompts.shape[1]
    tokens = jnp.concatenate([prompts, responses[:, :-1]], axis=1)
    token_mask = jnp.concatenate([prompt_mask, mask[:, :-1]], axis=1)
    hidden = model.decode(tokens, positions_from_mask(token_mask), token_mask, jax.lax.stop_gradient(visual), lora)
    hidden = hidden[:, width - 1 :]
    log_probs, entropy = token_log_probs(
        model, hidden, responses, temperature=temperature, suppress_ids=suppress_ids, chunk=chunk
    )
    if value_head is None:
        return Scored(log_probs, entropy, jnp.zeros_like(log_probs))
    features = jax.lax.stop_gradient(hidden) if value_stop_gradient else hidden
    return Scored(log_probs, entropy, value(value_head, features))
