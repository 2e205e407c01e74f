"""Finds rows whose prompts are too long before any program is compiled, and drops or rejects them."""

import sys
from collections.abc import Sequence

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
    """Returns the rows that fit, and {id: positions} of those that do not, which `config.data.too_long` may forbid.

    A training row must fit `config.data.max_prompt_tokens`. Every row must leave the model room for the longest
    response and must not have more text tokens than the tokenizer allows.

    Args:
      config: config of the run.
      processor: processor of the model.
      max_positions: most positions of a prompt and its response in the model; None for no limit.
      source: source of the rows.
      name: name of the set in messages.
      examples: rows of the set.
      training: whether they are training rows.

    Raises:
      UserError: no row fits, or one does not and `config.data.too_long` is "stop".
    """
    limit, field, advice = _limit(config, max_positions, training)
    most = max_tokens(processor.tokenizer)
    if limit is None and most is None:
        return list(examples), {}
    pairs = list(zip(examples, prompt_tokens(processor, examples), strict=True))
    beyond = {row.id: len(ids) for row, ids in pairs if limit is not None and len(ids) > limit}
    misfits = {row.id: len(ids) for row, ids in pairs if row.id not in beyond and processor.misfit(ids) is not None}
    long = beyond | misfits
    if not long:
        return list(examples), {}
    bounds = [f"the {limit} positions of {field}"] if beyond else []
    bounds += [f"the tokenizer's model_max_length={most}"] if misfits else []
    shown = ", ".join(f"row {one_line(str(row))[:_SHOWN]} takes {long[row]}" for row in list(long)[:_NAMED])
    more = f", and {len(long) - _NAMED} more" if len(long) > _NAMED else ""
    what = f"{len(long)} of {len(examples)} prompts are longer than {' or '.join(bounds)} ({shown}{more})"
    advice = advice.format(max(beyond.values())) if beyond else "shorten the prompts"
    if len(long) == len(examples):
        raise UserError(f"{name} ({source}): no row fits: {what}; {advice}")
    if config.data.too_long == "stop":
        raise UserError(f"{name} ({source}): {what}; {advice}, or leave them out with config.data.too_long=drop")
    print(f"icet-jax: {one_line(f'{name} ({source})')}: left out: {what}; {advice} to keep them", file=sys.stderr)
    return [row for row in examples if row.id not in long], long


def _limit(config: ConfigDict, positions: int | None, training: bool) -> tuple[int | None, str, str]:
    """Returns the most positions of a prompt or None, the reason, and advice with `{}` for the positions of the longest
    prompt."""
    answer = "lppo.max_new_tokens" if training else "sweep.max_new_tokens"
    new = config.lppo.max_new_tokens if training else config.sweep.max_new_tokens
    room = None if positions is None else max(positions - new, 0)
    longest = config.data.max_prompt_tokens
    if training and (room is None or longest <= room):
        return longest, "config.data.max_prompt_tokens", "set config.data.max_prompt_tokens={} or more"
    return room, f"the model's {positions} less config.{answer}={new}", f"lower config.{answer} or shorten the prompts"
