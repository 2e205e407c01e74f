"""Data files, the images that their rows name, and prepared sets."""

import csv
import io
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from icet_jax.data import prepared
from icet_jax.data.hh_rlhf import read_pairs
from icet_jax.data.published import read_source
from icet_jax.data.records import read_records
from icet_jax.media.image_files import leaves_root
from icet_jax.media.images import MAX_PIXELS, open_image
from tests.fuzz.damage import TRICKS, as_json, cases, files, joined, mutated, outcome, seeded, snapshot, some_rows, torn

ROWS = [
    {"id": "one", "prompt": "placeholder, one", "image": "a.png", "kind": "benign", "answer": "yes"},
    {"id": 2, "prompt": 'placeholder "two"', "image": ["a.png", "b.png"], "policy": "p"},
    {"prompt": "placeholder three", "image": []},
]
CELLS = ["id", "prompt", "image", "policy"]
TABLE = [
    CELLS,
    ["1", "placeholder, one", "a.png", "p"],
    ["2", 'the "second"\nline', "b.png", ""],
    ["3", "x", "a.png", "q"],
]


def picture(path, size=(3, 2)):
    Image.new("RGB", size, "red").save(path)


@pytest.fixture
def folder(tmp_path):
    root = tmp_path / "root"
    root.mkdir()
    for name in ("a.png", "b.png"):
        picture(root / name)
    picture(tmp_path / "secret.png")
    return root


def check(records, root):
    """Whatever rows a hostile file has, their texts can be encoded and their images are files of the folder."""
    for example in records.examples if records is not None else ():
        assert example.prompt.strip() and "\0" not in example.prompt
        (example.id + example.prompt + (example.answer or "") + (example.category or "")).encode("utf-8")
        for image in example.images:
            assert image.resolve().is_relative_to(root.resolve()) and image.is_file()
    if records is not None:
        line = records.report()
        assert line.isprintable() and len(line) < 5000


def csv_bytes(table):
    text = io.StringIO()
    csv.writer(text).writerows([[str(cell) for cell in row] for row in table])
    return text.getvalue().encode("utf-8", "surrogatepass")


POOL = (*(*TRICKS, *("a.png", "../secret.png", "link.png") * 5) * 4, "x" * 200_000)
tables = seeded(lambda draw: some_rows(draw, POOL, columns=draw.choice((4, None))))


def test_csv(folder):
    path, valid = folder / "rows.csv", csv_bytes(TABLE)
    path.write_bytes(valid)
    assert len(outcome(read_records, path)[0].examples) == 3

    @cases(200)
    @given(
        torn(valid)
        | tables.map(lambda rows: csv_bytes([CELLS, *rows]))
        | tables.map(lambda rows: csv_bytes([*TABLE, *rows]))
        | torn(valid).map(lambda data: data.decode("utf-8", "replace").encode("utf-16"))
        | st.binary(max_size=40).map(lambda data: valid + data)
    )
    def holds(content):
        path.write_bytes(content)
        check(outcome(read_records, path)[0], folder)

    before = {name: data for name, data in snapshot(folder.parent).items() if name != path}
    holds()
    assert {name: data for name, data in snapshot(folder.parent).items() if name != path} == before


def test_csv_of_open_quotes_is_read_in_time(folder):
    for line in ('"a,b,c,d\n', 'x,"\n', 'x,"""\n', '""",\n', '"a"b,\n'):
        (folder / "rows.csv").write_text(",".join(CELLS) + "\n" + line * 20_000)
        check(outcome(read_records, folder / "rows.csv")[0], folder)


def test_jsonl(folder):
    path, valid = folder / "rows.jsonl", b"".join(as_json(row) + b"\n" for row in ROWS)
    path.write_bytes(valid)
    assert len(outcome(read_records, path)[0].examples) == 3

    @cases(200)
    @given(
        torn(valid)
        | mutated(ROWS).map(lambda rows: b"\n".join(map(as_json, rows)) if isinstance(rows, list) else as_json(rows))
        | files(ROWS[0]).map(lambda data: valid + data)
    )
    def holds(content):
        path.write_bytes(content)
        check(outcome(read_records, path)[0], folder)

    holds()


