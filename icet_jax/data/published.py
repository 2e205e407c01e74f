"""Reads published data sets from the files that their authors distribute.

A source string `NAME:PATH[?option=value&...]` names the format, the file and options:

    redteam_2k:RedTeam_2K.csv?images=FOLDER[&seed=0]        JailbreakV-28K/JailBreakV-28k on the hub
    jailbreakv_28k:JailBreakV_28K.csv[?images=ROOT]         same repository; also its mini_JailBreakV_28K.csv
    advbench_coco:harmful_behaviors.csv?images=FOLDER[&seed=0]      llm-attacks/llm-attacks on GitHub
    xstest:xstest_prompts.csv[?images=FOLDER&seed=0]        paul-rottger/xstest on GitHub; also xstest_v2_prompts.csv
    harmbench:harmbench_behaviors_text_all.csv[?images=FOLDER&seed=0]       centerforaisafety/HarmBench on GitHub
    harmbench:harmbench_behaviors_multimodal_all.csv?images=FOLDER          same repository; every row names its image
    strongreject:strongreject_dataset.csv[?images=FOLDER&seed=0]            alexandrasouly/strongreject on GitHub
    figstep:safebench.csv?images=FOLDER                     ThuCCSLab/FigStep on GitHub: questions, rendered images
    captions:captions_val2014.json?images=FOLDER            benign rows: MS-COCO's captions, or Karpathy's splits
    vqa_v2:FOLDER?split=val2014[&images=FOLDER]             visualqa.org: questions, annotations, COCO images

Each source also accepts `limit=N`: reading stops after N usable rows. Where rows name no image, `images` is a folder of
benign images: a row's image is a pure function of (seed, row id) and the folder's sorted file names; if that file
cannot be used, another one is drawn in the same way. This project contains no part of these data sets.
"""

import re
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from icet_jax.data.benchmark_prompts import read_captions, read_figstep, read_harmbench, read_strongreject
from icet_jax.data.records import (
    BadRow,
    Example,
    Records,
    attack_format,
    category_of,
    collect,
    path_in,
    prompt_of,
    read_records,
    text,
    usable_image,
    yes_or_no,
)
from icet_jax.data.tables import RawRow, csv_rows, json_array_rows
from icet_jax.errors import UserError
from icet_jax.files import JsonObject
from icet_jax.media.image_files import MISSING, ImageFiles, ImageFolder

VQA_SUFFIX = "\nAnswer the question using a single word or phrase."
"""The text after a question with which LLaVA-1.5 was trained to give a short answer."""

_XSTEST_KINDS = {"safe": "benign", "unsafe": "forbidden"}


