"""What L-PPO and L-RLOO share, the algorithms that sample responses and learn from the responses' scores.

An iteration has three compiled phases: `rollout`, `prepare` and `update`. The algorithm's own file contains the last
steps of `prepare` (from scores to advantages) and the loss of `update`. `build_phases` builds the phases from these
two, and `Rewarded` runs them on the host.
"""

import dataclasses
import functools
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from icet_jax.algorithms import losses
from icet_jax.algorithms.base import Algorithm, Metrics, PhaseWork, PlannedPhase, ReadMetrics, images_per_row
from icet_jax.algorithms.metrics import host_metrics, policy_metrics, step_metrics
from icet_jax.algorithms.phases import (
    Rollout,
    abstract_results,
    check_divides,
    placed_results,
    program_name,
    response_columns,
    response_widths,
    run_epochs,
    sample_responses,
)
from icet_jax.algorithms.reward_by_kind import keyword_asr, kind_numbers, not_refused, scores_by_kind
from icet_jax.algorithms.rollouts import RowRewards
from icet_jax.algorithms.settings import Settings
from icet_jax.algorithms.state import TrainState
from icet_jax.algorithms.utilisation import speeds
from icet_jax.errors import during
from icet_jax.parallel.distributed import fetch
from icet_jax.parallel.programs import Program
from icet_jax.typing import Array

if TYPE_CHECKING:
    from ml_collections import ConfigDict

    from icet_jax.algorithms.reward_by_kind import RewardByKind
    from icet_jax.evaluation.batching import PromptBatch
    from icet_jax.planning.ahead import AbstractRun
    from icet_jax.vlm import VLM


@dataclasses.dataclass(frozen=True)
class Phases:
    """Holds the compiled phases of an iteration; `build_phases` builds them.

    Attributes:
      rollout: function of (params, state, images, tokens, mask, exits, run_key) that returns a `Rollout`.
      prepare_arrays: the jitted part of `prepare`.
      update: function of (params, state, batch, run_key) that returns (state, metrics) and donates the state.
      mesh: mesh of the arrays; None on one device.
      max_new_tokens: number of columns of the responses.
      group_size: number of responses to each prompt.
    """

    rollout: Program
    prepare_arrays: Program
    update: Program
    mesh: jax.sharding.Mesh | None
    max_new_tokens: int
    group_size: int

    def prepare(
        self, params: Any, state: TrainState, rollout: Rollout, scores: Any, learned: Any, longest: int | None = None,
        rewarded: Any = None, failures: Any = None, kinds: Any = None,
    ) -> tuple[TrainState, Any, dict[str, Any]]:  # fmt: skip
        """Computes the batch of the update from a rollout and its scores.

        Args:
          params: parameters of the model before training.
          state: the train state.
          rollout: the sampled responses.
          scores, learned, rewarded, failures, kinds: see `RowRewards`. None as `rewarded` means that all rows are
            rewarded, None as `kinds` that all rows are of the first kind.
          longest: length of the longest response. Columns beyond it are padding in every row and can be left out; None
            keeps all columns.

        Returns:
          (train state with the controls of the next rollout, batch of the update, metrics).
        """
        scores = np.asarray(scores, np.float32)
        rows = RowRewards(
            scores,
            np.asarray(learned, bool),
            np.ones(scores.shape, bool) if rewarded is None else np.asarray(rewarded, bool),
            np.zeros(scores.shape, np.int32) if kinds is None else np.asarray(kinds, np.int32),
            failures,
        )
        width, length = rollout.prompts.shape[1], rollout.mask.shape[1]
        columns = response_columns(width, length, length if longest is None else longest)
        arguments = (params, state.trainable, state.controls, rollout, rows)
        batch, controls, metrics = self.prepare_arrays(*arguments, columns=columns)
        return state._replace(controls=controls), batch, metrics

    def lowered(
        self, params: Any, state: TrainState, images: Any, tokens: Any, mask: Any, exits: Any, key: Any
    ) -> Iterator[tuple[str, Any]]:
        """Yields (name, program) of all phases; the phase that takes longest to compile comes first.

        The arguments are those of `rollout`. The shardings of a phase's results are fixed, so that the programs can be
        compiled for these shapes in any order.
        """
        arguments = (params, state, images, tokens, mask, exits, key)
        sampled = abstract_results(self.rollout.eval_shape(*arguments), self.mesh)
        rows = _row_shapes(tokens.shape[0] * self.group_size, observed=state.controls.exits is not None)
        prepared = (params, state.trainable, state.controls, sampled, rows)
        widths = response_widths(tokens.shape[1], self.max_new_tokens)
        for columns in widths:
            batch, controls, _ = abstract_results(self.prepare_arrays.eval_shape(*prepared, columns=columns), self.mesh)
            next_state = state._replace(controls=controls)
            yield program_name("update", columns), self.update.lower(params, next_state, batch, key)
        yield "rollout", self.rollout.lower(*arguments)
        for columns in widths:
            yield program_name("prepare", columns), self.prepare_arrays.lower(*prepared, columns=columns)


