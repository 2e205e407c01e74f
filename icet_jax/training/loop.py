"""The training loop: batch, algorithm's iteration, log, checkpoint; it continues from the newest checkpoint."""

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from icet_jax.algorithms.base import Algorithm, Metrics, ReadMetrics, algorithm_class
from icet_jax.algorithms.forward import replaced_roots, with_policy
from icet_jax.algorithms.phases import exit_schedule
from icet_jax.algorithms.reward_by_kind import RewardByKind
from icet_jax.algorithms.settings import Settings, from_config
from icet_jax.algorithms.state import TrainState, init_state
from icet_jax.checkpoints.run_state import RunState
from icet_jax.data.batches import Batches
from icet_jax.data.records import Example
from icet_jax.errors import StopRun, UserError
from icet_jax.evaluation.batching import PromptBatch, prompt_batch
from icet_jax.files import JsonObject, write_text_atomic
from icet_jax.nn.protocols import init_lora
from icet_jax.parallel.compilations import compile_programs
from icet_jax.parallel.programs import Program
from icet_jax.parallel.sharding import placed, replicated, shardings
from icet_jax.training.metrics_log import MetricsLog
from icet_jax.training.progress import Progress
from icet_jax.training.signals import delay_signals
from icet_jax.training.stability import Stability, learning_rate_scale, limits_kl
from icet_jax.typing import PyTree
from icet_jax.vlm import VLM

# Metrics beside the progress bar, under short names, if the algorithm reports them.
_PROGRESS_METRICS = {
    "kl": "objective/kl",
    "reward": "objective/scores",
    "asr": "objective/asr_refusal_keywords",
    "loss": "loss/total_avg",
}
# Folded into the run's random key to initialise adapters. Iterations fold in their number, which never gets that large.
_INIT_STREAM = 2**32 - 3

FirstPolicy = Callable[[], dict[str, PyTree]]
"""Function that returns the trained parts that training starts from: those of `TrainState.trainable` without the value
head."""


