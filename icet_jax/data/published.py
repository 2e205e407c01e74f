"""Reads published data sets from the files that their authors distribute, named `NAME:PATH[?option=value&...]`.

    redteam_2k:RedTeam_2K.csv?images=FOLDER[&seed=0]        JailbreakV-28K/JailBreakV-28k on the hub
    jailbreakv_28k:JailBreakV_28K.csv[?images=ROOT]         the same; also its mini_JailBreakV_28K.csv
    advbench_coco:harmful_behaviors.csv?images=FOLDER[&seed=0]      llm-attacks/llm-attacks on GitHub
    xstest:xstest_prompts.csv[?images=FOLDER&seed=0]        paul-rottger/xstest on GitHub; also xstest_v2_prompts.csv
    harmbench:harmbench_behaviors_text_all.csv[?images=FOLDER&seed=0]       centerforaisafety/HarmBench on GitHub
    harmbench:harmbench_behaviors_multimodal_all.csv?images=FOLDER          the same, each row with its own image
    strongreject:strongreject_dataset.csv[?images=FOLDER&seed=0]            alexandrasouly/strongreject on GitHub
    figstep:safebench.csv?images=FOLDER                     ThuCCSLab/FigStep on GitHub: questions, rendered images
    captions:captions_val2014.json?images=FOLDER            benign rows: MS-COCO's captions, or Karpathy's splits
    vqa_v2:FOLDER?split=val2014[&images=FOLDER]             visualqa.org: questions, annotations, COCO images

Each source also accepts `limit=N`: reading stops after N usable rows. If `images` is a folder of benign images, a
row's image is a pure function of (seed, row id) and the folder's sorted file names; if that file cannot be used,
another one is drawn in the same way. This project contains no part of these data sets.
"""

import re
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from icet_jax.data.benchmark_prompts import read_captions, read_figstep, read_harmbench, read_strongreject
from icet_jax.data.records import (
    BadRow,
    Example,
    Records,
    attack_format,
    category_of,
    collect,
    inside,
    prompt_of,
    read_records,
    text,
    truth,
    usable_image,
)
from icet_jax.data.tables import RawRow, csv_rows, json_array_rows
from icet_jax.errors import UserError
from icet_jax.files import JsonObject
from icet_jax.media.image_files import MISSING, ImageFiles, ImageFolder

VQA_SUFFIX = "\nAnswer the question using a single word or phrase."
"""What LLaVA-1.5 was trained to take as the request for a short answer."""

_XSTEST_KINDS = {"safe": "benign", "unsafe": "forbidden"}


@dataclass(frozen=True)
class _Request:
    """Holds the parts of a parsed source string; its paths are already relative to the right folder."""

    path: Path
    options: Mapping[str, str]
    images: Path | None
    image_root: Path | None
    limit: int | None
    files: ImageFiles

    def picker(self) -> Callable[[str], Path]:
        """Returns a function from row id to an image in the folder `images`, for sources without images; unusable ones
        are skipped."""
        assert self.images is not None
        return partial(self.files.draw, ImageFolder(self.images), int(self.options.get("seed", "0")))


def read_source(
    source: str,
    *,
    root: str | Path | None = None,
    image_root: str | Path | None = None,
    limit: int | None = None,
    decode: bool = False,
) -> Records:
    """Reads the rows of a file in one of the published formats, or of a user's own FILE.csv or FILE.jsonl.

    Args:
      source: source string, as described at the top of this module.
      root: folder for the source's relative paths; the working directory if None.
      image_root: folder for image paths of a user's file or of JailBreakV-28K; the file's own folder if None.
      limit: number of usable rows after which reading stops.
      decode: whether images are decoded, so that rows with damaged images are left out too.

    Raises:
      UserError: the format or an option is unknown, or the file cannot be read or has no usable row.
    """
    base = Path() if root is None else Path(root)
    name, colon, rest = source.partition(":")
    if not colon or not re.fullmatch(r"\w+", name):
        return read_records(base / source, image_root=image_root, limit=limit, decode=decode)
    if name not in _FORMATS:
        raise UserError(f"{source}: no data format is called '{name}'; known: {', '.join(_FORMATS)}")
    reader, required, optional = _FORMATS[name]
    path, question, query = rest.rpartition("?")
    if not question:
        path, query = rest, ""
    options = _options(source, query, required, (*optional, "limit"))
    own_limit = int(options["limit"]) if "limit" in options else None
    request = _Request(
        path=base / path,
        options=options,
        images=base / options["images"] if "images" in options else None,
        image_root=None if image_root is None else Path(image_root),
        limit=min((number for number in (own_limit, limit) if number is not None), default=None),
        files=ImageFiles(decode=decode),
    )
    records = reader(request)
    # Rows beyond the source's own limit are not part of the source.
    return replace(records, complete=records.complete or len(records.examples) == own_limit)


