"""The transcript file of a sweep: appended to as answers are scored, and what a killed sweep goes on from."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from icet_jax.data.records import Example
from icet_jax.errors import UserError
from icet_jax.evaluation.summary import Row
from icet_jax.files import write_text_atomic


def fingerprint(*settings: Any) -> str:
    """A short mark of everything that a row depends on besides the data set."""
    return hashlib.sha256(repr(settings).encode()).hexdigest()[:12]


class TranscriptFile:
    """Rows by (id, layer), in memory and, where a path is given, one JSON line each."""

    def __init__(self, path: str | Path | None, mark: str, examples: Sequence[Example]) -> None:
        """Reads what an earlier, killed sweep of the same mark and rows left; a half-written last line is cut off.

        Raises:
          UserError: ids that repeat; a file that is not a transcript, or of other settings, weights or rows.
        """
        self._path = None if path is None else Path(path)
        self._mark, self._examples = mark, list(examples)
        self._rows: dict[tuple[str, int], Row] = {}
        by_id = {example.id: example for example in self._examples}
        if len(by_id) != len(self._examples):
            raise UserError(f"{len(self._examples) - len(by_id)} rows repeat an id; give every row its own")
        if self._path is not None and self._path.exists():
            self._read(self._path, by_id)

    def has(self, examples: Sequence[Example], layer: int) -> bool:
        """Whether all of these rows are there at an exit."""
        return all((example.id, layer) in self._rows for example in examples)

    def add(self, rows: Sequence[Row]) -> None:
        """Keeps rows, replacing older ones of the same id and layer.

        Raises:
          UserError: the file cannot be written.
        """
        for row in rows:
            self._rows[row["id"], row["layer"]] = row
        if self._path is None:
            return
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with self._path.open("a", encoding="utf-8") as file:
                file.write("".join(map(self._line, rows)))
        except OSError as error:
            raise UserError(
                f"{self._path}: cannot be written ({error.strerror}); choose another place or free space"
            ) from error

    def finish(self, layers: Sequence[int]) -> list[Row]:
        """The rows at `layers`, by data-set row, then by layer; the file is put in that order (with all its layers)."""
        every = sorted({layer for _, layer in self._rows})
        keys = [(example.id, layer) for example in self._examples for layer in every]
        if self._path is not None:
            write_text_atomic(self._path, "".join(self._line(self._rows[key]) for key in keys if key in self._rows))
        return [self._rows[example.id, layer] for example in self._examples for layer in layers]

    def _line(self, row: Row) -> str:
        return json.dumps({**row, "sweep": self._mark}, allow_nan=False) + "\n"

    def _read(self, path: Path, by_id: dict[str, Example]) -> None:
        data = path.read_bytes()
        whole = data[: data.rfind(b"\n") + 1]
        for number, line in enumerate(whole.split(b"\n")[:-1], start=1):
            try:
                row = json.loads(line)
                mark, key = row.pop("sweep"), (row["id"], row["layer"])
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise UserError(f"{path}: line {number} is no transcript row; move the file away") from error
            example = by_id.get(row["id"])
            if mark != self._mark or example is None or example.prompt != row["prompt"]:
                raise UserError(
                    f"{path}: line {number} is of another sweep (settings, weights or rows differ); move the file away"
                )
            self._rows[key] = row
        if len(whole) < len(data):
            with path.open("r+b") as file:
                file.truncate(len(whole))
