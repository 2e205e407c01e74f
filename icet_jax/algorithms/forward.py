"""Evaluates given responses by teacher forcing: the only function that computes log-probs and values in training."""

from collections.abc import Collection, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from icet_jax.generation.sampling import distribution_kl, token_log_probs
from icet_jax.nn.heads import value
from icet_jax.nn.layers import Lora
from icet_jax.nn.protocols import POLICY_ROOT, PROJECTOR_ROOT, VisionLanguageModel
from icet_jax.typing import Array, Bool, Float, Int

_ROOTS = {"policy": POLICY_ROOT, "projector": PROJECTOR_ROOT}  # {part of `TrainState.trainable`: root in the model}


class TokenValues(NamedTuple):
    """Holds what a network gives to each response token, float32 `[B, A]`; log-probs, entropy and KL in nats.

    Attributes:
      log_probs: log-prob of the token.
      entropy: entropy of the distribution of the next token.
      values: output of the value head; 0 without one.
      anchor_kl: KL(anchor || network) of the next token; None without an anchor.
    """

    log_probs: Array
    entropy: Array
    values: Array
    anchor_kl: Array | None = None


class Anchor(NamedTuple):
    """Holds the target of a KL term: the next-token distributions of a network at an exit, for the same tokens.

    Attributes:
      model: network whose head turns `hidden` into these distributions.
      hidden: hidden states [B, A, E] of `model`, from `response_hidden`; they get no gradient.
    """

    model: VisionLanguageModel
    hidden: Array


def with_policy(params: Any, trainable: dict[str, Any], lora_scale: float | None) -> tuple[Any, Lora | None]:
    """Returns the policy as (parameters of the whole model, adapters or None).

    Args:
      params: parameters of the model before training; without adapters they are the reference.
      trainable: trained weights, see `TrainState`.
      lora_scale: alpha / rank; None if the decoder is trained in full, or not at all.
    """
    lora = None if lora_scale is None else Lora(weights=trainable["policy"], scale=lora_scale)
    replaced = {root: trainable[part] for part, root in replaced_roots(trainable, lora_scale).items()}
    return (nnx.State({**params, **replaced}) if replaced else params), lora


def replaced_roots(trained: Collection[str], lora_scale: float | None) -> dict[str, str]:
    """Returns {trained part: root of the parameters that it replaces}; adapters replace none.

    Args:
      trained: the trained parts, see `TrainState.trainable`.
      lora_scale: alpha / rank; None if the decoder is trained in full, or not at all.
    """
    roots = {"projector": PROJECTOR_ROOT} if lora_scale is not None else _ROOTS
    return {part: root for part, root in roots.items() if part in trained}


def evaluate_responses(
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
) -> TokenValues:
    """Returns log-prob, entropy and value of each response token, from one pass over `[prompt | response]`.

    Prompts are left-padded, so the hidden state that predicts response token t is at column P - 1 + t; log-prob,
    entropy and value are computed from it. The last response token is not an input, because nothing is predicted from
    it.

    Args:
      model: the network (policy or reference).
      lora: adapters; None for the reference, or under full fine-tuning.
      value_head: parameters of the value head; None gives zero values.
      prompts: left-padded prompts; the mask of a filler row is all false.
      prompt_mask: true at real prompt tokens.
      responses: sampled or target tokens.
      mask: true at the tokens of a response, which are the first ones of a row; results elsewhere have no meaning.
      visual: row-aligned image features from `model.visual`.
      temperature: divides the logits, as it did in the rollout.
      suppress_ids: tokens with probability 0.
      chunk: number of response positions whose logits exist at the same time.
      value_stop_gradient: whether the gradient of the values stops at the value head and does not reach the policy.
      anchor: target of `TokenValues.anchor_kl`; None computes no KL.
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
        return TokenValues(log_probs, entropy, jnp.zeros_like(log_probs), anchor_kl)
    features = jax.lax.stop_gradient(hidden) if value_stop_gradient else hidden
    return TokenValues(log_probs, entropy, value(value_head, features), anchor_kl)


def response_hidden(
    model: VisionLanguageModel,
    lora: Lora | None,
    prompts: Int[Array, "B P"],
    prompt_mask: Bool[Array, "B P"],
    responses: Int[Array, "B A"],
    mask: Bool[Array, "B A"],
    visual: Any,
) -> Float[Array, "B A E"]:
    """Returns the decoder's final hidden states at the positions whose logits predict the response tokens.

    The arguments are those of `evaluate_responses`.
    """
    width = prompts.shape[1]
    tokens = jnp.concatenate([prompts, responses[:, :-1]], axis=1)
    token_mask = jnp.concatenate([prompt_mask, mask[:, :-1]], axis=1)
    hidden = model.decode(tokens, model.positions(tokens, token_mask, visual), token_mask, visual, lora)
    return hidden[:, width - 1 :]
