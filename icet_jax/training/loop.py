"""The training loop: batch -> algorithm's step -> log -> checkpoint, from wherever the last process stopped."""

import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from icet_jax.algorithms.base import Algorithm, Read, Row, algorithm_class
from icet_jax.algorithms.forward import with_policy
from icet_jax.algorithms.phases import exit_schedule
from icet_jax.algorithms.reward_by_kind import RewardByKind
from icet_jax.algorithms.settings import Settings
from icet_jax.algorithms.state import TrainState, init_state
from icet_jax.checkpoints.run_state import RunState
from icet_jax.data.batches import Batches
from icet_jax.data.records import Example
from icet_jax.errors import Stopped, UserError
from icet_jax.evaluation.batching import PromptBatch, prompt_batch
from icet_jax.files import write_text_atomic
from icet_jax.nn.protocols import init_lora
from icet_jax.parallel.compilations import compile_programs
from icet_jax.parallel.programs import Program
from icet_jax.parallel.sharding import placed, replicated, shardings
from icet_jax.training.metrics_log import MetricsLog
from icet_jax.training.progress import Progress
from icet_jax.training.signals import kept_waiting
from icet_jax.training.stability import Stability, bounded, learning_rate_scale
from icet_jax.vlm import VLM

# What the progress line shows, where the algorithm reports it.
_SHOWN = {
    "kl": "objective/kl",
    "reward": "objective/scores",
    "asr": "objective/asr_refusal_keywords",
    "loss": "loss/total_avg",
}
# The stream of the run key that initialises adapters; iterations count up from 0 and never get here.
_INIT_STREAM = 2**32 - 3


