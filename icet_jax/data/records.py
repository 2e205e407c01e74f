"""Defines the rows of a data set and the rules for which rows of a file are used, and reads users' own files.

A user's CSV or JSONL file has the columns `prompt`, `image` and optionally `id`, `policy` (the content category),
`kind`, `answer`; others are ignored. In JSONL `image` may also be a list of several images, or of none for a text-only
row. The published formats (`published.py`) follow the same rules. Rows that cannot be used are left out, counted by
reason and reported with their numbers.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

from icet_jax.config.names import KINDS
from icet_jax.data.tables import RawRow, csv_rows, jsonl_rows, text_problem
from icet_jax.errors import UserError, one_line
from icet_jax.files import JsonObject
from icet_jax.media.image_files import MISSING, OUTSIDE, ImageFiles, leaves_root, require_file_name
from icet_jax.media.images import ImageLike
from icet_jax.media.templates import PLACEHOLDERS

_COLUMNS = "prompt, image[, id, policy, kind, answer]"
_REPORTED_PROBLEMS = 5
_SHOWN = 300  # characters of a problem that are shown


@dataclass(frozen=True, eq=False)
class Example:
    """Holds one row of a data set: a prompt with its images, and what is known about it.

    Attributes:
      id: unique within its data set; transcripts and paired differences use it as key.
      prompt: text of the request, without chat template and image placeholders.
      images: usually one: paths, stored images, PIL images or uint8 arrays [height, width, 3].
      kind: "forbidden" (should be refused), "benign" (a refusal is over-refusal) or "vqa" (the answer is about the
        image).
      answer: expected answer, or None.
      answers: expected answers of several annotators, if the metric is agreement with them (VQA-v2: ten).
      answer_type: type of the answer in the data set's words (VQA-v2: "yes/no", "number", "other"), or None.
      format: how the request is disguised, in the data set's words (JailBreakV-28K's attack formats); "" if unknown.
      transferred: whether the attack was made for language models and reused here; None if unknown.
      category: content category in the data set's words, which files call `policy`; None if unknown.
    """

    id: str
    prompt: str
    images: tuple[ImageLike, ...] = ()
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
      row: number of the row among the data rows of the file, from 1.
      line: line of the file on which the row ends.
      reason: kind of problem, in the same words for all rows that have it; reports count rows by reason.
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
      repeats: number of usable rows that differ from an earlier row in their id alone.
      animated: number of images with several frames, of which the first is used.
      complete: whether the source was read to its end, not stopped by a limit.
      replaced: descriptions of images that were drawn for a row but could not be used, so that another was drawn.
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
        """The number of rows that were read, usable or not."""
        return len(self.examples) + len(self.problems)

    def dropped(self) -> dict[str, int]:
        """Returns {reason: number of rows left out for it}, the most frequent first."""
        return dict(Counter(problem.reason for problem in self.problems).most_common())

    def report(self) -> str:
        """Returns one log line: how many rows are used, how many are left out by reason, and the first problems."""
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
    """Raised when a row cannot be used.

    Attributes:
      reason: kind of problem, by which reports count rows. The message, `str(error)`, is the detail about this row.
    """

    def __init__(self, reason: str, detail: str | None = None) -> None:
        super().__init__(detail or reason)
        self.reason = reason


Convert: TypeAlias = Callable[[JsonObject, str], Example]
"""Function that takes the fields of a raw row and its id and returns the row, or raises `BadRow` if it is unusable."""


def read_records(
    path: str | Path, *, image_root: str | Path | None = None, limit: int | None = None, decode: bool = False
) -> Records:
    """Reads the rows of a user's .csv or .jsonl file.

    Args:
      path: the file; the first line of a CSV names its columns.
      image_root: folder for relative image paths; None for the file's folder.
      limit: number of usable rows after which reading stops; None reads all.
      decode: whether to decode the images, so that rows with damaged images are left out too.

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

    def to_example(fields: JsonObject, identity: str) -> Example:
        """Returns the row with the id `identity`, see `Convert`."""
        prompt = prompt_of(fields, "prompt")
        kind = text(fields, "kind") or "forbidden"
        if kind not in KINDS:
            raise BadRow("unknown kind", f"kind '{kind}' is not one of {', '.join(KINDS)}")
        answer = text(fields, "answer")
        if kind == "vqa" and answer is None:
            raise BadRow("no answer", "a vqa row needs an answer")
        images = _images(fields.get("image"), root, files)
        category = text(fields, "policy")  # what data sets call "policy" is a category here
        return Example(identity, prompt, images, kind, answer, category)

    return collect(path, rows, to_example, files, id_field="id", limit=limit)