PUBLISHED = {
    "redteam_2k:rows.csv?images=.": [["id", "question", "policy"], ["1", "placeholder", "p"], ["2", "other", "q"]],
    "jailbreakv_28k:rows.csv": [
        ["id", "jailbreak_query", "redteam_query", "policy", "image_path", "format", "transfer_from_llm"],
        ["0", "placeholder", "placeholder", "p", "a.png", "Logic", "True"],
        ["1", "other", "placeholder", "p", "b.png", "figstep", "False"],
    ],
    "advbench_coco:rows.csv?images=.": [["goal", "target"], ["placeholder", "Sure"], ["other", "Sure"]],
    "xstest:rows.csv": [
        ["id", "prompt", "type", "label"],
        ["1", "placeholder", "t", "safe"],
        ["2", "x", "t", "unsafe"],
    ],
    "xstest:rows.csv?images=.": [
        ["id_v1", "id_v2", "type", "prompt"],
        ["v1-1", "v2-1", "t", "placeholder"],
        ["", "v2-2", "contrast_t", "x"],
    ],
    "harmbench:rows.csv": [
        ["Behavior", "BehaviorID", "SemanticCategory", "ContextString"],
        ["placeholder", "a", "t", ""],
        ["x", "b", "t", "context"],
    ],
    "strongreject:rows.csv": [["category", "source", "forbidden_prompt"], ["t", "s", "placeholder"], ["t", "s", "x"]],
}


@pytest.mark.parametrize("source", PUBLISHED)
def test_published_tables(source, folder):
    table, path = PUBLISHED[source], folder / "rows.csv"
    valid = csv_bytes(table)
    path.write_bytes(valid)
    assert len(outcome(read_source, source, root=folder)[0].examples) == 2
    rows = seeded(lambda draw: some_rows(draw, POOL, 4, len(table[0])))

    @cases(60, part=len(PUBLISHED))
    @given(torn(valid) | rows.map(lambda drawn: csv_bytes([*table, *drawn])))
    def holds(content):
        path.write_bytes(content)
        check(outcome(read_source, source, root=folder)[0], folder)

    holds()


QUESTIONS = {"info": {}, "questions": [{"question_id": n, "image_id": 7, "question": f"q{n}?"} for n in (1, 2)]}
NOTES = {
    "annotations": [
        {"question_id": n, "image_id": 7, "multiple_choice_answer": "yes", "answer_type": "yes/no",
         "answers": [{"answer": "yes"}]}
        for n in (1, 2)
    ]
}  # fmt: skip


def test_vqa_files(folder):
    names = [
        folder / f"v2_{part}.json" for part in ("OpenEnded_mscoco_val2014_questions", "mscoco_val2014_annotations")
    ]
    Image.new("RGB", (3, 2)).save(folder / "COCO_val2014_000000000007.jpg")

    def read(questions, notes):
        for path, content in zip(names, (questions, notes), strict=True):
            path.write_bytes(content)
        records, _ = outcome(read_source, "vqa_v2:.?split=val2014", root=folder)
        check(records, folder)
        return records

    assert len(read(as_json(QUESTIONS), as_json(NOTES)).examples) == 2

    @cases(150)
    @given(
        st.tuples(files(QUESTIONS), st.just(as_json(NOTES)))
        | st.tuples(st.just(as_json(QUESTIONS)), files(NOTES))
        | st.tuples(files(QUESTIONS), files(NOTES))
    )
    def holds(both):
        read(*both)

    holds()


CAPTIONS = {
    "images": [{"id": 1, "file_name": "a.png"}, {"imgid": 2, "filename": "b.png", "sentences": [{"raw": "words"}]}],
    "annotations": [{"image_id": 1, "caption": "words"}],
}


def test_caption_files(folder):
    path, source = folder / "captions.json", "captions:captions.json?images=."
    path.write_bytes(as_json(CAPTIONS))
    assert len(outcome(read_source, source, root=folder)[0].examples) == 2

    @cases(100)
    @given(files(CAPTIONS))
    def holds(content):
        path.write_bytes(content)
        check(outcome(read_source, source, root=folder)[0], folder)

    holds()


def test_source_strings(folder):
    (folder / "rows.csv").write_bytes(csv_bytes(TABLE))
    parts = (*PUBLISHED, "vqa_v2:", "rows.csv", "?", "&", "=", "images", "seed", "limit", ":", "9" * 30, ".")

    @cases(100)
    @given(joined((*parts, *parts, *TRICKS), 4))
    def holds(source):
        outcome(read_source, source, root=folder)

    holds()