class Trainer:
    """One training run in one directory. What is wrong with its rows is found when it is made, before any work."""

    def __init__(
        self, config: ConfigDict, workdir: Path, vlm: VLM, examples: Sequence[Example], reward: RewardByKind
    ) -> None:
        """Prepares the phases and the first batch.

        Args:
          config: checked.
          workdir: claimed by this config.
          vlm: the model before training; its weights stay as they are.
          examples: the training rows.
          reward: scores responses, for algorithms that are rewarded.

        Raises:
          UserError: the mixture asks for rows that are not there, a prompt does not fit, or an image is broken.
        """
        self._config, self._workdir, self._vlm = config, workdir, vlm
        self.algorithm: Algorithm = algorithm_class(config.algorithm)(config, vlm, reward)
        size = config.data.batch_size
        mixture = config.data.mixture.to_dict()
        self._batches = Batches(examples, mixture=mixture, batch_size=size, seed=config.seed)
        self._images_per_row = max(len(example.images) for example in examples)
        self._first = self.batch(0)

    def batch(self, index: int) -> PromptBatch:
        """Batch `index` of the run, a pure function of (seed, index), as arrays of one fixed shape."""
        return self._arrays(self._batches.batch(index))

    def _arrays(self, rows: list[Example]) -> PromptBatch:
        return prompt_batch(
            self._vlm, rows, len(rows), self._images_per_row, length=self._config.data.max_prompt_tokens
        )

    def _coming(self, start: int, total: int) -> Iterator[PromptBatch]:
        """Batches `start` to `total - 1`; threads open and tokenise the next ones."""
        if start == 0:
            yield self._first
        yield from self._batches.load(self._arrays, max(start, 1), total)

    def run(self) -> TrainState:
        """Trains to the last iteration, from the last complete checkpoint of the run directory.

        A run that was killed ends with the same bits as one that was not: rows, exits, samples and permutations depend
        on (seed, iteration) alone.

        Returns:
          The last state, or that of the best checkpoint where `config.checkpoint.best` names a metric.

        Raises:
          UserError: the run is not stable (the last good checkpoint stays), or the directory cannot be written to.
          Stopped: a signal came; the iterations so far are saved.
        """
        config, algorithm = self._config, self.algorithm
        checkpoints = open_checkpoints(config, self._workdir)
        try:
            state, metadata = self._start(checkpoints)
            done, stability = int(state.iteration), Stability(config, metadata.get("skipped", {}))
            if done < algorithm.iterations:
                self._name_device()
                if done:
                    print(f"{config.algorithm}: goes on after iteration {done}", file=sys.stderr)
                log = MetricsLog(self._workdir, config, step=done)
                try:
                    state = self._iterate(state, checkpoints, log, stability)
                finally:
                    log.close()
                checkpoints.wait()
            if self._unmeasured(checkpoints):
                state = self._measure_last(state, checkpoints, stability)
            return state if config.checkpoint.best is None else best_state(state, checkpoints)
        finally:
            checkpoints.close()

    def policy(self, state: TrainState) -> VLM:
        """The model with what `state` has learnt: adapters, or a language model of its own."""
        trained = with_policy(self._vlm.params, state.trainable, self.algorithm.settings.lora_scale)
        return self._vlm.with_weights(*trained)

    def _start(self, checkpoints: RunState) -> tuple[TrainState, dict[str, Any]]:
        """`newest_state`; meanwhile the programs of an iteration are compiled, if there is one to come."""
        arguments = (self._config, self._vlm, self.algorithm.settings)
        if max(checkpoints.steps, default=0) >= self.algorithm.iterations and not self._unmeasured(checkpoints):
            return newest_state(*arguments, checkpoints)
        head = has_value_head(self._config, checkpoints)
        programs = self.algorithm.lowered(abstract_state(*arguments, head), self._first)
        return compile_programs(programs, lambda: newest_state(*arguments, checkpoints))

    def _name_device(self) -> None:
        """Writes device.json, the devices and the peak that `perf/mfu` relates to, and says so."""
        peak = self.algorithm.peak
        write_text_atomic(self._workdir / "device.json", json.dumps(peak._asdict(), indent=1) + "\n")
        print(f"devices: {peak}", file=sys.stderr)

    def _iterate(
        self, state: TrainState, checkpoints: RunState, log: MetricsLog, stability: Stability
    ) -> TrainState:  # fmt: skip
        """Every iteration that `state` has not had yet; threads prepare the coming batches for the device."""
        config, start, total = self._config, int(state.iteration), self.algorithm.iterations
        with Progress(config.algorithm, total, start=start) as progress:
            read: Read | None = None
            finished = start
            with kept_waiting() as told:
                for batch in self._coming(start, total):
                    if told():
                        break
                    begun = self.algorithm.begin(state, batch)
                    if read is not None:
                        row = self._settle(finished, read(), log, stability, progress)
                        kept = self._keep(finished, state, row, checkpoints, stability)
                        if kept is not state:
                            state, begun = kept, self.algorithm.begin(kept, batch)
                    state, read = self.algorithm.finish(state, batch, begun)
                    finished += 1
                stop = told()
                if read is not None:
                    row = self._settle(finished, read(), log, stability, progress)
                    state = self._keep(finished, state, row, checkpoints, stability, now=stop)
                if stop:
                    checkpoints.wait()
                    raise Stopped(f"{told.name}: iteration {finished} is saved; the same command goes on from there")
        return state

    def _settle(
        self, finished: int, row: Row, log: MetricsLog, stability: Stability, progress: Progress
    ) -> Row:  # fmt: skip
        """What follows from an iteration's metrics, while the device is at work on the next one."""
        stability.check(row, finished)
        if finished == self.algorithm.iterations or finished % self._config.log.every == 0:
            log.write(finished, row)
        progress.advance({name: row[metric] for name, metric in _SHOWN.items() if metric in row})
        return row

    def _keep(
        self, finished: int, state: TrainState, row: Row, checkpoints: RunState, stability: Stability, *,
        now: bool = False,
    ) -> TrainState:  # fmt: skip
        """Saves the state where its turn has come, or `now`; gives the state to go on with.

        The iteration's rollout was the policy's before it: its `row` measures the state before `finished`. Where that
        is beyond the bound of the KL, the run goes back, and what is saved is what it goes on with.

        Raises:
          UserError: the run went back, and the config says that it stops then; the state within the bound is saved.
        """
        if stability.beyond is None:
            self._rate(finished - 1, row, checkpoints)
        else:
            state = self._go_back(finished, state, checkpoints, stability)
        ends = stability.ends(finished)
        if self._regular(finished) or now or ends is not None:
            checkpoints.save(finished, stored(state), {"skipped": stability.counts})
        if ends is not None:
            checkpoints.wait()
            raise ends
        return state

    def _regular(self, step: int) -> bool:
        """Whether a state has its turn to be saved; a signal must decide neither what competes nor what is gone to."""
        return step == self.algorithm.iterations or (step > 0 and step % self._config.checkpoint.every == 0)

    def _rate(self, step: int, row: Row, checkpoints: RunState) -> None:
        """Tells the checkpoint of `step` what it is worth, from the metrics of the rollout that its policy made."""
        settings, value = self._config.checkpoint, None
        if not self._regular(step) or not (settings.best is not None or bounded(self._config)):
            return
        if settings.best in row:
            value = row[settings.best] if settings.best_is == "highest" else -row[settings.best]
        elif settings.best is not None and row.get("train/updates") != 0:
            known = ", ".join(sorted(row))
            raise UserError(f"config.checkpoint.best={settings.best}: this run has no such metric, but {known}")
        checkpoints.measure(step, value)

    def _go_back(self, step: int, state: TrainState, checkpoints: RunState, stability: Stability) -> TrainState:
        """The newest checkpoint that was found within the bound, or the first state, as that of `step`; more slowly."""
        found = checkpoints.go_back(like=stored(state))
        if found is None:
            head = "value_head" in state.trainable
            found = 0, initial_state(self._config, self._vlm, self.algorithm.settings, head), {}
        scale = learning_rate_scale(stability.counts)
        print(
            f"iteration {step}: {stability.beyond}: back to the state of iteration {found[0]}, at {scale:.3g} of "
            "config.optimizer.learning_rate",
            file=sys.stderr,
        )
        now = found[1]._replace(iteration=_number(step, "int32", self._vlm))
        return _at_scale(now, scale, self._vlm)

    def _unmeasured(self, checkpoints: RunState) -> bool:
        """Whether the last state is saved, has to be measured and was not."""
        wanted = self._config.checkpoint.best is not None or bounded(self._config)
        last = self.algorithm.iterations
        return wanted and last in checkpoints.steps and last not in checkpoints.measured

    def _measure_last(self, state: TrainState, checkpoints: RunState, stability: Stability) -> TrainState:
        """One more iteration, which is thrown away: its rollout measures the last state. Gives the last state again.

        Raises:
          UserError: it is beyond the bound of the KL, and the config says that the run stops then.
        """
        last = self.algorithm.iterations
        print(f"{self._config.algorithm}: one more iteration measures the last state, and is dropped", file=sys.stderr)
        batch = self.batch(last)
        like, read = self.algorithm.finish(state, batch, self.algorithm.begin(state, batch))
        row = read()
        if not (bounded(self._config) and row.get("train/unstable")):
            self._rate(last, row, checkpoints)
            found = checkpoints.restore(like=stored(like))
            return like if found is None else found[1]
        stability.check(row, last)
        state = self._go_back(last, like, checkpoints, stability)
        value = checkpoints.measured.get(max(checkpoints.measured, default=0))
        ends = stability.ends(last)
        checkpoints.save(last, stored(state), {"skipped": stability.counts})
        checkpoints.wait()
        checkpoints.measure(last, value)
        if ends is not None:
            raise ends
        return state


