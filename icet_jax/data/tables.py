"""Yields the raw rows of CSV files, JSONL files, and arrays inside large JSON files one by one.

A malformed row does not affect the rows after it. Bytes that are not UTF-8 become surrogates, which `text_problem`
reports.
"""

import codecs
import csv
import json
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO, TypeAlias

from icet_jax.errors import UserError
from icet_jax.files import LFS_ADVICE, JsonObject, is_lfs_pointer, parse_json, require_regular

RawRow: TypeAlias = tuple[int, JsonObject | str]
"""(number of the line on which a row ends, the row's fields or, if the row is malformed, what is wrong with it)."""

_CHUNK = 1 << 20  # characters of a JSON file that are read at a time


def csv_rows(path: Path, required: Sequence[str], columns: str) -> Iterator[RawRow]:
    """Yields the rows of a CSV file whose first line names its columns.

    The column names are stripped and converted to lower case. A quotation mark that is never closed makes only its own
    line malformed.

    Args:
      path: the file.
      required: columns that the file must have.
      columns: description of all columns for error messages.

    Raises:
      UserError: the file is empty, a required column is missing, or two columns have the same name.
      OSError: the file cannot be read.
    """
    _require_utf8_file(path)
    with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        records = _csv_records(file)
        _, header = next(records, (0, []))
        if isinstance(header, str):
            raise UserError(f"{path}: its first line, the names of the columns, is not CSV ({header})")
        names = [cell.strip().lower() for cell in header]
        if not any(names):
            raise UserError(f"{path}: is empty; name the columns in its first line: {columns}")
        for separator, title in ((";", "semicolons"), ("\t", "tabs")):
            if len(names) == 1 and separator in names[0]:
                raise UserError(f"{path}: its columns are separated by {title}; save it as CSV with commas")
        for name, count in Counter(filter(None, names)).items():
            if count > 1:
                shown = name.encode("ascii", "backslashreplace").decode()
                raise UserError(
                    f"{path}: column '{shown}' stands {count} times in its first line; remove or rename all but one"
                )
        for name in required:
            if name not in names:
                actual = ", ".join(names).encode("ascii", "backslashreplace").decode()
                raise UserError(f"{path}: no column '{name}' among {actual}; its first line should name {columns}")
        for line, cells in records:
            if isinstance(cells, str):
                yield line, cells
            elif len(cells) != len(names):
                yield line, f"{len(cells)} cells, but {len(names)} columns"
            else:
                yield line, dict(zip(names, cells, strict=True))


def _require_utf8_file(path: Path) -> None:
    """Raises a `UserError` if a file is not regular (`require_regular`), a Git LFS pointer, or begins as UTF-16 or -32.

    Raises:
      OSError: the file cannot be read.
    """
    require_regular(path)
    with path.open("rb") as file:
        start = file.read(2)
    if start in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
        raise UserError(f"{path}: is UTF-16 or UTF-32 text; save it as UTF-8")
    if is_lfs_pointer(path):
        raise UserError(f"{path}: {LFS_ADVICE}")


def _csv_records(file: Iterable[str]) -> Iterator[tuple[int, list[str] | str]]:
    """Yields (last line, cells) of every record, or (line, reason) for a malformed one.

    After a malformed record, reading continues on the line after the record's first line.
    """
    source, returned_lines, line = iter(file), deque[str](), 0
    while True:
        used_lines: list[str] = []
        try:
            cells = next(csv.reader(_take(source, returned_lines, used_lines), strict=True))
        except StopIteration:
            return
        except csv.Error as error:
            returned_lines.extendleft(reversed(used_lines[1:]))
            line += 1
            yield line, f"not CSV ({error})"
            continue
        line += len(used_lines)
        if cells:
            yield line, cells


def _take(source: Iterator[str], returned_lines: deque[str], used_lines: list[str]) -> Iterator[str]:
    """Yields (and removes) `returned_lines`, then the lines of `source`, and appends each to `used_lines`."""
    while returned_lines:
        used_lines.append(returned_lines.popleft())
        yield used_lines[-1]
    for line in source:
        used_lines.append(line)
        yield line


def jsonl_rows(path: Path) -> Iterator[RawRow]:
    """Yields the rows of a file with one JSON object per line; blank lines are skipped."""
    _require_utf8_file(path)
    with path.open(encoding="utf-8-sig", errors="surrogateescape") as file:
        for line, text in enumerate(file, start=1):
            if not text.strip():
                continue
            try:
                row = json_row(text)
            except ValueError as error:
                yield line, f"not JSON ({getattr(error, 'msg', error)})"
                continue
            yield line, row


def json_row(text: str) -> JsonObject | str:
    """Returns the fields of a JSON object, or what is wrong with it (not an object, or a field occurs more than once).

    Raises:
      ValueError: the text is not JSON.
    """
    return _row(parse_json(text, object_pairs_hook=_object))