class Trainer:
    """Trains a model in one run directory."""

    def __init__(
        self, config: ConfigDict, workdir: Path, vlm: VLM, examples: Sequence[Example], reward: RewardByKind,
        first_policy: FirstPolicy | None = None,
    ) -> None:  # fmt: skip
        """Prepares the algorithm and the first batch, so that errors in the rows are found before any training.

        Args:
          config: checked config of the run.
          workdir: the run directory of this config.
          vlm: the model before training; its weights are not changed.
          examples: the training rows.
          reward: scores responses; unused by algorithms without rewards.
          first_policy: gives the policy to start from; it is called only where there is no checkpoint to restore. None
            starts from `vlm`, which is the reference in both cases.

        Raises:
          UserError: `config.data.mixture` names a kind without rows, a prompt is too long, or an image is broken.
        """
        self._config, self._workdir, self._vlm, self._first_policy = config, workdir, vlm, first_policy
        self.algorithm: Algorithm = algorithm_class(config.algorithm)(config, vlm, reward)
        prompts = config.data.batch_size // self.algorithm.group_size
        mixture = config.data.mixture.to_dict()
        self._batches = Batches(examples, mixture=mixture, batch_size=prompts, seed=config.seed)
        self._images_per_row = max(len(example.images) for example in examples)
        self._first = self.batch(0)

    def batch(self, index: int) -> PromptBatch:
        """Returns batch `index` of the run as arrays of a fixed shape; the batch depends only on (seed, index)."""
        return self._arrays(self._batches.batch(index))

    def _arrays(self, rows: list[Example]) -> PromptBatch:
        """Returns rows as arrays: tokenised, padded to the same length, and with decoded images."""
        return prompt_batch(
            self._vlm, rows, len(rows), self._images_per_row, length=self._config.data.max_prompt_tokens
        )

    def _batches_from(self, start: int, total: int) -> Iterator[PromptBatch]:
        """Yields batches `start` to `total - 1`; threads prepare the next ones in the meantime."""
        if start == 0:
            yield self._first
        yield from self._batches.load(self._arrays, max(start, 1), total)

    def run(self) -> TrainState:
        """Trains from the newest complete checkpoint of the run directory to the last iteration.

        Rows, exits, sampled tokens and permutations depend on (seed, iteration) alone. So a run that was killed and
        started again ends with the same bits as one that was never killed.

        Returns:
          The last state, or that of the best checkpoint if `config.checkpoint.best` names a metric.

        Raises:
          UserError: training is unstable (the last good checkpoint stays), or the directory cannot be written to.
          StopRun: a signal asked the run to stop; the iterations so far are saved.
        """
        config, algorithm = self._config, self.algorithm
        checkpoints = open_checkpoints(config, self._workdir)
        try:
            state, metadata = self._start(checkpoints)
            completed, stability = int(state.iteration), Stability(config, metadata.get("skipped", {}))
            if completed < algorithm.iterations:
                self._write_device()
                if completed:
                    print(f"{config.algorithm}: goes on after iteration {completed}", file=sys.stderr)
                log = MetricsLog(self._workdir, config, step=completed)
                try:
                    state = self._iterate(state, checkpoints, log, stability)
                finally:
                    log.close()
                checkpoints.wait()
            if must_measure_last(config, checkpoints):
                state = self._measure_last(state, checkpoints, stability)
            return state if config.checkpoint.best is None else best_state(state, checkpoints)
        finally:
            checkpoints.close()

    def policy(self, state: TrainState) -> VLM:
        """Returns the model with the trained weights of `state`: its adapters, its whole decoder, its projector."""
        params_and_lora = with_policy(self._vlm.params, state.trainable, self.algorithm.settings.lora_scale)
        return self._vlm.with_weights(*params_and_lora)

    def _start(self, checkpoints: RunState) -> tuple[TrainState, JsonObject]:
        """Returns `newest_state(...)`. If iterations remain, their programs are compiled while the state is loaded."""
        arguments = (self._config, self._vlm, self.algorithm.settings)
        is_finished = max(checkpoints.steps, default=0) >= self.algorithm.iterations
        if is_finished and not must_measure_last(self._config, checkpoints):
            return newest_state(*arguments, checkpoints, self._first_policy)
        value_head = has_value_head(self._config, checkpoints)
        programs = self.algorithm.lowered(abstract_state(*arguments, value_head), self._first)
        return compile_programs(programs, lambda: newest_state(*arguments, checkpoints, self._first_policy))

    def _write_device(self) -> None:
        """Writes device.json and prints it: the devices, and their peak speed, by which `perf/mfu` divides."""
        peak = self.algorithm.peak
        write_text_atomic(self._workdir / "device.json", json.dumps(peak._asdict(), indent=1) + "\n")
        print(f"devices: {peak}", file=sys.stderr)

    def _iterate(
        self, state: TrainState, checkpoints: RunState, log: MetricsLog, stability: Stability
    ) -> TrainState:  # fmt: skip
        """Runs every iteration that `state` has not had yet, and returns the last state.

        The metrics of an iteration are read after the next iteration has begun, so that the device does not wait. If
        they show that the run must go back, that next iteration is begun again from another state.
        """
        config, start, total = self._config, int(state.iteration), self.algorithm.iterations
        with Progress(config.algorithm, total, start=start) as progress:
            read_metrics: ReadMetrics | None = None
            completed = start
            with delay_signals() as stop_request:
                for batch in self._batches_from(start, total):
                    if stop_request.received():
                        break
                    begun = self.algorithm.begin(state, batch)
                    if read_metrics is not None:
                        metrics = self._process_metrics(completed, read_metrics(), log, stability, progress)
                        next_state = self._save_or_go_back(completed, state, metrics, checkpoints, stability)
                        if next_state is not state:
                            state, begun = next_state, self.algorithm.begin(next_state, batch)
                    state, read_metrics = self.algorithm.finish(state, batch, begun)
                    completed += 1
                stop = stop_request.received()
                if read_metrics is not None:
                    metrics = self._process_metrics(completed, read_metrics(), log, stability, progress)
                    state = self._save_or_go_back(completed, state, metrics, checkpoints, stability, save_now=stop)
                if stop:
                    checkpoints.wait()
                    stopped = f"{stop_request.reason}: iteration {completed} is saved"
                    raise StopRun(f"{stopped}; the same command goes on from there")
        return state

    def _process_metrics(
        self, iteration: int, metrics: Metrics, log: MetricsLog, stability: Stability, progress: Progress
    ) -> Metrics:  # fmt: skip
        """Checks, logs and shows the metrics of an iteration.

        Returns the metrics with the counts of unstable iterations added.

        Raises:
          UserError: see `Stability.check`.
        """
        stability.check(metrics, iteration)
        if iteration == self.algorithm.iterations or iteration % self._config.log.every == 0:
            log.write(iteration, metrics)
        shown = {name: metrics[metric] for name, metric in _PROGRESS_METRICS.items() if metric in metrics}
        progress.advance(shown)
        return metrics

    def _save_or_go_back(
        self, iteration: int, state: TrainState, metrics: Metrics, checkpoints: RunState, stability: Stability, *,
        save_now: bool = False,
    ) -> TrainState:  # fmt: skip
        """Saves a checkpoint if one is due or `save_now`; returns the state to continue with.

        The rollout of an iteration is sampled before the iteration's update. Its `metrics` therefore measure the state
        after the previous iteration. If that state exceeds the limit of the KL, the run goes back to an earlier state,
        which is then saved as the state of this iteration.

        Raises:
          UserError: the run went back, and the config says that it then ends. The state it went back to is saved.
        """
        if stability.rollback_reason is None:
            self._record_quality(iteration - 1, metrics, checkpoints)
        else:
            state = self._go_back(iteration, state, checkpoints, stability)
        error = stability.error_after_rollback(iteration)
        if self._is_regular_save(iteration) or save_now or error is not None:
            checkpoints.save(iteration, stored(state), {"skipped": stability.counts})
        if error is not None:
            checkpoints.wait()
            raise error
        return state

    def _is_regular_save(self, step: int) -> bool:
        """Returns whether the config demands a checkpoint of this step.

        Other checkpoints are saved because of a signal. They can be neither the best one nor one to go back to, because
        the result of a run must not depend on signals.
        """
        return step == self.algorithm.iterations or (step > 0 and step % self._config.checkpoint.every == 0)

    def _record_quality(self, step: int, metrics: Metrics, checkpoints: RunState) -> None:
        """Records the value of the metric `config.checkpoint.best` for the checkpoint of `step`.

        Nothing is recorded for a checkpoint that is not a regular save. `metrics` are those of the rollout that was
        sampled by the policy of that checkpoint.
        """
        settings, value = self._config.checkpoint, None
        if not self._is_regular_save(step) or not (settings.best is not None or limits_kl(self._config)):
            return
        if settings.best in metrics:
            value = metrics[settings.best] if settings.best_is == "highest" else -metrics[settings.best]
        elif settings.best is not None and metrics.get("train/updates") != 0:
            known = ", ".join(sorted(metrics))
            raise UserError(f"config.checkpoint.best={settings.best}: this run has no such metric, but {known}")
        checkpoints.measure(step, value)

    def _go_back(self, step: int, state: TrainState, checkpoints: RunState, stability: Stability) -> TrainState:
        """Goes back to the newest checkpoint within the limit of the KL, or else to the initial state.

        Later checkpoints are deleted. Returns that state as the state of iteration `step`, with a lower learning rate
        than before.
        """
        restored = checkpoints.go_back(like=stored(state))
        if restored is None:
            value_head = "value_head" in state.trainable
            first = first_state(self._config, self._vlm, self.algorithm.settings, value_head, self._first_policy)
            restored = 0, first, {}
        restored_step, restored_state, _ = restored
        scale = learning_rate_scale(stability.counts)
        print(
            f"iteration {step}: {stability.rollback_reason}: back to the state of iteration {restored_step}, at "
            f"{scale:.3g} of config.optimizer.learning_rate",
            file=sys.stderr,
        )
        return _scale_learning_rate(
            restored_state._replace(iteration=_scalar(step, "int32", self._vlm)), scale, self._vlm
        )

    def _measure_last(self, state: TrainState, checkpoints: RunState, stability: Stability) -> TrainState:
        """Measures the last state by the rollout of one more iteration, whose update is dropped.

        `state` is donated.

        Returns:
          The last state or, if it exceeds the limit of the KL, the state that the run went back to.

        Raises:
          UserError: the run went back, and the config says that it then ends.
        """
        last = self.algorithm.iterations
        print(f"{self._config.algorithm}: one more iteration measures the last state, and is dropped", file=sys.stderr)
        batch = self.batch(last)
        updated_state, read_metrics = self.algorithm.finish(state, batch, self.algorithm.begin(state, batch))
        metrics = read_metrics()
        if not (limits_kl(self._config) and metrics.get("train/unstable")):
            self._record_quality(last, metrics, checkpoints)
            restored = checkpoints.restore(like=stored(updated_state))
            return updated_state if restored is None else restored[1]
        stability.check(metrics, last)
        state = self._go_back(last, updated_state, checkpoints, stability)
        value = checkpoints.measured.get(max(checkpoints.measured, default=0))
        error = stability.error_after_rollback(last)
        checkpoints.save(last, stored(state), {"skipped": stability.counts})
        checkpoints.wait()
        checkpoints.measure(last, value)
        if error is not None:
            raise error
        return state


