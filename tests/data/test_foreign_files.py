"""Files that are not what they seem: Git LFS pointers, other encodings, other separators are refused by name."""

import pytest

from icet_jax.data.published import read_source
from icet_jax.data.records import read_records
from icet_jax.errors import UserError
from icet_jax.media.images import open_image
from tests.data import published

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0000\nsize 123456\n"


@pytest.mark.parametrize("name", ["rows.csv", "rows.jsonl"])
def test_a_table_that_is_an_lfs_pointer(name, tmp_path):
    (tmp_path / name).write_text(POINTER)
    with pytest.raises(UserError, match=rf"{name}: is a Git LFS pointer.*git lfs pull"):
        read_records(tmp_path / name)


def test_a_json_file_that_is_an_lfs_pointer(tmp_path):
    source = published.vqa(tmp_path)
    (tmp_path / "v2_OpenEnded_mscoco_val2014_questions.json").write_text(POINTER)
    with pytest.raises(UserError, match="questions.json: is a Git LFS pointer"):
        read_source(source)


def test_an_image_that_is_an_lfs_pointer(tmp_path):
    source = published.jailbreakv(tmp_path)
    (tmp_path / "pictures" / "sub" / "coco_3.png").write_text(POINTER)
    records = read_source(source)
    assert records.dropped() == {"not an image": 2} and "Git LFS pointer" in records.problems[0].detail
    with pytest.raises(UserError, match="Git LFS pointer"):
        open_image(tmp_path / "pictures" / "sub" / "coco_3.png")


@pytest.mark.parametrize("encoding", ["utf-16", "utf-32"])
@pytest.mark.parametrize("name", ["rows.csv", "rows.jsonl"])
def test_another_encoding(name, encoding, tmp_path):
    (tmp_path / name).write_text("prompt,image\na,b.png\n", encoding=encoding)
    with pytest.raises(UserError, match=f"{name}: is UTF-16 or UTF-32 text; save it as UTF-8"):
        read_records(tmp_path / name)


@pytest.mark.parametrize("separator, called", [(";", "semicolons"), ("\t", "tabs")])
def test_another_separator(separator, called, tmp_path):
    (tmp_path / "rows.csv").write_text(f"prompt{separator}image\na{separator}b.png\n")
    with pytest.raises(UserError, match=f"rows.csv: its columns are separated by {called}; save it as CSV with commas"):
        read_records(tmp_path / "rows.csv")


def test_one_vocabulary_of_categories(tmp_path):
    source = published.jailbreakv(tmp_path)
    path = tmp_path / "mini_JailBreakV_28K.csv"
    path.write_text(path.read_text().replace("policy 1", "Child Abuse Content"))
    assert {e.category for e in read_source(source).examples} == {"policy 0", "Child Abuse", "policy 2"}