def build_phases(
    graphdef: Any, settings: Settings, mesh: jax.sharding.Mesh | None, prepare_rows: Callable[..., Any],
    loss: Callable[..., tuple[Array, losses.Stats]], *, cache_key: Sequence[Any], group_size: int = 1,
) -> Phases:  # fmt: skip
    """Returns the phases for one model structure and one `Settings`; nothing is compiled before the first call.

    With a `mesh`, the train state is split over it as `parallel.sharding.shardings` says.

    Args:
      graphdef: structure of the network.
      settings: settings that the phases are compiled for.
      mesh: mesh of the arrays; None on one device.
      prepare_rows: function of (params, trainable, controls, rollout, `RowRewards`, columns=) that returns (batch of
        the update, controls of the next rollout, metrics).
      loss: function of (params, trainable, rows of the batch) that returns (loss, statistics), see
        `updates.LossFunction`.
      cache_key: name of the algorithm, and the values that `prepare_rows` and `loss` depend on beside graphdef,
        settings and mesh (see `parallel.programs.Program`).
      group_size: number of responses to each prompt.
    """

    def sample(*arrays: Any) -> Rollout:
        sampled = sample_responses(
            graphdef, settings, *arrays, anchored=settings.anchor_coef > 0, group_size=group_size
        )
        return placed_results(sampled, mesh)

    def prepare_columns(*arrays: Any, columns: int | None = None) -> Any:
        return placed_results(prepare_rows(*arrays, columns=columns), mesh)

    def learn(params: Any, state: TrainState, batch: Any, run_key: Array) -> tuple[TrainState, dict[str, Any]]:
        """Updates the policy for all epochs on one rollout; returns (state after the iteration, metrics)."""
        guards = dict(target_kl=settings.target_kl, max_ratio=settings.max_ratio)
        loss_of_trainable = functools.partial(loss, params)
        new_state, outcome = run_epochs(loss_of_trainable, settings, mesh, state, batch, run_key, **guards)
        return new_state, policy_metrics(outcome) | step_metrics(state, outcome, settings.optimizer)

    everything = (graphdef, settings, mesh, group_size, *cache_key)
    return Phases(
        rollout=Program(sample, cache_key=everything),
        prepare_arrays=Program(prepare_columns, cache_key=everything, static="columns"),
        update=Program(learn, cache_key=everything, donate=1),
        mesh=mesh,
        max_new_tokens=settings.sampling.max_new_tokens,
        group_size=group_size,
    )


def _row_shapes(rows: int, *, observed: bool) -> RowRewards:
    """Returns a template (shapes and dtypes only) of the arrays that the host passes to `prepare` for `rows` rows.

    With `observed`, it includes the rows' failures (`RowRewards.failures`), from which the exit schedule learns.
    """
    floats, flags = np.zeros(rows, np.float32), np.zeros(rows, bool)
    return RowRewards(floats, flags, flags, np.zeros(rows, np.int32), floats if observed else None)


