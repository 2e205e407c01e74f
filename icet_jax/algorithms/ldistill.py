"""L-Distill: every exit learns the distribution that the model before training has at its default exit.

It needs neither a reward nor a critic. The paper has no such algorithm.

One iteration, step by step; pi is the policy, pi_ref the model before training, P the projector:

    1. batch        prompts x with images, B rows                                              `training.loop`
    2. exits        l ~ the schedule of `config.ldistill.exits`, one per row                   `begin`
    3. encode       e_1 .. e_N = E(image): the tower once, for all exits                       `sample_responses`
    4. visual       P(e_l) at the row's exit, and P(e_default) at the default exit
    5. answers      `config.ldistill.on` = policy:   y ~ pi(. | P(e_l), x)
                                           default:  y ~ pi_ref(. | P(e_default), x)
    6. target       pi_ref(. | P(e_default), x, y_<t) at every token of the answer             `_update`
    7. update       K epochs of mini-batches:                                                  `ldistill_loss`
                    L = E_t[KL(pi_ref(. | P(e_default), x, y_<t) || pi(. | P(e_l), x, y_<t))]
    8. metrics      read while the next iteration runs                                         `finish`

The KL is exact, over the whole vocabulary, and the same as the term that `config.lppo.anchor_coef` adds to L-PPO. To
compute it, the reference's last hidden states [B, A, E] are stored, and the logits of both networks exist for only
`config.lppo.log_prob_chunk` positions at a time. The default exit has to be safe, because every exit learns the answers
of that exit. Epochs, mini-batches, accumulation, temperature and optimizer are those of L-PPO.
"""

import functools
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import numpy as np
from flax import nnx

from icet_jax.algorithms.base import Algorithm, Metrics, PhaseWork, PlannedPhase, ReadMetrics, images_per_row
from icet_jax.algorithms.forward import response_hidden
from icet_jax.algorithms.losses import masked_mean
from icet_jax.algorithms.metrics import host_metrics, step_metrics
from icet_jax.algorithms.phases import (
    Rollout,
    abstract_results,
    check_divides,
    cut_columns,
    evaluate_policy,
    observe_failures,
    placed_results,
    program_name,
    response_columns,
    response_widths,
    run_epochs,
    sample_responses,
)
from icet_jax.algorithms.reward_by_kind import keyword_asr, not_refused
from icet_jax.algorithms.settings import Settings
from icet_jax.algorithms.state import TrainState
from icet_jax.algorithms.utilisation import speeds
from icet_jax.errors import during
from icet_jax.parallel.distributed import fetch
from icet_jax.parallel.programs import Program
from icet_jax.parallel.sharding import joined_slices, row_slices
from icet_jax.typing import Array, Float

if TYPE_CHECKING:
    from ml_collections import ConfigDict

    from icet_jax.algorithms.reward_by_kind import RewardByKind
    from icet_jax.evaluation.batching import PromptBatch
    from icet_jax.planning.ahead import AbstractRun
    from icet_jax.vlm import VLM


class DistillBatch(NamedTuple):
    """Holds answers and, for their tokens, the reference's hidden states at the default exit; all row-aligned.

    Attributes:
      prompts, prompt_mask: [B, P], left-padded.
      visual: image features of each row's exit.
      responses: int32 [B, A].
      mask: bool [B, A], true at the tokens of the answers.
      anchor_hidden: [B, A, E], final hidden states of the reference at the default exit.
    """

    prompts: Array
    prompt_mask: Array
    visual: Any
    responses: Array
    mask: Array
    anchor_hidden: Array


class Phases(NamedTuple):
    """Holds the compiled phases of an iteration.

    Attributes:
      rollout: function of (params, state, images, tokens, mask, exits, run_key) that returns a `Rollout`.
      update: function of (params, state, rollout, run_key, failures, columns=) that returns (state, metrics) and
        donates the state. For `failures` see `exits.Schedule.observe`; they are None if the schedule learns nothing.
        For `columns` see `phases.cut_columns`.
    """

    rollout: Program
    update: Program


