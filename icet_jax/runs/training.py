"""The training loop: batch -> algorithm's step -> log -> checkpoint, from wherever the last process stopped."""

import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from icet_jax.api import VLM
from icet_jax.checkpoints.run_state import RunState
from icet_jax.data.batches import Batches
from icet_jax.data.records import Example
from icet_jax.errors import Stopped, UserError
from icet_jax.evaluation.batching import PromptBatch, prompt_batch
from icet_jax.files import write_text_atomic
from icet_jax.lppo.forward import with_policy
from icet_jax.lppo.settings import Settings
from icet_jax.lppo.state import TrainState, init_state
from icet_jax.models.family import init_lora
from icet_jax.parallel.programs import Program
from icet_jax.parallel.sharding import placed, shardings
from icet_jax.runs.algorithms import Algorithm, Lppo, Lsft, Read, Row
from icet_jax.runs.compilations import compile_programs
from icet_jax.runs.metrics_log import MetricsLog
from icet_jax.runs.progress import Progress
from icet_jax.runs.reward import RewardByKind
from icet_jax.runs.signals import kept_waiting
from icet_jax.runs.stability import Stability

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
          reward: scores responses (L-PPO).

        Raises:
          UserError: the mixture asks for rows that are not there, a prompt does not fit, or an image is broken.
        """
        self._config, self._workdir, self._vlm = config, workdir, vlm
        self.algorithm: Algorithm = Lppo(config, vlm, reward) if config.algorithm == "lppo" else Lsft(config, vlm)
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
            done = int(state.iteration)
            if done < algorithm.iterations:
                self._name_device()
                if done:
                    print(f"{config.algorithm}: goes on after iteration {done}", file=sys.stderr)
                log = MetricsLog(self._workdir, config, step=done)
                try:
                    stability = Stability(config, metadata.get("skipped", {}))
                    state = self._iterate(state, checkpoints, log, stability)
                finally:
                    log.close()
                checkpoints.wait()
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
        if max(checkpoints.steps, default=0) >= self.algorithm.iterations:
            return newest_state(*arguments, checkpoints)
        programs = self.algorithm.lowered(abstract_state(*arguments), self._first)
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
                        self._keep(finished, state, row, checkpoints, stability)
                    state, read = self.algorithm.finish(state, batch, begun)
                    finished += 1
                stop = told()
                if read is not None:
                    row = self._settle(finished, read(), log, stability, progress)
                    self._keep(finished, state, row, checkpoints, stability, now=stop)
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
    ) -> None:  # fmt: skip
        """Saves the state where its turn has come, or `now`: then it does not compete with those whose turn it was."""
        settings, value = self._config.checkpoint, None
        regular = finished == self.algorithm.iterations or finished % settings.every == 0
        if not (regular or now):
            return
        if regular and settings.best is not None:
            if settings.best not in row:
                known = ", ".join(sorted(row))
                raise UserError(f"config.checkpoint.best={settings.best}: this run has no such metric, but {known}")
            value = row[settings.best] if settings.best_is == "highest" else -row[settings.best]
        checkpoints.save(finished, state, {"skipped": stability.counts}, value=value)


def open_checkpoints(config: ConfigDict, workdir: Path) -> RunState:
    """The checkpoints of the run in `workdir`."""
    settings = config.checkpoint
    return RunState(workdir / "checkpoints", keep=settings.keep, keep_best=settings.best is not None)


def best_state(state: TrainState, checkpoints: RunState) -> TrainState:
    """The state of the best checkpoint, of the structure of `state`, which it is where there is none."""
    found = checkpoints.restore(like=state, best=True)
    if found is None:
        return state
    print(f"best checkpoint: iteration {found[0]}", file=sys.stderr)
    return found[1]


def newest_state(
    config: ConfigDict, vlm: VLM, settings: Settings, checkpoints: RunState
) -> tuple[TrainState, dict[str, Any]]:
    """State and metadata of the newest complete checkpoint, or those before the first iteration if there is none.

    Raises:
      UserError: a checkpoint of another config, or every one is damaged.
    """
    state = initial_state(config, vlm, settings)
    restored = checkpoints.restore(like=state)
    return (state, {}) if restored is None else restored[1:]


def initial_state(config: ConfigDict, vlm: VLM, settings: Settings) -> TrainState:
    """The state before the first iteration: fresh adapters (LoRA), or masters of the language model (rank 0)."""
    program, arguments = _initial(config, vlm, settings)
    state = program(*arguments)
    return state if vlm.mesh is None else jax.device_put(state, shardings(state, vlm.mesh))


def abstract_state(config: ConfigDict, vlm: VLM, settings: Settings) -> TrainState:
    """Shapes, dtypes and places of `initial_state`."""
    program, arguments = _initial(config, vlm, settings)
    state = program.eval_shape(*arguments)
    return state if vlm.mesh is None else placed(state, shardings(state, vlm.mesh))


def _initial(config: ConfigDict, vlm: VLM, settings: Settings) -> tuple[Program, tuple[Any, Any]]:
    """What makes the first state, and its arguments."""
    shapes, width, kl_coef = vlm.lora_shapes, vlm.hidden_size, config.lppo.kl_coef
    rank, alpha, targets = config.lora.rank, config.lora.alpha, tuple(config.lora.targets)

    def start(key: Any, params: Any) -> TrainState:
        lora = init_lora(shapes, rank=rank, alpha=alpha, targets=targets, key=key) if rank else None
        return init_state(params, lora, hidden_size=width, optimizer=settings.optimizer, kl_coef=kl_coef)

    key = jax.random.fold_in(jax.random.key(config.seed), _INIT_STREAM)
    about = (shapes, width, kl_coef, rank, alpha, targets, settings.optimizer)
    return Program(start, about=about), (key, None if rank else vlm.params)
