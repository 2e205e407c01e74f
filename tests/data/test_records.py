"""Reading a user's rows: bad ones are counted and named, hopeless files are one clear error."""

import json

import pytest
from PIL import Image

from icet_jax.data.records import Example, prompt_overlap, read_records
from icet_jax.errors import UserError


@pytest.fixture
def folder(tmp_path):
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    Image.new("RGB", (4, 4), "red").save(tmp_path / "b.jpg")
    (tmp_path / "note.png").write_text("this is no image")
    return tmp_path


def write(path, text):
    path.write_text(text, encoding="utf-8")
    return path


def test_csv_rows_and_defaults(folder):
    records = read_records(write(folder / "rows.csv", 'Prompt,image,extra\nfirst one,a.png,x\n"two\nlines",b.jpg,\n'))
    assert [e.prompt for e in records.examples] == ["first one", "two\nlines"]
    assert [e.id for e in records.examples] == ["1", "2"]
    assert records.examples[0].images == (folder / "a.png",)
    assert {e.kind for e in records.examples} == {"forbidden"}
    assert records.problems == [] and records.repeats == 0 and records.complete
    assert records.report() == "rows.csv: 2 rows"


def test_jsonl_rows(folder):
    rows = [
        {"id": "x", "prompt": "what colour", "image": "a.png", "kind": "vqa", "answer": "red", "policy": "p"},
        {"id": 7, "prompt": "two images", "image": ["a.png", "b.jpg"]},
        {"prompt": "text only", "image": []},
    ]
    text = "\n\n".join(json.dumps(row) for row in rows)
    records = read_records(write(folder / "rows.jsonl", "\ufeff" + text))
    assert [e.id for e in records.examples] == ["x", "7", "3"]
    assert [len(e.images) for e in records.examples] == [1, 2, 0]
    assert [e.kind for e in records.examples] == ["vqa", "forbidden", "forbidden"]
    assert records.examples[0].answer == "red" and records.examples[0].category == "p"


def test_bad_rows_are_counted_with_their_numbers(folder):
    text = (
        "id,prompt,image,kind,answer\n"
        "1,fine,a.png,,\n"
        "2,,a.png,,\n"
        "3,no image,,,\n"
        "4,lost image,gone.png,,\n"
        "5,not an image,note.png,,\n"
        "6,what colour,a.png,vqa,\n"
        "7,odd kind,a.png,other,\n"
        "1,same id,a.png,,\n"
        "9,too,a.png,benign,x,y\n"
        "10,fine,a.png,,\n"
    )
    records = read_records(write(folder / "rows.csv", text))
    assert [e.id for e in records.examples] == ["1", "10"]
    assert [problem.row for problem in records.problems] == list(range(2, 10))
    assert [problem.line for problem in records.problems] == list(range(3, 11))
    assert [problem.reason for problem in records.problems] == [
        "empty prompt", "missing image", "missing image", "not an image", "no answer", "unknown kind", "duplicate id",
        "malformed row",
    ]  # fmt: skip
    details = " | ".join(problem.detail for problem in records.problems)
    parts = ("prompt is empty", "image is empty", "gone.png", "note.png", "needs an answer", "'other'", "row 1", "cell")
    assert all(part in details for part in parts)
    assert records.read == 10 and records.dropped()["missing image"] == 2
    report = records.report()
    assert "2 rows" in report and "8 left out: 2 missing image, 1 empty prompt" in report and "and 3 more" in report


def test_rows_without_ids_are_the_same_row_if_they_say_the_same(folder):
    unnamed = read_records(write(folder / "rows.csv", "prompt,image\nfine,a.png\nfine,b.jpg\nfine,a.png\n"))
    assert [e.id for e in unnamed.examples] == ["1", "2"] and unnamed.dropped() == {"duplicate row": 1}
    named = read_records(write(folder / "rows.csv", "id,prompt,image\nx,fine,a.png\ny,fine,a.png\n"))
    assert [e.id for e in named.examples] == ["x", "y"] and named.repeats == 1
    assert "1 repeats kept" in named.report()


