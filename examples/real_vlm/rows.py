"""Makes the rows that the model is trained on, and those that are held out, and writes them as files of the package.

Every row is on one side by a hash of what it is about, so that anybody gets the same halves: photographs by their file
name (a fifth is held out), harmless instructions and forbidden requests by their text (half of them).
"""

import csv
import json
import re
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from examples.real_vlm import questions
from examples.real_vlm.photographs import Photograph, hash_order, is_held_out, read_objects
from icet_jax.data.benchmark_prompts import CAPTION_PROMPT
from icet_jax.data.published import read_source
from icet_jax.data.records import Example
from icet_jax.errors import UserError
from icet_jax.files import JsonObject, parse_json, write_text_atomic
from icet_jax.media.templates import PLACEHOLDERS
from icet_jax.media.tokenizer import Tokenizer

TEXT_HALF = 0.5
"""Share of the instructions and of the forbidden requests that is held out."""

MOST_HELD_OUT = 1000  # rows of a held-out file
LONGEST = 240  # characters of a harmless instruction: a longer one would not fit the training's prompt

CAPTIONS, QUESTIONS, HARMLESS, FORBIDDEN = "captions", "questions", "harmless", "forbidden"


@dataclass(frozen=True)
class Sources:
    """Names where the rows come from.

    Attributes:
      photographs: the usable photographs.
      instances: file with objects in MS-COCO's layout, or None.
      instructions: file with harmless instructions.
      forbidden: RedTeam-2K's file of forbidden requests, or None.
      limit: most training rows of the harmless instructions, and of the forbidden requests.
    """

    photographs: Sequence[Photograph]
    instances: Path | None
    instructions: Path
    forbidden: Path | None
    limit: int


def write_rows(folder: Path, sources: Sources, tokenizer: Tokenizer, longest_caption: int) -> dict[str, int]:
    """Writes the rows of both sides and the photographs that they show, and returns {file name: number of rows}.

    Rows are JSON lines with prompt, image, id, kind, answer and policy, as `config.data.train` and
    `config.sweep.datasets` read them. Files of training rows are captions, questions, harmless (without answers) and
    forbidden; those of the other side begin with held_out_.

    Args:
      folder: folder to write to.
      sources: where the rows come from.
      tokenizer: the model's tokenizer.
      longest_caption: most tokens of a caption, with EOS; longer ones are left out.

    Raises:
      UserError: a source cannot be read or has no usable row.
    """
    (folder / "images").mkdir(parents=True, exist_ok=True)
    for photograph in sources.photographs:
        copy = folder / _image(photograph)
        copy.parent.mkdir(parents=True, exist_ok=True)
        if not copy.is_file():
            shutil.copyfile(photograph.path, copy)
    instructions = read_instructions(sources.instructions)
    forbidden = [] if sources.forbidden is None else read_forbidden(sources.forbidden, folder / "images")
    counts = {}
    for held_out in (False, True):
        shown = [photograph for photograph in sources.photographs if photograph.is_held_out == held_out]
        limit = MOST_HELD_OUT if held_out else sources.limit
        rows = {
            CAPTIONS: [
                row
                for row in _caption_rows(shown, held_out=held_out)
                if len(tokenizer(row["answer"], add_special_tokens=False)["input_ids"]) < longest_caption
            ],
            QUESTIONS: _question_rows(shown, sources.instances),
            HARMLESS: _request_rows(instructions, shown, "benign", held_out=held_out, limit=limit),
            FORBIDDEN: _request_rows(forbidden, shown, "forbidden", held_out=held_out, limit=limit),
        }
        for name, made in rows.items():
            if made:
                file = f"held_out_{name}.jsonl" if held_out else f"{name}.jsonl"
                write_jsonl(folder / file, made)
                counts[file] = len(made)
    return counts


def write_jsonl(path: Path, rows: Iterable[JsonObject]) -> None:
    """Writes rows as JSON lines."""
    write_text_atomic(path, "".join(json.dumps(row) + "\n" for row in rows))


def read_jsonl(path: Path) -> list[JsonObject]:
    """Returns the rows of a file that `write_jsonl` has written."""
    return [parse_json(line) for line in path.read_text(encoding="utf-8").splitlines()]


