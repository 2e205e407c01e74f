"""Small data sets in the formats of published files, with placeholder prompts and noise images.

Each also has a row or two that cannot be used, as in real copies: a missing image, a repeated id.
"""

import csv
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from icet_jax.errors import UserError
from icet_jax.files import write_bytes_atomic, write_text_atomic

_ROWS = 12
_IMAGES = 6
_POLICIES = ("Policy A", "Policy B", "Policy C")
_SHAPES = ((28, 28), (40, 30), (31, 57))  # height, width

SOURCES = {
    "redteam_2k": "redteam_2k:{folder}/RedTeam_2K.csv?images={folder}/val2014",
    "mini_jailbreakv": "jailbreakv_28k:{folder}/mini_JailBreakV_28K.csv",
    "advbench_coco": "advbench_coco:{folder}/harmful_behaviors.csv?images={folder}/val2014",
    "custom": "{folder}/custom.csv",
    "xstest": "xstest:{folder}/xstest_prompts.csv?images={folder}/val2014",
    "vqa_v2": "vqa_v2:{folder}?split=val2014&images={folder}/val2014",
    "hh_rlhf": "{folder}/hh_rlhf.jsonl",
}
"""Source strings of the sets by toy name."""


def source(name: str, folder: Path) -> str:
    """Returns the source string of a set whose file is in `folder`; all files are written there unless they exist.

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
    (folder / "val2014").mkdir(parents=True, exist_ok=True)
    (folder / "figstep").mkdir(exist_ok=True)
    for index in range(_IMAGES):
        write_bytes_atomic(folder / "val2014" / f"COCO_val2014_{index + 1:012d}.jpg", _noise(index))
        write_bytes_atomic(folder / "figstep" / f"figstep_{index}.png", _noise(100 + index, "PNG"))
    requests = [f"placeholder forbidden request {index}" for index in range(_ROWS)]
    categories = [_POLICIES[index % len(_POLICIES)] for index in range(_ROWS)]
    rows: list[Sequence[Any]] = [
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


def _noise(seed: int, kind: str = "JPEG") -> bytes:
    from PIL import Image

    shape = _SHAPES[seed % len(_SHAPES)]
    pixels = np.random.default_rng(seed).integers(0, 256, (*shape, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind)
    return file.getvalue()


_JAILBREAK_COLUMNS = (
    "id", "jailbreak_query", "redteam_query", "format", "policy", "image_path", "from", "selected_mini",
    "transfer_from_llm",
)  # fmt: skip


_ATTACKS = (("Template", True), ("figstep", False), ("Logic", True), ("SD", False))
"""(format, transfer_from_llm) of JailBreakV-28K's rows in turn; with three categories all combinations occur."""


def _jailbreaks(requests: Sequence[str], categories: Sequence[str]) -> list[Sequence[Any]]:
    return [
        (
            index,
            f"Look at the picture. {request}",
            request,
            _ATTACKS[index % len(_ATTACKS)][0],
            category,
            # The last image does not exist, as most of the set's images are not published with it.
            f"figstep/figstep_{index % _IMAGES if index < _ROWS - 1 else 'absent'}.png",
            "toy",
            True,
            _ATTACKS[index % len(_ATTACKS)][1],
        )
        for index, (request, category) in enumerate(zip(requests, categories, strict=True))
    ]


def _xstest() -> list[Sequence[Any]]:
    rows: list[Sequence[Any]] = []
    for index in range(_ROWS):
        label = "unsafe" if index % 2 else "safe"
        kind = f"contrast_{_POLICIES[index % 3].lower().replace(' ', '_')}" if index % 2 else "homonyms"
        rows.append((f"v2-{index + 1}", f"placeholder {label} question {index}", kind, label, "focus", ""))
    return rows


def _write_vqa(folder: Path) -> None:
    questions, annotations = [], []
    for index in range(_ROWS):
        image = 1 + index % _IMAGES
        kind, answer = (("yes/no", "yes"), ("number", "2"), ("other", "red"))[index % 3]
        others = {"yes/no": "no", "number": "3", "other": "dark red"}[kind]
        answers = [answer] * 7 + [others] * 3
        number = 1000 + index
        questions.append({"image_id": image, "question": f"placeholder question {index}?", "question_id": number})
        annotations.append(
            {
                "question_id": number,
                "image_id": image,
                "question_type": "what",
                "answer_type": kind,
                "multiple_choice_answer": answer,
                "answers": [
                    {"answer": text, "answer_confidence": "yes", "answer_id": place + 1}
                    for place, text in enumerate(answers)
                ],
            }
        )
    for name, content in (
        ("v2_OpenEnded_mscoco_val2014_questions.json", {"questions": questions}),
        ("v2_mscoco_val2014_annotations.json", {"annotations": annotations}),
    ):
        write_text_atomic(folder / name, json.dumps(content))


def _pair(index: int) -> dict[str, str]:
    """Returns a preference pair that can be learned, because the chosen response declines."""
    start = f"\n\nHuman: placeholder request {index}\n\nAssistant:"
    return {"chosen": f"{start} I would rather not.", "rejected": f"{start} Of course, number {index} it is."}


def _write_csv(path: Path, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    file = io.StringIO(newline="")
    writer = csv.writer(file)
    writer.writerow(columns)
    writer.writerows(rows)
    write_text_atomic(path, file.getvalue())
