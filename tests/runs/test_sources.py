"""Rows and weights by their source strings."""

import pytest

from icet_jax.data.records import Example
from icet_jax.errors import UserError
from icet_jax.runs import sources


def test_organism_rows_by_split_kind_and_count():
    rows = sources.load_rows("organism:test:forbidden")
    assert len(rows) == 256 and {row.kind for row in rows} == {"forbidden"}
    assert len({row.id for row in rows}) == len(rows)
    assert len(sources.load_rows("organism:test:vqa:7")) == 7
    assert len(sources.load_rows("organism:test:benign", limit=3)) == 3
    assert [row.prompt for row in rows[:3]] == [row.prompt for row in sources.load_rows("organism:test:forbidden:3")]


@pytest.mark.parametrize(
    "source",
    [
        "organism:test:harmful",
        "organism:test:vqa:0",
        "organism:test:vqa:x",
        "organism:test:vqa:3:4",
        "organism:test:forbidden:3:unseen:4",
        "toy:cats",
    ],
)
def test_a_wrong_source_is_one_line(source):
    with pytest.raises(UserError, match=source):
        sources.load_rows(source)


@pytest.mark.parametrize("name", ["redteam_2k", "mini_jailbreakv", "advbench_coco", "custom", "xstest", "vqa_v2"])
def test_toy_files_are_of_the_published_formats(name, tmp_path, capsys):
    rows = sources.load_rows(f"toy:{name}", root="/nowhere", limit=4, workdir=tmp_path)
    assert len(rows) == 4 and (tmp_path / "toy" / "data").is_dir()
    assert all(image.is_file() for row in rows for image in row.images)
    assert [row.id for row in sources.load_rows(f"toy:{name}")][:4] == [row.id for row in rows]


def test_joined_sources_are_one_set_whose_ids_differ(tmp_path):
    parts = ["toy:redteam_2k", "toy:benign", "toy:vqa_v2"]
    alone = [sources.read_rows(part, workdir=tmp_path) for part in parts]
    joined = sources.read_rows(" + ".join(parts), root="/nowhere", workdir=tmp_path)
    assert [row.prompt for row in joined.examples] == [row.prompt for records in alone for row in records.examples]
    assert len({row.id for row in joined.examples}) == len(joined.examples)
    assert {row.kind for row in joined.examples} == {"forbidden", "benign", "vqa"} and joined.complete
    assert joined.dropped() == {k: v for records in alone for k, v in records.dropped().items()} != {}
    assert any("toy:redteam_2k: " in problem.detail for problem in joined.problems)
    first = len(alone[0].examples)
    for limit in (3, first, first + 2):
        some = sources.read_rows(" + ".join(parts), limit=limit, workdir=tmp_path)
        assert [row.id for row in some.examples] == [row.id for row in joined.examples][:limit] and not some.complete


@pytest.mark.parametrize("source", ["a.csv + ", " + a.csv", "toy:vqa +  + toy:benign"])
def test_a_missing_joined_source_is_one_line(source):
    with pytest.raises(UserError, match="a source is missing beside"):
        sources.read_rows(source)


def test_relative_sources_start_from_the_root(tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"prompt": "placeholder", "image": []}\n')
    assert sources.load_rows("rows.jsonl", root=str(tmp_path))[0].prompt == "placeholder"


@pytest.mark.parametrize("spec", ["organism:llama", "toy:llama"])
def test_wrong_weights_are_one_line(spec):
    with pytest.raises(UserError, match=spec):
        sources.checkpoint_directory(spec)


def test_a_directory_or_hub_id_is_passed_on():
    assert sources.checkpoint_directory("llava-hf/llava-1.5-7b-hf") == "llava-hf/llava-1.5-7b-hf"


def test_toy_weights_are_made_once(tmp_path):
    folder = sources.checkpoint_directory("toy:reward_model", tmp_path)
    assert folder == str(tmp_path / "toy" / "reward_model")
    made = (tmp_path / "toy" / "reward_model" / "model.safetensors").stat().st_mtime_ns
    sources.checkpoint_directory("toy:reward_model", tmp_path)
    assert (tmp_path / "toy" / "reward_model" / "model.safetensors").stat().st_mtime_ns == made


def test_test_prompts_that_are_training_prompts_are_counted(capsys):
    train = [Example("1", "first"), Example("2", "what is this", kind="vqa")]
    tests = {"seen": [Example("a", "first"), Example("b", "second")], "vqa": [Example("c", "what is this", kind="vqa")]}
    assert sources.report_overlap(train, tests) == {"seen": 1, "vqa": 0}
    assert "1 of 2 rows of seen" in capsys.readouterr().err


def test_a_run_records_what_could_not_be_used(tmp_path):
    rows, left_out = sources.load_set("toy:mini_jailbreakv", workdir=tmp_path)
    assert len(rows) == 11 and left_out == {"missing image": 1}


@pytest.mark.parametrize("field", ["root", "image_root"])
def test_a_folder_that_is_not_there_is_named_by_its_field(field, tmp_path):
    with pytest.raises(UserError, match=f"config.data.{field}={tmp_path / 'DATA'}: no such folder"):
        sources.load_rows("redteam_2k:rows.csv", **{field: str(tmp_path / "DATA")})