def open_checkpoints(config: ConfigDict, workdir: Path) -> RunState:
    """Opens the training checkpoints of the run in `workdir`; which ones are kept follows from the config."""
    settings = config.checkpoint
    return RunState(
        workdir / "checkpoints",
        keep=settings.keep,
        keep_best=settings.best is not None,
        keep_measured=limits_kl(config),
    )


def has_value_head(config: ConfigDict, checkpoints: RunState) -> bool:
    """Returns whether the run's train states have a value head: whether its algorithm or its checkpoints have one.

    Checkpoints of L-SFT that earlier versions wrote have a value head, which stays zero.
    """
    of_algorithm = algorithm_class(config.algorithm).value_head
    return of_algorithm or any("value_head" in name for name in checkpoints.array_names())


def must_measure_last(config: ConfigDict, checkpoints: RunState) -> bool:
    """Returns whether the last state is saved but not measured yet, although the config needs its measurement."""
    needs_measurement = config.checkpoint.best is not None or limits_kl(config)
    last = config[config.algorithm].iterations
    return needs_measurement and last in checkpoints.steps and last not in checkpoints.measured


def best_state(state: TrainState, checkpoints: RunState) -> TrainState:
    """Returns the state of the best checkpoint, of the newest one if none was measured, or `state` without checkpoints.

    `state` also gives the structure, shapes and shardings of what is restored.
    """
    best_step = checkpoints.best
    restored = checkpoints.restore(like=stored(state), best=True)
    if restored is None:
        return state
    step, restored_state, _ = restored
    what = "best checkpoint" if step == best_step else "no checkpoint was measured, the newest is taken"
    print(f"{what}: iteration {step}", file=sys.stderr)
    return restored_state


