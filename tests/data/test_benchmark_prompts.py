"""HarmBench, StrongREJECT, FigStep, captions and both versions of XSTest: rows as their published files have them."""

import json

import pytest
from PIL import Image

from icet_jax.data.benchmark_prompts import CAPTION_PROMPT, FIGSTEP_PROMPT
from icet_jax.data.published import read_source
from icet_jax.errors import UserError
from tests.data import published

ROWS = published.ROWS


def test_harmbench_text(tmp_path):
    source = published.harmbench(tmp_path)
    examples = read_source(source).examples
    assert [e.id for e in examples] == [f"behaviour_{i}" for i in range(ROWS)]
    assert (examples[1].prompt, examples[1].category, examples[1].kind) == (
        "placeholder behaviour 1",
        "area_1",
        "forbidden",
    )
    assert examples[4].prompt == "some context\n\n---\n\nplaceholder behaviour 4"
    assert len(examples[0].images) == 1
    assert read_source(source.partition("?")[0]).examples[0].images == ()


def test_harmbench_rows_keep_their_own_images(tmp_path):
    examples = read_source(published.harmbench_multimodal(tmp_path)).examples
    assert [e.images[0].name for e in examples] == [f"coco_{i % 5}.png" for i in range(ROWS)]


@pytest.mark.parametrize("name", ["../secret.png", ""])
def test_harmbench_images_stay_in_their_folder(name, tmp_path):
    source = published.harmbench_multimodal(tmp_path)
    Image.new("RGB", (2, 2)).save(tmp_path / "secret.png")
    path = tmp_path / "harmbench_behaviors_multimodal_all.csv"
    path.write_text(path.read_text().replace("coco_0.png", name, 1))
    records = read_source(source)
    assert [problem.row for problem in records.problems] == [1] and len(records.examples) == ROWS - 1


def test_strongreject(tmp_path):
    source = published.strongreject(tmp_path)
    example = read_source(source).examples[5]
    assert (example.id, example.prompt, example.category) == ("6", "placeholder prompt 5", "category 2")
    assert len(example.images) == 1 and read_source(source.partition("?")[0]).examples[5].images == ()


def test_figstep_requests_are_in_the_images(tmp_path):
    examples = read_source(published.figstep(tmp_path)).examples
    assert {e.prompt for e in examples} == {FIGSTEP_PROMPT} and len(examples) == ROWS
    assert examples[6].id == "ForbidQI_2_3" and examples[6].category == "Category 1"
    assert examples[6].images[0].name == "query_ForbidQI_2_3_6.png"


def test_figstep_rows_without_a_rendered_image_are_counted(tmp_path):
    source = published.figstep(tmp_path)
    (tmp_path / "SafeBench" / "query_ForbidQI_1_2_6.png").unlink()
    records = read_source(source)
    assert records.dropped() == {"missing image": 1} and records.problems[0].row == 2


def test_captions_of_coco(tmp_path):
    examples = read_source(published.captions(tmp_path)).examples
    assert [(e.id, e.answer) for e in examples[:2]] == [("100", "Caption 0."), ("101", "Caption 2.")]
    assert {(e.prompt, e.kind) for e in examples} == {(CAPTION_PROMPT, "benign")}
    assert examples[3].images[0].name == "coco_3.png"


def test_captions_of_karpathys_splits(tmp_path):
    folder = published.images(tmp_path / "flickr")
    images = [
        {"imgid": i, "filename": f"coco_{i}.png", "sentences": [{"raw": f"First {i}."}, {"raw": "Second."}]}
        for i in range(5)
    ]
    images[2]["sentences"] = []
    (tmp_path / "dataset_flickr8k.json").write_text(json.dumps({"images": images, "dataset": "flickr8k"}))
    records = read_source(f"captions:{tmp_path / 'dataset_flickr8k.json'}?images={folder}")
    assert [e.answer for e in records.examples] == ["First 0.", "First 1.", "First 3.", "First 4."]
    assert records.dropped() == {"no answer": 1}


@pytest.mark.parametrize("content, says", [("[]", "has no list 'images'"), ("{", "not a JSON file")])
def test_a_captions_file_of_another_layout_is_one_line(content, says, tmp_path):
    (tmp_path / "captions.json").write_text(content)
    with pytest.raises(UserError, match=says):
        read_source(f"captions:{tmp_path / 'captions.json'}?images={published.images(tmp_path / 'photographs')}")


def test_xstest_v2_has_its_labels_in_the_type(tmp_path):
    types = ["homonyms", "contrast_homonyms", "real_group_nons_discr", "contrast_discr"]
    rows = [[f"v1-{i}", f"v2-{i}", kind, f"placeholder {i}", "", ""] for i, kind in enumerate(types)]
    path = published.write_csv(
        tmp_path / "xstest_v2_prompts.csv", ["id_v1", "id_v2", "type", "prompt", "focus", "note"], rows
    )
    examples = read_source(f"xstest:{path}").examples
    assert [e.id for e in examples] == ["v2-0", "v2-1", "v2-2", "v2-3"]
    assert [e.kind for e in examples] == ["benign", "forbidden", "benign", "forbidden"]
    assert examples[1].category == "contrast_homonyms"


def test_xstest_without_an_id_or_a_label_is_one_line(tmp_path):
    for header, missing in ((["prompt", "type"], "id"), (["id", "prompt", "type"], "label")):
        path = published.write_csv(tmp_path / "xstest.csv", header, [["x"] * len(header)])
        with pytest.raises(UserError, match=f"no column '{missing}'"):
            read_source(f"xstest:{path}")
