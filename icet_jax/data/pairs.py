"""Exit pairs, from which L-DPO learns: a training row at one exit, with an answer to prefer and an answer to avoid.

A file has one JSON object per line:

    {"id": ROW ID, "fingerprint": HASH OF THE ROW, "exit": L, "chosen": TEXT, "rejected": TEXT}

The fingerprint is the one in `fingerprints.json`. It identifies the row, because ids of different data sets may be
equal. The texts are answers of a model; a file of pairs may contain harmful text, as transcripts may.
"""

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from icet_jax.data.records import Example
from icet_jax.data.tables import jsonl_rows, text_problem
from icet_jax.errors import UserError
from icet_jax.files import JsonObject, write_text_atomic

_FIELDS = ("id", "fingerprint", "exit", "chosen", "rejected")


@dataclass(frozen=True, eq=False, kw_only=True)
class ExitPair(Example):
    """Holds a training row at one exit and its two answers.

    Attributes:
      exit_layer: the exit at which the answers are learnt, from 1.
      chosen: the answer to prefer.
      rejected: the answer to avoid.
    """

    exit_layer: int
    chosen: str
    rejected: str


class PairRecord(NamedTuple):
    """Holds one line of a file of pairs, whose row has not been looked up yet.

    Attributes:
      id: id of the row.
      fingerprint: hash of the row, as in `fingerprints.json`.
      exit_layer: exit of the pair, from 1.
      chosen: the answer to prefer.
      rejected: the answer to avoid.
      line: line of the file, from 1; 0 for a record that was not read from a file.
    """

    id: str
    fingerprint: str
    exit_layer: int
    chosen: str
    rejected: str
    line: int = 0

    def of_row(self, row: Example) -> ExitPair:
        """Returns the exit pair that consists of `row` and of the exit and the answers of this record."""
        return ExitPair(**vars(row), exit_layer=self.exit_layer, chosen=self.chosen, rejected=self.rejected)


def write_exit_pairs(path: str | Path, records: Iterable[PairRecord]) -> None:
    """Writes a file of pairs, all of it or nothing.

    Raises:
      UserError: the file cannot be written.
    """
    write_text_atomic(path, "".join(f"{json.dumps(dict(zip(_FIELDS, record, strict=False)))}\n" for record in records))


def read_exit_pairs(path: str | Path, num_exits: int) -> list[PairRecord]:
    """Returns the records of a file of pairs, in its order.

    Args:
      path: the file, .jsonl.
      num_exits: number of exits of the model.

    Raises:
      UserError: the file cannot be read or is empty, or a line is not a valid pair; the message names line and field.
    """
    path = Path(path)
    if path.suffix.lower() != ".jsonl":
        raise UserError(f"{path}: a file of pairs is .jsonl, not '{path.suffix}'; convert or rename it")
    try:
        records = [_record(f"{path}: line {line}", line, fields, num_exits) for line, fields in jsonl_rows(path)]
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); check config.ldpo.pairs") from error
    if not records:
        raise UserError(f"{path}: has no pairs; write it with a run of config.algorithm=ldpo or with --mode=sweep")
    return records


def _record(where: str, line: int, fields: JsonObject | str, num_exits: int) -> PairRecord:
    """Returns one line as a record.

    Raises:
      UserError: the line is not a valid pair.
    """
    if isinstance(fields, str):
        raise UserError(f"{where}: {fields}; correct or remove the line")
    for name in _FIELDS:
        problem = _problem(name, fields.get(name), num_exits)
        if problem is not None:
            raise UserError(f"{where}: {name} {problem}; correct or remove the line")
    unknown = sorted(set(fields) - {*_FIELDS})
    if unknown:
        raise UserError(f"{where}: {unknown[0]} is no field of a pair ({', '.join(_FIELDS)}); remove it")
    if fields["chosen"].strip() == fields["rejected"].strip():
        raise UserError(f"{where}: chosen and rejected are the same text; correct or remove the line")
    identity, fingerprint, exit_layer, chosen, rejected = (fields[name] for name in _FIELDS)
    return PairRecord(identity, fingerprint, exit_layer, chosen, rejected, line)


def _problem(name: str, value: Any, num_exits: int) -> str | None:
    """Returns what is wrong with the value of a field, or None."""
    if value is None:
        return "is missing"
    if name == "exit":
        is_exit = type(value) is int and 1 <= value <= num_exits
        return None if is_exit else f"is {str(value)[:20]!r}, but this model's exits are 1 to {num_exits}"
    if not isinstance(value, str):
        return "is not text"
    if name == "fingerprint" and not re.fullmatch(r"[0-9a-f]{16}", value):
        return "is not 16 hexadecimal digits of fingerprints.json"
    return text_problem(value)
