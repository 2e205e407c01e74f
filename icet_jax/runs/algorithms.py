"""One training iteration of each algorithm, behind the two calls that the training loop makes: `lowered` and `step`."""

import dataclasses
import time
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import jax
import numpy as np
from ml_collections import ConfigDict

from icet_jax.api import VLM
from icet_jax.evaluation.batching import PromptBatch
from icet_jax.judges.keywords import refused
from icet_jax.lppo import learner, lsft
from icet_jax.lppo.metrics import host_metrics
from icet_jax.lppo.settings import Settings, from_config
from icet_jax.lppo.state import TrainState
from icet_jax.runs.reward import RewardByKind

Row = dict[str, float]


class Algorithm(Protocol):
    """What the training loop needs of an algorithm.

    Attributes:
      settings: what its phases are compiled for.
      iterations: length of the run.
    """

    settings: Settings
    iterations: int

    def lowered(self, state: TrainState, batch: PromptBatch) -> Iterator[tuple[str, Any]]:
        """Everything that `step` runs on the device, by name, ready to be compiled for batches of this shape."""
        ...

    def step(self, state: TrainState, batch: PromptBatch) -> tuple[TrainState, Row]:
        """One iteration on `batch`; the old state is donated. The row holds the iteration's metrics."""
        ...


class Lppo:
    """Rollout at drawn exits, reward of the text, old and reference log-probs, K epochs of clipped updates."""

    def __init__(self, config: ConfigDict, vlm: VLM, reward: RewardByKind):
        self.iterations = config.lppo.iterations
        self.settings = _settings(config, vlm, self.iterations)
        self._vlm, self._reward = vlm, reward
        self._phases = learner.build(vlm.graphdef, self.settings, vlm.mesh)
        self._run_key = jax.random.key(config.seed)
        self._exits = _exit_drawer(self.settings, vlm, self._run_key, config.data.batch_size)

    def lowered(self, state: TrainState, batch: PromptBatch) -> Iterator[tuple[str, Any]]:
        """See `Algorithm`."""
        exits = self._exits(state.iteration)
        inputs = (batch.images, batch.tokens, batch.mask, exits, self._run_key)
        yield from self._phases.lowered(self._vlm.params, state, *inputs)

    def step(self, state: TrainState, batch: PromptBatch) -> tuple[TrainState, Row]:
        """See `Algorithm`."""
        params, started = self._vlm.params, time.perf_counter()
        exits = self._exits(state.iteration)
        rollout = self._phases.rollout(params, state, batch.images, batch.tokens, batch.mask, exits, self._run_key)
        tokens, mask = jax.device_get((rollout.tokens, rollout.mask))
        sampled = time.perf_counter()
        texts = self._vlm.processor.decode(tokens, mask)
        scores, learned = self._reward(batch.examples, texts)
        scored = time.perf_counter()
        state, train_batch, before = self._phases.prepare(params, state, rollout, scores, learned)
        state, after = self._phases.update(params, state, train_batch, self._run_key)
        row = host_metrics(before, after)
        forbidden = [text for example, text in zip(batch.examples, texts, strict=True) if example.kind == "forbidden"]
        if forbidden:
            row["objective/asr_refusal_keywords"] = float(np.mean([not refused(text) for text in forbidden]))
        finished = time.perf_counter()
        row |= {
            "perf/time_rollout": sampled - started,
            "perf/time_score": scored - sampled,
            "perf/time_update": finished - scored,
            "perf/samples_per_sec": len(texts) / (finished - started),
            "perf/tokens_per_sec": float(mask.sum()) / (finished - started),
        }
        return state, row


class Lsft:
    """The ablation: the refusal for forbidden rows, the known answer for others, learnt at drawn exits."""

    def __init__(self, config: ConfigDict, vlm: VLM):
        self.iterations = config.lsft.iterations
        self.settings = dataclasses.replace(_settings(config, vlm, self.iterations), exits=config.lsft.exits)
        self._vlm, self._refusal = vlm, config.lsft.refusal
        self._update: Any = lsft.build(vlm.graphdef, self.settings, vlm.mesh)
        self._run_key = jax.random.key(config.seed)
        self._exits = _exit_drawer(self.settings, vlm, self._run_key, config.data.batch_size)

    def lowered(self, state: TrainState, batch: PromptBatch) -> Iterator[tuple[str, Any]]:
        """See `Algorithm`."""
        yield "update", self._update.lower(self._vlm.params, state, *self._inputs(state, batch))

    def step(self, state: TrainState, batch: PromptBatch) -> tuple[TrainState, Row]:
        """See `Algorithm`."""
        started = time.perf_counter()
        inputs = self._inputs(state, batch)
        state, metrics = self._update(self._vlm.params, state, *inputs)
        row = host_metrics(metrics)
        elapsed = time.perf_counter() - started
        row |= {"perf/time_update": elapsed, "perf/samples_per_sec": len(batch.examples) / elapsed}
        return state, row

    def _inputs(self, state: TrainState, batch: PromptBatch) -> tuple[Any, ...]:
        sampling = self.settings.sampling
        texts = [self._refusal if row.kind == "forbidden" else row.answer for row in batch.examples]
        tokenizer = self._vlm.processor.tokenizer
        ids = [None if text is None else tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
        targets, target_mask = lsft.pad_targets(
            ids, eos_id=sampling.eos_ids[0], length=sampling.max_new_tokens, pad_id=sampling.pad_id
        )
        exits = self._exits(state.iteration)
        return (batch.images, batch.tokens, batch.mask, exits, targets, target_mask, self._run_key)


def _settings(config: ConfigDict, vlm: VLM, iterations: int) -> Settings:
    drawn = vlm.sampling(config.lppo.max_new_tokens)
    return from_config(
        config, eos_ids=drawn.eos_ids, suppress_ids=drawn.suppress_ids, pad_id=drawn.pad_id, iterations=iterations
    )


def _exit_drawer(settings: Settings, vlm: VLM, run_key: Any, batch_size: int) -> Callable[[Any], Any]:
    """iteration -> exits int32 [B], compiled once."""

    def draw(key: Any, iteration: Any) -> Any:
        return learner.draw_exits(
            settings, key, iteration, batch=batch_size, num_exits=vlm.num_exits, default_exit=vlm.default_exit
        )

    compiled = jax.jit(draw)
    return lambda iteration: compiled(run_key, iteration)
