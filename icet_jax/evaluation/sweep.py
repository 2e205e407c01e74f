"""The layer sweep: every row of a data set answered at every exit, and scored.

Each image is encoded once for all exits: a batch goes through the tower, then one exit after another through projector
and decoder. Exits are traced, so there is one compile per (phase, prompt length). While the device answers at one exit,
the host decodes and scores the one before.
"""

import functools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx

from icet_jax.data.records import Example
from icet_jax.errors import UserError
from icet_jax.evaluation.batching import PromptBatch, batch_indices, prompt_batch
from icet_jax.evaluation.scoring import answer_rows, judge
from icet_jax.evaluation.summary import Row, summarise
from icet_jax.evaluation.transcripts import TranscriptFile, fingerprint
from icet_jax.generation.decode import Generation, generate
from icet_jax.generation.sampling import Sampling
from icet_jax.judges.base import Scorer
from icet_jax.lppo.exits import check_exit
from icet_jax.models.family import Images
from icet_jax.models.layers import Lora
from icet_jax.typing import Array, Bool, Int, Key

SCHEMA = 1


class SweepProgress(NamedTuple):
    """State of a running sweep; a step is one batch at one exit.

    Attributes:
      done: finished steps, those of an earlier, interrupted sweep included.
      total: steps in all.
      seconds_left: estimate; None until one step has been timed without its compilation.
    """

    done: int
    total: int
    seconds_left: float | None


@dataclass(frozen=True, eq=False)
class SweepResult:
    """What a sweep found.

    Attributes:
      sweep: the content of `sweeps/*.json`.
      rows: the content of `transcripts/*.jsonl`, by data-set row, then by exit.
      tokens: how many tokens were generated in this call.
      seconds: how long this call took.
    """

    sweep: dict[str, Any]
    rows: list[Row]
    tokens: int
    seconds: float


def sweep(
    vlm: Any,
    examples: Sequence[Example],
    *,
    exits: Sequence[int] | str = "all",
    sampling: Sampling,
    scorers: Sequence[Scorer],
    batch_size: int,
    lora: Lora | None = None,
    transcript_path: str | Path | None = None,
    progress: Callable[[SweepProgress], None] | None = None,
    dataset: str = "data",
    model: str = "model",
    seed: int = 0,
    tag: str = "",
) -> SweepResult:
    """Answers every row at every exit and scores the answers.

    A row's answer depends on (seed, its number in `examples`, prompt, images, weights) alone: two sweeps with the same
    seed draw with common random numbers at all exits, before and after training.

    Args:
      vlm: the model, an `icet_jax.api.VLM`.
      examples: the rows; ids must differ.
      exits: "all", or numbers from 1.
      sampling: how answers are drawn (temperature 0 is greedy).
      scorers: what judges them, side by side.
      batch_size: rows answered at once.
      lora: the policy's adapters; None is the model as it is.
      transcript_path: rows are appended here as they are answered and again as they are judged, and a sweep that
        finds its own rows there goes on from them (answers that other judges have judged, or a judge failed on, are
        judged again); once complete the file is rewritten in order.
      progress: called after every step.
      dataset: its name.
      model: the model's name.
      seed: of the sampling.
      tag: names the weights ("before", "step 24"); rows in the file under another tag are another sweep's.

    Raises:
      UserError: no rows, an exit out of range, an image that cannot be opened, a transcript file of another sweep.
    """
    began = time.monotonic()
    layers = _layers(exits, vlm.num_exits)
    if not examples:
        raise UserError(f"sweep of {dataset}: no rows; give a data set with at least one")
    file = TranscriptFile(transcript_path, fingerprint(sampling, seed, tag), _judges_mark(scorers), examples)
    tokens = _Runner(vlm, sampling, scorers, lora, seed, file, progress).run(examples, layers, batch_size)
    rows = file.finish(layers)
    kinds = sorted({example.kind for example in examples})
    result = {
        "schema": SCHEMA,
        "model": model,
        "dataset": dataset,
        "kind": kinds[0] if len(kinds) == 1 else "mixed",
        "exit_definition": vlm.exit_definition,
        "num_exits": vlm.num_exits,
        "default_exit": vlm.default_exit,
        "seed": seed,
        "generation": _generation_settings(sampling),
        **summarise(rows, layers, vlm.num_exits),
    }
    return SweepResult(result, rows, tokens, time.monotonic() - began)


def _layers(exits: Sequence[int] | str, num_exits: int) -> list[int]:
    if isinstance(exits, str):
        if exits != "all":
            raise UserError(f'sweep.exits: {exits!r} given; use "all" or numbers from 1')
        return list(range(1, num_exits + 1))
    return sorted({check_exit(layer, num_exits, "sweep.exits") for layer in exits})


def _judges_mark(scorers: Sequence[Scorer]) -> str:
    return fingerprint([(scorer.metric, scorer.name, getattr(scorer, "fingerprint", "")) for scorer in scorers])


def _generation_settings(sampling: Sampling) -> dict[str, Any]:
    names = ("max_new_tokens", "temperature", "top_k", "top_p")
    return {name: getattr(sampling, name) for name in names}


@functools.partial(jax.jit, static_argnames="graphdef")
def encode(graphdef: nnx.GraphDef, params: nnx.State, images: Images) -> Any:
    """The images' encodings for all exits."""
    return nnx.merge(graphdef, params).encode(images)


@functools.partial(jax.jit, static_argnames=("graphdef", "sampling"))
def answer(
    graphdef: nnx.GraphDef,
    params: nnx.State,
    lora: Lora | None,
    encoded: Any,
    exit_layer: Int[Array, ""],
    tokens: Int[Array, "B P"],
    mask: Bool[Array, "B P"],
    row_keys: Key[Array, "B"],
    sampling: Sampling,
) -> Generation:
    """Responses of B rows at one traced exit; `encoded` is None where no row has an image."""
    model = nnx.merge(graphdef, params)
    visual = None if encoded is None else model.visual(encoded, exit_layer)
    return generate(model, tokens, mask, visual, row_keys, sampling, lora)


