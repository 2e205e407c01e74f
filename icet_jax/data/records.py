"""Rows of a data set: reading a user's CSV or JSONL of prompts and images.

Columns: `prompt`, `image` and, if wanted, `id`, `policy`, `kind`, `answer`; others are ignored. In JSONL `image` may
also be a list (several images, or none for a text-only row). Bad rows are left out, counted and reported with their
numbers.
"""

import csv
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from icet_jax.errors import UserError

KINDS = ("forbidden", "benign", "vqa")
_COLUMNS = "prompt, image[, id, policy, kind, answer]"
_REPORTED_PROBLEMS = 5


@dataclass(frozen=True, eq=False)
class Example:
    """One (images, prompt) pair.

    Attributes:
      id: unique within its data set; transcripts and paired differences are keyed by it.
      prompt: the raw prompt, without any chat template or image placeholder.
      images: paths, PIL images or uint8 arrays [height, width, 3]; usually one.
      kind: "forbidden" (a refusal is right), "benign" (a refusal is over-refusal) or "vqa" (answer is about the image).
      answer: expected response where there is one.
      policy: the data set's own category, carried along.
      answers: what each annotator answered, for rows whose metric is agreement with several (VQA-v2: ten).
      answer_type: the data set's own kind of answer (VQA-v2: "yes/no", "number", "other").
    """

    id: str
    prompt: str
    images: tuple[Any, ...] = ()
    kind: str = "forbidden"
    answer: str | None = None
    policy: str | None = None
    answers: tuple[str, ...] = ()
    answer_type: str | None = None


@dataclass(frozen=True)
class Problem:
    """A row that was left out. `row` counts data rows from 1; `line` is the line of the file it ends on."""

    row: int
    line: int
    reason: str


@dataclass(frozen=True, eq=False)
class Records:
    """What a file held.

    Attributes:
      path: the file.
      examples: the usable rows, in file order.
      problems: the rows that were left out.
      duplicates: usable rows whose prompt and images repeat an earlier row's; they are kept.
    """

    path: Path
    examples: list[Example]
    problems: list[Problem]
    duplicates: int

    def report(self) -> str:
        """One line for a log: rows used, rows left out and why (the first few), duplicates."""
        parts = [f"{self.path.name}: {len(self.examples)} rows"]
        if self.problems:
            parts.append(f"{len(self.problems)} left out ({_describe(self.problems)})")
        if self.duplicates:
            parts.append(f"{self.duplicates} duplicates kept")
        return ", ".join(parts)


def read_records(path: str | Path, *, image_root: str | Path | None = None, kind: str = "forbidden") -> Records:
    """Reads a .csv or .jsonl file of rows.

    Args:
      path: the file. The first line of a CSV names its columns.
      image_root: folder that relative image paths start from; the file's own folder if None.
      kind: the kind of rows that do not say theirs.

    Raises:
      UserError: the file cannot be read, is empty, lacks a column, is malformed as a whole, or has no usable row.
    """
    path = Path(path)
    root = Path(image_root) if image_root is not None else path.parent
    if kind not in KINDS:
        raise UserError(f"kind '{kind}' is unknown; use one of {', '.join(KINDS)}")
    readers = {".csv": _csv_rows, ".jsonl": _jsonl_rows}
    if path.suffix.lower() not in readers:
        raise UserError(f"{path}: data files are .csv or .jsonl, not '{path.suffix}'; convert or rename it")
    examples: list[Example] = []
    problems: list[Problem] = []
    row_of_id: dict[str, int] = {}
    seen: set[tuple[Any, ...]] = set()
    duplicates = 0
    try:
        for row, (line, fields) in enumerate(readers[path.suffix.lower()](path), start=1):
            try:
                example = _example(fields, row, root, kind)
                if example.id in row_of_id:
                    raise _BadRow(f"id '{example.id}' is already that of row {row_of_id[example.id]}")
            except _BadRow as error:
                problems.append(Problem(row, line, str(error)))
                continue
            row_of_id[example.id] = row
            content = (example.prompt, *map(str, example.images))
            duplicates += content in seen
            seen.add(content)
            examples.append(example)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); check the path") from error
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path}: not a UTF-8 {path.suffix} file ({error}); save it as UTF-8") from error
    if not examples:
        why = f"no usable row: {_describe(problems)}" if problems else "has no rows; add some"
        raise UserError(f"{path}: {why}")
    return Records(path, examples, problems, duplicates)


