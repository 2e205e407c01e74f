"""The layer sweep: every row of a data set answered at every exit, and scored.

Prompts of all rows and exits share the slots of one engine (`evaluation.queue`). While the device answers, the host
decodes, writes down and scores what has been answered before.
"""

import functools
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from icet_jax.data.records import Example
from icet_jax.errors import UserError, during
from icet_jax.evaluation.queue import CompileAhead, Queue
from icet_jax.evaluation.scoring import answer_rows, judge
from icet_jax.evaluation.statistics import Interval
from icet_jax.evaluation.summary import Row, summarise
from icet_jax.evaluation.transcripts import TranscriptFile, fingerprint
from icet_jax.generation.engine import Finished
from icet_jax.generation.sampling import Sampling, check_log_probs
from icet_jax.nn.protocols import check_exit
from icet_jax.scorers.base import Scorer
from icet_jax.typing import Array, Key
from icet_jax.vlm import VLM

SCHEMA = 1


class SweepProgress(NamedTuple):
    """State of a running sweep.

    Attributes:
      done: answers that are judged, those of an earlier, interrupted sweep included.
      total: answers in all.
      seconds_left: estimate; None until some answers have been timed without compilations.
      tokens_per_second: generated, of all answers timed.
    """

    done: int
    total: int
    seconds_left: float | None
    tokens_per_second: float | None


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

    def curve(self, metric: str) -> dict[int, Interval]:
        """Mean and 95% interval of a metric at each exit that has it, such as "asr/refusal_keywords".

        Raises:
          UserError: no exit has it; the metrics there are stand in the message.
        """
        found = {layer["layer"]: layer["metrics"] for layer in self.sweep["layers"]}
        if not any(metric in metrics for metrics in found.values()):
            known = sorted({name for metrics in found.values() for name in metrics})
            raise UserError(f"{metric}: not measured by this sweep, which has {', '.join(known)}")
        curve = {layer: metrics[metric] for layer, metrics in found.items() if metric in metrics}
        unknown = (math.nan, math.nan)
        return {
            layer: Interval(math.nan if point["mean"] is None else point["mean"], *(point["ci95"] or unknown))
            for layer, point in curve.items()
        }


def sweep(
    vlm: VLM,
    examples: Sequence[Example],
    *,
    exits: Sequence[int] | str = "all",
    sampling: Sampling,
    scorers: Sequence[Scorer],
    batch_size: int,
    transcript_path: str | Path | None = None,
    progress: Callable[[SweepProgress], None] | None = None,
    dataset: str = "data",
    model: str = "model",
    seed: int = 0,
    tag: str = "",
    compile_ahead: CompileAhead | None = None,
) -> SweepResult:
    """Answers every row at every exit and scores the answers.

    A row's answer depends on (seed, its number in `examples`, prompt, images, weights) alone: two sweeps with the same
    seed draw with common random numbers at all exits, before and after training.

    Args:
      vlm: the model, with its adapters if it has any.
      examples: the rows; ids must differ.
      exits: "all", or numbers from 1.
      sampling: how answers are drawn (temperature 0 is greedy).
      scorers: what judges them, side by side.
      batch_size: rows answered at once, and judged together.
      transcript_path: rows are appended here as they are answered and again as they are judged, and a sweep that
        finds its own rows there goes on from them (answers that other judges have judged, or a judge failed on, are
        judged again); once complete the file is rewritten in order.
      progress: called whenever answers have been judged.
      dataset: its name.
      model: the model's name.
      seed: of the sampling.
      compile_ahead: compiles (name, lowered program) pairs; None leaves each to be compiled where it is first needed.
      tag: names the weights ("before", "step 24"); rows in the file under another tag are another sweep's.

    Raises:
      UserError: no rows, an exit out of range, an image that cannot be opened, a transcript file of another sweep,
        logits that are NaN or infinite.
    """
    began = time.monotonic()
    layers = _layers(exits, vlm.num_exits)
    if not examples:
        raise UserError(f"sweep of {dataset}: no rows; give a data set with at least one")
    file = TranscriptFile(transcript_path, fingerprint(sampling, seed, tag), _judges_mark(scorers), examples)
    key = jax.random.key(seed)
    tokens = _Runner(vlm, examples, sampling, scorers, key, file, progress, batch_size, compile_ahead).run(layers)
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


class Answer(NamedTuple):
    """A finished answer.

    Attributes:
      text: without special tokens.
      length: tokens, EOS included.
      truncated: whether the limit cut it off.
    """

    text: str
    length: int
    truncated: bool


def row_keys(key: Key[Array, ""], count: int) -> Key[Array, "N"]:
    """The key of each row of a data set of `count`, the same at every exit."""
    return jax.vmap(functools.partial(jax.random.fold_in, key))(np.arange(count, dtype=np.uint32))


