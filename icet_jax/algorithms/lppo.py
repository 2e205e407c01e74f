"""L-PPO: Clip-PPO whose policy, reference and value are conditioned on the image encoder's exit l (the paper's method).

One iteration, step by step; pi is the policy, pi_ref the model before training, V the value head, P the projector:

     1. batch        prompts x with images, B rows                                                `training.loop`
     2. exits        l ~ the schedule of `config.lppo.exits`, one per row (paper: one layer)       `begin`
     3. encode       e_1 .. e_N = E(image): the tower once, for all exits                          `sample_responses`
     4. visual       P(e_l), through the same projector at every exit
     5. rollout      y ~ pi_old(. | P(e_l), x), at the rollout's temperature
     6. text         the response as words, and its reward r(x, y)                                 `finish`
     7. log-probs    log pi_old(y_t | P(e_l), x, y_<t), log pi_ref(y_t | same), V_t                `_prepare`
     8. rewards      R_t = -eta KL_t + [t is the last token] r(x, y)   (paper: R = r - eta KL(pi || pi_ref))
     9. advantages   A = GAE(R, V; gamma, lambda), whitened over the rollout
    10. update       K epochs of mini-batches:  K_t = pi(y_t | ...) / pi_old(y_t | ...)           `_update`, `lppo_loss`
                     L_policy = E[max(-K A, -clip(K, 1 - eps, 1 + eps) A)]
                     L_value  = E[(V - returns)^2]
                     L        = L_policy + c1 L_value
                     with `config.lppo.anchor_coef` c (ours, off by default), for which step 7 runs pi_ref once more:
                     L       += c E[KL(pi_ref(. | P(e_default), x, y_<t) || pi(. | P(e_l), x, y_<t))]
    11. metrics      means under TRL's names, read while the next iteration runs                   `finish`

Tower and projector are frozen, rollouts are never stale, and the one change from Clip-PPO is l: numerator and
denominator of K_t, reference and value all see P(e_l) of the row's own exit. The phases can be used alone:

    graphdef, params = nnx.split(model)                    # frozen: tower, projector and the reference policy
    settings = settings.from_config(config, vlm.sampling(max_new_tokens, temperature))
    state = state.init_state(params, lora, hidden_size=model.hidden_size, optimizer=settings.optimizer, kl_coef=...)
    run = lppo.build(graphdef, settings, mesh)             # lora: nn.protocols.init_lora(...), None = full fine-tuning
    run_key = jax.random.key(seed)

    while int(state.iteration) < iterations:
        exits = phases.draw_exits(settings, run_key, state.iteration, batch=B, num_exits=.., default_exit=..)
        rollout = run.rollout(params, state, images, tokens, mask, exits, run_key)
        scores, learned = ...                              # host: decode rollout.tokens by rollout.mask, score the text
        state, batch, metrics = run.prepare(params, state, rollout, scores, learned, longest)
        state, more = run.update(params, state, batch, run_key)        # donates `state`
        row = metrics.host_metrics(metrics, more); metrics.instability(row)
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from icet_jax.algorithms import losses, rewards
from icet_jax.algorithms.advantages import gae, whiten
from icet_jax.algorithms.base import Algorithm, PhaseWork, PlannedPhase, Read, Row, images_per_row
from icet_jax.algorithms.forward import Anchor, Scored, response_hidden, score_responses, with_policy
from icet_jax.algorithms.metrics import host_metrics, policy_metrics, rollout_metrics, step_metrics
from icet_jax.algorithms.phases import (
    Rollout,
    abstract_results,
    check_divides,
    cut_columns,
    observe_failures,
    placed_results,
    program_name,
    response_columns,
    response_widths,
    run_epochs,
    sample_responses,
)
from icet_jax.algorithms.reward_by_kind import keyword_asr, not_refused, scores_by_kind
from icet_jax.algorithms.settings import Settings
from icet_jax.algorithms.state import Controls, TrainState
from icet_jax.algorithms.utilisation import speeds
from icet_jax.errors import during
from icet_jax.generation.sampling import is_eos
from icet_jax.parallel.distributed import fetch
from icet_jax.parallel.programs import Program
from icet_jax.parallel.sharding import joined_slices, row_slices
from icet_jax.typing import Array, Bool, Float, Int

if TYPE_CHECKING:
    from ml_collections import ConfigDict

    from icet_jax.algorithms.reward_by_kind import RewardByKind
    from icet_jax.evaluation.batching import PromptBatch
    from icet_jax.planning.ahead import AbstractRun
    from icet_jax.vlm import VLM


class TrainBatch(NamedTuple):
    """A rollout with everything the update needs held constant; every leaf is row-aligned."""

    prompts: Array
    prompt_mask: Array
    visual: Any
    responses: Array
    mask: Array
    old_log_probs: Array
    old_values: Array
    advantages: Array
    returns: Array
    anchor_hidden: Any = None


@dataclasses.dataclass(frozen=True)
class Phases:
    """The compiled phases of an iteration.

    `lowered` takes what `rollout` takes and gives all three by name, ready to be compiled for these shapes in any order
    and at once; `prepare_arrays` is the jitted part of `prepare`.
    """

    rollout: Program
    prepare: Callable[..., tuple[TrainState, TrainBatch, dict[str, Any]]]
    prepare_arrays: Program
    update: Program
    lowered: Callable[..., Iterator[tuple[str, Any]]]


def build(graphdef: Any, settings: Settings, mesh: jax.sharding.Mesh | None = None) -> Phases:
    """The phases for one model structure and one `Settings`; nothing is compiled before the first call.

    With a `mesh`, an update returns the state where `parallel.sharding.shardings` puts it; place the first one so too.
    """

    def prepare_columns(*arrays: Any, columns: int | None = None) -> Any:
        return placed_results(_prepare(graphdef, settings, *arrays, columns=columns), mesh)

    about = (graphdef, settings, mesh)
    prepare_arrays = Program(prepare_columns, about=about, static="columns")

    def prepare(
        params: Any, state: TrainState, rollout: Rollout, scores: Any, learned: Any, longest: int | None = None,
        rewarded: Any = None, failures: Any = None,
    ) -> tuple[TrainState, TrainBatch, dict[str, Any]]:  # fmt: skip
        """Steps 7 to 9.

        Args:
          params: the frozen model.
          state: the train state.
          rollout: of step 5.
          scores: float32 [B]; NaN marks a row that could not be scored, which trains nothing.
          learned: bool [B], rows scored by a reward model; only these are normalised.
          longest: length of the longest response: columns that are padding in every row are left out.
          rewarded: bool [B], false for rows that nothing rewards: they learn from the KL terms alone and are left out
            of whitening; None is all true.
          failures: float32 [B], see `exits.Schedule.observe`; None where the schedule learns nothing.
        """
        scores, learned = np.asarray(scores, np.float32), np.asarray(learned, bool)
        rewarded = np.ones(scores.shape, bool) if rewarded is None else np.asarray(rewarded, bool)
        given = (params, state.trainable, state.controls, rollout, scores, learned, rewarded, failures)
        width, length = rollout.prompts.shape[1], rollout.mask.shape[1]
        columns = response_columns(width, length, length if longest is None else longest)
        batch, controls, metrics = prepare_arrays(*given, columns=columns)
        return state._replace(controls=controls), batch, metrics

    def sample(*arrays: Any) -> Rollout:
        sampled = sample_responses(graphdef, settings, *arrays, anchored=settings.anchor_coef > 0)
        return placed_results(sampled, mesh)

    def learn(*arrays: Any) -> tuple[TrainState, dict[str, Any]]:
        return _update(graphdef, settings, mesh, *arrays)

    rollout, update = Program(sample, about=about), Program(learn, about=about, donate=1)

    def lowered(
        params: Any, state: TrainState, images: Any, tokens: Any, mask: Any, exits: Any, key: Any
    ) -> Iterator[tuple[str, Any]]:
        # A phase's results lie where it says, so that none has to be compiled before another. The longest comes first.
        arguments = (params, state, images, tokens, mask, exits, key)
        made = abstract_results(rollout.eval_shape(*arguments), mesh)
        rows = tokens.shape[0]
        failures = None if state.controls.exits is None else np.zeros(rows, np.float32)
        per_row = (np.zeros(rows, np.float32), np.zeros(rows, bool), np.zeros(rows, bool), failures)
        given = (params, state.trainable, state.controls, made, *per_row)
        widths = response_widths(tokens.shape[1], settings.sampling.max_new_tokens)
        for columns in widths:
            batch, controls, _ = abstract_results(prepare_arrays.eval_shape(*given, columns=columns), mesh)
            yield program_name("update", columns), update.lower(params, state._replace(controls=controls), batch, key)
        yield "rollout", rollout.lower(*arguments)
        for columns in widths:
            yield program_name("prepare", columns), prepare_arrays.lower(*given, columns=columns)

    return Phases(rollout=rollout, prepare=prepare, prepare_arrays=prepare_arrays, update=update, lowered=lowered)


def _score_slice(
    graphdef: Any, settings: Settings, params: Any, trainable: Any, rows: Rollout
) -> tuple[Scored, Array, Array | None]:  # fmt: skip
    """The policy's and the reference's view of some rows.

    Returns:
      (old log-probs, entropy, values), reference log-probs, and with an anchor the reference's states at the default
      exit.
    """
    sampling = settings.sampling
    shared: dict[str, Any] = dict(
        temperature=sampling.temperature, suppress_ids=sampling.suppress_ids, chunk=settings.log_prob_chunk
    )
    inputs = (rows.prompts, rows.prompt_mask, rows.tokens, rows.mask, rows.visual)
    policy, lora = with_policy(params, trainable, settings.lora_scale)
    old = score_responses(nnx.merge(graphdef, policy), lora, trainable["value_head"], *inputs, **shared)
    frozen = nnx.merge(graphdef, params)
    reference = score_responses(frozen, None, None, *inputs, **shared)
    anchor_hidden = None
    if settings.anchor_coef:
        anchor_hidden = response_hidden(frozen, None, *inputs[:-1], rows.anchor_visual)
    return old, reference.log_probs, anchor_hidden


def _prepare(
    graphdef: Any, settings: Settings, params: Any, trainable: Any, controls: Controls, rollout: Rollout,
    scores: Array, learned: Array, rewarded: Array, failures: Array | None = None, *, columns: int | None = None,
) -> tuple[TrainBatch, Controls, dict[str, Any]]:  # fmt: skip
    """Old and reference log-probs, values, token rewards, advantages; whitened over the rollout's rewarded rows.

    With `columns`, the responses are cut to so many: the rest must be padding.
    """
    rollout = cut_columns(rollout, columns)
    scored = jnp.isfinite(scores) & rollout.mask.any(axis=1)
    mask = rollout.mask & scored[:, None]
    check_divides(settings, mask.shape[0])

    # 7. log pi_old, V and log pi_ref of every token, at the row's exit, by the function that the update uses.
    # In as many slices as an update has, so that this phase holds no more activations than that one.
    slices = row_slices(rollout, settings.minibatches * settings.accumulation)
    score = functools.partial(_score_slice, graphdef, settings, params, trainable)
    old, ref_log_probs, anchor_hidden = joined_slices(jax.lax.map(score, slices))

    # 8. R_t = -eta KL_t + [t is the last token] r(x, y), with r normalised, clipped and less the missing-EOS penalty.
    has_eos = _ends_with_eos(settings, rollout.tokens, mask) & scored
    shaped, normaliser = rewards.shape_scores(
        scores,
        has_eos | ~rewarded,  # what is not rewarded is not penalised either
        controls.normaliser,
        learned=learned,
        valid=scored,
        normalise=settings.normalise,
        clip=settings.clip,
        missing_eos_penalty=settings.missing_eos_penalty,
    )
    kl = rewards.kl_penalty(old.log_probs, ref_log_probs, settings.kl_kind)
    reward = rewards.token_rewards(shaped, kl, mask, kl_coef=controls.kl_coef)

    # 9. A = GAE(R, V; gamma, lambda); returns = A + V; then A is whitened over the rewarded rows.
    if settings.whiten_rewards:
        reward = whiten(reward, mask, shift_mean=False, rows=rewarded)
    advantages, returns = gae(reward, old.values, mask, gamma=settings.gamma, lam=settings.lam)

    sequence_kl = rewards.sequence_kl(old.log_probs, ref_log_probs, mask)
    stable = is_stable(settings, jnp.sum(sequence_kl) / jnp.maximum(jnp.sum(scored), 1))
    batch = TrainBatch(
        prompts=rollout.prompts,
        prompt_mask=rollout.prompt_mask,
        visual=rollout.visual,
        responses=rollout.tokens,
        mask=mask & stable,
        old_log_probs=old.log_probs,
        old_values=old.values,
        advantages=whiten(advantages, mask, rows=rewarded) if settings.whiten_advantages else advantages,
        returns=returns,
        anchor_hidden=anchor_hidden,
    )
    model = nnx.merge(graphdef, params)
    metrics = rollout_metrics(
        exits=rollout.exits, num_exits=model.num_exits, mask=mask, scored=scored,
        unscored=rollout.mask.any(axis=1) & ~scored, has_eos=has_eos, scores=scores, shaped=shaped, kl=kl,
        sequence_kl=sequence_kl, kl_coef=controls.kl_coef, log_probs=old.log_probs,
        sampled_log_probs=rollout.log_probs, advantages=advantages, returns=returns,
    )  # fmt: skip
    after = _controls_after(settings, controls, metrics["objective/kl"], jnp.sum(scored))._replace(
        normaliser=normaliser
    )
    after = observe_failures(settings, after, model, rollout.exits, failures)
    kept = jax.tree.map(lambda new, old: jnp.where(jnp.isfinite(new), new, old), after, controls)
    return batch, kept, metrics | {"train/unstable": ~stable}


def _ends_with_eos(settings: Settings, tokens: Int[Array, "B A"], mask: Bool[Array, "B A"]) -> Bool[Array, " B"]:
    """Whether the last token inside the mask is an EOS; meaningless for empty rows."""
    last = jnp.maximum(jnp.sum(mask, axis=1) - 1, 0)
    last_token = jnp.take_along_axis(tokens, last[:, None], axis=1)[:, 0]
    return is_eos(last_token, settings.sampling.eos_ids)


def _controls_after(settings: Settings, controls: Controls, kl: Array, sequences: Array) -> Controls:
    """Those of the next rollout: with `kl_adaptive` eta follows the KL of this one."""
    if not settings.kl_adaptive:
        return controls
    kl_coef = rewards.adaptive_kl_coef(
        controls.kl_coef, kl, sequences, target=settings.kl_target, horizon=settings.kl_horizon
    )
    return controls._replace(kl_coef=kl_coef)


def is_stable(settings: Settings, kl: Float[Array, ""]) -> Bool[Array, ""]:
    """Whether a rollout with this mean KL (nats per sequence) is learnt from: it is a number, and within `max_kl`."""
    return jnp.isfinite(kl) & (kl <= settings.max_kl if settings.max_kl else True)


def lppo_loss(
    graphdef: Any, settings: Settings, params: Any, trainable: dict[str, Any], rows: TrainBatch
) -> tuple[Float[Array, ""], dict[str, Array]]:
    """L = L_policy + c1 * L_value - entropy_coef * entropy (paper), token means over `rows`, and TRL's statistics."""
    policy, lora = with_policy(params, trainable, settings.lora_scale)
    anchor = Anchor(nnx.merge(graphdef, params), rows.anchor_hidden) if settings.anchor_coef else None
    new = score_responses(
        nnx.merge(graphdef, policy),
        lora,
        trainable["value_head"],
        rows.prompts,
        rows.prompt_mask,
        rows.responses,
        rows.mask,
        rows.visual,
        temperature=settings.sampling.temperature,
        suppress_ids=settings.sampling.suppress_ids,
        chunk=settings.log_prob_chunk,
        value_stop_gradient=settings.value_stop_gradient,
        anchor=anchor,
    )
    clips: dict[str, Any] = dict(clip_range=settings.clip_range, dual_clip=settings.dual_clip or None)
    policy_term, stats = losses.policy_loss(new.log_probs, rows.old_log_probs, rows.advantages, rows.mask, **clips)
    value_term, value_stats = losses.value_loss(
        new.values, rows.old_values, rows.returns, rows.mask, clip_range=settings.value_clip_range or None
    )
    entropy = losses.masked_mean(new.entropy, rows.mask)
    loss = policy_term + settings.value_coef * value_term
    if settings.entropy_coef:
        loss = loss - settings.entropy_coef * entropy
    stats |= {
        "policy": policy_term, "value": value_term, "entropy": entropy, "value_clipfrac": value_stats["clipfrac"]
    }  # fmt: skip
    if new.anchor_kl is not None:
        stats["anchor"] = losses.masked_mean(new.anchor_kl, rows.mask)
        loss = loss + settings.anchor_coef * stats["anchor"]
    return loss, stats


