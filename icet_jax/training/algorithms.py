"""One training iteration of each algorithm, behind what the training loop calls: `lowered`, `begin` and `finish`.

What is dispatched runs while the host goes on: an iteration's metrics are read after the next one has begun.
"""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import jax
import numpy as np
from flax import nnx
from ml_collections import ConfigDict

from icet_jax.algorithms import learner, lsft
from icet_jax.algorithms.metrics import host_metrics
from icet_jax.algorithms.settings import Settings, from_config
from icet_jax.algorithms.state import TrainState
from icet_jax.errors import during
from icet_jax.evaluation.batching import PromptBatch
from icet_jax.parallel.distributed import fetch
from icet_jax.parallel.mesh_fit import slices
from icet_jax.parallel.programs import Program
from icet_jax.parallel.sharding import replicated, row_shards
from icet_jax.scorers.keywords import refused
from icet_jax.training.reward import RewardByKind, scores_by_kind
from icet_jax.training.utilisation import Counter, Peak, Stopwatch, device_peak, speeds
from icet_jax.vlm import VLM

Row = dict[str, float]
Read = Callable[[], Row]
"""Waits for an iteration to end and gives its metrics."""


class Algorithm(Protocol):
    """What the training loop needs of an algorithm.

    Attributes:
      settings: what its phases are compiled for.
      iterations: length of the run.
      peak: of the devices, which `perf/mfu` relates to.
    """

    settings: Settings
    iterations: int
    peak: Peak

    def lowered(self, state: TrainState, batch: PromptBatch) -> Iterator[tuple[str, Any]]:
        """Everything that an iteration runs on the device, by name, ready to be compiled for batches of this shape."""
        ...

    def begin(self, state: TrainState, batch: PromptBatch) -> Any:
        """Starts an iteration on `batch` as far as it needs nothing from the host, and waits for nothing."""
        ...

    def finish(self, state: TrainState, batch: PromptBatch, begun: Any) -> tuple[TrainState, Read]:
        """The rest of the iteration that `begin` gave `begun` for; donates `state`, waits for no update."""
        ...


class Lppo:
    """Rollout at drawn exits, reward of the text, old and reference log-probs, K epochs of clipped updates."""

    def __init__(self, config: ConfigDict, vlm: VLM, reward: RewardByKind):
        self.iterations = config.lppo.iterations
        self.settings = _settings(config, vlm, self.iterations)
        self._vlm, self._reward = vlm, reward
        self._phases = learner.build(vlm.graphdef, self.settings, vlm.mesh)
        self._run_key = jax.random.key(config.seed)
        self._exits = _exit_drawer(self.settings, vlm, config.data.batch_size)
        self._watch, self._counter = Stopwatch(), Counter(nnx.merge(vlm.graphdef, vlm.params), self.settings)
        self.peak = _peak(config, vlm)

    def lowered(self, state: TrainState, batch: PromptBatch) -> Iterator[tuple[str, Any]]:
        """See `Algorithm`."""
        exits = self._exits.eval_shape(self._run_key, state.iteration)
        inputs = (batch.images, batch.tokens, batch.mask, exits, self._run_key)
        yield from self._phases.lowered(self._vlm.params, state, *inputs)
        yield from self._reward.lowered(batch.tokens.shape[1] + self.settings.sampling.max_new_tokens)

    def begin(self, state: TrainState, batch: PromptBatch) -> Any:
        """See `Algorithm`."""
        self._watch.start()
        with during("rollout"):
            exits = self._exits(self._run_key, state.iteration)
            return self._phases.rollout(
                self._vlm.params, state, batch.images, batch.tokens, batch.mask, exits, self._run_key
            )

    def finish(self, state: TrainState, batch: PromptBatch, begun: Any) -> tuple[TrainState, Read]:
        """See `Algorithm`."""
        params, rollout = self._vlm.params, begun
        with during("rollout"):  # what fails on a device is told where its results are asked for
            tokens, mask, prompt_mask, exits = fetch((rollout.tokens, rollout.mask, batch.mask, rollout.exits))
        seconds = {"rollout": self._watch.lap()}
        texts = self._vlm.processor.decode(tokens, mask)
        with during("judging"):
            scores, learned = self._reward(batch.examples, texts)
        seconds["score"] = self._watch.lap()
        longest = int(mask.sum(axis=1).max())
        rewarded = self._reward.rewarded(batch.examples)
        with during("update"):
            prepared = self._phases.prepare(params, state, rollout, scores, learned, longest, rewarded)
            state, train_batch, before = prepared
            state, after = self._phases.update(params, state, train_batch, self._run_key)
        by_kind = scores_by_kind(batch.examples, scores, rewarded & mask.any(axis=1), exits)
        forbidden = [text for example, text in zip(batch.examples, texts, strict=True) if example.kind == "forbidden"]
        done = self._counter.lppo(prompt_mask.sum(axis=1), mask.sum(axis=1), _images(batch))

        @during("update")
        def read() -> Row:
            row = host_metrics(before, after) | by_kind
            if forbidden:
                row["objective/asr_refusal_keywords"] = float(np.mean([not refused(text) for text in forbidden]))
            return row | speeds(done, seconds | {"update": self._watch.lap()}, self._counter.evaluated(row), self.peak)

        return state, read