def open_checkpoints(config: ConfigDict, workdir: Path) -> RunState:
    """The checkpoints of the run in `workdir`."""
    settings = config.checkpoint
    return RunState(
        workdir / "checkpoints",
        keep=settings.keep,
        keep_best=settings.best is not None,
        keep_measured=bounded(config),
    )


def has_value_head(config: ConfigDict, checkpoints: RunState) -> bool:
    """Whether the run's states have a value head: where its algorithm trains one, or its checkpoints have one.

    Checkpoints of L-SFT once had one, which stayed zero; such a run goes on as it began.
    """
    of_algorithm = algorithm_class(config.algorithm).value_head
    return of_algorithm or any("value_head" in name for name in checkpoints.array_names())


def best_state(state: TrainState, checkpoints: RunState) -> TrainState:
    """The state of the best checkpoint, of the structure of `state`, which it is where there is none."""
    best = checkpoints.best
    found = checkpoints.restore(like=stored(state), best=True)
    if found is None:
        return state
    says = "best checkpoint" if found[0] == best else "no checkpoint was measured, the newest is taken"
    print(f"{says}: iteration {found[0]}", file=sys.stderr)
    return found[1]


def stored(state: TrainState) -> TrainState:
    """What a checkpoint has of a state: all but the scale of the learning rate, which follows from its metadata."""
    return state._replace(controls=state.controls._replace(learning_rate_scale=None))