def _update(
    graphdef: Any, settings: Settings, mesh: jax.sharding.Mesh | None, params: Any, state: TrainState,
    batch: TrainBatch, run_key: Array,
) -> tuple[TrainState, dict[str, Any]]:  # fmt: skip
    """10. K epochs of clipped updates on one rollout; advances the iteration."""
    new_state, outcome = run_epochs(
        lambda trainable, rows: lppo_loss(graphdef, settings, params, trainable, rows),
        settings,
        mesh,
        state,
        batch,
        run_key,
        target_kl=settings.target_kl,
        max_ratio=settings.max_ratio,
    )
    return new_state, policy_metrics(outcome) | step_metrics(state, outcome, settings.optimizer)


class Lppo(Algorithm):
    """The recipe on the host; see the module for its steps."""

    value_head = True
    bounded = True

    def __init__(self, config: "ConfigDict", vlm: "VLM", reward: "RewardByKind"):
        """See `Algorithm`."""
        super().__init__(config, vlm, reward)
        self._reward = reward
        self._phases = build(vlm.graphdef, self.settings, vlm.mesh)

    def lowered(self, state: TrainState, batch: "PromptBatch") -> Iterator[tuple[str, Any]]:
        """See `Algorithm`."""
        exits = self._exits.eval_shape(self._run_key, state.iteration, state.controls.exits)
        inputs = (batch.images, batch.tokens, batch.mask, exits, self._run_key)
        yield from self._phases.lowered(self._vlm.params, state, *inputs)
        yield from self._reward.lowered(batch.tokens.shape[1] + self.settings.sampling.max_new_tokens)

    def begin(self, state: TrainState, batch: "PromptBatch") -> Rollout:
        """Steps 2 to 5, which need nothing from the host; waits for nothing."""
        self._watch.start()
        with during("rollout"):
            exits = self._exits(self._run_key, state.iteration, state.controls.exits)
            return self._phases.rollout(
                self._vlm.params, state, batch.images, batch.tokens, batch.mask, exits, self._run_key
            )

    def finish(self, state: TrainState, batch: "PromptBatch", begun: Any) -> tuple[TrainState, Read]:
        """Steps 6 to 11; donates `state`, and waits for no update."""
        params, rollout = self._vlm.params, begun
        with during("rollout"):  # what fails on a device is told where its results are asked for
            tokens, mask, prompt_mask, exits = fetch((rollout.tokens, rollout.mask, batch.mask, rollout.exits))
        seconds = {"rollout": self._watch.lap()}

        # 6. The response as words, and r(x, y).
        texts = self._vlm.processor.decode(tokens, mask)
        with during("judging"):
            scores, learned = self._reward(batch.examples, texts)
        seconds["score"] = self._watch.lap()
        longest = int(mask.sum(axis=1).max())
        rewarded = self._reward.rewarded(batch.examples)
        failures = not_refused(batch.examples, texts)

        # 7 to 10. Log-probs, rewards and advantages; then K epochs of updates.
        with during("update"):
            observed = None if state.controls.exits is None else failures
            prepared = self._phases.prepare(params, state, rollout, scores, learned, longest, rewarded, observed)
            state, train_batch, before = prepared
            state, after = self._phases.update(params, state, train_batch, self._run_key)

        # 11. What is known of it, when it is over.
        by_kind = scores_by_kind(batch.examples, scores, rewarded & mask.any(axis=1), exits)
        passes = 2 + (self.settings.anchor_coef > 0)
        done = self._counter.done(prompt_mask.sum(axis=1), mask.sum(axis=1), images_per_row(batch), passes=passes)

        @during("update")
        def read() -> Row:
            row = host_metrics(before, after) | by_kind | keyword_asr(failures)
            return row | speeds(done, seconds | {"update": self._watch.lap()}, self._counter.evaluated(row), self.peak)

        return state, read

    @classmethod
    def planned(cls, run: "AbstractRun", compiled: Callable[[PlannedPhase], Any]) -> Iterator[PlannedPhase]:
        """See `Algorithm`."""
        vlm, config, settings, state = run.vlm, run.config, run.settings, run.state
        batch = config.data.batch_size
        check_divides(settings, batch)
        phases: Any = build(vlm.graphdef, settings, run.devices)
        images, (tokens, mask), exits, key = run.images(batch), run.prompts(batch), run.exits(batch), run.key
        # Under full fine-tuning the policy has weights of its own, and only `prepare` takes the reference.
        encoder = run.weights(policy=False)
        reference = () if settings.lora_scale is not None else run.weights(policy=True)
        arguments = (vlm.params, state, images, tokens, mask, exits, key)
        rollout = PlannedPhase(
            "rollout", (images, tokens, mask), run.cache(batch, settings.sampling.max_new_tokens),
            lambda: phases.rollout.jitted.lower(*arguments), [reference, state.opt_state],
        )  # fmt: skip
        yield rollout
        sampled = run.outputs(rollout, compiled, batch, phases.rollout, *arguments)
        per_row = (np.zeros(batch, np.float32), np.zeros(batch, bool), np.ones(batch, bool))
        given = (vlm.params, state.trainable, state.controls, sampled, *per_row)
        prepare = PlannedPhase(
            "prepare", sampled, None, lambda: phases.prepare_arrays.jitted.lower(*given), [encoder, state.opt_state]
        )  # fmt: skip
        yield prepare
        train_batch = run.outputs(prepare, compiled, batch, phases.prepare_arrays, *given, first=True)
        yield PlannedPhase(
            "update", train_batch, None,
            lambda: phases.update.jitted.lower(vlm.params, state, train_batch, key),
            [encoder, reference],
        )  # fmt: skip

    @classmethod
    def work(cls, run: "AbstractRun") -> Mapping[str, PhaseWork]:
        """See `Algorithm`."""
        batch = run.config.data.batch_size
        policy, adapters = run.forward_flops()
        passes = 2 + (run.settings.anchor_coef > 0)
        return {
            "rollout": run.rollout_work(),
            "prepare": PhaseWork(batch * (passes * policy + adapters), passes * run.slices),
            "update": run.update_work(),
        }


ALGORITHM = Lppo