def stored(state: TrainState) -> TrainState:
    """Returns the part of a state that checkpoints contain, which is everything except the learning-rate scale.

    The scale is computed from the number of rollbacks in the checkpoint's metadata.
    """
    return state._replace(controls=state.controls._replace(learning_rate_scale=None))


def newest_state(
    config: ConfigDict, vlm: VLM, settings: Settings, checkpoints: RunState, first_policy: FirstPolicy | None = None
) -> tuple[TrainState, JsonObject]:
    """Returns state and metadata of the newest complete checkpoint; without one, `first_state(...)` and {}.

    Raises:
      UserError: the checkpoint belongs to another config, or all checkpoints are damaged.
    """
    value_head = has_value_head(config, checkpoints)
    restored = checkpoints.restore(like=stored(initial_state(config, vlm, settings, value_head)))
    if restored is None:
        return first_state(config, vlm, settings, value_head, first_policy), {}
    _, restored_state, metadata = restored
    if limits_kl(config):
        restored_state = _scale_learning_rate(restored_state, learning_rate_scale(metadata.get("skipped", {})), vlm)
    return restored_state, metadata


def last_policy(config: ConfigDict, workdir: Path, vlm: VLM) -> dict[str, PyTree]:
    """Returns what the training in `workdir` ended with (see `FirstPolicy`), part of the result of `Trainer.run`.

    Args:
      config: config of that training.
      workdir: its run directory.
      vlm: the model before that training.

    Raises:
      UserError: it has not ended, or the checkpoint of its last iteration is damaged.
    """
    settings = from_config(config, vlm.sampling(config.lppo.max_new_tokens, config.lppo.temperature))
    checkpoints = open_checkpoints(config, workdir)
    try:
        state, _ = newest_state(config, vlm, settings, checkpoints)
        last = config[config.algorithm].iterations
        if int(state.iteration) < last or must_measure_last(config, checkpoints):
            raise UserError(
                f"{workdir}: its training has not ended (iteration {int(state.iteration)} of {last}); start it again"
            )
        trainable = (state if config.checkpoint.best is None else best_state(state, checkpoints)).trainable
        return {part: trainable[part] for part in settings.trained}
    finally:
        checkpoints.close()