def build(graphdef: Any, settings: Settings, on: str, mesh: jax.sharding.Mesh | None = None) -> Phases:
    """Returns the phases for one model structure; nothing is compiled before the first call.

    Args:
      graphdef: structure of the network.
      settings: settings that the phases are compiled for.
      on: value of `config.ldistill.on`.
      mesh: mesh over which the train state is split as `parallel.sharding.shardings` says; None on one device.
    """

    def sample(*arrays: Any) -> Rollout:
        by_reference = on == "default"
        return placed_results(
            sample_responses(graphdef, settings, *arrays, anchored=True, by_reference=by_reference), mesh
        )

    def learn(*arrays: Any, columns: int | None = None) -> tuple[TrainState, dict[str, Any]]:
        return _update(graphdef, settings, mesh, *arrays, columns=columns)

    cache_key = (graphdef, settings, on, mesh)
    return Phases(Program(sample, cache_key=cache_key), Program(learn, cache_key=cache_key, donate=1, static="columns"))


def ldistill_loss(
    graphdef: Any, settings: Settings, params: Any, trainable: dict[str, Any], rows: DistillBatch
) -> tuple[Float[Array, ""], dict[str, Array]]:
    """Returns the loss of step 7, the mean KL(pi_ref at the default exit || pi at the row's exit) per token in nats.

    The second result is a dict of statistics with the mean entropy of the policy.
    """
    temperature = settings.sampling.temperature
    scored = evaluate_policy(
        graphdef, settings, params, trainable, rows, temperature=temperature, anchor_hidden=rows.anchor_hidden
    )
    assert scored.anchor_kl is not None
    loss = masked_mean(scored.anchor_kl, rows.mask)
    return loss, {"entropy": masked_mean(scored.entropy, rows.mask)}


def _update(
    graphdef: Any, settings: Settings, mesh: jax.sharding.Mesh | None, params: Any, state: TrainState,
    rollout: Rollout, run_key: Array, failures: Array | None = None, *, columns: int | None = None,
) -> tuple[TrainState, dict[str, Any]]:  # fmt: skip
    """Runs steps 6 and 7: computes the target for the answers, then updates the policy as L-PPO does.

    Returns:
      (train state after the iteration, metrics).
    """
    rollout = cut_columns(rollout, columns)
    check_divides(settings, rollout.mask.shape[0])

    # 6. The reference's hidden states at the default exit, computed in as many slices as an update has.
    slices = row_slices(rollout, settings.minibatches * settings.accumulation)
    anchor_hidden = joined_slices(jax.lax.map(functools.partial(_target_slice, graphdef, params), slices))
    batch = DistillBatch(
        prompts=rollout.prompts,
        prompt_mask=rollout.prompt_mask,
        visual=rollout.visual,
        responses=rollout.tokens,
        mask=rollout.mask,
        anchor_hidden=anchor_hidden,
    )

    # 7. K epochs of mini-batches; the exit schedule sees which forbidden requests were not refused.
    controls = observe_failures(settings, state.controls, nnx.merge(graphdef, params), rollout.exits, failures)
    state = state._replace(controls=controls)
    new_state, outcome = run_epochs(
        lambda trainable, rows: ldistill_loss(graphdef, settings, params, trainable, rows),
        settings,
        mesh,
        state,
        batch,
        run_key,
    )
    metrics = {"policy/entropy_avg": outcome.stats["entropy"], "loss/anchor_avg": outcome.stats["loss"]}
    return new_state, metrics | step_metrics(state, outcome, settings.optimizer)


def _target_slice(graphdef: Any, params: Any, rows: Rollout) -> Float[Array, "B A E"]:
    """Returns the reference's final hidden states at the default exit for some rows."""
    frozen = nnx.merge(graphdef, params)
    return response_hidden(frozen, None, rows.prompts, rows.prompt_mask, rows.tokens, rows.mask, rows.anchor_visual)


