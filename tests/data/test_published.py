"""Published formats: good rows load as they are; each of ten kinds of damage costs its rows alone, with its reason."""

import csv
import io
import json
from pathlib import Path

import pytest
from PIL import Image

from icet_jax.data.published import VQA_SUFFIX, read_source
from icet_jax.errors import UserError
from icet_jax.media.image_files import ImageFolder
from tests.data import published

ROWS = published.ROWS


def ids(records):
    return [example.id for example in records.examples]


def test_redteam_2k(tmp_path):
    records = read_source(published.redteam(tmp_path))
    assert ids(records) == [str(i) for i in range(ROWS)] and records.problems == [] and records.repeats == 0
    first = records.examples[0]
    assert first.prompt == "placeholder forbidden request 0, in two\nlines"
    assert (first.kind, first.category, first.answer) == ("forbidden", "policy 0", None)
    assert first.images[0].parent == tmp_path / "coco"


def test_jailbreakv_28k(tmp_path):
    records = read_source(published.jailbreakv(tmp_path))
    example = records.examples[7]
    assert (example.id, example.kind, example.category) == ("7", "forbidden", "policy 1")
    assert example.prompt == 'placeholder wrapped request 7, "quoted"'
    assert example.images == (tmp_path / "pictures" / "sub" / "coco_2.png",)
    # Images lie beside the file, or under the config's root, where the source names no folder.
    plain = published.jailbreakv(tmp_path).partition("?")[0]
    assert len(read_source(plain, image_root=tmp_path / "pictures").examples) == ROWS
    with pytest.raises(UserError, match="no usable row: row 1: no image file"):
        read_source(plain)


def jailbreakv_with(folder, cells, columns=("format", "transfer_from_llm")):
    """The source, its columns replaced by `columns` and their `cells` row by row."""
    source = published.jailbreakv(folder)
    path = folder / "mini_JailBreakV_28K.csv"
    with path.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    kept = ["id", "jailbreak_query", "policy", "image_path"]
    published.write_csv(
        path, [*kept, *columns], [[row[name] for name in kept] + cell for row, cell in zip(rows, cells, strict=True)]
    )
    return source


def test_jailbreakv_formats_have_one_spelling(tmp_path):
    assert [(row.format, row.transferred) for row in read_source(published.jailbreakv(tmp_path)).examples[:2]] == [
        ("Template", True),
        ("figstep", False),
    ]
    cells = [
        ["Template", "True"], [" template ", "true"], ["TEMPLATE", " YES "], ["FigStep", "False"], ["sd_TYPO", "0"],
        ["a  new\nformat", "1.0"], ["", ""], ["  ", "  "], *[["Logic", "no"]] * 4,
    ]  # fmt: skip
    records = read_source(jailbreakv_with(tmp_path / "spelt", cells))
    assert [(row.format, row.transferred) for row in records.examples[:8]] == [
        *[("Template", True)] * 3, ("figstep", False), ("SD_typo", False), ("a new format", True), *[("", None)] * 2,
    ]  # fmt: skip
    assert records.problems == []


def test_jailbreakv_without_formats_or_with_one_that_says_nothing(tmp_path):
    """Older copies of the file lack the columns; what is neither yes nor no costs its row."""
    records = read_source(jailbreakv_with(tmp_path / "old", [[]] * ROWS, columns=()))
    assert len(records.examples) == ROWS and {(row.format, row.transferred) for row in records.examples} == {("", None)}
    records = read_source(jailbreakv_with(tmp_path / "odd", [["Logic", "maybe"], *[["Logic", "True"]] * (ROWS - 1)]))
    assert len(records.examples) == ROWS - 1 and records.dropped() == {"bad field": 1}
    told = "row 1: transfer_from_llm is 'maybe'; write True or False, or leave it empty"
    assert told in records.report() and "\n" not in records.report()


def test_advbench_coco(tmp_path):
    records = read_source(published.advbench(tmp_path))
    assert ids(records) == [str(i) for i in range(1, ROWS + 1)]
    assert records.examples[0].prompt == "placeholder behaviour 0"
    assert {example.kind for example in records.examples} == {"forbidden"}
    assert len({example.images for example in records.examples}) > 1


def test_xstest(tmp_path):
    source = published.xstest(tmp_path)
    examples = read_source(source).examples
    assert [e.kind for e in examples] == ["forbidden" if i % 3 == 0 else "benign" for i in range(ROWS)]
    assert examples[5].category == "type_1" and examples[5].id == "v2-5" and len(examples[5].images) == 1
    assert all(e.images == () for e in read_source(source.partition("?")[0]).examples)


