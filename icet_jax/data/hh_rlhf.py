"""Reads preference pairs in the format of Anthropic's HH-RLHF: two transcripts that differ only in the last answer.

A file is .jsonl or .jsonl.gz. Each line is `{"chosen": TRANSCRIPT, "rejected": TRANSCRIPT}`. A transcript is
"\\n\\nHuman: ...\\n\\nAssistant: ..." with any number of turns, and the assistant's turn is the last. Rows in another
form are left out and counted by reason.
"""

import gzip
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from icet_jax.data.records import BadRow
from icet_jax.data.tables import json_row
from icet_jax.errors import UserError
from icet_jax.files import require_regular

HUMAN, ASSISTANT = "\n\nHuman:", "\n\nAssistant:"

PreferencePair = tuple[str, str, str]
"""(prompt, chosen response, rejected response)."""


@dataclass(frozen=True, eq=False)
class Preferences:
    """Holds the preference pairs of a file, or of several, and counts of the rows that were left out.

    Attributes:
      source: the file, or the joined names of several.
      pairs: the usable pairs, in file order. A prompt is the transcript up to the last question, including earlier
        turns, without the leading "\\n\\nHuman: "; the template "\\n\\nHuman: {prompt} \\n\\nAssistant:" restores it.
      read: number of rows in the file, without blank lines.
      dropped: {reason: number of rows that were left out for it}.
      first_line: {reason: line number of the first row that was left out for it}.
      sources: {pair: the source that it was read from}; empty for a single file.
    """

    source: str
    pairs: list[PreferencePair]
    read: int
    dropped: Counter[str] = field(default_factory=Counter)
    first_line: dict[str, int] = field(default_factory=dict)
    sources: dict[PreferencePair, str] = field(default_factory=dict)

    def report(self) -> str:
        """Returns one line for a log: the numbers of pairs, of rows, and of rows left out for each reason."""
        reasons = sorted(self.dropped.items(), key=lambda item: (-item[1], item[0]))
        parts = [f"{reason}: {count} (first on line {self.first_line[reason]})" for reason, count in reasons]
        left_out = f", {self.dropped.total()} left out ({'; '.join(parts)})" if parts else ""
        return f"{Path(self.source).name}: {len(self.pairs)} pairs of {self.read} rows{left_out}"


def read_pairs(path: str | Path) -> Preferences:
    """Reads a file of preference pairs.

    Raises:
      UserError: the file cannot be read, has another format, is truncated, or contains no usable pair.
    """
    path = Path(path)
    if not path.name.lower().endswith((".jsonl", ".jsonl.gz")):
        raise UserError(f"{path}: preference pairs are .jsonl or .jsonl.gz; convert or rename the file")
    pairs: dict[PreferencePair, None] = {}  # an ordered set
    dropped: Counter[str] = Counter()
    first_line: dict[str, int] = {}
    read = 0
    try:
        for line, text in _lines(path):
            read += 1
            try:
                pair = _pair(text)
                if pair in pairs:
                    raise BadRow("repeats an earlier pair")
            except BadRow as error:
                dropped[error.reason] += 1
                first_line.setdefault(error.reason, line)
                continue
            pairs[pair] = None
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise UserError(f"{path}: a damaged or truncated gzip file ({error}); download it again") from error
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); check the path") from error
    result = Preferences(str(path), list(pairs), read, dropped, first_line)
    if not pairs:
        raise UserError(f"{path}: no usable preference pair: {result.report() if read else 'the file is empty'}")
    return result


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Yields (line number, bytes) of every line that is not blank."""
    require_regular(path)
    with gzip.open(path) if path.suffix.lower() == ".gz" else path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                yield number, line


def _pair(line: bytes) -> PreferencePair:
    """Returns the preference pair of a line; raises `BadRow` if the line is not a valid pair."""
    try:
        row = json_row(line.decode("utf-8-sig"))
    except UnicodeDecodeError:
        raise BadRow("not UTF-8") from None
    except ValueError:
        raise BadRow("not JSON") from None
    if isinstance(row, str):
        raise BadRow(row)
    (prompt, chosen), (rejected_prompt, rejected) = (_split(row.get(name), name) for name in ("chosen", "rejected"))
    if prompt != rejected_prompt:
        raise BadRow("the transcripts differ before the last answer")
    if chosen == rejected:
        raise BadRow("both answers are the same")
    return prompt, chosen, rejected


def _split(transcript: object, name: str) -> tuple[str, str]:
    """Returns (prompt, last answer), both stripped, of the transcript in field `name`.

    Raises:
      BadRow: the field is not a valid transcript that ends with a non-empty answer.
    """
    if not isinstance(transcript, str):
        raise BadRow(f"{name} is no text")
    # A lone surrogate is valid JSON, but tokenizers reject it.
    if any("\ud800" <= char <= "\udfff" for char in transcript):
        raise BadRow(f"{name} is not valid Unicode")
    start, colon, answer = transcript.rpartition(ASSISTANT)
    if not start.startswith(HUMAN) or not colon:
        raise BadRow(f"{name} is no transcript of Human and Assistant")
    if HUMAN in answer:
        raise BadRow(f"{name} does not end with the assistant's turn")
    prompt, answer = start.removeprefix(HUMAN).strip(), answer.strip()
    if not prompt or not answer:
        raise BadRow(f"{name} has an empty {'question' if not prompt else 'answer'}")
    return prompt, answer


def split_by_prompt(
    pairs: Iterable[PreferencePair], share: float, seed: int
) -> tuple[list[PreferencePair], list[PreferencePair]]:
    """Returns (training pairs, held-out pairs); about the fraction `share` of the prompts is held out.

    Whether a pair is held out depends on its prompt, `share` and `seed` alone. All pairs with the same prompt are
    therefore on the same side, and adding pairs to a file does not move its other pairs.
    """
    train: list[PreferencePair] = []
    held_out: list[PreferencePair] = []
    for pair in pairs:
        position = zlib.crc32(f"{seed}\n{pair[0]}".encode()) / 2**32
        (held_out if position < share else train).append(pair)
    return train, held_out


def without_prompts(pairs: Iterable[PreferencePair], others: Iterable[PreferencePair]) -> list[PreferencePair]:
    """Returns those `pairs` whose prompt is not the prompt of any pair in `others`."""
    prompts = {pair[0] for pair in others}
    return [pair for pair in pairs if pair[0] not in prompts]