@dataclass(frozen=True)
class ParsedSource:
    """Holds the parts of a source string, and how it is to be read.

    Attributes:
      path: file or folder of the data set. `path`, `images` and `image_root` are complete paths.
      options: {option of the source string: its value as text}.
      images: folder that the option `images` names; None without that option.
      image_root: folder for image paths that the rows name; None for the data set's default.
      limit: number of usable rows after which reading stops; None reads all.
      files: checks the image files.
    """

    path: Path
    options: Mapping[str, str]
    images: Path | None
    image_root: Path | None
    limit: int | None
    files: ImageFiles

    def image_drawer(self) -> Callable[[str], Path]:
        """Returns a function that takes a row's id and returns a usable image drawn from the folder `images`."""
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
    """Reads the rows of a file in one of the published formats, or of a user's own .csv or .jsonl file.

    Args:
      source: source string, as described at the top of this module, or the path of a user's file.
      root: folder for relative paths in `source`; None for the working directory.
      image_root: folder for the image paths in a user's file or in JailBreakV-28K; None for the file's folder.
      limit: number of usable rows after which reading stops; None reads all.
      decode: whether to decode the images, so that rows with damaged images are left out too.

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
    source_limit = int(options["limit"]) if "limit" in options else None
    parsed = ParsedSource(
        path=base / path,
        options=options,
        images=base / options["images"] if "images" in options else None,
        image_root=None if image_root is None else Path(image_root),
        limit=min((number for number in (source_limit, limit) if number is not None), default=None),
        files=ImageFiles(decode=decode),
    )
    records = reader(parsed)
    # Rows beyond the limit in the source string do not belong to the source.
    return replace(records, complete=records.complete or len(records.examples) == source_limit)


def _options(source: str, query: str, required: tuple[str, ...], optional: tuple[str, ...]) -> dict[str, str]:
    """Returns the options in `query`, the part of a source string after the question mark.

    Raises:
      UserError: an option is malformed or unknown, or a required option is missing.
    """
    options: dict[str, str] = {}
    allowed = (*required, *optional)
    for part in filter(None, query.split("&")):
        key, equals, value = part.partition("=")
        if key not in allowed or not equals or not value:
            raise UserError(f"{source}: '{part}' is not an option; write KEY=VALUE with a KEY of {', '.join(allowed)}")
        if key in ("seed", "limit") and not re.fullmatch(r"[0-9]{1,9}", value) or (key, value) == ("limit", "0"):
            raise UserError(f"{source}: {part} must be a whole number, {'0' if key == 'seed' else '1'} or more")
        options[key] = value
    for key in required:
        if key not in options:
            raise UserError(f"{source}: needs {key}: add ?{key}={'val2014' if key == 'split' else 'FOLDER'}")
    return options


def _redteam_2k(source: ParsedSource) -> Records:
    """Reads RedTeam-2K: columns id, question, policy; images are drawn from a folder."""
    draw_image = source.image_drawer()

    def to_example(fields: JsonObject, identity: str) -> Example:
        prompt = prompt_of(fields, "question")
        image = usable_image(draw_image(identity), source.files)
        return Example(_required_id(fields, identity), prompt, (image,), category=category_of(fields, "policy"))

    rows = csv_rows(source.path, ("id", "question", "policy"), "id, question, policy")
    return collect(source.path, rows, to_example, source.files, id_field="id", limit=source.limit)


def _jailbreakv_28k(source: ParsedSource) -> Records:
    """Reads JailBreakV-28K: columns id, jailbreak_query, policy, image_path[, format, transfer_from_llm]."""
    root = source.images or source.image_root or source.path.parent

    def to_example(fields: JsonObject, identity: str) -> Example:
        prompt = prompt_of(fields, "jailbreak_query")
        name = text(fields, "image_path")
        if name is None:
            raise BadRow(MISSING, "image_path is empty")
        image = usable_image(path_in(root, name), source.files)
        return Example(
            _required_id(fields, identity),
            prompt,
            (image,),
            category=category_of(fields, "policy"),
            format=attack_format(fields, "format"),
            transferred=yes_or_no(fields, "transfer_from_llm"),
        )

    required = ("id", "jailbreak_query", "policy", "image_path")
    rows = csv_rows(source.path, required, ", ".join(required))
    return collect(source.path, rows, to_example, source.files, id_field="id", limit=source.limit)


def _advbench_coco(source: ParsedSource) -> Records:
    """Reads AdvBench: columns goal, target (the beginning of an answer, not used); the id of a row is its number."""
    draw_image = source.image_drawer()

    def to_example(fields: JsonObject, identity: str) -> Example:
        prompt = prompt_of(fields, "goal")
        return Example(identity, prompt, (usable_image(draw_image(identity), source.files),))

    rows = csv_rows(source.path, ("goal",), "goal, target")
    return collect(source.path, rows, to_example, source.files, id_field=None, limit=source.limit)


def _xstest(source: ParsedSource) -> Records:
    """Reads both versions of XSTest: columns id, prompt, type, label, or id_v2, prompt, type (`_xstest_rows`).

    Rows have no image unless a folder of images is given.
    """
    draw_image = source.image_drawer() if source.images else None

    def to_example(fields: JsonObject, identity: str) -> Example:
        prompt = prompt_of(fields, "prompt")
        label = (text(fields, "label") or "").lower()
        if label not in _XSTEST_KINDS:
            raise BadRow("unknown label", f"label '{label}' is neither safe nor unsafe")
        images = () if draw_image is None else (usable_image(draw_image(identity), source.files),)
        kind, row_type = _XSTEST_KINDS[label], text(fields, "type")
        return Example(_required_id(fields, identity), prompt, images, kind, category=row_type)

    columns = "id, prompt, type, label (or id_v1, id_v2, type, prompt)"
    rows = _xstest_rows(source.path, csv_rows(source.path, ("prompt", "type"), columns), columns)
    return collect(source.path, rows, to_example, source.files, id_field="id", limit=source.limit)


def _xstest_rows(path: Path, rows: Iterator[RawRow], columns: str) -> Iterator[RawRow]:
    """Yields the rows of either version of XSTest with the columns id and label.

    The second version has no labels. There, a prompt is unsafe if its type begins with "contrast_" (XSTest's README).

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


def _required_id(fields: JsonObject, identity: str) -> str:
    """Returns `identity`; raises `BadRow` if the row's field `id`, which this format requires, is empty."""
    if not str(fields["id"]).strip():
        raise BadRow("no id", "the id is empty")
    return identity


def _vqa_v2(source: ParsedSource) -> Records:
    """Reads VQA-v2's questions, joined with their annotations by question_id.

    The images are COCO_SPLIT_000000000000.jpg in the folder `images`, else in a folder SPLIT next to the questions.
    """
    split = source.options["split"]
    questions = source.path / f"v2_OpenEnded_mscoco_{split}_questions.json"
    annotations = source.path / f"v2_mscoco_{split}_annotations.json"
    for path in (questions, annotations):
        if not path.is_file():
            raise UserError(f"{path}: no such file; split={split} needs its questions and annotations, unzipped")
    split_folder = source.path / split
    images = source.images or (split_folder if split_folder.is_dir() else source.path)
    annotation_reader = _AnnotationReader(annotations)

    def to_example(fields: JsonObject, identity: str) -> Example:
        question_id = _natural_number(fields, "question_id")
        prompt = prompt_of(fields, "question") + VQA_SUFFIX
        image_id = _natural_number(fields, "image_id")
        annotation = annotation_reader.read(question_id)
        if annotation.image_id != image_id:
            detail = f"question {question_id} is about image {image_id}, but its annotation about {annotation.image_id}"
            raise BadRow("annotation of another image", detail)
        image = usable_image(images / f"COCO_{split}_{image_id:012d}.jpg", source.files)
        return Example(
            identity, prompt, (image,), "vqa", annotation.answer, answers=annotation.answers,
            answer_type=annotation.answer_type,
        )  # fmt: skip

    rows = json_array_rows(questions, "questions")
    return collect(questions, rows, to_example, source.files, id_field="question_id", limit=source.limit)


@dataclass(frozen=True)
class _Annotation:
    """Holds the most frequent answer to a VQA-v2 question, the answers of all annotators, and the answer type."""

    image_id: int
    answer: str
    answers: tuple[str, ...]
    answer_type: str | None


class _AnnotationReader:
    """Finds annotations by question, and reads the annotation file only as far as necessary.

    Annotations that were read before their question are kept in memory. In the published files, questions and
    annotations are in the same order, so there are few of them.
    """

    def __init__(self, path: Path) -> None:
        self._rows: Iterator[RawRow] = json_array_rows(path, "annotations")
        self._waiting: dict[int, _Annotation | BadRow] = {}

    def read(self, question_id: int) -> _Annotation:
        """Returns the annotation of a question, once per question; raises `BadRow` if it is missing or unusable."""
        while question_id not in self._waiting:
            _, fields = next(self._rows, (0, None))
            if fields is None:
                raise BadRow("no annotation", f"question {question_id} has no annotation")
            if not isinstance(fields, str):
                self._add(fields)
        annotation = self._waiting.pop(question_id)
        if isinstance(annotation, BadRow):
            raise annotation
        return annotation

    def _add(self, fields: JsonObject) -> None:
        """Adds the annotation in a row, or the reason why it cannot be used, to those kept for later questions."""
        try:
            question_id = _natural_number(fields, "question_id")
        except BadRow:
            return  # the question will be left out because it has no annotation
        try:
            self._waiting.setdefault(question_id, _annotation(fields))
        except BadRow as error:
            self._waiting.setdefault(question_id, error)


def _annotation(fields: JsonObject) -> _Annotation:
    """Returns the annotation in a row; raises `BadRow` if it is incomplete."""
    answer, annotator_answers = text(fields, "multiple_choice_answer"), fields.get("answers")
    if answer is None:
        raise BadRow("no answer", "its annotation has no multiple_choice_answer")
    is_list = isinstance(annotator_answers, list) and all(isinstance(one, dict) for one in annotator_answers)
    if not is_list or not annotator_answers:
        raise BadRow("no answer", "its annotation has no list of answers")
    # Interned, because there are millions of answers, most of them equal.
    answers = tuple(sys.intern(text(one, "answer") or "") for one in annotator_answers)
    return _Annotation(_natural_number(fields, "image_id"), answer, answers, text(fields, "answer_type"))


def _natural_number(fields: JsonObject, name: str) -> int:
    """Returns the whole number, at least 0, in a field; raises `BadRow` if it is something else."""
    value = fields.get(name)
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise BadRow("bad field", f"{name} is not a whole number")
    return value


_FORMATS: dict[str, tuple[Callable[[ParsedSource], Records], tuple[str, ...], tuple[str, ...]]] = {
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
"""{name of a format in source strings: (reader, required options, optional options)}."""