def test_vqa_v2(tmp_path):
    example = read_source(published.vqa(tmp_path)).examples[4]
    assert example.prompt == "How many things are here 4?" + VQA_SUFFIX
    assert (example.id, example.kind, example.answer, example.answer_type) == ("10004", "vqa", "4", "number")
    assert example.answers == ("4",) * 7 + ("5",) * 3
    assert example.images == (tmp_path / "val2014" / "COCO_val2014_000000001001.jpg",)


def test_vqa_v2_reads_no_further_than_asked(tmp_path, monkeypatch):
    questions, annotations = published.vqa_tables(tmp_path)
    source = published.write_vqa(tmp_path, questions, annotations)
    for path in (tmp_path / "val2014").iterdir():
        if not path.name.endswith("1000.jpg"):
            path.unlink()
    # Later rows have no image, and the files end in garbage beyond the chunk that is read.
    monkeypatch.setattr("icet_jax.data.tables._CHUNK", 64)
    for path in tmp_path.glob("*.json"):
        path.write_text(path.read_text()[: path.stat().st_size * 3 // 4] + "\x00garbage")
    records = read_source(source, limit=3)
    assert len(records.examples) == 3 and records.problems == [] and not records.complete


def test_vqa_v2_annotations_in_another_order(tmp_path):
    questions, annotations = published.vqa_tables(tmp_path)
    annotations["annotations"].reverse()
    records = read_source(published.write_vqa(tmp_path, questions, annotations))
    assert [e.answer for e in records.examples] == [str(i) for i in range(ROWS)]


@pytest.mark.parametrize("name", published.SOURCES)
@pytest.mark.parametrize("chunk", [7, 1 << 20])
def test_chunks_do_not_matter(name, chunk, tmp_path, monkeypatch):
    monkeypatch.setattr("icet_jax.data.tables._CHUNK", chunk)
    assert len(read_source(published.SOURCES[name](tmp_path)).examples) == ROWS


def test_a_picked_image_depends_on_seed_and_id_alone(tmp_path):
    source = published.redteam(tmp_path)
    everything = {e.id: e.images for e in read_source(source).examples}
    other_seed = {e.id: e.images for e in read_source(source + "&seed=1").examples}
    assert set(everything.values()) > set() and everything != other_seed
    path = tmp_path / "RedTeam_2K.csv"
    with path.open(newline="") as file:
        header, *rows = list(csv.reader(file))
    published.write_csv(path, header, rows[::-2])
    fewer = {e.id: e.images for e in read_source(source).examples}
    assert len(fewer) == ROWS // 2 and all(everything[key] == fewer[key] for key in fewer)


@pytest.mark.parametrize("name", published.SOURCES)
def test_limits_and_roots(name, tmp_path):
    source = published.SOURCES[name](tmp_path)
    inside = source.replace(f"{tmp_path}/", "").replace(str(tmp_path), ".")
    assert str(tmp_path) not in inside
    everything = read_source(inside, root=tmp_path)
    assert ids(everything) == ids(read_source(source)) and everything.complete
    assert [e.images for e in everything.examples] == [e.images for e in read_source(source).examples]
    own = read_source(inside + "&limit=5", root=tmp_path)
    assert ids(own) == ids(everything)[:5] and own.complete
    fewer = read_source(inside + "&limit=5", root=tmp_path, limit=3)
    assert ids(fewer) == ids(everything)[:3] and not fewer.complete
    assert ids(read_source(inside + "&limit=5", root=tmp_path, limit=9)) == ids(own)


def test_the_folder_of_images_is_sorted_and_holds_images_alone(tmp_path):
    published.images(tmp_path)
    (tmp_path / "notes.txt").write_text("no image")
    folder = ImageFolder(tmp_path)
    assert {folder.choose(0, str(i)).name for i in range(200)} == {f"coco_{i}.png" for i in range(5)}
    assert folder.choose(0, "v2-17") == ImageFolder(tmp_path).choose(0, "v2-17")


# Damage to tables: a change of the rows (beside the names of the columns) or of the bytes, and what it costs.


def cell(row, column, value):
    def change(header, rows):
        rows[row][header.index(column)] = value

    return change


def repeat_id(header, rows):
    rows[5][0] = rows[4][0]


def add_cell(header, rows):
    rows[5].append("one more")


def cut_row(header, rows):
    del rows[5][1:]


TABLE_DAMAGE = {
    "more cells than columns": (add_cell, {"malformed row": 1}),
    "fewer cells than columns": (cut_row, {"malformed row": 1}),
}


def damages(text_column):
    """Ten kinds, for a format whose prompt stands in `text_column`."""
    return TABLE_DAMAGE | {
        "empty prompt": (cell(5, text_column, ""), {"empty prompt": 1}),
        "blank prompt": (cell(5, text_column, " \n\t "), {"empty prompt": 1}),
        "image placeholder": (cell(5, text_column, "placeholder <image> 5"), {"image placeholder": 1}),
        "NUL": (cell(5, text_column, "placeholder \0 5"), {"bad text": 1}),
    }


def unclosed_quote(data):
    lines = data.split(b"\n")
    return b"\n".join([*lines[:-3], b'99,"never closed,x', *lines[-3:]])


def stray_quote(data):
    lines = data.split(b"\n")
    return b"\n".join([*lines[:-3], b'98,"closed" twice" over,x', *lines[-3:]])


BYTE_DAMAGE = {
    "not UTF-8": (lambda data: data + b"90,placeholder \xff\xfe,x", {"malformed row", "bad text"}),
    "a quotation mark that is never closed": (unclosed_quote, {"malformed row"}),
    "quotation marks inside a cell": (stray_quote, {"malformed row"}),
    "a line that is no row": (lambda data: data + b"this line is not of the table\r\n", {"malformed row"}),
}

COLUMNS = {"redteam_2k": "question", "jailbreakv_28k": "jailbreak_query", "advbench_coco": "goal", "xstest": "prompt"}


def table_of(source):
    return Path(source.partition(":")[2].rpartition("?")[0])


@pytest.mark.parametrize("name", COLUMNS)
def test_ten_kinds_of_damage_to_a_table(name, tmp_path):
    kinds = damages(COLUMNS[name])
    assert len(kinds) + len(BYTE_DAMAGE) == 10
    for number, (change, cost) in enumerate(kinds.values()):
        folder = tmp_path / str(number)
        folder.mkdir()
        source = published.SOURCES[name](folder)
        with table_of(source).open(encoding="utf-8", newline="") as file:
            header, *rows = list(csv.reader(file))
        change(header, rows)
        published.write_csv(table_of(source), header, rows)
        records = read_source(source)
        assert records.dropped() == cost and len(records.examples) == ROWS - 1, change
        assert [problem.row for problem in records.problems] == [6]
    for change, costs in BYTE_DAMAGE.values():
        folder = tmp_path / f"bytes {len(list(tmp_path.iterdir()))}"
        folder.mkdir()
        source = published.SOURCES[name](folder)
        table_of(source).write_bytes(change(table_of(source).read_bytes()))
        records = read_source(source)
        assert len(records.examples) == ROWS, change
        assert len(records.problems) == 1 and set(records.dropped()) <= costs


@pytest.mark.parametrize("name", ["redteam_2k", "jailbreakv_28k", "xstest"])
@pytest.mark.parametrize("change, reason", [(repeat_id, "duplicate id"), (cell(5, "id", " "), "no id")])
def test_ids_are_the_files_own(name, change, reason, tmp_path):
    source = published.SOURCES[name](tmp_path)
    with table_of(source).open(newline="") as file:
        header, *rows = list(csv.reader(file))
    change(header, rows)
    published.write_csv(table_of(source), header, rows)
    records = read_source(source)
    assert records.dropped() == {reason: 1} and len(records.examples) == ROWS - 1


@pytest.mark.parametrize(
    "path, reason",
    [
        ("", "missing image"),
        ("sub/gone.png", "missing image"),
        ("sub/" + "x" * 300 + ".png", "missing image"),
        ("../secret.png", "image path outside its folder"),
        ("sub/../../secret.png", "image path outside its folder"),
        ("{root}/secret.png", "image path outside its folder"),
        ("..\\secret.png", "image path outside its folder"),
        ("C:\\secret.png", "image path outside its folder"),
        ("sub/note.png", "not an image"),
        ("sub", "missing image"),
        ("sub/half.png", "damaged image"),
        ("sub/bomb.png", "damaged image"),
        ("sub/thin.png", "damaged image"),
    ],
)
def test_damaged_images_of_jailbreakv(path, reason, tmp_path):
    from tests.media.test_images import png

    source = published.jailbreakv(tmp_path)
    sub = tmp_path / "pictures" / "sub"
    Image.new("RGB", (2, 2)).save(tmp_path / "secret.png")
    (sub / "note.png").write_text("this is no image")
    (sub / "half.png").write_bytes((sub / "coco_0.png").read_bytes()[:50])
    (sub / "bomb.png").write_bytes(png(60_000, 60_000))
    Image.new("RGB", (1, 900)).save(sub / "thin.png")
    with table_of(source).open(newline="") as file:
        header, *rows = list(csv.reader(file))
    cell(5, "image_path", path.format(root=tmp_path))(header, rows)
    published.write_csv(table_of(source), header, rows)
    records = read_source(source, decode=True)
    assert records.dropped() == {reason: 1} and len(records.examples) == ROWS - 1


@pytest.mark.parametrize("name", ["redteam_2k", "advbench_coco", "xstest"])
def test_for_a_broken_image_in_the_folder_another_is_drawn(name, tmp_path):
    source = published.SOURCES[name](tmp_path)
    whole = read_source(source).examples
    broken = whole[0].images[0]
    broken.write_text("no image")
    records = read_source(source)
    assert not records.problems and len(records.examples) == ROWS
    for before, after in zip(whole, records.examples, strict=True):
        assert broken not in after.images
        assert after.images == before.images or before.images == (broken,)
    assert [e.images for e in read_source(source).examples] == [e.images for e in records.examples]
    assert len(records.replaced) == 1 and broken.name in records.replaced[0]
    assert records.report().count(broken.name) == 1 and "1 unusable images" in records.report()


def test_rows_are_left_out_where_no_image_of_the_folder_can_be_used(tmp_path):
    source = published.advbench(tmp_path)
    for image in (tmp_path / "coco").iterdir():
        image.write_text("no image")
    with pytest.raises(UserError, match="no usable row"):
        read_source(source)


def test_xstest_labels(tmp_path):
    source = published.xstest(tmp_path)
    text = table_of(source).read_text()
    table_of(source).write_text(text.replace(",safe,", ",harmless,", 1).replace(",unsafe,", ",Unsafe ,", 1))
    records = read_source(source)
    assert records.dropped() == {"unknown label": 1} and records.examples[0].kind == "forbidden"


def entry(table, row, **changes):
    def change(tables):
        tables[table][table][row].update(changes)

    return change


def without(table, row, field):
    return lambda tables: tables[table][table][row].pop(field)


def replace(table, row, value):
    def change(tables):
        tables[table][table][row] = value

    return change


VQA_DAMAGE = {
    "empty question": (entry("questions", 5, question=" "), "empty prompt"),
    "question is no text": (entry("questions", 5, question=["a"]), "bad field"),
    "question without an id": (without("questions", 5, "question_id"), "bad field"),
    "question id is no number": (entry("questions", 5, question_id="5x"), "bad field"),
    "question without an image": (without("questions", 5, "image_id"), "bad field"),
    "an image that is not there": (entry("questions", 5, image_id=77), "annotation of another image"),
    "an image missing on disk": (None, "missing image"),
    "duplicate question": (entry("questions", 5, question_id=10004), "duplicate id"),
    "no annotation": (entry("annotations", 5, question_id=5), "no annotation"),
    "annotation without answers": (without("annotations", 5, "answers"), "no answer"),
    "annotation's answers are no list": (entry("annotations", 5, answers=[3]), "no answer"),
    "annotation without the common answer": (entry("annotations", 5, multiple_choice_answer=None), "no answer"),
    "question is no object": (replace("questions", 5, 7), "malformed row"),
    "annotation is no object": (replace("annotations", 5, "x"), "no annotation"),
    "lone surrogate": (entry("questions", 5, question="placeholder \ud800"), "bad text"),
}


@pytest.mark.parametrize("kind", VQA_DAMAGE)
def test_damage_to_vqa_v2(kind, tmp_path):
    questions, annotations = published.vqa_tables(tmp_path)
    change, reason = VQA_DAMAGE[kind]
    if change is None:
        questions["questions"][5]["image_id"] = annotations["annotations"][5]["image_id"] = 77
    else:
        change({"questions": questions, "annotations": annotations})
    records = read_source(published.write_vqa(tmp_path, questions, annotations))
    assert records.dropped() == {reason: 1} and [problem.row for problem in records.problems] == [6]
    assert ids(records) == [str(10000 + i) for i in range(ROWS) if i != 5]


def test_vqa_files_that_are_cut_off_keep_what_came_before(tmp_path):
    source = published.vqa(tmp_path)
    path = tmp_path / "v2_OpenEnded_mscoco_val2014_questions.json"
    path.write_text(path.read_text()[:-150])
    records = read_source(source)
    assert records.dropped() == {"malformed row": 1} and "damaged or cut off" in records.problems[0].detail
    assert ids(records) == [str(10000 + i) for i in range(len(records.examples))] and len(records.examples) > 8
    annotations = tmp_path / "v2_mscoco_val2014_annotations.json"
    annotations.write_text(annotations.read_text()[:-2500])
    fewer = read_source(source)
    assert 0 < len(fewer.examples) < len(records.examples)
    assert fewer.dropped()["no annotation"] == len(records.examples) - len(fewer.examples)


@pytest.mark.parametrize(
    "source, says",
    [
        ("redteam:{0}/x.csv", "no data format is called 'redteam'; known: redteam_2k, jailbreakv_28k"),
        ("redteam_2k:{0}/x.csv", "needs images: add ?images=FOLDER"),
        ("vqa_v2:{0}", "needs split: add ?split=val2014"),
        ("redteam_2k:{0}/x.csv?images={0}&sed=1", "'sed=1' is not an option"),
        ("redteam_2k:{0}/x.csv?images={0}&seed=-1", "seed=-1 must be a whole number, 0 or more"),
        ("xstest:{0}/x.csv?images", "'images' is not an option"),
        ("xstest:{0}/x.csv?limit=0", "limit=0 must be a whole number, 1 or more"),
        ("xstest:{0}/x.csv?limit=1e3", "limit=1e3 must be a whole number, 1 or more"),
        ("redteam_2k:{0}/x.csv?images={0}/none", "cannot be read"),
        ("redteam_2k:{0}/x.csv?images={0}", "contains no image file"),
        ("redteam_2k:{0}/gone.csv?images={0}/coco", "gone.csv: cannot be read"),
        ("redteam_2k:{0}/empty.csv?images={0}/coco", "empty.csv: is empty"),
        ("redteam_2k:{0}/x.csv?images={0}/coco", "no column 'id' among prompt, image"),
        ("jailbreakv_28k:{0}/x.csv", "no column 'id'"),
        ("advbench_coco:{0}/x.csv?images={0}/coco", "no column 'goal'"),
        ("vqa_v2:{0}?split=val2014", "v2_OpenEnded_mscoco_val2014_questions.json: no such file"),
        ("vqa_v2:{0}/json?split=a", "questions.json: not a JSON file"),
        ("vqa_v2:{0}/json?split=b", "questions.json: has no list 'questions'"),
        ("vqa_v2:{0}/json?split=c", "questions.json: has no rows"),
        ("{0}/rows.parquet", "data files are .csv or .jsonl"),
    ],
)  # fmt: skip
def test_a_hopeless_source_is_one_line(source, says, tmp_path):
    published.images(tmp_path / "coco")
    (tmp_path / "x.csv").write_text("prompt,image\n1,2\n")
    (tmp_path / "empty.csv").write_text("")
    (tmp_path / "json").mkdir()
    for split, content in {"a": "no json", "b": '{"rows": []}', "c": '{"questions": []}'}.items():
        (tmp_path / "json" / f"v2_OpenEnded_mscoco_{split}_questions.json").write_text(content)
        (tmp_path / "json" / f"v2_mscoco_{split}_annotations.json").write_text('{"annotations": []}')
    with pytest.raises(UserError) as caught:
        read_source(source.format(tmp_path))
    assert says in str(caught.value) and "\n" not in str(caught.value)


def test_a_long_file_of_broken_rows_takes_no_time(tmp_path):
    text = io.StringIO()
    text.write("id,question,policy\n")
    for index in range(20_000):
        text.write(f'{index},"never closed {index},x\n' if index % 1000 == 7 else f"{index},placeholder {index},x\n")
    (tmp_path / "RedTeam_2K.csv").write_text(text.getvalue())
    records = read_source(f"redteam_2k:{tmp_path / 'RedTeam_2K.csv'}?images={published.images(tmp_path / 'coco')}")
    assert len(records.examples) == 19_980 and records.dropped() == {"malformed row": 20}


def test_json_is_read_in_published_layouts(tmp_path):
    questions, annotations = published.vqa_tables(tmp_path)
    source = published.write_vqa(tmp_path, questions, annotations)
    path = tmp_path / "v2_OpenEnded_mscoco_val2014_questions.json"
    first_key = {"questions": questions.pop("questions"), "nested": {"questions": [1, [2]]}, "n": 1.5e3, **questions}
    path.write_text("\ufeff \n" + json.dumps(first_key, indent=3, ensure_ascii=False))
    assert len(read_source(source).examples) == ROWS
    path.write_text(json.dumps({"nested": first_key["nested"], **first_key}))
    assert len(read_source(source).examples) == ROWS
