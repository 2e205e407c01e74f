"""Small files in the formats that data sets are published in, with harmless placeholder rows."""

import csv
import json
from pathlib import Path

from PIL import Image

ROWS = 12


def images(folder: Path, count: int = 5) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for index in range(count):
        Image.new("RGB", (6, 4), (40 * index, 9, 200)).save(folder / f"coco_{index}.png")
    return folder


def write_csv(path: Path, header: list[str], rows: list[list[str]]) -> Path:
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([header, *rows])
    return path


def redteam(folder: Path) -> str:
    rows = [
        [str(i), f"placeholder forbidden request {i}, in two\nlines", f"policy {i % 3}", "GPT"] for i in range(ROWS)
    ]
    path = write_csv(folder / "RedTeam_2K.csv", ["id", "question", "policy", "from"], rows)
    return f"redteam_2k:{path}?images={images(folder / 'coco')}"


def jailbreakv(folder: Path) -> str:
    images(folder / "pictures" / "sub")
    header = [
        "id", "jailbreak_query", "redteam_query", "format", "policy", "image_path", "from", "selected_mini",
        "transfer_from_llm",
    ]  # fmt: skip
    rows = [
        [
            str(i), f'placeholder wrapped request {i}, "quoted"', f"placeholder {i}", ("Template", "figstep")[i % 2],
            f"policy {i % 3}", f"sub/coco_{i % 5}.png", "x", "True", ("True", "False")[i % 2],
        ]
        for i in range(ROWS)
    ]  # fmt: skip
    return f"jailbreakv_28k:{write_csv(folder / 'mini_JailBreakV_28K.csv', header, rows)}?images={folder / 'pictures'}"


def advbench(folder: Path) -> str:
    rows = [[f"placeholder behaviour {i}", f"Sure, here is placeholder {i}"] for i in range(ROWS)]
    path = write_csv(folder / "harmful_behaviors.csv", ["goal", "target"], rows)
    return f"advbench_coco:{path}?images={images(folder / 'coco')}&seed=3"


def xstest(folder: Path) -> str:
    rows = [
        [f"v2-{i}", f"placeholder question {i}?", f"type_{i % 4}", "unsafe" if i % 3 == 0 else "safe", "focus", ""]
        for i in range(ROWS)
    ]
    path = write_csv(folder / "xstest_prompts.csv", ["id", "prompt", "type", "label", "focus", "note"], rows)
    return f"xstest:{path}?images={images(folder / 'coco')}"


def vqa_tables(folder: Path) -> tuple[dict, dict]:
    """The two published JSON files' content; their images are made in `folder`/val2014."""
    pictures = folder / "val2014"
    pictures.mkdir()
    for i in range(ROWS // 3):
        Image.new("RGB", (6, 4), (50 * i, 9, 200)).save(pictures / f"COCO_val2014_{1000 + i:012d}.jpg")
    about = {"info": {"year": 2017}, "license": {"name": "none"}, "data_subtype": "val2014"}
    questions = [
        {"image_id": 1000 + i // 3, "question": f"How many things are here {i}?", "question_id": 10000 + i}
        for i in range(ROWS)
    ]
    annotations = [
        {
            "question_type": "how many",
            "multiple_choice_answer": str(i),
            "answers": [{"answer": str(i + (j > 6)), "answer_confidence": "yes", "answer_id": j} for j in range(10)],
            "image_id": 1000 + i // 3,
            "answer_type": "number",
            "question_id": 10000 + i,
        }
        for i in range(ROWS)
    ]
    return (
        about | {"task_type": "Open-Ended", "data_type": "mscoco", "questions": questions},
        about | {"annotations": annotations},
    )


def write_vqa(folder: Path, questions: dict, annotations: dict) -> str:
    (folder / "v2_OpenEnded_mscoco_val2014_questions.json").write_text(json.dumps(questions))
    (folder / "v2_mscoco_val2014_annotations.json").write_text(json.dumps(annotations))
    return f"vqa_v2:{folder}?split=val2014"


def vqa(folder: Path) -> str:
    return write_vqa(folder, *vqa_tables(folder))


def harmbench(folder: Path) -> str:
    header = ["Behavior", "FunctionalCategory", "SemanticCategory", "Tags", "ContextString", "BehaviorID"]
    rows = [
        [
            f"placeholder behaviour {i}",
            "standard",
            f"area_{i % 3}",
            "",
            "some context" if i == 4 else "",
            f"behaviour_{i}",
        ]
        for i in range(ROWS)
    ]
    path = write_csv(folder / "harmbench_behaviors_text_all.csv", header, rows)
    return f"harmbench:{path}?images={images(folder / 'coco')}"


def harmbench_multimodal(folder: Path) -> str:
    header = [
        "Behavior", "BehaviorID", "FunctionalCategory", "SemanticCategory", "ImageFileName", "Source",
        "ImageDescription", "RedactedImageDescription", "Tags",
    ]  # fmt: skip
    rows = [
        [
            f"placeholder behaviour {i}",
            f"behaviour_{i}",
            "multimodal",
            f"area_{i % 3}",
            f"coco_{i % 5}.png",
            "",
            "",
            "",
            "",
        ]
        for i in range(ROWS)
    ]
    path = write_csv(folder / "harmbench_behaviors_multimodal_all.csv", header, rows)
    return f"harmbench:{path}?images={images(folder / 'behaviour_images')}"


def strongreject(folder: Path) -> str:
    rows = [[f"category {i % 3}", "custom", f"placeholder prompt {i}"] for i in range(ROWS)]
    path = write_csv(folder / "strongreject_dataset.csv", ["category", "source", "forbidden_prompt"], rows)
    return f"strongreject:{path}?images={images(folder / 'coco')}"


def figstep(folder: Path) -> str:
    pictures = folder / "SafeBench"
    pictures.mkdir()
    header = ["dataset", "category_id", "task_id", "category_name", "question", "instruction"]
    rows = [
        ["ForbidQI", str(1 + i // 4), str(1 + i % 4), f"Category {i // 4}", "placeholder", "x"] for i in range(ROWS)
    ]
    for _, category, task, *_ in rows:
        Image.new("RGB", (6, 4)).save(pictures / f"query_ForbidQI_{category}_{task}_6.png")
    return f"figstep:{write_csv(folder / 'safebench.csv', header, rows)}?images={pictures}"


def captions(folder: Path) -> str:
    pictures = images(folder / "photographs", ROWS)
    content = {
        "images": [{"id": 100 + i, "file_name": f"coco_{i}.png"} for i in range(ROWS)],
        "annotations": [{"image_id": 100 + i // 2, "id": i, "caption": f"Caption {i}."} for i in range(2 * ROWS)],
    }
    (folder / "captions_val2014.json").write_text(json.dumps(content))
    return f"captions:{folder / 'captions_val2014.json'}?images={pictures}"


SOURCES = {
    "redteam_2k": redteam,
    "jailbreakv_28k": jailbreakv,
    "advbench_coco": advbench,
    "xstest": xstest,
    "vqa_v2": vqa,
    "harmbench": harmbench,
    "harmbench_multimodal": harmbench_multimodal,
    "strongreject": strongreject,
    "figstep": figstep,
    "captions": captions,
}
