"""Rows of a data set: what a row is, how files become rows, and the reader of a user's own CSV or JSONL.

Columns of a user's file: `prompt`, `image` and, if wanted, `id`, `policy`, `kind`, `answer`; others are ignored. In
JSONL `image` may also be a list (several images, or none for a text-only row). The published formats are in
`published.py`; they share this file's rules. Rows that cannot be used are left out, counted by reason and reported with
their numbers.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from icet_jax.config.names import KINDS
from icet_jax.data.tables import RawRow, csv_rows, jsonl_rows, text_problem
from icet_jax.errors import UserError, one_line
from icet_jax.media.image_files import MISSING, OUTSIDE, ImageFiles, leaves_root, require_file_name
from icet_jax.media.templates import PLACEHOLDERS

_COLUMNS = "prompt, image[, id, policy, kind, answer]"
_REPORTED_PROBLEMS = 5
_SHOWN = 300  # characters of a problem


@dataclass(frozen=True, eq=False)
class Example:
    """One (images, prompt) pair.

    Attributes:
      id: unique within its data set; transcripts and paired differences are keyed by it.
      prompt: the raw prompt, without any chat template or image placeholder.
      images: paths, stored images, PIL images or uint8 arrays [height, width, 3]; usually one.
      kind: "forbidden" (a refusal is right), "benign" (a refusal is over-refusal) or "vqa" (answer is about the image).
      answer: expected response where there is one.
      policy: the data set's own category, carried along.
      answers: what each annotator answered, for rows whose metric is agreement with several (VQA-v2: ten).
      answer_type: the data set's own kind of answer (VQA-v2: "yes/no", "number", "other").
      format: how the request is disguised, in the data set's own words (JailBreakV-28K's attack formats); "" where the
        data set does not say.
      transferred: whether the attack was made against language models and carried over; None where unknown.
    """

    id: str
    prompt: str
    images: tuple[Any, ...] = ()
    kind: str = "forbidden"
    answer: str | None = None
    policy: str | None = None
    answers: tuple[str, ...] = ()
    answer_type: str | None = None
    format: str = ""
    transferred: bool | None = None


@dataclass(frozen=True)
class Problem:
    """A row that was left out.

    Attributes:
      row: its number, data rows counting from 1.
      line: of the file, on which the row ends.
      reason: the same words for every row of the same trouble; reports count them.
      detail: what is wrong with this one.
    """

    row: int
    line: int
    reason: str
    detail: str


@dataclass(frozen=True, eq=False)
class Records:
    """What a source held.

    Attributes:
      source: how reports call it.
      examples: the usable rows, in file order.
      problems: the rows that were left out.
      repeats: usable rows whose prompt and images are an earlier row's under another id of the file's own; kept.
      animated: images of several frames, of which the first is used.
      complete: whether the source was read to its end (false where a limit was reached before).
      replaced: what is wrong with each image that was drawn for a row and gave way to another.
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
        """Rows read, usable or not."""
        return len(self.examples) + len(self.problems)

    def dropped(self) -> dict[str, int]:
        """{reason: rows left out for it}, the most frequent first."""
        return dict(Counter(problem.reason for problem in self.problems).most_common())

    def report(self) -> str:
        """One line for a log: rows used, rows left out by reason (with the first few), repeats, animations."""
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
    """Why one row cannot be used: a reason that many rows may share, and what is wrong with this one."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(detail)
        self.reason = reason


Convert: TypeAlias = Callable[[dict[str, Any], str], Example]
"""(fields, id) -> the row; raises `BadRow`."""


def read_records(
    path: str | Path,
    *,
    image_root: str | Path | None = None,
    limit: int | None = None,
    decode: bool = False,
) -> Records:
    """Reads a .csv or .jsonl file of rows.

    Args:
      path: the file. The first line of a CSV names its columns.
      image_root: folder that relative image paths start from; the file's own folder if None.
      limit: usable rows after which reading stops.
      decode: whether images are decoded, so that rows whose image is damaged are left out too.

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

    def convert(fields: dict[str, Any], identity: str) -> Example:
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
    """Turns raw rows into a data set; the one place that decides which rows stay.

    A row whose id is an earlier row's is left out. A row without an id of its own goes by its number, and is left out
    where it repeats an earlier row's prompt, images and answer; rows that the file itself tells apart may repeat.

    Args:
      path: for errors and reports.
      rows: as the readers of `tables.py` yield them.
      convert: makes the row, or says why not.
      files: what `convert` looks at images with.
      id_field: where a row's id is; None for files without ids.
      limit: usable rows after which reading stops.

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
                own = text(fields, id_field) if id_field is not None else None
                identity = own or str(row)
                if identity in row_of_id:
                    raise BadRow("duplicate id", f"id '{identity}' is already that of row {row_of_id[identity]}")
                example = convert(fields, identity)
                content = (example.prompt, *map(str, example.images), example.answer)
                if content in row_of_content and own is None:
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
    """Number of test rows whose prompt is, character for character, a training prompt."""
    prompts = {example.prompt for example in train}
    return sum(example.prompt in prompts for example in test)


def text(fields: dict[str, Any], name: str) -> str | None:
    """The stripped text of a cell; None where it is absent or blank.

    Raises:
      BadRow: it is no text, or not UTF-8.
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


