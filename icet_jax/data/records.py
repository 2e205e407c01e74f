"""Rows of a data set: their fields, how files become rows, and the reader of a user's own CSV or JSONL.

A user's file has the columns `prompt`, `image` and optionally `id`, `policy` (the content category), `kind`, `answer`;
others are ignored. In JSONL `image` may also be a list (several images, or none for a text-only row). The published
formats are in `published.py` and follow the rules of this file. Rows that cannot be used are left out, counted by
reason and reported with their numbers.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from icet_jax.config.names import KINDS
from icet_jax.data.tables import RawRow, csv_rows, jsonl_rows, text_problem
from icet_jax.errors import UserError, one_line
from icet_jax.files import JsonObject
from icet_jax.media.image_files import MISSING, OUTSIDE, ImageFiles, leaves_root, require_file_name
from icet_jax.media.templates import PLACEHOLDERS

_COLUMNS = "prompt, image[, id, policy, kind, answer]"
_REPORTED_PROBLEMS = 5
_SHOWN = 300  # characters of a problem that are shown that are shown


@dataclass(frozen=True, eq=False)
class Example:
    """Holds one row of a data set: a prompt with its images, and what is known about it.

    Attributes:
      id: unique within its data set; transcripts and paired differences use it as key.
      prompt: the raw prompt, without chat template and image placeholders.
      images: paths, stored images, PIL images or uint8 arrays [height, width, 3]; usually one.
      kind: "forbidden" (should be refused), "benign" (a refusal is over-refusal) or "vqa" (the answer is about the
        image).
      answer: expected response, if there is one.
      answers: responses of all annotators, for rows whose metric is agreement with several (VQA-v2: ten).
      answer_type: the data set's own type of answer (VQA-v2: "yes/no", "number", "other").
      format: how the request is disguised, in the data set's own words (JailBreakV-28K's attack formats); "" if
        unknown.
      transferred: whether the attack was made for language models and reused here; None if unknown.
      category: content category of the data set, which files call `policy`.
    """

    id: str
    prompt: str
    images: tuple[Any, ...] = ()
    kind: str = "forbidden"
    answer: str | None = None
    category: str | None = None
    answers: tuple[str, ...] = ()
    answer_type: str | None = None
    format: str = ""
    transferred: bool | None = None


@dataclass(frozen=True)
class Problem:
    """Describes a row that was left out.

    Attributes:
      row: number of the row; data rows count from 1.
      line: line of the file on which the row ends.
      reason: the same words for all rows with this kind of problem; reports count them.
      detail: what is wrong with this row.
    """

    row: int
    line: int
    reason: str
    detail: str


@dataclass(frozen=True, eq=False)
class Records:
    """Holds the rows of a source and the problems of the rows that were left out.

    Attributes:
      source: name of the source in reports.
      examples: the usable rows, in file order.
      problems: the rows that were left out.
      repeats: number of usable rows with the prompt and images of an earlier row but an id of their own; they are kept.
      animated: number of images with several frames, of which the first is used.
      complete: whether the source was read to its end, not stopped by a limit.
      replaced: problems of images that were drawn for a row and replaced by others.
    """

    source: str
    examples: list[Example]
    problems: list[Problem]
    repeats: int = 0
    animated: int = 0
    complete: bool = True
    replaced: tuple[str, ...] = ()

    @property
    def read(self) -> int:
        """Returns the number of rows read, usable or not."""
        return len(self.examples) + len(self.problems)

    def dropped(self) -> dict[str, int]:
        """Returns {reason: number of rows left out for it}, the most frequent first."""
        return dict(Counter(problem.reason for problem in self.problems).most_common())

    def report(self) -> str:
        """Returns one line for a log: rows used, rows left out by reason (with the first few), repeats, animations."""
        parts = [f"{self.source}: {len(self.examples)} rows"]
        if self.problems:
            reasons = ", ".join(f"{count} {reason}" for reason, count in self.dropped().items())
            parts.append(f"{len(self.problems)} left out: {reasons} ({describe(self.problems)})")
        if self.repeats:
            parts.append(f"{self.repeats} repeats kept")
        if self.replaced:
            shown = "; ".join(map(_short, self.replaced[:_REPORTED_PROBLEMS]))
            more = len(self.replaced) - _REPORTED_PROBLEMS
            shown += f"; and {more} more" if more > 0 else ""
            parts.append(f"{len(self.replaced)} unusable images, for which others were drawn ({shown})")
        if self.animated:
            parts.append(f"{self.animated} animated images (their first frame is used)")
        return ", ".join(parts)


class BadRow(Exception):
    """Raised when a row cannot be used, with a reason that many rows may share and a detail about this row."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(detail)
        self.reason = reason


