"""Rows whose prompts do not fit: found before any program is compiled, and dropped or refused."""

import sys
from collections.abc import Sequence
from typing import Any

from ml_collections import ConfigDict

from icet_jax.checkpoints.hf_config import read_hf_config
from icet_jax.data.records import Example
from icet_jax.errors import UserError, one_line
from icet_jax.evaluation.batching import prompt_tokens

REASON = "too long"
_NAMED = 5  # rows that a message names
_SHOWN = 60  # characters of a row's id


def fitting_rows(
    config: ConfigDict, vlm: Any, source: str, name: str, examples: Sequence[Example], *, training: bool = False
) -> tuple[list[Example], dict[str, int]]:
    """The rows that fit, and {id: positions} of those that do not, which `config.data.too_long` may refuse.

    A training row must fit `config.data.max_prompt_tokens`; any row must leave the model room for the longest answer.

    Args:
      config: of the run.
      vlm: the model, an `icet_jax.api.VLM`.
      source: where the rows come from.
      name: of the set, as messages call it.
      examples: its rows.
      training: whether they are training rows.

    Raises:
      UserError: no row fits, or one does not and `config.data.too_long` is "stop".
    """
    limit, field, mend = _limit(config, vlm, training)
    if limit is None:
        return list(examples), {}
    lengths = [len(tokens) for tokens in prompt_tokens(vlm, examples)]
    pairs = list(zip(examples, lengths, strict=True))
    long = {row.id: length for row, length in pairs if length > limit}
    if not long:
        return list(examples), {}
    shown = ", ".join(f"row {one_line(str(row))[:_SHOWN]} takes {long[row]}" for row in list(long)[:_NAMED])
    more = f", and {len(long) - _NAMED} more" if len(long) > _NAMED else ""
    what = f"{len(long)} of {len(examples)} prompts are longer than the {limit} positions of {field} ({shown}{more})"
    mend = mend.format(max(long.values()))
    if len(long) == len(examples):
        raise UserError(f"{name} ({source}): no row fits: {what}; {mend}")
    if config.data.too_long == "stop":
        raise UserError(f"{name} ({source}): {what}; {mend}, or leave them out with config.data.too_long=drop")
    print(f"icet-jax: {one_line(f'{name} ({source})')}: left out: {what}; {mend} to keep them", file=sys.stderr)
    return [row for row, length in pairs if length <= limit], long


def _limit(config: ConfigDict, vlm: Any, training: bool) -> tuple[int | None, str, str]:
    """(positions that a prompt may take or None, what says so, how to raise it with the longest prompt's as `{}`)."""
    answer = "lppo.max_new_tokens" if training else "sweep.max_new_tokens"
    new = config.lppo.max_new_tokens if training else config.sweep.max_new_tokens
    positions = _positions(vlm)
    room = None if positions is None else max(positions - new, 0)
    longest = config.data.max_prompt_tokens
    if training and (room is None or longest <= room):
        return longest, "config.data.max_prompt_tokens", "set config.data.max_prompt_tokens={} or more"
    return room, f"the model's {positions} less config.{answer}={new}", f"lower config.{answer} or shorten the prompts"


def _positions(vlm: Any) -> int | None:
    """Positions that the language model was trained for, as its config.json says; None where it does not."""
    values = read_hf_config(vlm.directory)
    found = (values.get("text_config") or values).get("max_position_embeddings")
    return found if type(found) is int and found > 0 else None