def test_image_paths_stay_in_their_folder(folder, tmp_path):
    (folder / "link.png").symlink_to(tmp_path / "secret.png")
    (folder / "up").symlink_to(tmp_path)
    (folder / "loop").symlink_to(folder / "loop")
    (folder / "within.png").symlink_to(folder / "a.png")
    outside = (
        "link.png",
        "up/secret.png",
        "../secret.png",
        "a/../../secret.png",
        str(tmp_path / "secret.png"),
        "..\\x",
        "C:\\x",
        "\\\\host\\x",
    )
    for name in outside:
        assert leaves_root(folder, name), name
        (folder / "rows.jsonl").write_bytes(as_json({"prompt": "placeholder", "image": name}))
        assert "is not in" in outcome(read_records, folder / "rows.jsonl")[1]
    for name in ("a.png", "./a.png", str(folder / "a.png"), "within.png", "no/such.png", "a..b.png"):
        assert not leaves_root(folder, name), name

    # The hub's cache is made of links, all to one folder beside the snapshots.
    repo = tmp_path / "datasets--x--y"
    (repo / "blobs").mkdir(parents=True)
    snapshot_folder = repo / "snapshots" / "abc" / "pictures"
    snapshot_folder.mkdir(parents=True)
    picture(repo / "blobs" / "123.png")
    (snapshot_folder / "a.png").symlink_to("../../../blobs/123.png")
    (snapshot_folder / "b.png").symlink_to(tmp_path / "secret.png")
    assert not leaves_root(snapshot_folder, "a.png") and leaves_root(snapshot_folder, "b.png")


def test_preference_pairs(tmp_path):
    row = {"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "\n\nHuman: a\n\nAssistant: c"}
    path = tmp_path / "pairs.jsonl"

    @cases(100)
    @given(files(row).map(lambda data: as_json(row) + b"\n" + data) | files(row) | torn(as_json(row) * 3))
    def holds(content):
        path.write_bytes(content)
        found, _ = outcome(read_pairs, path)
        assert found is None or all(text.encode() for pair in found.pairs for text in pair)

    holds()


def encoded(kind):
    file = io.BytesIO()
    image = Image.effect_noise((9, 7), 60).convert("RGB")
    image.save(
        file, kind, **({"save_all": True, "append_images": [image.rotate(90)]} if kind in ("GIF", "WEBP") else {})
    )
    return file.getvalue()


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF"])
def test_images(kind):
    valid = encoded(kind)
    assert outcome(open_image, valid)[0].size == (9, 7)

    @cases(60, part=6)
    @given(torn(valid, most=6) | st.binary(max_size=30).map(lambda tail: valid[:30] + tail))
    def holds(content):
        image, _ = outcome(open_image, content)
        assert image is None or (image.mode == "RGB" and image.width * image.height <= MAX_PIXELS)

    holds()


def test_formats_that_run_programs_are_not_opened(tmp_path):
    script = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\n(placeholder) print\nshowpage\n%%EOF\n"
    assert "not an image" in outcome(open_image, script)[1]
    (tmp_path / "a.png").write_bytes(script)
    (tmp_path / "rows.jsonl").write_bytes(as_json({"prompt": "placeholder", "image": "a.png"}))
    assert "not an image" in outcome(read_records, tmp_path / "rows.jsonl", decode=True)[1]


def test_a_small_file_may_not_take_a_gibibyte():
    file = io.BytesIO()
    Image.new("1", (10_000, 10_000)).save(file, "PNG")  # below Pillow's own bound, and a few kilobytes
    assert len(file.getvalue()) < 100_000
    assert "too large" in outcome(open_image, file.getvalue())[1]


FACTS = {
    "schema": 1, "source": "rows.csv", "limit": None, "fingerprint": "f", "complete": True, "read": 2, "kept": 2,
    "dropped": {"missing image": 1}, "repeats": 0, "animated": 0, "problems": [], "images": 1, "image_bytes": 10,
}  # fmt: skip


def test_facts_of_prepared_sets(tmp_path):
    (tmp_path / "train").mkdir()
    path = tmp_path / "train" / "source.json"
    path.write_text(json.dumps(FACTS))
    assert outcome(prepared.dropped_rows, tmp_path, "train")[0] == {"missing image": 1}

    @cases(150)
    @given(files(FACTS))
    def holds(content):
        path.write_bytes(content)
        outcome(prepared.read_set, tmp_path, "train", "rows.csv", 1)  # the records themselves are not there
        assert all(
            type(count) is int for count in (outcome(prepared.dropped_rows, tmp_path, "train")[0] or {}).values()
        )

    before = snapshot(tmp_path).keys()
    holds()
    assert snapshot(tmp_path).keys() == before