def newest_state(
    config: ConfigDict, vlm: VLM, settings: Settings, checkpoints: RunState
) -> tuple[TrainState, dict[str, Any]]:
    """State and metadata of the newest complete checkpoint, or those before the first iteration if there is none.

    Raises:
      UserError: a checkpoint of another config, or every one is damaged.
    """
    state = initial_state(config, vlm, settings, has_value_head(config, checkpoints))
    restored = checkpoints.restore(like=stored(state))
    if restored is None:
        return state, {}
    _, found, metadata = restored
    if bounded(config):
        found = _at_scale(found, learning_rate_scale(metadata.get("skipped", {})), vlm)
    return found, metadata


def _at_scale(state: TrainState, scale: float, vlm: VLM) -> TrainState:
    """The state with a scale of the learning rate."""
    scaled = state.controls._replace(learning_rate_scale=_number(scale, "float32", vlm))
    return state._replace(controls=scaled)


def _number(value: int | float, dtype: str, vlm: VLM) -> Any:
    """A number of the train state, where those of the first state lie."""
    number = np.asarray(value, dtype)
    return jnp.asarray(number) if vlm.mesh is None else jax.device_put(number, replicated(vlm.mesh))


def initial_state(
    config: ConfigDict, vlm: VLM, settings: Settings, value_head: bool | None = None
) -> TrainState:  # fmt: skip
    """The state before the first iteration: fresh adapters (LoRA), or masters of the language model (rank 0).

    Args:
      config: of the run.
      vlm: the model before training.
      settings: of the run's algorithm.
      value_head: whether there is one; None: as the algorithm says.
    """
    program, arguments = _initial(config, vlm, settings, value_head)
    state = program(*arguments)
    return state if vlm.mesh is None else jax.device_put(state, shardings(state, vlm.mesh))


def abstract_state(
    config: ConfigDict, vlm: VLM, settings: Settings, value_head: bool | None = None
) -> TrainState:  # fmt: skip
    """Shapes, dtypes and places of `initial_state`."""
    program, arguments = _initial(config, vlm, settings, value_head)
    state = program.eval_shape(*arguments)
    return state if vlm.mesh is None else placed(state, shardings(state, vlm.mesh))


def _initial(
    config: ConfigDict, vlm: VLM, settings: Settings, value_head: bool | None
) -> tuple[Program, tuple[Any, Any]]:  # fmt: skip
    """What makes the first state, and its arguments."""
    shapes, width, kl_coef = vlm.lora_shapes, vlm.hidden_size, config.lppo.kl_coef
    rank, alpha, targets = config.lora.rank, config.lora.alpha, tuple(config.lora.targets)
    scaled = bounded(config)
    critic = algorithm_class(config.algorithm).value_head if value_head is None else value_head
    exits = exit_schedule(settings, vlm.num_exits, vlm.default_exit)

    def start(key: Any, params: Any) -> TrainState:
        lora = init_lora(shapes, rank=rank, alpha=alpha, targets=targets, key=key) if rank else None
        state = init_state(
            params, lora, hidden_size=width, optimizer=settings.optimizer, kl_coef=kl_coef, value_head=critic,
            exits=exits.initial_state(),
        )  # fmt: skip
        scale = jnp.ones((), jnp.float32) if scaled else None
        return state._replace(controls=state.controls._replace(learning_rate_scale=scale))

    key = jax.random.fold_in(jax.random.key(config.seed), _INIT_STREAM)
    about = (shapes, width, kl_coef, rank, alpha, targets, settings.optimizer, scaled, critic, exits)
    return Program(start, about=about), (key, None if rank else vlm.params)