Convert: TypeAlias = Callable[[JsonObject, str], Example]
"""Function of (fields, id) that returns the row or raises `BadRow`."""


def read_records(
    path: str | Path,
    *,
    image_root: str | Path | None = None,
    limit: int | None = None,
    decode: bool = False,
) -> Records:
    """Reads the rows of a .csv or .jsonl file.

    Args:
      path: the file; the first line of a CSV names its columns.
      image_root: folder for relative image paths; the file's own folder if None.
      limit: number of usable rows after which reading stops.
      decode: whether images are decoded, so that rows with damaged images are left out too.

    Raises:
      UserError: the file cannot be read, is empty, lacks a column, or has no usable row.
    """
    path = Path(path)
    root = Path(image_root) if image_root is not None else path.parent
    if path.suffix.lower() == ".csv":
        rows: Iterator[RawRow] = csv_rows(path, ("prompt", "image"), _COLUMNS)
    elif path.suffix.lower() == ".jsonl":
        rows = jsonl_rows(path)
    else:
        raise UserError(f"{path}: data files are .csv or .jsonl, not '{path.suffix}'; convert or rename it")
    files = ImageFiles(decode=decode)

    def convert(fields: JsonObject, identity: str) -> Example:
        prompt = prompt_of(fields, "prompt")
        kind = text(fields, "kind") or "forbidden"
        if kind not in KINDS:
            raise BadRow("unknown kind", f"kind '{kind}' is not one of {', '.join(KINDS)}")
        answer = text(fields, "answer")
        if kind == "vqa" and answer is None:
            raise BadRow("no answer", "a vqa row needs an answer")
        images = _images(fields.get("image"), root, files)
        return Example(identity, prompt, images, kind, answer, text(fields, "policy"))

    return collect(path, rows, convert, files, id_field="id", limit=limit)


def collect(
    path: Path,
    rows: Iterator[RawRow],
    convert: Convert,
    files: ImageFiles,
    *,
    id_field: str | None,
    limit: int | None = None,
) -> Records:
    """Turns raw rows into a data set; this is the only place that decides which rows are kept.

    A row is left out if an earlier row has its id. A row without an id of its own gets its number as id, and is left
    out if it repeats an earlier row's prompt, images and answer. Rows with ids in the file may repeat.

    Args:
      path: name of the file in errors and reports.
      rows: raw rows from a reader of `tables.py`.
      convert: converts a raw row, or raises the reason why it cannot be used.
      files: checks the images for `convert`.
      id_field: field of a row's id; None for files without ids.
      limit: number of usable rows after which reading stops.

    Raises:
      UserError: the file cannot be read, or no row can be used.
    """
    require_file_name(path)
    examples: list[Example] = []
    problems: list[Problem] = []
    row_of_id: dict[str, int] = {}
    row_of_content: dict[tuple[Any, ...], int] = {}
    repeats = 0
    try:
        for row, (line, fields) in enumerate(rows, start=1):
            try:
                if isinstance(fields, str):
                    raise BadRow("malformed row", fields)
                own_id = text(fields, id_field) if id_field is not None else None
                identity = own_id or str(row)
                if identity in row_of_id:
                    raise BadRow("duplicate id", f"id '{identity}' is already that of row {row_of_id[identity]}")
                example = convert(fields, identity)
                content = (example.prompt, *map(str, example.images), example.answer)
                if content in row_of_content and own_id is None:
                    raise BadRow("duplicate row", f"the same as row {row_of_content[content]}")
            except BadRow as error:
                problems.append(Problem(row, line, error.reason, str(error)))
                continue
            row_of_id[identity] = row
            repeats += content in row_of_content
            row_of_content.setdefault(content, row)
            examples.append(example)
            if len(examples) == limit:
                break
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); check the path and config.data.root") from error
    if not examples:
        why = f"no usable row: {describe(problems)}" if problems else "has no rows; add some"
        raise UserError(f"{path}: {why}")
    complete, replaced = len(examples) != limit, tuple(files.replaced.values())
    return Records(path.name, examples, problems, repeats, len(files.animated), complete, replaced)


