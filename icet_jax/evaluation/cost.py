"""What a sweep will cost, before it starts: answers, tokens, operations, time, judged responses.

Operations are those of the matrix products and of attention, counted by the model for prompts padded to the bucket of
the average one. Time is these over speeds measured on the device, of products shaped like a prompt's and like one
decoding step's; what else a model does, and slots that stand empty at the end, are in the range's upper end. Compiling,
and the judges' own work, are not in it.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
from flax import nnx

from icet_jax.data.padding import prompt_bucket
from icet_jax.data.records import Example
from icet_jax.evaluation.scoring import concerns
from icet_jax.generation.sampling import Sampling
from icet_jax.parallel.speed import product_speed
from icet_jax.scorers.base import Scorer
from icet_jax.vlm import VLM

_SAMPLED = 64  # prompts tokenised to learn their lengths
_SHORT = 1 / 8  # of the token limit: answers of the optimistic end of the range
_SLACK = 3.0  # pessimistic end: three times the time of the bare products
_CPU_ROWS, _ROWS = 256, 4096  # of the product that stands for a prompt's
_CPU_ELEMENTS = 1 << 23  # largest matrix timed on a CPU


class Rates(NamedTuple):
    """Floating-point operations a second: of products over many rows, and over the rows of one decoding step."""

    prompts: float
    steps: float


@dataclass(frozen=True)
class Cost:
    """What sweeps will take. Costs of several sweeps add up with `+`.

    Attributes:
      rows: rows of the data sets.
      answers: rows x exits.
      prompt_tokens: of one exit, image positions included, without padding (estimated from a sample of the prompts).
      new_tokens: at most.
      tower_flops: encoding the images, once for all exits.
      prompt_flops: projector and prefill at every exit.
      answer_flops: decoding, where every answer is as long as allowed.
      judged: scorer -> responses that it will score.
      remote_seconds: scorer -> least time its service's rate limit allows for them.
      seconds: (from, to): all answers short and nothing but the products; all as long as allowed, with slack.
    """

    rows: int = 0
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
        def joined(mine: dict[str, Any], theirs: dict[str, Any]) -> dict[str, Any]:
            return {name: mine.get(name, 0) + theirs.get(name, 0) for name in {**mine, **theirs}}

        return Cost(
            self.rows + other.rows,
            self.answers + other.answers,
            self.prompt_tokens + other.prompt_tokens,
            self.new_tokens + other.new_tokens,
            self.tower_flops + other.tower_flops,
            self.prompt_flops + other.prompt_flops,
            self.answer_flops + other.answer_flops,
            joined(self.judged, other.judged),
            joined(self.remote_seconds, other.remote_seconds),
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
) -> Cost:
    """The cost of `icet_jax.evaluation.sweep.sweep` with the same arguments, before it starts.

    Args:
      vlm: the model.
      examples: the data set's rows.
      exits: "all", or numbers.
      sampling: how answers are drawn.
      scorers: what will judge them. One with `requests_per_second` asks a service.
      batch_size: rows answered at once.
      dtype: of the computation.
      rates: speeds; measured if None (in about a second, once per process).

    Raises:
      UserError: a prompt that the tokenizer cannot take, or an image of the sample that cannot be opened.
    """
    count = vlm.num_exits if isinstance(exits, str) else len(set(exits))
    lengths = _prompt_lengths(vlm, examples)
    per_row = max((len(row.images) for row in examples), default=0)
    length = prompt_bucket(math.ceil(sum(lengths) / max(len(lengths), 1)))
    model = nnx.merge(vlm.graphdef, vlm.params)
    each = model.operations(length, length + sampling.max_new_tokens, per_row)
    tower = len(examples) * per_row * each.encode
    prompts = len(examples) * count * (per_row * each.visual + each.prefill)
    steps = len(examples) * count * sampling.max_new_tokens * each.step
    if rates is None:
        devices = 1 if vlm.mesh is None else vlm.mesh.size
        ffn = max(size_out for _, _, size_out in vlm.lora_shapes.values())
        rates = measured_rates(vlm.hidden_size, ffn, batch_size, dtype, devices)
    judged = {
        f"{scorer.metric}/{scorer.name}": count * sum(concerns(scorer, row.kind) for row in examples)
        for scorer in scorers
    }
    limits = {f"{scorer.metric}/{scorer.name}": _requests_per_second(scorer) for scorer in scorers}
    before_answers = (tower + prompts) / rates.prompts
    return Cost(
        rows=len(examples),
        answers=len(examples) * count,
        prompt_tokens=round(sum(lengths) / max(len(lengths), 1) * len(examples)),
        new_tokens=len(examples) * count * sampling.max_new_tokens,
        tower_flops=tower,
        prompt_flops=prompts,
        answer_flops=steps,
        judged=judged,
        remote_seconds={name: judged[name] / limit for name, limit in limits.items() if limit},
        seconds=(
            before_answers + _SHORT * steps / rates.steps,
            _SLACK * (before_answers + steps / rates.steps),
        ),
    )


def measured_rates(width: int, ffn: int, batch_size: int, dtype: str, devices: int = 1) -> Rates:
    """Speeds of this process's device, times `devices`, timed in less than about a second.

    Args:
      width: of the decoder.
      ffn: width of its feed-forward layers.
      batch_size: rows of one decoding step.
      dtype: of the computation.
      devices: over which a batch is split.
    """
    on_cpu = jax.default_backend() == "cpu"
    if on_cpu:
        ffn = max(1, min(ffn, _CPU_ELEMENTS // width))
    rows = _CPU_ROWS if on_cpu else _ROWS
    prompts, steps = (product_speed(count, width, ffn, dtype) for count in (rows, batch_size))
    return Rates(devices * prompts, devices * min(prompts, steps))


def _prompt_lengths(vlm: VLM, examples: Sequence[Example]) -> list[int]:
    """Tokens of at most `_SAMPLED` prompts at even distances, images included."""
    count = min(len(examples), _SAMPLED)
    sample = [examples[index * len(examples) // count] for index in range(count)]
    prompts = vlm.processor.token_ids([list(row.images) for row in sample], [row.prompt for row in sample])
    return [len(tokens) for tokens in prompts]


def _requests_per_second(scorer: Scorer) -> float | None:
    """The rate limit of a scorer's service, also behind a cache; None for a scorer that runs here."""
    return getattr(getattr(scorer, "scorer", scorer), "requests_per_second", None)