class Lsft:
    """The ablation: the refusal for forbidden rows, the known answer for others, learnt at drawn exits."""

    def __init__(self, config: ConfigDict, vlm: VLM):
        self.iterations = config.lsft.iterations
        self.settings = dataclasses.replace(_settings(config, vlm, self.iterations), exits=config.lsft.exits)
        self._vlm, self._refusal = vlm, config.lsft.refusal
        self._update = lsft.build(vlm.graphdef, self.settings, vlm.mesh)
        self._run_key = jax.random.key(config.seed)
        self._exits = _exit_drawer(self.settings, vlm, config.data.batch_size)
        self._watch, self._counter = Stopwatch(), Counter(nnx.merge(vlm.graphdef, vlm.params), self.settings)
        self.peak = _peak(config, vlm)

    def lowered(self, state: TrainState, batch: PromptBatch) -> Iterator[tuple[str, Any]]:
        """See `Algorithm`."""
        exits = self._exits.eval_shape(self._run_key, state.iteration)
        for columns in learner.response_widths(batch.tokens.shape[1], self.settings.sampling.max_new_tokens):
            inputs = self._inputs(batch, exits, *self._targets(batch, columns))
            yield learner.program_name("update", columns), self._update.lower(self._vlm.params, state, *inputs)

    def begin(self, state: TrainState, batch: PromptBatch) -> Any:
        """See `Algorithm`."""
        self._watch.start()
        targets, mask = self._targets(batch)
        length = self.settings.sampling.max_new_tokens
        columns = learner.response_columns(batch.tokens.shape[1], length, int(mask.sum(axis=1).max()))
        exits = self._exits(self._run_key, state.iteration)
        return self._inputs(batch, exits, targets[:, :columns], mask[:, :columns])

    def finish(self, state: TrainState, batch: PromptBatch, begun: Any) -> tuple[TrainState, Read]:
        """See `Algorithm`."""
        with during("update"):
            state, metrics = self._update(self._vlm.params, state, *begun)
        prompt_mask, target_mask = fetch(batch.mask), begun[5]
        done = self._counter.lsft(prompt_mask.sum(axis=1), target_mask.sum(axis=1), _images(batch))

        @during("update")
        def read() -> Row:
            row = host_metrics(metrics)
            return row | speeds(done, {"update": self._watch.lap()}, self._counter.evaluated(row), self.peak)

        return state, read

    def _targets(self, batch: PromptBatch, columns: int | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Token ids and mask of what the rows are to answer; the first `columns`, or all that may be sampled."""
        sampling = self.settings.sampling
        texts = [self._refusal if row.kind == "forbidden" else row.answer for row in batch.examples]
        tokenizer = self._vlm.processor.tokenizer
        ids = [None if text is None else tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
        targets, mask = lsft.pad_targets(
            ids, eos_id=sampling.eos_ids[0], length=sampling.max_new_tokens, pad_id=sampling.pad_id
        )
        return targets[:, :columns], mask[:, :columns]

    def _inputs(self, batch: PromptBatch, exits: Any, targets: Any, mask: Any) -> tuple[Any, ...]:
        return (batch.images, batch.tokens, batch.mask, exits, targets, mask, self._run_key)


def _peak(config: ConfigDict, vlm: VLM) -> Peak:
    devices = jax.devices()[:1] if vlm.mesh is None else list(vlm.mesh.devices.flat)
    return device_peak(devices, config.model.dtype)


def _images(batch: PromptBatch) -> np.ndarray:
    """Images of each row."""
    return np.array([len(example.images) for example in batch.examples])


def _settings(config: ConfigDict, vlm: VLM, iterations: int) -> Settings:
    sampling = vlm.sampling(config.lppo.max_new_tokens, config.lppo.temperature)
    settings = from_config(config, sampling, iterations=iterations)
    shards = 1 if vlm.mesh is None else row_shards(vlm.mesh)
    return dataclasses.replace(settings, accumulation=slices(config, shards))


def _exit_drawer(settings: Settings, vlm: VLM, batch_size: int) -> Program:
    """(run key, iteration) -> exits int32 [B], on every device."""

    def draw(key: Any, iteration: Any) -> Any:
        return learner.draw_exits(
            settings, key, iteration, batch=batch_size, num_exits=vlm.num_exits, default_exit=vlm.default_exit
        )

    everywhere = None if vlm.mesh is None else replicated(vlm.mesh)
    return Program(draw, about=(settings, batch_size, vlm.num_exits, vlm.default_exit), out_sharding=everywhere)