class _Step(NamedTuple):
    """Rows at one exit whose answers are on their way."""

    examples: Sequence[Example]
    layer: int
    generation: Generation


class _Clock:
    """Counts steps and estimates the time left from the pace after the first, which compiles."""

    def __init__(self, total: int) -> None:
        self.total, self.done = total, 0
        self._timed, self._began = 0, 0.0

    @property
    def started(self) -> bool:
        """Whether a step has been finished in this call."""
        return self._began > 0

    def tick(self, *, timed: bool) -> SweepProgress:
        """One step further; a step that generated nothing is not timed."""
        self.done += 1
        if not timed:
            return SweepProgress(self.done, self.total, None)
        now = time.monotonic()
        if not self.started:
            self._began = now
            return SweepProgress(self.done, self.total, None)
        self._timed += 1
        pace = (now - self._began) / self._timed
        return SweepProgress(self.done, self.total, pace * (self.total - self.done))


class _Runner:
    """Runs the steps that the transcript file does not have yet."""

    def __init__(
        self,
        vlm: Any,
        sampling: Sampling,
        scorers: Sequence[Scorer],
        lora: Lora | None,
        seed: int,
        file: TranscriptFile,
        progress: Callable[[SweepProgress], None] | None,
    ) -> None:
        self.vlm, self.sampling, self.scorers, self.lora = vlm, sampling, scorers, lora
        self.key, self.file, self.report = jax.random.key(seed), file, progress
        self.tokens, self.mixed, self.clock = 0, False, _Clock(0)

    def run(self, examples: Sequence[Example], layers: Sequence[int], batch_size: int) -> int:
        """Answers and scores what is missing; returns the number of tokens generated."""
        plan = batch_indices(examples, batch_size)
        per_row = max(len(example.images) for example in examples)
        self.mixed = len({example.kind == "forbidden" for example in examples}) > 1
        self.clock = _Clock(len(plan) * len(layers))
        waiting: _Step | None = None
        for indices in plan:
            rows = [examples[index] for index in indices]
            todo = self._judge_again(rows, layers)
            if not todo:
                continue
            batch = prompt_batch(self.vlm, rows, batch_size, per_row)
            encoded = None if batch.images is None else encode(self.vlm.graphdef, self.vlm.params, batch.images)
            keys = _row_keys(self.key, indices, batch_size)
            for layer in todo:
                step = _Step(rows, layer, self._answer(batch, encoded, layer, keys))
                if waiting is not None:
                    self._finish(waiting)
                waiting = step
                if not self.clock.started:  # on its own, so that the compilation is not part of the pace
                    self._finish(step)
                    waiting = None
        if waiting is not None:
            self._finish(waiting)
        return self.tokens

    def _judge_again(self, examples: Sequence[Example], layers: Sequence[int]) -> list[int]:
        """The exits at which a batch has no answers yet; where it has, judges those that lack the present judges."""
        todo = []
        for layer in layers:
            known = self.file.answers(examples, layer)
            if known is None:
                todo.append(layer)
            elif self.file.has(examples, layer):
                self.clock.done += 1
            else:
                texts = [row["response"] for row in known]
                lengths, truncated = ([int(row["scores"][name]) for row in known] for name in ("length", "truncated"))
                self._score(examples, layer, texts, lengths, truncated, new=False)
                self._tick(timed=False)
        return todo

    def _answer(self, batch: PromptBatch, encoded: Any, layer: int, keys: Array) -> Generation:
        return answer(
            self.vlm.graphdef,
            self.vlm.params,
            self.lora,
            encoded,
            np.int32(layer),
            batch.tokens,
            batch.mask,
            keys,
            self.sampling,
        )

    def _finish(self, step: _Step) -> None:
        """Waits for a step's answers, writes them down and scores them."""
        count = len(step.examples)
        tokens, mask = (np.asarray(part)[:count] for part in (step.generation.tokens, step.generation.mask))
        lengths = mask.sum(axis=1)
        last = tokens[np.arange(count), np.maximum(lengths - 1, 0)]
        truncated = mask.all(axis=1) & ~np.isin(last, self.sampling.eos_ids)
        texts = self.vlm.processor.decode(tokens, mask)
        self._score(step.examples, step.layer, texts, lengths.tolist(), truncated.tolist(), new=True)
        self.tokens += int(lengths.sum())
        self._tick(timed=True)

    def _score(
        self,
        examples: Sequence[Example],
        layer: int,
        texts: list[str],
        lengths: list[int],
        truncated: Sequence[int],
        *,
        new: bool,
    ) -> None:
        """Judges answers; new ones are safe in the file before any judge sees them."""
        rows = answer_rows(examples, layer, texts, lengths, truncated, mixed=self.mixed)
        if new:
            self.file.add(rows, judged=False)
        judge(rows, self.scorers, mixed=self.mixed)
        self.file.add(rows, judged=True)

    def _tick(self, *, timed: bool) -> None:
        progress = self.clock.tick(timed=timed)
        if self.report is not None:
            self.report(progress)


def _row_keys(key: Key[Array, ""], indices: Sequence[int], batch_size: int) -> Key[Array, "B"]:
    """The key of each row, from its number in the data set; the same at every exit."""
    numbers = np.zeros(batch_size, np.uint32)
    numbers[: len(indices)] = indices
    return jax.vmap(functools.partial(jax.random.fold_in, key))(numbers)
