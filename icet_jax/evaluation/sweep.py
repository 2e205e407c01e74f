"""The sweep: generates and scores a response of every row of a data set at every exit.

The prompts of all rows and exits share the slots of one decoding engine (`evaluation.queue`). While the device
generates, the host decodes, writes and scores earlier responses.
"""

import itertools
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from icet_jax.data.records import Example
from icet_jax.errors import UserError, during
from icet_jax.evaluation.combined import row_attempts
from icet_jax.evaluation.queue import CompileAhead, Queue
from icet_jax.evaluation.scoring import answer_rows, judge
from icet_jax.evaluation.statistics import Interval
from icet_jax.evaluation.summary import Row, summarise
from icet_jax.evaluation.transcripts import TranscriptFile, fingerprint
from icet_jax.files import JsonObject
from icet_jax.generation.engine import Response
from icet_jax.generation.sampling import Sampling, check_log_probs
from icet_jax.nn.protocols import check_exit
from icet_jax.scorers.base import Scorer
from icet_jax.typing import Array, Key
from icet_jax.vlm import VLM

SCHEMA = 1


class SweepProgress(NamedTuple):
    """Describes the state of a running sweep.

    Attributes:
      done: number of judged responses, including those of an earlier, interrupted sweep.
      total: number of responses in total.
      seconds_left: estimate of the remaining time; None until responses have been timed. The first ones are not
        timed, because programs are compiled for them.
      tokens_per_second: generated tokens per second over all timed responses; None until there are some.
    """

    done: int
    total: int
    seconds_left: float | None
    tokens_per_second: float | None


@dataclass(frozen=True, eq=False)
class SweepResult:
    """Holds the result of a sweep.

    Attributes:
      sweep: content of `sweeps/*.json`.
      rows: transcript rows, sorted by row of data, exit and attempt.
      tokens: number of tokens generated in this call.
      seconds: duration of this call.
    """

    sweep: JsonObject
    rows: list[Row]
    tokens: int
    seconds: float

    def curve(self, metric: str) -> dict[int, Interval]:
        """Returns {exit: mean and 95% interval} of a metric such as "asr/refusal_keywords", for each exit that has it.

        Raises:
          UserError: no exit has the metric; the message lists the metrics that exist.
        """
        metrics_of_layer = {layer["layer"]: layer["metrics"] for layer in self.sweep["layers"]}
        if not any(metric in metrics for metrics in metrics_of_layer.values()):
            names = sorted({name for metrics in metrics_of_layer.values() for name in metrics})
            raise UserError(f"{metric}: not measured by this sweep, which has {', '.join(names)}")
        curve = {layer: metrics[metric] for layer, metrics in metrics_of_layer.items() if metric in metrics}
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
    attempts: int = 1,
) -> SweepResult:
    """Generates and scores the responses of every row at every exit, and returns them with their summary.

    The random numbers of a response depend only on `seed`, the row's index in `examples` and the attempt. All exits,
    and the sweeps before and after training, therefore use the same ones. Besides them, a response depends only on the
    row's prompt and images, the exit, `sampling` and the weights.

    Args:
      vlm: the model, with its adapters if it has any.
      examples: the rows of the data set, with different ids.
      exits: "all", or a list of exits, which count from 1.
      sampling: how responses are sampled (temperature 0 is greedy).
      scorers: the scorers of the responses.
      batch_size: number of rows that are decoded together, and of responses that are scored together.
      transcript_path: file to which rows are appended when they are generated, and again when they are scored. If the
        file has rows of the same sweep, the sweep continues from them: it generates only missing responses, and scores
        only responses that `scorers` have not scored. The file is sorted at the end. None writes no file.
      progress: called whenever responses have been scored.
      dataset: name of the data set, for the summary.
      model: name of the model, for the summary.
      seed: seed of the sampling.
      compile_ahead: see `CompileAhead`; with None each program is compiled when it is first needed.
      tag: name of the weights, such as "before" or "step 24". A file with rows of another tag is refused.
      attempts: number of responses of each forbidden row at each exit; other rows get one. The first response does not
        depend on this number, so that a sweep can be continued with more attempts.

    Raises:
      UserError: there are no rows, there are several attempts without a temperature, an exit is out of range, an image
        cannot be opened, the transcript file belongs to another sweep, or logits are NaN or infinite.
    """
    began = time.monotonic()
    layers = _layers(exits, vlm.num_exits)
    if not examples:
        raise UserError(f"sweep of {dataset}: no rows; give a data set with at least one")
    if attempts < 1 or (attempts > 1 and sampling.temperature == 0):
        raise UserError(
            f"sweep of {dataset}: attempts={attempts}; give 1, or more with a temperature above 0 (greedy attempts are "
            "all the same)"
        )
    file = TranscriptFile(transcript_path, fingerprint(sampling, seed, tag), _scorers_fingerprint(scorers), examples)
    key = jax.random.key(seed)
    settings = sampling, scorers, key, file, progress, batch_size, compile_ahead
    tokens = _Runner(vlm, examples, *settings).run(layers, attempts)
    rows = file.finish(layers, attempts)
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
        "generation": {**_generation_settings(sampling), "attempts": attempts},
        **summarise(rows, layers, vlm.num_exits),
    }
    return SweepResult(result, rows, tokens, time.monotonic() - began)


