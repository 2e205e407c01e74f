"""Finds rows whose prompts are too long for the model before anything is compiled, and drops or rejects them."""

import sys
from collections.abc import Sequence
from typing import NamedTuple

from ml_collections import ConfigDict

from icet_jax.data.records import Example
from icet_jax.errors import UserError, one_line
from icet_jax.evaluation.batching import prompt_tokens
from icet_jax.media.limits import max_tokens
from icet_jax.models.base.processor import Processor

REASON = "too long"
_NAMED = 5  # most rows that a message names
_SHOWN = 60  # characters of a row's id that a message shows


def fitting_rows(
    config: ConfigDict, processor: Processor, max_positions: int | None, source: str, name: str,
    examples: Sequence[Example], *, training: bool = False,
) -> tuple[list[Example], dict[str, int]]:  # fmt: skip
    """Splits rows into those whose prompts fit the model and those that are too long.

    It names the latter on standard error, and the rows whose prompts spell a special token (see
    `icet_jax.media.tokenizer.PlainText`).

    A prompt and the longest allowed answer together must not take more positions than the model has. The prompt of a
    training row must also fit into `config.data.max_prompt_tokens`, and no prompt may have more text tokens than the
    tokenizer allows.

    Args:
      config: config of the run.
      processor: processor of the model.
      max_positions: largest number of positions of a prompt and its answer together; None for no limit.
      source: source of the rows, for messages.
      name: name of the set, for messages.
      examples: rows of the set.
      training: whether `examples` are training rows.

    Returns:
      The rows that fit, and {row id: number of positions of its prompt} for the rows that do not.

    Raises:
      UserError: no row fits; or some row does not fit and `config.data.too_long` is "stop".
    """
    _name_special_tokens(processor, f"{name} ({source})", examples)
    limit = _prompt_limit(config, max_positions, training)
    tokenizer_limit = max_tokens(processor.tokenizer)
    if limit.positions is None and tokenizer_limit is None:
        return list(examples), {}
    pairs = list(zip(examples, prompt_tokens(processor, examples), strict=True))
    over_limit = {row.id: len(ids) for row, ids in pairs if limit.positions is not None and len(ids) > limit.positions}
    over_tokenizer_limit = {
        row.id: len(ids) for row, ids in pairs if row.id not in over_limit and processor.misfit(ids) is not None
    }
    too_long = over_limit | over_tokenizer_limit
    if not too_long:
        return list(examples), {}
    limits = [f"the {limit.positions} positions of {limit.origin}"] if over_limit else []
    limits += [f"the tokenizer's model_max_length={tokenizer_limit}"] if over_tokenizer_limit else []
    shown = ", ".join(f"row {one_line(str(row))[:_SHOWN]} takes {too_long[row]}" for row in list(too_long)[:_NAMED])
    more = f", and {len(too_long) - _NAMED} more" if len(too_long) > _NAMED else ""
    what = f"{len(too_long)} of {len(examples)} prompts are longer than {' or '.join(limits)} ({shown}{more})"
    advice = limit.advice.format(max(over_limit.values())) if over_limit else "shorten the prompts"
    if len(too_long) == len(examples):
        raise UserError(f"{name} ({source}): no row fits: {what}; {advice}")
    if config.data.too_long == "stop":
        raise UserError(f"{name} ({source}): {what}; {advice}, or leave them out with config.data.too_long=drop")
    print(f"icet-jax: {one_line(f'{name} ({source})')}: left out: {what}; {advice} to keep them", file=sys.stderr)
    return [row for row in examples if row.id not in too_long], too_long


def _name_special_tokens(processor: Processor, name: str, examples: Sequence[Example]) -> None:
    """Prints how many prompts of the set `name` spell a special token of the tokenizer, and the first of them."""
    rows = [str(row.id) for row in examples if processor.plain.changes(row.prompt)]
    if rows:
        count = f"{len(rows)} of {len(examples)} prompts spell a special token of the tokenizer"
        shown = f"first in row {one_line(rows[0])[:_SHOWN]}"
        print(f"icet-jax: {one_line(name)}: {count} ({shown}), which stays text: it gets a space", file=sys.stderr)


class _PromptLimit(NamedTuple):
    """Holds the limit for the length of prompts.

    Attributes:
      positions: largest number of positions of a prompt; None for no limit.
      origin: what sets the limit, for messages.
      advice: how to fix prompts that are too long; "{}" stands for the number of positions of the longest prompt.
    """

    positions: int | None
    origin: str
    advice: str


def _prompt_limit(config: ConfigDict, max_positions: int | None, training: bool) -> _PromptLimit:
    """Returns the limit for prompts: the model's positions minus those of the longest allowed answer.

    For training rows the limit is `config.data.max_prompt_tokens` if that is smaller.
    """
    field = "lppo.max_new_tokens" if training else "sweep.max_new_tokens"
    new_tokens = config.lppo.max_new_tokens if training else config.sweep.max_new_tokens
    model_limit = None if max_positions is None else max(max_positions - new_tokens, 0)
    training_limit = config.data.max_prompt_tokens
    if training and (model_limit is None or training_limit <= model_limit):
        advice = "set config.data.max_prompt_tokens={} or more"
        return _PromptLimit(training_limit, "config.data.max_prompt_tokens", advice)
    origin = f"the model's {max_positions} less config.{field}={new_tokens}"
    return _PromptLimit(model_limit, origin, f"lower config.{field} or shorten the prompts")