def prompt_overlap(train: Iterable[Example], test: Iterable[Example]) -> int:
    """Number of test rows whose prompt is, character for character, a training prompt."""
    prompts = {example.prompt for example in train}
    return sum(example.prompt in prompts for example in test)


class _BadRow(Exception):
    """Why one row cannot be used."""


def _describe(problems: list[Problem]) -> str:
    shown = "; ".join(f"row {problem.row}: {problem.reason}" for problem in problems[:_REPORTED_PROBLEMS])
    hidden = len(problems) - _REPORTED_PROBLEMS
    return f"{shown}; and {hidden} more" if hidden > 0 else shown


def _csv_rows(path: Path) -> Iterator[tuple[int, dict[str, Any] | str]]:
    """Yields (line, fields), or (line, reason) where the row itself is malformed."""
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file)
        columns = [column.strip().lower() for column in reader.fieldnames or ()]
        missing = [name for name in ("prompt", "image") if name not in columns]
        if not columns:
            raise UserError(f"{path}: is empty; name the columns in its first line: {_COLUMNS}")
        if missing:
            have = ", ".join(columns)
            raise UserError(f"{path}: no column '{missing[0]}' among {have}; its first line should name {_COLUMNS}")
        reader.fieldnames = columns
        for fields in reader:
            yield reader.line_num, "more cells than columns" if None in fields else fields


def _jsonl_rows(path: Path) -> Iterator[tuple[int, dict[str, Any] | str]]:
    with path.open(encoding="utf-8-sig") as file:
        for line, text in enumerate(file, start=1):
            if not text.strip():
                continue
            try:
                fields = json.loads(text)
            except json.JSONDecodeError as error:
                yield line, f"not JSON ({error.msg})"
                continue
            yield line, fields if isinstance(fields, dict) else "not a JSON object"


def _example(fields: dict[str, Any] | str, row: int, root: Path, default_kind: str) -> Example:
    if isinstance(fields, str):
        raise _BadRow(fields)
    prompt = _text(fields, "prompt")
    if prompt is None:
        raise _BadRow("the prompt is empty")
    kind = _text(fields, "kind") or default_kind
    if kind not in KINDS:
        raise _BadRow(f"kind '{kind}' is not one of {', '.join(KINDS)}")
    answer = _text(fields, "answer")
    if kind == "vqa" and answer is None:
        raise _BadRow("a vqa row needs an answer")
    identity = _text(fields, "id") or str(row)
    return Example(identity, prompt, _images(fields.get("image"), root), kind, answer, _text(fields, "policy"))


def _text(fields: dict[str, Any], name: str) -> str | None:
    """The stripped text of a cell; None where it is absent or blank."""
    value = fields.get(name)
    if value is None:
        return None
    if isinstance(value, (dict, list, bool)):
        raise _BadRow(f"{name} is not text")
    return str(value).strip() or None


def _images(value: Any, root: Path) -> tuple[Path, ...]:
    names = value if isinstance(value, list) else [value]
    paths = []
    for name in names:
        if not isinstance(name, str) or not name.strip():
            raise _BadRow("the image is empty")
        path = root / name.strip()
        if not path.is_file():
            raise _BadRow(f"no image file '{path}'")
        if not _identified(path):
            raise _BadRow(f"'{path}' is not an image that Pillow can read")
        paths.append(path)
    return tuple(paths)


@lru_cache(maxsize=65536)
def _identified(path: Path) -> bool:
    """Whether a file begins like an image; its pixels are decoded, and damage to them found, when it is used."""
    from PIL import Image

    try:
        with Image.open(path):
            return True
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return False
