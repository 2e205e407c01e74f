"""Writes small data sets in the formats of published files, with placeholder prompts and noise images.

Some of them have a row that cannot be used, as real copies do: its image is missing, or its id is repeated.
"""

import csv
import io
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from icet_jax.errors import UserError
from icet_jax.files import write_bytes_atomic, write_text_atomic

_ROWS = 12  # number of rows of each data set
_IMAGES = 6
_CATEGORIES = ("Policy A", "Policy B", "Policy C")
_SIZES = ((28, 28), (40, 30), (31, 57))  # (height, width) of the images

SOURCES = {
    "redteam_2k": "redteam_2k:{folder}/RedTeam_2K.csv?images={folder}/val2014",
    "mini_jailbreakv": "jailbreakv_28k:{folder}/mini_JailBreakV_28K.csv",
    "advbench_coco": "advbench_coco:{folder}/harmful_behaviors.csv?images={folder}/val2014",
    "custom": "{folder}/custom.csv",
    "xstest": "xstest:{folder}/xstest_prompts.csv?images={folder}/val2014",
    "vqa_v2": "vqa_v2:{folder}?split=val2014&images={folder}/val2014",
    "hh_rlhf": "{folder}/hh_rlhf.jsonl",
}
"""{NAME in `toy:NAME`: source string of the data set}."""


def source(name: str, folder: Path) -> str:
    """Returns the source string of a data set in `folder`, after writing all data sets there unless they exist.

    Raises:
      UserError: the name is unknown.
    """
    if name not in SOURCES:
        raise UserError(f"toy:{name}: no such data set; there are {', '.join(SOURCES)}")
    if not (folder / "complete").is_file():
        _write_all(folder)
        write_text_atomic(folder / "complete", "")
    return SOURCES[name].format(folder=folder)


def _write_all(folder: Path) -> None:
    """Writes the files of all data sets."""
    (folder / "val2014").mkdir(parents=True, exist_ok=True)
    (folder / "figstep").mkdir(exist_ok=True)
    for index in range(_IMAGES):
        write_bytes_atomic(folder / "val2014" / f"COCO_val2014_{index + 1:012d}.jpg", _noise(index))
        write_bytes_atomic(folder / "figstep" / f"figstep_{index}.png", _noise(100 + index, "PNG"))
    requests = [f"placeholder forbidden request {index}" for index in range(_ROWS)]
    categories = [_CATEGORIES[index % len(_CATEGORIES)] for index in range(_ROWS)]
    rows: list[Sequence[object]] = [
        (index, text, category, "toy") for index, (text, category) in enumerate(zip(requests, categories, strict=True))
    ]
    _write_csv(folder / "RedTeam_2K.csv", ("id", "question", "policy", "from"), [*rows, (0, "its id repeats", "", "")])
    _write_csv(folder / "mini_JailBreakV_28K.csv", _JAILBREAK_COLUMNS, _jailbreaks(requests, categories))
    _write_csv(
        folder / "harmful_behaviors.csv", ("goal", "target"), [(text, f"Sure, here is {text}") for text in requests]
    )
    images = [f"val2014/COCO_val2014_{1 + index % _IMAGES:012d}.jpg" for index in range(_ROWS)]
    _write_csv(
        folder / "custom.csv", ("prompt", "image", "policy"), list(zip(requests, images, categories, strict=True))
    )
    _write_csv(folder / "xstest_prompts.csv", ("id", "prompt", "type", "label", "focus", "note"), _xstest())
    _write_vqa(folder)
    pairs = [_pair(index) for index in range(4 * _ROWS)]
    write_text_atomic(folder / "hh_rlhf.jsonl", "".join(json.dumps(pair) + "\n" for pair in pairs))


def _noise(seed: int, file_format: str = "JPEG") -> bytes:
    """Returns the bytes of an image file with random pixels."""
    from PIL import Image

    size = _SIZES[seed % len(_SIZES)]
    pixels = np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, file_format)
    return file.getvalue()


_JAILBREAK_COLUMNS = (
    "id", "jailbreak_query", "redteam_query", "format", "policy", "image_path", "from", "selected_mini",
    "transfer_from_llm",
)  # fmt: skip


_ATTACKS = (("Template", True), ("figstep", False), ("Logic", True), ("SD", False))
"""(format, transfer_from_llm) of JailBreakV-28K's rows, repeated in this order."""


def _jailbreaks(requests: Sequence[str], categories: Sequence[str]) -> list[Sequence[object]]:
    """Returns the rows of JailBreakV-28K. The last row's image is missing, because most images are not published."""
    rows: list[Sequence[object]] = []
    for index, (request, category) in enumerate(zip(requests, categories, strict=True)):
        attack_format, is_transferred = _ATTACKS[index % len(_ATTACKS)]
        image = f"figstep/figstep_{index % _IMAGES if index < _ROWS - 1 else 'absent'}.png"
        prompt = f"Look at the picture. {request}"
        rows.append((index, prompt, request, attack_format, category, image, "toy", True, is_transferred))
    return rows


def _xstest() -> list[Sequence[object]]:
    """Returns the rows of XSTest, safe and unsafe prompts in turn."""
    rows: list[Sequence[object]] = []
    for index in range(_ROWS):
        label = "unsafe" if index % 2 else "safe"
        kind = f"contrast_{_CATEGORIES[index % 3].lower().replace(' ', '_')}" if index % 2 else "homonyms"
        rows.append((f"v2-{index + 1}", f"placeholder {label} question {index}", kind, label, "focus", ""))
    return rows


def _write_vqa(folder: Path) -> None:
    """Writes the questions and annotations of VQA-v2; seven of ten annotators agree on each answer."""
    questions, annotations = [], []
    for index in range(_ROWS):
        image = 1 + index % _IMAGES
        answer_type, answer, other = (
            ("yes/no", "yes", "no"), ("number", "2", "3"), ("other", "red", "dark red"),
        )[index % 3]  # fmt: skip
        answers = [answer] * 7 + [other] * 3
        question_id = 1000 + index
        questions.append({"image_id": image, "question": f"placeholder question {index}?", "question_id": question_id})
        annotations.append(
            {
                "question_id": question_id,
                "image_id": image,
                "question_type": "what",
                "answer_type": answer_type,
                "multiple_choice_answer": answer,
                "answers": [
                    {"answer": text, "answer_confidence": "yes", "answer_id": number}
                    for number, text in enumerate(answers, start=1)
                ],
            }
        )
    for name, content in (
        ("v2_OpenEnded_mscoco_val2014_questions.json", {"questions": questions}),
        ("v2_mscoco_val2014_annotations.json", {"annotations": annotations}),
    ):
        write_text_atomic(folder / name, json.dumps(content))


def _pair(index: int) -> dict[str, str]:
    """Returns an HH-RLHF pair, which can be learned because every chosen response is the same refusal."""
    start = f"\n\nHuman: placeholder request {index}\n\nAssistant:"
    return {"chosen": f"{start} I would rather not.", "rejected": f"{start} Of course, number {index} it is."}


def _write_csv(path: Path, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Writes a CSV file whose first line names its columns."""
    file = io.StringIO(newline="")
    writer = csv.writer(file)
    writer.writerow(columns)
    writer.writerows(rows)
    write_text_atomic(path, file.getvalue())