def _scale_learning_rate(state: TrainState, scale: float, vlm: VLM) -> TrainState:
    """Returns the state with its learning rate multiplied by `scale` from now on."""
    controls = state.controls._replace(learning_rate_scale=_scalar(scale, "float32", vlm))
    return state._replace(controls=controls)


def _scalar(value: int | float, dtype: str, vlm: VLM) -> jax.Array:
    """Returns a number as an array on every device of the model."""
    array = np.asarray(value, dtype)
    return jnp.asarray(array) if vlm.mesh is None else jax.device_put(array, replicated(vlm.mesh))


def first_state(
    config: ConfigDict, vlm: VLM, settings: Settings, value_head: bool, first_policy: FirstPolicy | None
) -> TrainState:  # fmt: skip
    """Returns the train state that a run without checkpoints starts from: `initial_state(...)`, with the parts of
    `first_policy` in place of the model's if that is given."""
    parts = {} if first_policy is None else first_policy()  # first, because reading it takes memory for a state
    state = initial_state(config, vlm, settings, value_head)
    return state._replace(trainable={**state.trainable, **parts}) if parts else state


def initial_state(
    config: ConfigDict, vlm: VLM, settings: Settings, value_head: bool | None = None
) -> TrainState:  # fmt: skip
    """Returns the train state before the first iteration.

    Its trainable weights are new LoRA adapters or, with `config.lora.rank` 0, a float32 copy of the decoder's weights;
    if L-SFT trains the projector, a float32 copy of that too or alone.

    Args:
      config: config of the run.
      vlm: the model before training.
      settings: settings of the run's algorithm.
      value_head: whether the state has a value head; None means that the algorithm decides.
    """
    program, arguments = _initial_state_program(config, vlm, settings, value_head)
    state = program(*arguments)
    return state if vlm.mesh is None else jax.device_put(state, shardings(state, vlm.mesh))


def abstract_state(
    config: ConfigDict, vlm: VLM, settings: Settings, value_head: bool | None = None
) -> TrainState:  # fmt: skip
    """Returns the result of `initial_state` as shapes, dtypes and shardings, without computing it."""
    program, arguments = _initial_state_program(config, vlm, settings, value_head)
    state = program.eval_shape(*arguments)
    return state if vlm.mesh is None else placed(state, shardings(state, vlm.mesh))


def _initial_state_program(
    config: ConfigDict, vlm: VLM, settings: Settings, value_head: bool | None
) -> tuple[Program, tuple[jax.Array, Any]]:  # fmt: skip
    """Returns (program that computes the initial state, the program's arguments).

    The arguments are a random key and the model's parameters, or None in place of the parameters if only adapters are
    trained.
    """
    shapes, width, kl_coef, trained = vlm.lora_shapes, vlm.hidden_size, config.lppo.kl_coef, settings.trained
    rank = 0 if settings.lora_scale is None else config.lora.rank
    alpha, targets = config.lora.alpha, tuple(config.lora.targets)
    has_scale = limits_kl(config)
    critic = algorithm_class(config.algorithm).value_head if value_head is None else value_head
    exits = exit_schedule(settings, vlm.num_exits, vlm.default_exit)

    def start(key: jax.Array, params: Any) -> TrainState:
        lora = init_lora(shapes, rank=rank, alpha=alpha, targets=targets, key=key) if rank else None
        state = init_state(
            params, lora, hidden_size=width, optimizer=settings.optimizer, kl_coef=kl_coef, value_head=critic,
            exits=exits.initial_state(), trained=trained,
        )  # fmt: skip
        scale = jnp.ones((), jnp.float32) if has_scale else None
        return state._replace(controls=state.controls._replace(learning_rate_scale=scale))

    key = jax.random.fold_in(jax.random.key(config.seed), _INIT_STREAM)
    cache_key = (shapes, width, kl_coef, rank, alpha, targets, settings.optimizer, has_scale, critic, exits, trained)
    needs_params = bool(replaced_roots(trained, settings.lora_scale))
    return Program(start, cache_key=cache_key), (key, vlm.params if needs_params else None)