def _layers(exits: Sequence[int] | str, num_exits: int) -> list[int]:
    """Returns the requested exits, ascending; raises a UserError if one does not exist."""
    if isinstance(exits, str):
        if exits != "all":
            raise UserError(f'sweep.exits: {exits!r} given; use "all" or numbers from 1')
        return list(range(1, num_exits + 1))
    return sorted({check_exit(layer, num_exits, "sweep.exits") for layer in exits})


def _scorers_fingerprint(scorers: Sequence[Scorer]) -> str:
    return fingerprint([(scorer.metric, scorer.name, getattr(scorer, "fingerprint", "")) for scorer in scorers])


def _generation_settings(sampling: Sampling) -> JsonObject:
    names = ("max_new_tokens", "temperature", "top_k", "top_p")
    return {name: getattr(sampling, name) for name in names}


class Answer(NamedTuple):
    """Holds a finished response.

    Attributes:
      text: the response without special tokens.
      length: number of tokens, EOS included.
      truncated: whether the response ended at the token limit.
    """

    text: str
    length: int
    truncated: bool


def answer_keys(key: Key[Array, ""], rows: int, attempts: int = 1) -> Key[Array, "K N"]:
    """Returns the random key of each of K attempts of each of N rows; all exits use the same keys.

    Args:
      key: the sweep's key.
      rows: number of rows N.
      attempts: number of attempts K. The keys of attempt 0 do not depend on it.
    """
    # Folding in 2^32 - attempt gives each attempt its own key; no row index, which is folded in too, gets that large.
    keys = [key, *(jax.random.fold_in(key, np.uint32(2**32 - attempt)) for attempt in range(1, attempts))]
    fold_in_rows = jax.vmap(jax.random.fold_in, (None, 0))
    return jnp.stack([fold_in_rows(attempt_key, np.arange(rows, dtype=np.uint32)) for attempt_key in keys])


def read_answer(item: Response, vlm: VLM, sampling: Sampling, row: str) -> Answer:
    """Converts a response of the engine to text.

    Args:
      item: response whose tag is (row, exit, attempt).
      vlm: the model that generated the response.
      sampling: how the response was sampled.
      row: id of the row, for the error message.

    Raises:
      UserError: the logits of a token were NaN or infinite.
    """
    check_log_probs(item.log_probs, f"exit {item.tag[1]}, row {row}")
    length = len(item.tokens)
    truncated = length == sampling.max_new_tokens and item.tokens[-1] not in sampling.eos_ids
    (text,) = vlm.processor.decode(item.tokens[None], np.ones((1, length), bool))
    return Answer(text, length, bool(truncated))


