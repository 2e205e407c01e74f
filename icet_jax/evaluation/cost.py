"""Estimates the cost of a sweep before it starts: responses, tokens, operations, time, judged responses.

Operations are floating-point operations of matrix products and attention, for prompts padded like one of average
length. Time is operations divided by the device's speed, which is measured with matrix products in the shapes of a
prompt and of a decoding step. The upper end of the time range allows for the model's other work and for empty slots at
the end. Compilation and the judges' work are not included.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
from flax import nnx

from icet_jax.data.padding import prompt_bucket
from icet_jax.data.records import Example
from icet_jax.evaluation.combined import row_attempts
from icet_jax.evaluation.scoring import concerns
from icet_jax.generation.sampling import Sampling
from icet_jax.parallel.speed import product_speed
from icet_jax.scorers.base import Scorer
from icet_jax.vlm import VLM

_SAMPLE_SIZE = 64  # prompts that are tokenised to estimate the mean length
_SHORT_RESPONSE = 1 / 8  # length of all responses at the lower end of the time range, as a share of the token limit
_SLACK = 3.0  # upper end of the time range, as a multiple of the time that the matrix products alone take
_PREFILL_ROWS = 4096  # rows of the matrix product that is timed for prefill
_PREFILL_ROWS_ON_CPU = 256
_MAX_ELEMENTS_ON_CPU = 1 << 23  # number of elements of the largest matrix that is timed on a CPU


class Rates(NamedTuple):
    """Holds speeds in floating-point operations per second.

    Attributes:
      prompts: speed of matrix products over many rows, as in prefill.
      steps: speed of matrix products over as many rows as one decoding step has.
    """

    prompts: float
    steps: float


@dataclass(frozen=True)
class Cost:
    """Holds the cost of sweeps; costs of several sweeps are added with `+`.

    Attributes:
      rows: rows of the data sets.
      attempts: number of responses at one exit, larger than `rows` if rows are answered several times.
      answers: number of responses at all exits.
      prompt_tokens: tokens of the prompts at one exit, with image positions, without padding (estimated from a sample).
      new_tokens: largest number of tokens that can be generated.
      tower_flops: operations of the image encoder, which runs once for all exits.
      prompt_flops: operations of projector and prefill at all exits.
      answer_flops: operations of decoding if every response reaches the token limit.
      judged: {scorer: responses that it will score}.
      remote_seconds: {scorer that uses a service with a rate limit: shortest time in which it can score its responses}.
      seconds: (low, high) estimate of the time. The low one is for short responses and counts matrix products alone;
        the high one is for responses that reach the token limit and allows for all other work.
    """

    rows: int = 0
    attempts: int = 0
    answers: int = 0
    prompt_tokens: int = 0
    new_tokens: int = 0
    tower_flops: int = 0
    prompt_flops: int = 0
    answer_flops: int = 0
    judged: dict[str, int] = field(default_factory=dict)
    remote_seconds: dict[str, float] = field(default_factory=dict)
    seconds: tuple[float, float] = (0.0, 0.0)

    def __add__(self, other: "Cost") -> "Cost":
        """Returns the cost of both sweeps together."""

        def add(left: dict[str, Any], right: dict[str, Any]) -> dict[str, Any]:
            return {name: left.get(name, 0) + right.get(name, 0) for name in {**left, **right}}

        return Cost(
            self.rows + other.rows,
            self.attempts + other.attempts,
            self.answers + other.answers,
            self.prompt_tokens + other.prompt_tokens,
            self.new_tokens + other.new_tokens,
            self.tower_flops + other.tower_flops,
            self.prompt_flops + other.prompt_flops,
            self.answer_flops + other.answer_flops,
            add(self.judged, other.judged),
            add(self.remote_seconds, other.remote_seconds),
            (self.seconds[0] + other.seconds[0], self.seconds[1] + other.seconds[1]),
        )


def estimate(
    vlm: VLM,
    examples: Sequence[Example],
    *,
    exits: Sequence[int] | str = "all",
    sampling: Sampling,
    scorers: Sequence[Scorer],
    batch_size: int,
    dtype: str,
    rates: Rates | None = None,
    attempts: int = 1,
) -> Cost:
    """Returns an estimate of the cost of `icet_jax.evaluation.sweep.sweep` with the same arguments.

    Args:
      vlm, examples, exits, sampling, batch_size: see `sweep`.
      scorers: scorers of the responses; one with the attribute `requests_per_second` uses a service.
      dtype: dtype of the computation.
      rates: speeds of the device; None measures them (in about a second, once per process).
      attempts: responses of each forbidden row at an exit; the prompt is processed for each of them.

    Raises:
      UserError: the tokenizer rejects a prompt, or an image of the sample cannot be opened.
    """
    count = vlm.num_exits if isinstance(exits, str) else len(set(exits))
    lengths = _prompt_lengths(vlm, examples)
    per_row = max((len(row.images) for row in examples), default=0)
    length = prompt_bucket(math.ceil(sum(lengths) / max(len(lengths), 1)))
    model = nnx.merge(vlm.graphdef, vlm.params)
    operations = model.operations(length, length + sampling.max_new_tokens, per_row)
    tower = len(examples) * per_row * operations.encode
    responses = sum(row_attempts(row.kind, attempts) for row in examples)
    prompts = responses * count * (per_row * operations.visual + operations.prefill)
    steps = responses * count * sampling.max_new_tokens * operations.step
    if rates is None:
        devices = 1 if vlm.mesh is None else vlm.mesh.size
        ffn = max(size_out for _, _, size_out in vlm.lora_shapes.values())
        rates = measured_rates(vlm.hidden_size, ffn, batch_size, dtype, devices)
    judged = {
        f"{scorer.metric}/{scorer.name}": count
        * sum(row_attempts(row.kind, attempts) for row in examples if concerns(scorer, row.kind))
        for scorer in scorers
    }
    limits = {f"{scorer.metric}/{scorer.name}": _requests_per_second(scorer) for scorer in scorers}
    before_answers = (tower + prompts) / rates.prompts
    return Cost(
        rows=len(examples),
        attempts=responses,
        answers=responses * count,
        prompt_tokens=round(sum(lengths) / max(len(lengths), 1) * len(examples)),
        new_tokens=responses * count * sampling.max_new_tokens,
        tower_flops=tower,
        prompt_flops=prompts,
        answer_flops=steps,
        judged=judged,
        remote_seconds={name: judged[name] / limit for name, limit in limits.items() if limit},
        seconds=(
            before_answers + _SHORT_RESPONSE * steps / rates.steps,
            _SLACK * (before_answers + steps / rates.steps),
        ),
    )


def measured_rates(width: int, ffn: int, batch_size: int, dtype: str, devices: int = 1) -> Rates:
    """Measures the speed of this process's device and returns it multiplied by `devices`; takes at most about a second.

    Args:
      width: width of the decoder.
      ffn: width of its feed-forward layers.
      batch_size: rows of one decoding step.
      dtype: dtype of the computation.
      devices: number of devices over which a batch is split.
    """
    on_cpu = jax.default_backend() == "cpu"
    if on_cpu:
        ffn = max(1, min(ffn, _MAX_ELEMENTS_ON_CPU // width))
    rows = _PREFILL_ROWS_ON_CPU if on_cpu else _PREFILL_ROWS
    prompts, steps = (product_speed(count, width, ffn, dtype) for count in (rows, batch_size))
    # Products over the few rows of a decoding step cannot be faster than those of prefill: a higher speed is noise.
    return Rates(devices * prompts, devices * min(prompts, steps))


def _prompt_lengths(vlm: VLM, examples: Sequence[Example]) -> list[int]:
    """Returns the lengths in tokens, image positions included, of at most `_SAMPLE_SIZE` evenly spaced prompts."""
    count = min(len(examples), _SAMPLE_SIZE)
    sample = [examples[index * len(examples) // count] for index in range(count)]
    prompts = vlm.processor.token_ids([list(row.images) for row in sample], [row.prompt for row in sample])
    return [len(tokens) for tokens in prompts]


def _requests_per_second(scorer: Scorer) -> float | None:
    """Returns the rate limit of a scorer's service, also of a cached scorer; None for a scorer without a service."""
    return getattr(getattr(scorer, "scorer", scorer), "requests_per_second", None)