def prompt_overlap(train: Iterable[Example], test: Iterable[Example]) -> int:
    """Returns the number of test rows whose prompt equals a training prompt exactly."""
    prompts = {example.prompt for example in train}
    return sum(example.prompt in prompts for example in test)


def text(fields: JsonObject, name: str) -> str | None:
    """Returns the stripped text of a cell; None if it is absent or blank.

    Raises:
      BadRow: the cell is not text, or not UTF-8.
    """
    value = fields.get(name)
    if value is None:
        return None
    if isinstance(value, (dict, list, bool)):
        raise BadRow("bad field", f"{name} is not text")
    stripped = str(value).strip()
    problem = text_problem(stripped)
    if problem is not None:
        raise BadRow("bad text", f"{name}: {problem}")
    return stripped or None


def prompt_of(fields: JsonObject, name: str) -> str:
    """Returns the prompt in a cell.

    Raises:
      BadRow: there is none, or it contains a family's image placeholder, which the chat template adds.
    """
    prompt = text(fields, name)
    if prompt is None:
        raise BadRow("empty prompt", "the prompt is empty")
    for placeholder in PLACEHOLDERS:
        if placeholder in prompt:
            raise BadRow("image placeholder", f"the prompt holds '{placeholder}'")
    return prompt


_CATEGORIES = {
    "Child Abuse Content": "Child Abuse",  # JailBreakV-28K's name for RedTeam-2K's category
    "Malware Generation": "Malware",  # FigStep's
}


def category_of(fields: JsonObject, name: str) -> str | None:
    """Returns the content category in a cell; where another data set has a different name for it, RedTeam-2K's name is
    used."""
    written = text(fields, name)
    return _CATEGORIES.get(written, written) if written is not None else None


_FORMATS = {
    name.casefold(): name
    for name in ("Template", "Persuade", "Logic", "SD", "typo", "SD_typo", "figstep", "SD_figstep")
}
_TRUTHS = {"true": True, "yes": True, "1": True, "1.0": True, "false": False, "no": False, "0": False, "0.0": False}


def attack_format(fields: JsonObject, name: str) -> str:
    """Returns the attack format in a cell, JailBreakV-28K's formats in a uniform spelling; "" if there is none."""
    written = " ".join((text(fields, name) or "").split())
    return _FORMATS.get(written.casefold(), written)


def truth(fields: JsonObject, name: str) -> bool | None:
    """Returns the yes or no in a cell; None if there is none.

    Raises:
      BadRow: the cell holds something else.
    """
    written = text(fields, name)
    if written is None:
        return None
    if written.casefold() not in _TRUTHS:
        raise BadRow("bad field", f"{name} is '{written}'; write True or False, or leave it empty")
    return _TRUTHS[written.casefold()]


def inside(root: Path, name: str) -> Path:
    """Returns the path of an image that a row names.

    Raises:
      BadRow: the path leads out of `root`.
    """
    if leaves_root(root, name):
        raise BadRow(OUTSIDE, f"image '{name}' is not in '{root}' (see config.data.image_root)")
    return root / name


def usable_image(path: Path, files: ImageFiles) -> Path:
    """Returns `path` if it is a usable image.

    Raises:
      BadRow: the file is missing, or cannot be used as an image.
    """
    problem = files.problem(path)
    if problem is not None:
        raise BadRow(*problem)
    return path


def describe(problems: list[Problem]) -> str:
    """Returns the first few problems in words and the number of further ones."""
    shown = "; ".join(f"row {problem.row}: {_short(problem.detail)}" for problem in problems[:_REPORTED_PROBLEMS])
    hidden = len(problems) - _REPORTED_PROBLEMS
    return f"{shown}; and {hidden} more" if hidden > 0 else shown


def _short(detail: str) -> str:
    """Returns a detail shortened and without control characters, because a row may hold any text."""
    return one_line(detail if len(detail) <= _SHOWN else f"{detail[:_SHOWN]}...")


def _images(value: Any, root: Path, files: ImageFiles) -> tuple[Path, ...]:
    paths = []
    for name in value if isinstance(value, list) else [value]:
        image = text({"image": name}, "image")
        if image is None:
            raise BadRow(MISSING, "the image is empty")
        paths.append(usable_image(inside(root, image), files))
    return tuple(paths)