def read_instructions(path: Path) -> list[tuple[str, str | None]]:
    """Returns (instruction, None) of each usable row of a .csv or .json file; both have a field `instruction`.

    Instructions are left out if they are too long or hold an image placeholder.

    Raises:
      UserError: the file cannot be read, or none of its rows is usable.
    """
    try:
        text = path.read_text(encoding="utf-8")
        rows = parse_json(text) if path.suffix == ".json" else list(csv.DictReader(text.splitlines(keepends=True)))
    except (OSError, ValueError, csv.Error) as error:
        raise UserError(
            f"--instructions={path}: cannot be read ({error}); give a .csv or .json file with a field 'instruction'"
        ) from error
    values = [row.get("instruction") for row in rows if isinstance(row, dict)] if isinstance(rows, list) else []
    texts = dict.fromkeys(value.strip() for value in values if isinstance(value, str))
    usable: list[tuple[str, str | None]] = [(text, None) for text in texts if _is_usable(text)]
    if not usable:
        raise UserError(f"--instructions={path}: has no row with an 'instruction' of 1 to {LONGEST} characters")
    return usable


def _is_usable(instruction: str) -> bool:
    """Returns whether an instruction may become a row."""
    return 0 < len(instruction) <= LONGEST and not any(name in instruction for name in PLACEHOLDERS)


def read_forbidden(path: Path, images: Path) -> list[tuple[str, str | None]]:
    """Returns (request, category) of each usable row of RedTeam-2K's file (columns id, question, policy).

    Raises:
      UserError: the file cannot be read, or none of its rows is usable.
    """
    rows: list[Example] = read_source(f"redteam_2k:{path}?images={images}").examples
    return [(row.prompt, row.category) for row in rows]


def _image(photograph: Photograph) -> str:
    """Returns the path of the photograph's copy in the folder of the rows."""
    return f"images/{photograph.name}"


def _caption_rows(photographs: Sequence[Photograph], *, held_out: bool) -> list[JsonObject]:
    """Returns rows that ask for a description: one for each caption; held out, for the first caption alone."""
    rows = []
    for photograph in photographs:
        for number, caption in enumerate(photograph.captions[:1] if held_out else photograph.captions):
            row_id = f"{CAPTIONS}:{photograph.name}:{number}"
            rows.append(_row(row_id, CAPTION_PROMPT, photograph, "benign", caption, CAPTIONS))
    return rows


def _question_rows(photographs: Sequence[Photograph], instances: Path | None) -> list[JsonObject]:
    """Returns questions about the photographs, of kind vqa."""
    by_name = {photograph.name: photograph for photograph in photographs}
    asked = questions.from_captions(photographs)
    if instances is not None:
        counts = {name: objects for name, objects in read_objects(instances).items() if name in by_name}
        asked += questions.from_objects(counts)
    rows = {}
    for question in asked:
        subject = re.sub(r"\W+", "_", question.text.partition("\n")[0].lower()).strip("_")
        row_id = f"{QUESTIONS}:{question.photograph}:{subject}"
        photograph = by_name[question.photograph]
        rows[row_id] = _row(row_id, question.text, photograph, "vqa", question.answer, question.type)
    return list(rows.values())


def _request_rows(
    requests: Sequence[tuple[str, str | None]], photographs: Sequence[Photograph], kind: str, *, held_out: bool,
    limit: int,
) -> list[JsonObject]:  # fmt: skip
    """Returns at most `limit` requests of one side, each with a photograph that a hash of its text chooses."""
    sided = [request for request in requests if is_held_out(request[0], TEXT_HALF) == held_out]
    rows = []
    for text, category in sorted(sided, key=lambda request: hash_order(request[0]))[:limit]:
        digest = hash_order(f"photograph of\n{text}")
        photograph = photographs[int.from_bytes(digest[:8], "big") % len(photographs)]
        name = FORBIDDEN if kind == "forbidden" else HARMLESS
        rows.append(_row(f"{name}:{hash_order(text).hex()[:16]}", text, photograph, kind, None, category or name))
    return rows


def _row(
    row_id: str, prompt: str, photograph: Photograph, kind: str, answer: str | None, policy: str
) -> JsonObject:  # fmt: skip
    """Returns a row of a .jsonl file, see `icet_jax.data.records`."""
    row = {
        "id": row_id, "prompt": prompt, "image": _image(photograph), "kind": kind, "answer": answer, "policy": policy,
    }  # fmt: skip
    return {name: value for name, value in row.items() if value is not None}