def _options(source: str, query: str, required: tuple[str, ...], optional: tuple[str, ...]) -> dict[str, str]:
    options: dict[str, str] = {}
    allowed = (*required, *optional)
    for part in filter(None, query.split("&")):
        key, equals, value = part.partition("=")
        if key not in allowed or not equals or not value:
            raise UserError(
                f"{source}: '{part}' is no option of it; write KEY=VALUE with a KEY of {', '.join(allowed)}"
            )
        if key in ("seed", "limit") and not re.fullmatch(r"[0-9]{1,9}", value) or (key, value) == ("limit", "0"):
            raise UserError(f"{source}: {part} must be a whole number, {'0' if key == 'seed' else '1'} or more")
        options[key] = value
    for key in required:
        if key not in options:
            raise UserError(f"{source}: needs {key}: add ?{key}={'val2014' if key == 'split' else 'FOLDER'}")
    return options


def _redteam_2k(request: _Request) -> Records:
    """Reads RedTeam-2K, columns id, question, policy; images are drawn from a folder."""
    pick = request.picker()

    def convert(fields: JsonObject, identity: str) -> Example:
        prompt = prompt_of(fields, "question")
        image = usable_image(pick(identity), request.files)
        return Example(_own_id(fields, identity), prompt, (image,), category=category_of(fields, "policy"))

    rows = csv_rows(request.path, ("id", "question", "policy"), "id, question, policy")
    return collect(request.path, rows, convert, request.files, id_field="id", limit=request.limit)


def _jailbreakv_28k(request: _Request) -> Records:
    """Reads JailBreakV-28K, columns id, jailbreak_query, redteam_query, policy, image_path[, format,
    transfer_from_llm].

    Image paths must stay inside their root.
    """
    root = request.images or request.image_root or request.path.parent

    def convert(fields: JsonObject, identity: str) -> Example:
        prompt = prompt_of(fields, "jailbreak_query")
        name = text(fields, "image_path")
        if name is None:
            raise BadRow(MISSING, "image_path is empty")
        image = usable_image(inside(root, name), request.files)
        return Example(
            _own_id(fields, identity),
            prompt,
            (image,),
            category=category_of(fields, "policy"),
            format=attack_format(fields, "format"),
            transferred=truth(fields, "transfer_from_llm"),
        )

    required = ("id", "jailbreak_query", "policy", "image_path")
    rows = csv_rows(request.path, required, ", ".join(required))
    return collect(request.path, rows, convert, request.files, id_field="id", limit=request.limit)


def _advbench_coco(request: _Request) -> Records:
    """Reads AdvBench, columns goal, target (an affirmative beginning, which is not used); row numbers are the ids."""
    pick = request.picker()

    def convert(fields: JsonObject, identity: str) -> Example:
        prompt = prompt_of(fields, "goal")
        return Example(identity, prompt, (usable_image(pick(identity), request.files),))

    rows = csv_rows(request.path, ("goal",), "goal, target")
    return collect(request.path, rows, convert, request.files, id_field=None, limit=request.limit)


def _xstest(request: _Request) -> Records:
    """Reads XSTest, columns prompt, type and id, label (or id_v2, as in xstest_v2_prompts.csv, where the type gives the
    label).

    Rows are text-only unless a folder of images is given.
    """
    pick = request.picker() if request.images else None

    def convert(fields: JsonObject, identity: str) -> Example:
        prompt = prompt_of(fields, "prompt")
        label = (text(fields, "label") or "").lower()
        if label not in _XSTEST_KINDS:
            raise BadRow("unknown label", f"label '{label}' is neither safe nor unsafe")
        images = () if pick is None else (usable_image(pick(identity), request.files),)
        kind, row_type = _XSTEST_KINDS[label], text(fields, "type")
        return Example(_own_id(fields, identity), prompt, images, kind, category=row_type)

    columns = "id, prompt, type, label (or id_v1, id_v2, type, prompt)"
    rows = _xstest_rows(request.path, csv_rows(request.path, ("prompt", "type"), columns), columns)
    return collect(request.path, rows, convert, request.files, id_field="id", limit=request.limit)


def _xstest_rows(path: Path, rows: Iterator[RawRow], columns: str) -> Iterator[RawRow]:
    """Yields the rows of both layouts of XSTest with the columns id and label.

    The second version has no label; its unsafe prompts are those whose type begins with contrast_ (XSTest's README).

    Raises:
      UserError: the file has neither id nor id_v2, or it has id but no label.
    """
    for line, fields in rows:
        if not isinstance(fields, str) and not {"id", "label"} <= fields.keys():
            if "id_v2" not in fields:
                missing = "label" if "id" in fields else "id"
                raise UserError(f"{path}: no column '{missing}' among {', '.join(fields)}; the columns are {columns}")
            kind = "unsafe" if fields["type"].strip().lower().startswith("contrast_") else "safe"
            fields = {**fields, "id": fields["id_v2"], "label": kind}
        yield line, fields


