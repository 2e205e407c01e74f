"""The transcript file of a sweep, from which an interrupted sweep continues.

A response is written before it is judged, and again with its scores. Each line has two fingerprints: one of the sweep
(what the response depends on besides the data set) and one of the judges (what the scores depend on; None before there
are scores). A response is judged again if its judges have changed or one of them failed. If there are several
processes, only the first one reads and writes the file; all keep the same rows in memory.
"""

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from icet_jax.data.records import Example
from icet_jax.errors import UserError
from icet_jax.evaluation.combined import row_attempts, transcript_key
from icet_jax.evaluation.scoring import facts
from icet_jax.evaluation.summary import Row
from icet_jax.files import append_text, read_bytes, seal, unseal, write_text_atomic
from icet_jax.parallel.distributed import is_writer, on_first


def fingerprint(*settings: Any) -> str:
    """Returns a short hash of settings, which must have a `repr` that identifies their values."""
    return hashlib.sha256(repr(settings).encode()).hexdigest()[:12]


class TranscriptFile:
    """Holds a sweep's transcript rows by (id, exit, attempt), in memory and, if there is a path, in a file."""

    def __init__(self, path: str | Path | None, mark: str, judges: str, examples: Sequence[Example]) -> None:
        """Reads the file of an interrupted sweep, if it exists; an incomplete last line is removed from it.

        Args:
          path: the file; None keeps the rows only in memory.
          mark: `fingerprint` of the settings and weights that responses depend on.
          judges: `fingerprint` of the scorers, on which scores depend.
          examples: rows of the data set.

        Raises:
          UserError: ids repeat, or the file is not a transcript or belongs to other settings, weights or rows.
        """
        self._path = None if path is None else Path(path)
        self._mark, self._judges, self._examples = mark, judges, list(examples)
        self._rows: dict[tuple[str, int, int], Row] = {}
        self._judged: set[tuple[str, int, int]] = set()
        by_id = {example.id: example for example in self._examples}
        if len(by_id) != len(self._examples):
            raise UserError(f"{len(self._examples) - len(by_id)} rows repeat an id; give every row its own")
        if self._path is None:
            return
        file = self._path
        for row, judged in on_first(lambda: list(self._read(file, by_id)) if file.exists() else []):
            key = transcript_key(row)
            self._rows[key] = row
            (self._judged.add if judged else self._judged.discard)(key)

    def is_judged(self, example: Example, layer: int, attempt: int = 0) -> bool:
        """Returns whether a row has a response at an exit and the current judges have judged it."""
        return (example.id, layer, attempt) in self._judged

    def answer(self, example: Example, layer: int, attempt: int = 0) -> Row | None:
        """Returns the transcript row of a response, judged or not; None if there is no response yet."""
        return self._rows.get((example.id, layer, attempt))

    def add(self, rows: Sequence[Row], *, judged: bool) -> None:
        """Stores rows, in memory and in the file, in place of stored rows with the same id, exit and attempt.

        Args:
          rows: transcript rows.
          judged: whether all judges have scored `rows`.

        Raises:
          UserError: the file cannot be written.
        """
        for row in rows:
            key = transcript_key(row)
            self._rows[key] = row
            (self._judged.add if judged else self._judged.discard)(key)
        if self._path is not None and is_writer():
            append_text(self._path, "".join(map(self._line, rows)))

    def finish(self, layers: Sequence[int], attempts: int = 1) -> list[Row]:
        """Returns the transcript rows of a finished sweep and sorts the file, by row of data, exit and attempt.

        Args:
          layers: exits of the sweep; rows at other exits stay in the file and are not returned.
          attempts: responses of each forbidden row at an exit; rows of further attempts also stay in the file only.
        """
        numbers = {example.id: number for number, example in enumerate(self._examples)}
        if self._path is not None:
            keys = sorted(self._rows, key=lambda key: (numbers[key[0]], *key[1:]))
            write_text_atomic(self._path, "".join(self._line(self._rows[key]) for key in keys))
        return [
            self._rows[example.id, layer, attempt]
            for example in self._examples
            for layer in layers
            for attempt in range(row_attempts(example.kind, attempts))
        ]

    def _line(self, row: Row) -> str:
        judges = self._judges if transcript_key(row) in self._judged else None
        return seal({**row, "sweep": self._mark, "judges": judges}) + "\n"

    def _read(self, path: Path, by_id: dict[str, Example]) -> Iterator[tuple[Row, bool]]:
        """Yields (transcript row, whether the current judges have judged it) for each complete line of the file.

        At the end it removes an incomplete last line, left by a process that was stopped while writing.

        Raises:
          UserError: the file cannot be read, a line is not a transcript row, or a line belongs to another sweep.
        """
        try:
            data = read_bytes(path)
        except OSError as error:
            raise UserError(f"{path}: cannot be read ({error.strerror}); move the file away") from error
        complete_lines = data[: data.rfind(b"\n") + 1]
        for number, line in enumerate(complete_lines.split(b"\n")[:-1], start=1):
            try:
                row = unseal(line.decode("utf-8"))
                mark, judges = row.pop("sweep"), row.pop("judges")
                if not _is_row(row):
                    raise ValueError("a field is missing or of another type")
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise UserError(f"{path}: line {number} is no transcript row; move the file away") from error
            example = by_id.get(row["id"])
            if mark != self._mark or example is None or example.prompt != row["prompt"]:
                raise UserError(
                    f"{path}: line {number} is of another sweep (settings, weights or rows differ); move the file away"
                )
            # A row from an earlier version lacks newer fields of the data set, such as its attack format.
            yield row | facts(example), judges == self._judges and None not in row["scores"].values()
        if len(complete_lines) < len(data):
            with path.open("r+b") as file:
                file.truncate(len(complete_lines))


def finished_rows(path: Path, required: Sequence[tuple[str, int, int]]) -> list[Row]:
    """Returns the transcript rows in the file of a finished sweep.

    Args:
      path: the file.
      required: (id, exit, attempt) of the rows that must exist.

    Raises:
      UserError: the file is damaged, or rows are missing.
    """
    try:
        rows = [unseal(line.decode("utf-8")) for line in read_bytes(path).split(b"\n")[:-1]]
        missing = set(required) - set(map(transcript_key, rows))
        if missing:
            raise ValueError(f"{len(missing)} rows are missing")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{path}: is damaged ({error}); remove it, and the {path.stem}.json of its sweep, to have it measured again"
        ) from error
    return rows


def _is_row(row: Row) -> bool:
    """Returns whether a transcript row has all required fields, of the right types."""
    scores = row.get("scores")
    return (
        all(isinstance(row.get(name), str) for name in ("id", "prompt", "response"))
        and type(row["layer"]) is int
        and type(row.get("attempt", 0)) is int
        and isinstance(scores, dict)
        and all(value is None or type(value) in (int, float) for value in scores.values())
    )