def json_array_rows(path: Path, key: str) -> Iterator[RawRow]:
    """Yields the objects of an array `{..., key: [...]}` one by one, without loading the file (hundreds of megabytes).

    Instead of a line number, each row has the number of the object, from 1. If the file becomes invalid at some point,
    the last row yielded is a malformed one.

    Raises:
      UserError: the file does not begin as a JSON object, or has no array of that name.
      OSError: the file cannot be read.
    """
    _require_utf8_file(path)
    with path.open(encoding="utf-8-sig", errors="surrogateescape") as file:
        reader = _JsonReader(file)
        try:
            has_array = reader.enter(key)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path}: not a JSON file ({error})") from error
        if not has_array:
            raise UserError(f"{path}: has no list '{key}'; give the data set's published file")
        number = 0
        while True:
            try:
                has_next = reader.next_in_array(first=number == 0)
                value = reader.value() if has_next else None
            except (ValueError, RecursionError) as error:
                yield number + 1, f"the file is not JSON from here on, damaged or cut off ({error})"
                return
            if not has_next:
                return
            number += 1
            yield number, _row(value)


@dataclass(frozen=True)
class _RepeatedField:
    """Stands for a JSON object in which `field` occurs more than once, so that its value is ambiguous."""

    field: str


def _object(pairs: list[tuple[str, Any]]) -> JsonObject | _RepeatedField:
    """Returns a JSON object as a dict, or `_RepeatedField` if a field occurs more than once."""
    fields = dict(pairs)
    if len(fields) == len(pairs):
        return fields
    return _RepeatedField(next(name for name, count in Counter(name for name, _ in pairs).items() if count > 1))


def _row(value: object) -> JsonObject | str:
    """Returns the fields of a row, or what is wrong with it."""
    if isinstance(value, _RepeatedField):
        return f"field '{value.field.encode('ascii', 'backslashreplace').decode()}' more than once"
    return value if isinstance(value, dict) else "not a JSON object"


class _JsonReader:
    """Reads JSON values from a file one after the other, loading the file in chunks."""

    def __init__(self, file: TextIO) -> None:
        self._file, self._decoder = file, json.JSONDecoder(object_pairs_hook=_object)
        # The loaded text, the position in it, and whether the file has ended.
        self._text, self._position, self._ended = "", 0, False

    def enter(self, key: str) -> bool:
        """Moves into the array `key` of the top-level object; returns False if there is no such array."""
        self._expect("{")
        if self._peek() == "}":
            return False
        while True:
            name = self.value()
            self._expect(":")
            if name == key and self._peek() == "[":
                self._expect("[")
                return True
            self.value()
            if self._peek() != ",":
                self._expect("}")
                return False
            self._expect(",")

    def next_in_array(self, *, first: bool) -> bool:
        """Moves to the next element of the array (`first`: to its first one); returns False if the array has ended."""
        if self._peek() == "]":
            return False
        if not first:
            self._expect(",")
        return True

    def value(self) -> Any:
        """Returns the value at the current position and moves behind it."""
        self._peek()
        while True:
            try:
                value, end = self._decoder.raw_decode(self._text, self._position)
            except ValueError as error:
                if not self._load_chunk():
                    raise ValueError(getattr(error, "msg", str(error))) from error
                continue
            # A number at the very end of the loaded text may continue in the next chunk.
            if end < len(self._text) or not self._load_chunk():
                self._position = end
                return value

    def _peek(self) -> str:
        """Returns the next character that is not white space, without consuming it; "" at the end of the file.

        White space before it is skipped.
        """
        while True:
            while self._position < len(self._text):
                if not self._text[self._position].isspace():
                    return self._text[self._position]
                self._position += 1
            if not self._load_chunk():
                return ""

    def _expect(self, character: str) -> None:
        """Consumes white space and then `character`; raises a `ValueError` if another character comes next."""
        next_character = self._peek()
        if next_character != character:
            raise ValueError(
                f"expected {character!r}, found {next_character.encode('ascii', 'backslashreplace').decode()!r}"
            )
        self._position += 1

    def _load_chunk(self) -> bool:
        """Loads another chunk and drops the text before the current position; returns False at the end of the file."""
        chunk = "" if self._ended else self._file.read(max(_CHUNK, len(self._text) - self._position))
        self._ended = not chunk
        if chunk:
            self._text, self._position = self._text[self._position :] + chunk, 0
        return bool(chunk)


def text_problem(text: str) -> str | None:
    """Returns why a text cannot be used: it was not UTF-8, or contains a NUL byte; None if it can be used."""
    if any("\ud800" <= character <= "\udfff" for character in text):
        return "not UTF-8"
    return "contains a NUL byte" if "\0" in text else None