def read_answer(item: Finished, vlm: VLM, sampling: Sampling, row: str) -> Answer:
    """What the engine's tokens say.

    Args:
      item: of a row and exit that `item.tag` names.
      vlm: the model that answered.
      sampling: how it was asked.
      row: the row's id, for the error line.

    Raises:
      UserError: the answer was drawn from NaN or infinite logits.
    """
    check_log_probs(item.log_probs, f"exit {item.tag[1]}, row {row}")
    length = len(item.tokens)
    truncated = length == sampling.max_new_tokens and item.tokens[-1] not in sampling.eos_ids
    (text,) = vlm.processor.decode(item.tokens[None], np.ones((1, length), bool))
    return Answer(text, length, bool(truncated))


class _Clock:
    """Counts answers and estimates the time left from the pace after the first, which had to wait for compilations."""

    def __init__(self, total: int) -> None:
        self.total, self.done = total, 0
        self._timed, self._tokens, self._began = 0, 0, 0.0

    def tick(self, answers: int, tokens: int = 0) -> SweepProgress:
        """So many answers further; `tokens` were generated for them."""
        self.done += answers
        now = time.monotonic()
        if not tokens:
            return SweepProgress(self.done, self.total, None, None)
        if not self._began:
            self._began = now
            return SweepProgress(self.done, self.total, None, None)
        self._timed += answers
        self._tokens += tokens
        elapsed = max(now - self._began, 1e-9)
        pace = elapsed / self._timed
        return SweepProgress(self.done, self.total, pace * (self.total - self.done), self._tokens / elapsed)


class _Runner:
    """Answers and judges what the transcript file does not have yet."""

    def __init__(
        self,
        vlm: VLM,
        examples: Sequence[Example],
        sampling: Sampling,
        scorers: Sequence[Scorer],
        key: Key[Array, ""],
        file: TranscriptFile,
        progress: Callable[[SweepProgress], None] | None,
        batch_size: int,
        compile_ahead: CompileAhead | None,
    ) -> None:
        self.compile_ahead = compile_ahead
        self.vlm, self.examples, self.sampling, self.scorers = vlm, examples, sampling, scorers
        self.keys = row_keys(key, len(examples))
        self.file, self.report, self.batch_size = file, progress, batch_size
        self.mixed = len({example.kind == "forbidden" for example in examples}) > 1
        self.clock = _Clock(0)
        self.unjudged: list[Row] = []
        self.tokens, self.reported = 0, 0

    def run(self, layers: Sequence[int]) -> int:
        """Answers and scores what is missing; returns the number of tokens generated."""
        self.clock = _Clock(len(self.examples) * len(layers))
        todo = self._missing(layers)
        self._judge(0)
        if todo:
            how = self.sampling, self.batch_size, self.compile_ahead
            queue = Queue(self.vlm, self.examples, self.keys, todo, *how)
            for ended in queue.answers():
                self._take(ended)
                self._judge(self.batch_size)
            self._judge(0)
        return self.tokens

    def _missing(self, layers: Sequence[int]) -> dict[int, list[int]]:
        """The exits at which each row has no answer yet; answers that lack the present judges are kept for them."""
        todo: dict[int, list[int]] = {}
        for number, example in enumerate(self.examples):
            for layer in layers:
                known = self.file.answers([example], layer)
                if known is None:
                    todo.setdefault(number, []).append(layer)
                elif self.file.has([example], layer):
                    self.clock.done += 1
                else:
                    lengths, truncated = ([int(known[0]["scores"][name])] for name in ("length", "truncated"))
                    self.unjudged += self._rows([example], layer, [known[0]["response"]], lengths, truncated)
        return todo

    def _take(self, ended: Sequence[Finished]) -> None:
        """Writes answers down; they are safe in the file before any judge sees them.

        Raises:
          UserError: an answer was drawn from NaN or infinite logits; none of these answers is written.
        """
        rows = []
        for item in ended:
            number, layer = item.tag
            text, length, cut = read_answer(item, self.vlm, self.sampling, self.examples[number].id)
            rows += self._rows([self.examples[number]], layer, [text], [length], [int(cut)])
            self.tokens += length
        self.file.add(rows, judged=False)
        self.unjudged += rows

    def _rows(self, examples: Sequence[Example], layer: int, *answers: Any) -> list[Row]:
        return answer_rows(examples, layer, *answers, mixed=self.mixed)

    def _judge(self, least: int) -> None:
        """Judges the answers that wait, by `batch_size`, while there are at least `least` (0: all)."""
        while self.unjudged and len(self.unjudged) >= least:
            rows, self.unjudged = self.unjudged[: self.batch_size], self.unjudged[self.batch_size :]
            with during("judging"):
                judge(rows, self.scorers, mixed=self.mixed)
            self.file.add(rows, judged=True)
            new = self.tokens - self.reported
            self.reported = self.tokens
            progress = self.clock.tick(len(rows), new)
            if self.report is not None:
                self.report(progress)