def _own_id(fields: Mapping[str, Any], identity: str) -> str:
    """Returns the id of a row in a format where every row must have one."""
    if not str(fields["id"]).strip():
        raise BadRow("no id", "the id is empty")
    return identity


def _vqa_v2(request: _Request) -> Records:
    """Reads VQA-v2's questions, joined with their annotations by question_id; images are
    COCO_SPLIT_000000000000.jpg."""
    split = request.options["split"]
    questions = request.path / f"v2_OpenEnded_mscoco_{split}_questions.json"
    annotations = request.path / f"v2_mscoco_{split}_annotations.json"
    for path in (questions, annotations):
        if not path.is_file():
            raise UserError(f"{path}: no such file; split={split} needs its questions and annotations, unzipped")
    beside = request.path / split
    images = request.images or (beside if beside.is_dir() else request.path)
    lookup = _Annotations(annotations)

    def convert(fields: JsonObject, identity: str) -> Example:
        number = _whole(fields, "question_id")
        prompt = prompt_of(fields, "question") + VQA_SUFFIX
        image_id = _whole(fields, "image_id")
        note = lookup.of(number)
        if note.image_id != image_id:
            raise BadRow("annotation of another image", f"question {number} is about image {image_id}, its answers not")
        image = usable_image(images / f"COCO_{split}_{image_id:012d}.jpg", request.files)
        return Example(
            identity, prompt, (image,), "vqa", note.answer, answers=note.answers, answer_type=note.answer_type
        )

    rows = json_array_rows(questions, "questions")
    return collect(questions, rows, convert, request.files, id_field="question_id", limit=request.limit)


@dataclass(frozen=True)
class _Annotation:
    image_id: int
    answer: str
    answers: tuple[str, ...]
    answer_type: str | None


class _Annotations:
    """Looks up annotations by question, reading only as far as needed; the published files have both in the same
    order."""

    def __init__(self, path: Path) -> None:
        self._rows: Iterator[RawRow] = json_array_rows(path, "annotations")
        self._waiting: dict[int, _Annotation | BadRow] = {}

    def of(self, question: int) -> _Annotation:
        """Returns the annotation of a question."""
        while question not in self._waiting:
            _, fields = next(self._rows, (0, None))
            if fields is None:
                raise BadRow("no annotation", f"question {question} has no annotation")
            if not isinstance(fields, str):
                self._keep(fields)
        annotation = self._waiting.pop(question)
        if isinstance(annotation, BadRow):
            raise annotation
        return annotation

    def _keep(self, fields: JsonObject) -> None:
        try:
            number = _whole(fields, "question_id")
        except BadRow:
            return  # its question, if there is one, is left out for having no annotation
        try:
            self._waiting.setdefault(number, _annotation(fields))
        except BadRow as error:
            self._waiting.setdefault(number, error)


def _annotation(fields: JsonObject) -> _Annotation:
    answer, annotator_answers = text(fields, "multiple_choice_answer"), fields.get("answers")
    if answer is None:
        raise BadRow("no answer", "its annotation has no multiple_choice_answer")
    if (
        not isinstance(annotator_answers, list)
        or not annotator_answers
        or not all(isinstance(one, dict) for one in annotator_answers)
    ):
        raise BadRow("no answer", "its annotation has no list of answers")
    answers = tuple(
        sys.intern(text(one, "answer") or "") for one in annotator_answers
    )  # there are millions, and most are equal
    return _Annotation(_whole(fields, "image_id"), answer, answers, text(fields, "answer_type"))


def _whole(fields: JsonObject, name: str) -> int:
    value = fields.get(name)
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise BadRow("bad field", f"{name} is no whole number")
    return value


_FORMATS: dict[str, tuple[Callable[[_Request], Records], tuple[str, ...], tuple[str, ...]]] = {
    "redteam_2k": (_redteam_2k, ("images",), ("seed",)),
    "jailbreakv_28k": (_jailbreakv_28k, (), ("images",)),
    "advbench_coco": (_advbench_coco, ("images",), ("seed",)),
    "xstest": (_xstest, (), ("images", "seed")),
    "vqa_v2": (_vqa_v2, ("split",), ("images",)),
    "harmbench": (read_harmbench, (), ("images", "seed")),
    "strongreject": (read_strongreject, (), ("images", "seed")),
    "figstep": (read_figstep, ("images",), ()),
    "captions": (read_captions, ("images",), ()),
}
"""{name: (reader, required options, optional options)}."""
