"""What L-PPO and L-RLOO compute in the same way: a rollout's log-probs, KL and shaped scores, and the clipped loss.

In both algorithms, the phase `prepare` begins with `evaluate_rollout` and ends with `report_rollout`, and the loss
begins with `clipped_loss` and ends with `add_options`.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from icet_jax.algorithms import losses, rewards
from icet_jax.algorithms.forward import TokenValues, evaluate_responses, response_hidden, with_policy
from icet_jax.algorithms.metrics import rollout_metrics
from icet_jax.algorithms.phases import Rollout, check_divides, cut_columns, evaluate_policy, observe_failures
from icet_jax.algorithms.settings import Settings
from icet_jax.algorithms.state import Controls
from icet_jax.generation.sampling import is_eos
from icet_jax.parallel.sharding import joined_slices, row_slices
from icet_jax.typing import Array, Bool, Float, Int


class RowRewards(NamedTuple):
    """Holds what the host knows about the rows of a rollout; one entry per row, [B].

    Attributes:
      scores: float32; NaN for a row that could not be scored, which trains nothing.
      learned: bool, true if a reward model computed the score; only these scores are normalised.
      rewarded: bool, false for rows of a kind without a reward, which learn from the KL terms alone.
      kinds: int32, the row's kind as its index in `config.names.KINDS`.
      failures: float32, see `exits.Schedule.observe`; None if the exit schedule learns nothing.
    """

    # Not annotated as arrays of jax, because they are numpy arrays on the host.
    scores: Any
    learned: Any
    rewarded: Any
    kinds: Any
    failures: Any = None


class EvaluatedRollout(NamedTuple):
    """Holds a rollout, the log-probs of its responses under the policy and the reference, and its scores.

    Attributes:
      rollout: the rollout with only the response columns that are learnt from.
      scored: bool [B], true for rows that have a response and a score.
      mask: bool [B, A], the response tokens of scored rows.
      old: the policy's log-probs, entropies and (with a value head) values.
      ref_log_probs: float32 [B, A], the reference's log-probs at the same exit.
      anchor_hidden: [B, A, E], final hidden states of the reference at the default exit; None without an anchor.
      has_eos: bool [B], true for scored rows whose response ends with an EOS.
      shaped: float32 [B], scores after normalising, clipping and the missing-EOS penalty; 0 if not scored.
      kl: float32 [B, A], the KL estimate `config.lppo.kl_kind`, times the factor of the row's kind.
      sequence_kl: float32 [B], k1 summed over each response in nats, without that factor.
      stable: bool scalar, false if the rollout's KL exceeds `config.lppo.max_kl`, so that nothing is learnt from it.
      normaliser: running statistics of all scores so far, including these.
    """

    rollout: Rollout
    scored: Array
    mask: Array
    old: TokenValues
    ref_log_probs: Array
    anchor_hidden: Array | None
    has_eos: Array
    shaped: Array
    kl: Array
    sequence_kl: Array
    stable: Array
    normaliser: rewards.ScoreNormaliser


def evaluate_rollout(
    graphdef: Any, settings: Settings, params: Any, trainable: Any, controls: Controls, rollout: Rollout,
    rows: RowRewards, columns: int | None,
) -> EvaluatedRollout:  # fmt: skip
    """Returns log-probs of policy and reference, KL and shaped scores of a rollout.

    Args:
      graphdef: structure of the network.
      settings: settings that the phase is compiled for.
      params: parameters of the model before training, the reference.
      trainable: trained weights: the policy and, if there is one, the value head.
      controls: controls of this rollout.
      rollout: the sampled responses.
      rows: scores and other facts about the rows.
      columns: number of response columns that are learnt from, see `phases.cut_columns`.
    """
    rollout = cut_columns(rollout, columns)
    scored = jnp.isfinite(rows.scores) & rollout.mask.any(axis=1)
    mask = rollout.mask & scored[:, None]
    check_divides(settings, mask.shape[0])

    # Computed by the function that the update uses, and in as many slices, so that this phase needs no more memory.
    slices = row_slices(rollout, settings.minibatches * settings.accumulation)
    score = functools.partial(_score_slice, graphdef, settings, params, trainable)
    old, ref_log_probs, anchor_hidden = joined_slices(jax.lax.map(score, slices))

    has_eos = _ends_with_eos(settings, rollout.tokens, mask) & scored
    shaped, normaliser = rewards.shape_scores(
        rows.scores,
        has_eos | ~rows.rewarded,  # rows without a reward get no penalty either
        controls.normaliser,
        learned=rows.learned,
        valid=scored,
        normalise=settings.normalise,
        clip=settings.clip,
        missing_eos_penalty=settings.missing_eos_penalty,
    )
    kl = rewards.kl_penalty(old.log_probs, ref_log_probs, settings.kl_kind)
    if any(factor != 1 for factor in settings.kl_factors):
        kl = kl * kl_factors(settings, rows.kinds)[:, None]
    sequence_kl = rewards.sequence_kl(old.log_probs, ref_log_probs, mask)
    return EvaluatedRollout(
        rollout=rollout,
        scored=scored,
        mask=mask,
        old=old,
        ref_log_probs=ref_log_probs,
        anchor_hidden=anchor_hidden,
        has_eos=has_eos,
        shaped=shaped,
        kl=kl,
        sequence_kl=sequence_kl,
        stable=is_stable(settings, jnp.sum(sequence_kl) / jnp.maximum(jnp.sum(scored), 1)),
        normaliser=normaliser,
    )


def kl_factors(settings: Settings, kinds: Int[Array, " B"]) -> Float[Array, " B"]:
    """Returns the factor of the KL coefficient for each row, by its kind (`config.lppo.kl_coef_by_kind`)."""
    return jnp.asarray(settings.kl_factors, jnp.float32)[kinds]


def _score_slice(
    graphdef: Any, settings: Settings, params: Any, trainable: Any, rows: Rollout
) -> tuple[TokenValues, Array, Array | None]:  # fmt: skip
    """Evaluates the responses of some rows under the policy and the reference.

    Returns:
      (values of the policy, log-probs of the reference, final hidden states of the reference at the default exit or
      None without an anchor).
    """
    sampling = settings.sampling
    shared: dict[str, Any] = dict(
        temperature=sampling.temperature, suppress_ids=sampling.suppress_ids, chunk=settings.log_prob_chunk
    )
    inputs = (rows.prompts, rows.prompt_mask, rows.tokens, rows.mask, rows.visual)
    policy, lora = with_policy(params, trainable, settings.lora_scale)
    old = evaluate_responses(nnx.merge(graphdef, policy), lora, trainable.get("value_head"), *inputs, **shared)
    frozen = nnx.merge(graphdef, params)
    reference = evaluate_responses(frozen, None, None, *inputs, **shared)
    anchor_hidden = None
    if settings.anchor_coef:
        anchor_hidden = response_hidden(frozen, None, *inputs[:-1], rows.anchor_visual)
    return old, reference.log_probs, anchor_hidden


def report_rollout(
    graphdef: Any, settings: Settings, params: Any, controls: Controls, evaluated: EvaluatedRollout, rows: RowRewards
) -> tuple[Controls, dict[str, Any]]:  # fmt: skip
    """Returns the controls of the next rollout, and the metrics of this one.

    A control that would become NaN or infinite stays as it was. The arguments are those of `evaluate_rollout` and its
    result.
    """
    model = nnx.merge(graphdef, params)
    rollout = evaluated.rollout
    metrics = rollout_metrics(
        exits=rollout.exits, num_exits=model.num_exits, mask=evaluated.mask, scored=evaluated.scored,
        unscored=rollout.mask.any(axis=1) & ~evaluated.scored, has_eos=evaluated.has_eos, scores=rows.scores,
        shaped=evaluated.shaped, kl=evaluated.kl, sequence_kl=evaluated.sequence_kl, kl_coef=controls.kl_coef,
        log_probs=evaluated.old.log_probs, sampled_log_probs=rollout.log_probs,
    )  # fmt: skip
    after = _controls_after(settings, controls, metrics["objective/kl"], jnp.sum(evaluated.scored))
    after = after._replace(normaliser=evaluated.normaliser)
    after = observe_failures(settings, after, model, rollout.exits, rows.failures)
    finite = jax.tree.map(lambda new, old: jnp.where(jnp.isfinite(new), new, old), after, controls)
    return finite, metrics | {"train/unstable": ~evaluated.stable}


def clipped_loss(
    graphdef: Any, settings: Settings, params: Any, trainable: dict[str, Any], rows: Any, advantages: Array
) -> tuple[TokenValues, Float[Array, ""], losses.Stats]:  # fmt: skip
    """Returns the clipped policy loss of some rows of a batch, see `losses.policy_loss`.

    Args:
      graphdef: structure of the network.
      settings: settings that the update is compiled for.
      params: parameters of the model before training.
      trainable: trained weights.
      rows: rows with prompts, prompt_mask, visual, responses, mask, old_log_probs and anchor_hidden.
      advantages: float32 [B, A].

    Returns:
      (log-probs, entropies and values of the responses under the current policy, loss, statistics).
    """
    new = evaluate_policy(
        graphdef, settings, params, trainable, rows, temperature=settings.sampling.temperature,
        anchor_hidden=rows.anchor_hidden if settings.anchor_coef else None,
    )  # fmt: skip
    clips: dict[str, Any] = dict(clip_range=settings.clip_range, dual_clip=settings.dual_clip or None)
    loss, stats = losses.policy_loss(new.log_probs, rows.old_log_probs, advantages, rows.mask, **clips)
    return new, loss, stats | {"policy": loss}


def add_options(
    settings: Settings, loss: Float[Array, ""], stats: losses.Stats, new: TokenValues, mask: Bool[Array, "B A"]
) -> tuple[Float[Array, ""], losses.Stats]:  # fmt: skip
    """Returns the loss plus the optional entropy bonus and anchor term, and the statistics including these terms.

    Args:
      settings: settings with the coefficients; a term with coefficient 0 is left out.
      loss: loss without these terms.
      stats: statistics of that loss.
      new: first result of `clipped_loss`.
      mask: true on the response tokens.
    """
    stats = stats | {"entropy": losses.masked_mean(new.entropy, mask)}
    if settings.entropy_coef:
        loss = loss - settings.entropy_coef * stats["entropy"]
    if new.anchor_kl is not None:
        stats["anchor"] = losses.masked_mean(new.anchor_kl, mask)
        loss = loss + settings.anchor_coef * stats["anchor"]
    return loss, stats


def _ends_with_eos(settings: Settings, tokens: Int[Array, "B A"], mask: Bool[Array, "B A"]) -> Bool[Array, " B"]:
    """Returns for each row whether its last token inside the mask is an EOS; undefined for rows without a token."""
    last = jnp.maximum(jnp.sum(mask, axis=1) - 1, 0)
    last_token = jnp.take_along_axis(tokens, last[:, None], axis=1)[:, 0]
    return is_eos(last_token, settings.sampling.eos_ids)


def _controls_after(settings: Settings, controls: Controls, kl: Array, sequences: Array) -> Controls:
    """Returns the controls of the next rollout: with `kl_adaptive`, the KL coefficient is adapted to this KL.

    `kl` is the mean per sequence in nats, `sequences` the number of sequences.
    """
    if not settings.kl_adaptive:
        return controls
    kl_coef = rewards.adaptive_kl_coef(
        controls.kl_coef, kl, sequences, target=settings.kl_target, horizon=settings.kl_horizon
    )
    return controls._replace(kl_coef=kl_coef)


def is_stable(settings: Settings, kl: Float[Array, ""]) -> Bool[Array, ""]:
    """Returns whether to learn from a rollout with this mean KL (nats per sequence): it is finite and <= `max_kl`."""
    return jnp.isfinite(kl) & (kl <= settings.max_kl if settings.max_kl else True)