class Ldistill(Algorithm):
    """Runs L-Distill on the host; the module's docstring has its steps."""

    def __init__(self, config: "ConfigDict", vlm: "VLM", reward: "RewardByKind"):
        """See `Algorithm`."""
        super().__init__(config, vlm, reward)
        self._on = config.ldistill.on
        self._phases = build(vlm.graphdef, self.settings, self._on, vlm.mesh)

    def lowered(self, state: TrainState, batch: "PromptBatch") -> Iterator[tuple[str, Any]]:
        """See `Algorithm`."""
        params, key, mesh = self._vlm.params, self._run_key, self._vlm.mesh
        exits = self._exits.eval_shape(key, state.iteration, state.controls.exits)
        arguments = (params, state, batch.images, batch.tokens, batch.mask, exits, key)
        rollout = abstract_results(self._phases.rollout.eval_shape(*arguments), mesh)
        failures = None if state.controls.exits is None else np.zeros(batch.tokens.shape[0], np.float32)
        for columns in response_widths(batch.tokens.shape[1], self.settings.sampling.max_new_tokens):
            program = self._phases.update.lower(params, state, rollout, key, failures, columns=columns)
            yield program_name("update", columns), program
        yield "rollout", self._phases.rollout.lower(*arguments)

    def begin(self, state: TrainState, batch: "PromptBatch") -> Rollout:
        """Starts steps 2 to 5, which need nothing from the host, and does not wait for them."""
        return self._start_rollout(self._phases.rollout, state, batch)

    def finish(self, state: TrainState, batch: "PromptBatch", rollout: Any) -> tuple[TrainState, ReadMetrics]:
        """Runs steps 6 to 8; see `Algorithm`."""
        with during("rollout"):  # an error on the device is raised when its results are fetched
            tokens, mask, prompt_mask = fetch((rollout.tokens, rollout.mask, batch.mask))
        seconds = {"rollout": self._watch.lap()}
        columns = response_columns(prompt_mask.shape[1], mask.shape[1], int(mask.sum(axis=1).max()))

        def failures() -> np.ndarray:
            """Returns which forbidden requests were not refused, see `exits.Schedule.observe`."""
            return not_refused(batch.examples, self._vlm.processor.decode(tokens, mask))

        # The texts are made while the device updates, unless the exit schedule learns from them.
        observed = None if state.controls.exits is None else failures()
        with during("update"):
            state, metrics = self._phases.update(
                self._vlm.params, state, rollout, self._run_key, observed, columns=columns
            )
        asr: Metrics = {}
        if self._on == "policy":  # answers of the model before training say nothing about the policy
            asr = keyword_asr(failures() if observed is None else observed)
        answers = mask.sum(axis=1)
        operations = self._counter.count(prompt_mask.sum(axis=1), answers, images_per_row(batch), passes=1)

        @during("update")
        def read() -> Metrics:
            row = host_metrics(metrics) | {"val/response_length": float(np.mean(answers[answers > 0]))} | asr
            return row | speeds(
                operations, seconds | {"update": self._watch.lap()}, self._counter.evaluated(row), self.peak
            )

        return state, read

    @classmethod
    def planned(cls, run: "AbstractRun", get_program: Callable[[PlannedPhase], Any]) -> Iterator[PlannedPhase]:
        """See `Algorithm`."""
        vlm, settings, state = run.vlm, run.settings, run.state
        batch = run.config.data.batch_size
        check_divides(settings, batch)
        phases: Any = build(vlm.graphdef, settings, run.config.ldistill.on, run.devices)
        images, (tokens, mask) = run.images(batch), run.prompts(batch)
        reference = run.replaced_weights()
        arguments = (vlm.params, state, images, tokens, mask, run.exits(batch), run.key)
        rollout = PlannedPhase(
            "rollout", (images, tokens, mask), run.cache(batch, settings.sampling.max_new_tokens),
            lambda: phases.rollout.jitted.lower(*arguments), [reference, state.opt_state],
        )  # fmt: skip
        yield rollout
        sampled = run.outputs(rollout, get_program, batch, phases.rollout, *arguments)
        yield PlannedPhase(
            "update", sampled, None, lambda: phases.update.jitted.lower(vlm.params, state, sampled, run.key),
            run.weights(policy=False),
        )  # fmt: skip

    @classmethod
    def work(cls, run: "AbstractRun") -> Mapping[str, PhaseWork]:
        """See `Algorithm`."""
        policy, _ = run.forward_flops()
        update = run.update_work()
        target = run.config.data.batch_size * policy
        return {
            "rollout": run.rollout_work(),
            "update": PhaseWork(target + update.flops, run.slices + update.reads),
        }


ALGORITHM = Ldistill