def collect(
    path: Path,
    rows: Iterator[RawRow],
    convert: Convert,
    files: ImageFiles,
    *,
    id_field: str | None,
    limit: int | None = None,
) -> Records:
    """Converts the raw rows of a file and decides which are used; all formats share these rules.

    A row is left out if an earlier row has the same id. A row without an id gets its number as id, and is left out if
    an earlier row has the same prompt, images and answer. A row with an id of its own may repeat the content of an
    earlier row.

    Args:
      path: name of the file in errors and reports.
      rows: raw rows from a reader of `tables.py`.
      convert: converts a raw row.
      files: the image checker that `convert` uses.
      id_field: name of the field that contains a row's id; None for files without ids.
      limit: number of usable rows after which reading stops; None reads all.

    Raises:
      UserError: the file cannot be read, or no row can be used.
    """
    require_file_name(path)
    examples: list[Example] = []
    problems: list[Problem] = []
    row_of_id: dict[str, int] = {}
    row_of_content: dict[tuple[str | None, ...], int] = {}
    repeats = 0
    try:
        for row, (line, fields) in enumerate(rows, start=1):
            try:
                if isinstance(fields, str):
                    raise BadRow("malformed row", fields)
                named_id = text(fields, id_field) if id_field is not None else None
                identity = named_id or str(row)
                if identity in row_of_id:
                    raise BadRow("duplicate id", f"id '{identity}' is already that of row {row_of_id[identity]}")
                example = convert(fields, identity)
                content = (example.prompt, *map(str, example.images), example.answer)
                if content in row_of_content and named_id is None:
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
        message = f"no usable row: {describe(problems)}" if problems else "has no rows; add some"
        raise UserError(f"{path}: {message}")
    complete, replaced = len(examples) != limit, tuple(files.replaced.values())
    return Records(path.name, examples, problems, repeats, len(files.animated), complete, replaced)


def prompt_overlap(train: Iterable[Example], test: Iterable[Example]) -> int:
    """Returns the number of test rows whose prompt equals a training prompt exactly."""
    prompts = {example.prompt for example in train}
    return sum(example.prompt in prompts for example in test)


def text(fields: JsonObject, name: str) -> str | None:
    """Returns the stripped text of a row's field `name`; None if it is absent or blank.

    Raises:
      BadRow: the field is not text, not UTF-8, or contains a NUL byte.
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
    """Returns the prompt in a row's field `name`.

    Raises:
      BadRow: the prompt is empty, or contains the image placeholder of a model family, which only a chat template may
        add.
    """
    prompt = text(fields, name)
    if prompt is None:
        raise BadRow("empty prompt", "the prompt is empty")
    for placeholder in PLACEHOLDERS:
        if placeholder in prompt:
            raise BadRow("image placeholder", f"the prompt contains '{placeholder}'")
    return prompt


_CATEGORIES = {
    "Child Abuse Content": "Child Abuse",  # JailBreakV-28K's name for RedTeam-2K's category
    "Malware Generation": "Malware",  # FigStep's
}


def category_of(fields: JsonObject, name: str) -> str | None:
    """Returns the content category in a row's field `name`; None if the field is absent or blank.

    Categories for which RedTeam-2K has another name get RedTeam-2K's name.
    """
    category = text(fields, name)
    return _CATEGORIES.get(category, category) if category is not None else None


_FORMATS = {
    name.casefold(): name
    for name in ("Template", "Persuade", "Logic", "SD", "typo", "SD_typo", "figstep", "SD_figstep")
}
_TRUTH_VALUES = dict.fromkeys(("true", "yes", "1", "1.0"), True) | dict.fromkeys(("false", "no", "0", "0.0"), False)


def attack_format(fields: JsonObject, name: str) -> str:
    """Returns the attack format in a row's field `name`; "" if the field is absent or blank.

    JailBreakV-28K's formats, whose spelling differs between its files, get one spelling.
    """
    spelling = " ".join((text(fields, name) or "").split())
    return _FORMATS.get(spelling.casefold(), spelling)


def yes_or_no(fields: JsonObject, name: str) -> bool | None:
    """Returns whether a row's field `name` says yes (True, yes, 1) or no (False, no, 0); None if it is empty.

    Raises:
      BadRow: the field contains something else.
    """
    value = text(fields, name)
    if value is None:
        return None
    if value.casefold() not in _TRUTH_VALUES:
        raise BadRow("bad field", f"{name} is '{value}'; write True or False, or leave it empty")
    return _TRUTH_VALUES[value.casefold()]


def path_in(root: Path, name: str) -> Path:
    """Returns the path of the image file `name` in the folder `root`.

    Raises:
      BadRow: the path leads out of `root`.
    """
    if leaves_root(root, name):
        raise BadRow(OUTSIDE, f"image '{name}' is not in '{root}' (see config.data.image_root)")
    return root / name


def usable_image(path: Path, files: ImageFiles) -> Path:
    """Returns `path` if the file can be used as an image.

    Raises:
      BadRow: the file is missing, or cannot be used as an image.
    """
    problem = files.problem(path)
    if problem is not None:
        raise BadRow(*problem)
    return path


def describe(problems: list[Problem]) -> str:
    """Returns a text with the first few problems and the number of further problems."""
    shown = "; ".join(f"row {problem.row}: {_short(problem.detail)}" for problem in problems[:_REPORTED_PROBLEMS])
    hidden = len(problems) - _REPORTED_PROBLEMS
    return f"{shown}; and {hidden} more" if hidden > 0 else shown


def _short(detail: str) -> str:
    """Returns a detail shortened and without control characters, because it may quote any text of a row."""
    return one_line(detail if len(detail) <= _SHOWN else f"{detail[:_SHOWN]}...")


def _images(value: object, root: Path, files: ImageFiles) -> tuple[Path, ...]:
    """Returns the paths of the images that a row's field names, one or a list; raises `BadRow` if one is unusable."""
    paths = []
    for name in value if isinstance(value, list) else [value]:
        image = text({"image": name}, "image")
        if image is None:
            raise BadRow(MISSING, "the image is empty")
        paths.append(usable_image(path_in(root, image), files))
    return tuple(paths)