def test_a_limit_stops_reading(folder):
    path = write(folder / "rows.csv", "prompt,image\none,a.png\ntwo,gone.png\nthree,a.png\nfour,gone.png\n")
    records = read_records(path, limit=2)
    assert [e.prompt for e in records.examples] == ["one", "three"]
    assert records.read == 3 and not records.complete
    assert read_records(path, limit=3).complete


def test_damaged_pixels_are_found_where_images_are_decoded(folder):
    (folder / "half.png").write_bytes((folder / "a.png").read_bytes()[:45])
    path = write(folder / "rows.csv", "prompt,image\none,a.png\ntwo,half.png\n")
    assert len(read_records(path).examples) == 2
    records = read_records(path, decode=True)
    assert [e.prompt for e in records.examples] == ["one"] and records.dropped() == {"damaged image": 1}


def test_animations_are_counted_once_each(folder):
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue")]
    frames[0].save(folder / "moving.gif", save_all=True, append_images=frames[1:])
    records = read_records(write(folder / "rows.csv", "prompt,image\none,moving.gif\ntwo,moving.gif\nthree,a.png\n"))
    assert records.animated == 1 and "1 animated images (their first frame is used)" in records.report()


def test_bad_json_lines_are_rows_too(folder):
    text = '{"prompt": "fine", "image": "a.png"}\n{"prompt": "half\n[1]\n{"prompt": ["x"], "image": "a.png"}\n'
    records = read_records(write(folder / "rows.jsonl", text))
    assert len(records.examples) == 1
    assert [problem.row for problem in records.problems] == [2, 3, 4]
    assert records.dropped() == {"malformed row": 2, "bad field": 1}


def test_image_root(folder, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    path = write(elsewhere / "rows.csv", "prompt,image\none,a.png\n")
    assert read_records(path, image_root=folder).examples[0].images == (folder / "a.png",)


@pytest.mark.parametrize(
    ("name", "content", "part"),
    [
        ("rows.csv", b"", "is empty"),
        ("rows.csv", b"prompt,image\n", "has no rows"),
        ("rows.csv", b"prompt,picture\nx,a.png\n", "no column 'image'"),
        (
            "rows.csv",
            b"prompt,image, Prompt\nx,a.png,y\n",
            "rows.csv: column 'prompt' stands 2 times in its first",
        ),
        ("rows.jsonl", b'{"prompt": "x", "image": "a.png", "prompt": "y"}\n', "field 'prompt' more than once"),
        ("rows.csv", b"prompt,image\nx,gone.png\n", "no usable row: row 1"),
        ("rows.jsonl", b"", "has no rows"),
        ("rows.jsonl", b'{"prompt": "x"}\n', "no usable row: row 1"),
        ("rows.csv", b"prompt,image\n\xff\xfe,a.png\n", "UTF-8"),
        ("rows.txt", b"prompt,image\n", ".csv or .jsonl"),
    ],
)
def test_hopeless_files_are_one_line(folder, name, content, part):
    path = folder / name
    path.write_bytes(content)
    with pytest.raises(UserError) as caught:
        read_records(path)
    assert part in str(caught.value) and name in str(caught.value) and "\n" not in str(caught.value)


def test_missing_file(folder):
    with pytest.raises(UserError, match="cannot be read"):
        read_records(folder / "gone.csv")


def test_prompt_overlap():
    train = [Example("1", "a"), Example("2", "b")]
    assert prompt_overlap(train, [Example("1", "b"), Example("2", "B"), Example("3", "b")]) == 2


def test_no_prompt_holds_any_familys_placeholder(folder):
    """So that every family is measured on the same rows."""
    text = "prompt,image\nfine,a.png\nwhat <image> is,a.png\nwhat <|image|> is,a.png\n"
    records = read_records(write(folder / "rows.csv", text))
    assert [example.prompt for example in records.examples] == ["fine"]
    assert [problem.reason for problem in records.problems] == ["image placeholder"] * 2