class _Clock:
    """Counts responses and estimates the remaining time.

    The first responses are not timed, because programs are compiled for them.
    """

    def __init__(self, total: int) -> None:
        self.total, self.done = total, 0
        self._timed, self._tokens, self._began = 0, 0, 0.0

    def tick(self, answers: int, tokens: int = 0) -> SweepProgress:
        """Counts `answers` more responses, for which `tokens` were generated, and returns the progress."""
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
    """Generates and judges the responses that the transcript file does not have yet.

    `unjudged` holds the transcript rows that wait for the scorers. `mixed` is true if the data set has both forbidden
    and other rows.
    """

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
        self.key = key
        self.file, self.report, self.batch_size = file, progress, batch_size
        self.mixed = len({example.kind == "forbidden" for example in examples}) > 1
        self.clock = _Clock(0)
        self.unjudged: list[Row] = []
        self.tokens, self.reported = 0, 0

    def run(self, layers: Sequence[int], attempts: int) -> int:
        """Generates and scores the missing responses and returns the number of generated tokens."""
        self.clock = _Clock(len(layers) * sum(row_attempts(example.kind, attempts) for example in self.examples))
        todo = self._missing(layers, attempts)
        self._judge(0)
        if todo:
            settings = self.sampling, self.batch_size, self.compile_ahead
            keys = answer_keys(self.key, len(self.examples), attempts)
            queue = Queue(self.vlm, self.examples, keys, todo, *settings)
            for responses in queue.answers():
                self._write(responses)
                self._judge(self.batch_size)
            self._judge(0)
        return self.tokens

    def _missing(self, layers: Sequence[int], attempts: int) -> dict[int, list[tuple[int, int]]]:
        """Returns {row index: (exit, attempt) pairs that have no response yet}.

        Existing responses that need scoring are added to `unjudged`.
        """
        todo: dict[int, list[tuple[int, int]]] = {}
        for number, example in enumerate(self.examples):
            for layer, attempt in itertools.product(layers, range(row_attempts(example.kind, attempts))):
                row = self.file.answer(example, layer, attempt)
                if row is None:
                    todo.setdefault(number, []).append((layer, attempt))
                elif self.file.is_judged(example, layer, attempt):
                    self.clock.done += 1
                else:
                    length, truncated = (int(row["scores"][name]) for name in ("length", "truncated"))
                    self.unjudged += self._row(
                        example, layer, attempt, Answer(row["response"], length, bool(truncated))
                    )
        return todo

    def _write(self, responses: Sequence[Response]) -> None:
        """Writes responses to the file before they are judged, and adds them to `unjudged`.

        Raises:
          UserError: the logits of a response were NaN or infinite; none of these responses is written then.
        """
        rows = []
        for item in responses:
            number, layer, attempt = item.tag
            answer = read_answer(item, self.vlm, self.sampling, self.examples[number].id)
            rows += self._row(self.examples[number], layer, attempt, answer)
            self.tokens += answer.length
        self.file.add(rows, judged=False)
        self.unjudged += rows

    def _row(self, example: Example, layer: int, attempt: int, answer: Answer) -> list[Row]:
        columns = [answer.text], [answer.length], [int(answer.truncated)]
        return answer_rows([example], layer, *columns, attempt=attempt, mixed=self.mixed)

    def _judge(self, minimum: int) -> None:
        """Judges the responses in `unjudged`, `batch_size` at a time, until it is empty or has fewer than `minimum`."""
        while self.unjudged and len(self.unjudged) >= minimum:
            rows, self.unjudged = self.unjudged[: self.batch_size], self.unjudged[self.batch_size :]
            with during("judging"):
                judge(rows, self.scorers, mixed=self.mixed)
            self.file.add(rows, judged=True)
            new_tokens = self.tokens - self.reported
            self.reported = self.tokens
            progress = self.clock.tick(len(rows), new_tokens)
            if self.report is not None:
                self.report(progress)