class Rewarded(Algorithm):
    """Runs the iterations of an algorithm with scored responses on the host; the base class of L-PPO and L-RLOO."""

    bounded = True

    def __init__(self, config: "ConfigDict", vlm: "VLM", reward: "RewardByKind"):
        """See `Algorithm`."""
        super().__init__(config, vlm, reward)
        self._reward = reward
        self._phases = self.phases(config, vlm.graphdef, self.settings, vlm.mesh)

    @classmethod
    @abstractmethod
    def phases(
        cls, config: "ConfigDict", graphdef: Any, settings: Settings, mesh: jax.sharding.Mesh | None
    ) -> Phases:  # fmt: skip
        """Returns the algorithm's compiled phases, from `build_phases`."""

    def lowered(self, state: TrainState, batch: "PromptBatch") -> Iterator[tuple[str, Any]]:
        """See `Algorithm`."""
        exits = self._exits.eval_shape(self._run_key, state.iteration, state.controls.exits)
        inputs = (batch.images, batch.tokens, batch.mask, exits, self._run_key)
        yield from self._phases.lowered(self._vlm.params, state, *inputs)
        yield from self._reward.lowered(batch.tokens.shape[1] + self.settings.sampling.max_new_tokens)

    def begin(self, state: TrainState, batch: "PromptBatch") -> Rollout:
        """Starts to draw the exits and to sample the responses, and does not wait for them."""
        return self._start_rollout(self._phases.rollout, state, batch)

    def finish(self, state: TrainState, batch: "PromptBatch", rollout: Any) -> tuple[TrainState, ReadMetrics]:
        """Scores the responses and starts the updates; see `Algorithm`."""
        params = self._vlm.params
        with during("rollout"):  # an error on the device is raised when its results are fetched
            tokens, mask, prompt_mask, exits = fetch((rollout.tokens, rollout.mask, batch.mask, rollout.exits))
        seconds = {"rollout": self._watch.lap()}

        # The responses as words, and their scores r(x, y).
        examples = [example for example in batch.examples for _ in range(self.group_size)]
        texts = self._vlm.processor.decode(tokens, mask)
        with during("judging"):
            scores, learned = self._reward(examples, texts)
        seconds["score"] = self._watch.lap()
        longest = int(mask.sum(axis=1).max())
        rewarded = self._reward.rewarded(examples)
        failures = not_refused(examples, texts)

        # Log-probs, rewards and advantages; then K epochs of updates.
        with during("update"):
            observed = None if state.controls.exits is None else failures
            prepared = self._phases.prepare(
                params, state, rollout, scores, learned, longest, rewarded, observed, kind_numbers(examples)
            )
            state, train_batch, before = prepared
            state, after = self._phases.update(params, state, train_batch, self._run_key)

        # Metrics, which are read after the update has ended.
        by_kind = scores_by_kind(examples, scores, rewarded & mask.any(axis=1), exits)
        lengths = np.repeat(prompt_mask.sum(axis=1), self.group_size), mask.sum(axis=1)
        images = np.repeat(images_per_row(batch), self.group_size)
        operations = self._counter.count(*lengths, images, passes=_passes(self.settings), group_size=self.group_size)

        @during("update")
        def read() -> Metrics:
            row = host_metrics(before, after) | by_kind | keyword_asr(failures)
            return row | speeds(
                operations, seconds | {"update": self._watch.lap()}, self._counter.evaluated(row), self.peak
            )

        return state, read

    @classmethod
    def planned(cls, run: "AbstractRun", get_program: Callable[[PlannedPhase], Any]) -> Iterator[PlannedPhase]:
        """See `Algorithm`."""
        vlm, config, settings, state = run.vlm, run.config, run.settings, run.state
        batch = config.data.batch_size
        check_divides(settings, batch)
        phases: Any = cls.phases(config, vlm.graphdef, settings, run.devices)
        prompts = batch // run.group_size
        images, (tokens, mask), exits, key = run.images(prompts), run.prompts(prompts), run.exits(prompts), run.key
        # Under full fine-tuning the policy has separate weights, and only `prepare` uses those of the reference.
        encoder = run.weights(policy=False)
        reference = run.replaced_weights()
        arguments = (vlm.params, state, images, tokens, mask, exits, key)
        rollout = PlannedPhase(
            "rollout", (images, tokens, mask), run.cache(batch, settings.sampling.max_new_tokens),
            lambda: phases.rollout.jitted.lower(*arguments), [reference, state.opt_state],
        )  # fmt: skip
        yield rollout
        sampled = run.outputs(rollout, get_program, batch, phases.rollout, *arguments)
        rows = _row_shapes(batch, observed=state.controls.exits is not None)
        evaluated = (vlm.params, state.trainable, state.controls, sampled, rows)
        prepare = PlannedPhase(
            "prepare", sampled, None, lambda: phases.prepare_arrays.jitted.lower(*evaluated), [encoder, state.opt_state]
        )  # fmt: skip
        yield prepare
        train_batch = run.outputs(prepare, get_program, batch, phases.prepare_arrays, *evaluated, first=True)
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
        passes = _passes(run.settings)
        return {
            "rollout": run.rollout_work(),
            # Only the pass of the policy has adapters.
            "prepare": PhaseWork(flops=batch * (passes * policy + adapters), reads=passes * run.slices),
            "update": run.update_work(),
        }


def _passes(settings: Settings) -> int:
    """Returns how often `prepare` evaluates every row: by the policy, by the reference and, if used, for the anchor."""
    return 2 + (settings.anchor_coef > 0)