def prompt_of(fields: dict[str, Any], name: str) -> str:
    """The prompt in a cell.

    Raises:
      BadRow: there is none, or it holds a family's image placeholder, which is put there by the chat template.
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


def category(fields: dict[str, Any], name: str) -> str | None:
    """The category in a cell, under RedTeam-2K's name where another data set calls the same thing differently."""
    written = text(fields, name)
    return _CATEGORIES.get(written, written) if written is not None else None


_FORMATS = {
    name.casefold(): name
    for name in ("Template", "Persuade", "Logic", "SD", "typo", "SD_typo", "figstep", "SD_figstep")
}
_TRUTHS = {"true": True, "yes": True, "1": True, "1.0": True, "false": False, "no": False, "0": False, "0.0": False}


def attack_format(fields: dict[str, Any], name: str) -> str:
    """The attack format in a cell, JailBreakV-28K's own in their one spelling; "" where there is none."""
    written = " ".join((text(fields, name) or "").split())
    return _FORMATS.get(written.casefold(), written)


def truth(fields: dict[str, Any], name: str) -> bool | None:
    """The yes or no in a cell; None where there is none.

    Raises:
      BadRow: it is something else.
    """
    written = text(fields, name)
    if written is None:
        return None
    if written.casefold() not in _TRUTHS:
        raise BadRow("bad field", f"{name} is '{written}'; write True or False, or leave it empty")
    return _TRUTHS[written.casefold()]


def inside(root: Path, name: str) -> Path:
    """The path of an image that a row names.

    Raises:
      BadRow: it leads out of `root`.
    """
    if leaves_root(root, name):
        raise BadRow(OUTSIDE, f"image '{name}' is not in '{root}' (see config.data.image_root)")
    return root / name


def usable_image(path: Path, files: ImageFiles) -> Path:
    """`path` itself.

    Raises:
      BadRow: the file is missing, or no image that can be used.
    """
    problem = files.problem(path)
    if problem is not None:
        raise BadRow(*problem)
    return path


def describe(problems: list[Problem]) -> str:
    """The first few problems and how many more there are."""
    shown = "; ".join(f"row {problem.row}: {_short(problem.detail)}" for problem in problems[:_REPORTED_PROBLEMS])
    hidden = len(problems) - _REPORTED_PROBLEMS
    return f"{shown}; and {hidden} more" if hidden > 0 else shown


def _short(detail: str) -> str:
    """What a row holds may be of any length, and hold what steers a terminal."""
    return one_line(detail if len(detail) <= _SHOWN else f"{detail[:_SHOWN]}...")


def _images(value: Any, root: Path, files: ImageFiles) -> tuple[Path, ...]:
    paths = []
    for name in value if isinstance(value, list) else [value]:
        image = text({"image": name}, "image")
        if image is None:
            raise BadRow(MISSING, "the image is empty")
        paths.append(usable_image(inside(root, image), files))
    return tuple(paths)
