"""Rows that do not fit: measured before anything is compiled, left out and counted, or refused."""

import json

import pytest
from PIL import Image

import icet_jax
from icet_jax import main as front_door
from icet_jax.errors import UserError
from icet_jax.runs import common, config_files
from tests import tiny
from tests.runs import smoke

LONG = "word " * 200


@pytest.fixture
def rows(tmp_path):
    """A file of four harmless rows, of which the second is long."""
    Image.new("RGB", (6, 4)).save(tmp_path / "picture.png")
    path = tmp_path / "rows.jsonl"
    prompts = {"first": "short", "second": LONG, "third": "a bit longer", "fourth": "short again"}
    lines = [{"id": name, "prompt": prompt, "image": "picture.png"} for name, prompt in prompts.items()]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def settings(rows, **changes):
    fields = {"data__train": str(rows), "data__mixture": "{'forbidden': 1.0}", "sweep__scorers": "refusal_keywords"}
    return fields | {"sweep__limit": "none", "sweep__utility": "{}"} | changes


def load(rows, workdir, **changes):
    """The inputs of a run and its data.json."""
    fields = smoke.SETTINGS | {k.replace("__", "."): v for k, v in settings(rows, **changes).items()}
    workdir.mkdir(exist_ok=True)
    inputs = common.load_inputs(config_files.load(smoke.CONFIG, fields), workdir, training=True)
    return inputs, json.loads((workdir / "data.json").read_text())


def test_a_training_row_that_is_too_long_is_left_out_and_named(rows, tmp_path, capsys):
    inputs, facts = load(rows, tmp_path / "run")
    assert [row.id for row in inputs.train] == ["first", "third", "fourth"]
    needed = facts["too_long"]["train"]["second"]
    assert facts["left_out"] == {"train": {"too long": 1}} and facts["rows"]["train"] == {"forbidden": 3}
    said = [line for line in capsys.readouterr().err.splitlines() if "left out" in line]
    assert len(said) == 1 and str(rows) in said[0] and f"row second takes {needed}" in said[0]
    assert f"set config.data.max_prompt_tokens={needed} or more" in said[0]
    # With that length the row is kept.
    inputs, facts = load(rows, tmp_path / "wide", data__max_prompt_tokens=str(needed))
    assert len(inputs.train) == 4 and "too_long" not in facts and facts["left_out"] == {}


def test_a_row_that_is_too_long_stops_the_start_if_asked_to(rows, tmp_path, capsys):
    arguments = smoke.arguments(tmp_path / "run", **settings(rows, data__too_long="stop"))
    assert front_door.main(arguments) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert "1 of 4 prompts are longer than the 96 positions of config.data.max_prompt_tokens (row second takes" in line
    assert "config.data.max_prompt_tokens=" in line and "config.data.too_long=drop" in line
    assert not (tmp_path / "run" / "sweeps").exists() and not (tmp_path / "run" / "metrics.jsonl").exists()


def test_training_in_python_measures_too(rows, tmp_path):
    fields = {k.replace("__", "."): v for k, v in settings(rows, data__too_long="stop").items()}
    with pytest.raises(UserError, match="row second takes"):
        icet_jax.train(icet_jax.load_config(smoke.CONFIG, smoke.SETTINGS | fields), tmp_path / "run")


def test_rows_of_a_sweep_leave_the_model_room_for_the_answer(rows, tmp_path, capsys):
    tiny.save_llava(tmp_path / "model")  # 512 positions
    same = {"model__checkpoint": str(tmp_path / "model"), "sweep__datasets": f"{{'mine': {str(rows)!r}}}"}
    same |= {"sweep__exits": "1", "data__max_prompt_tokens": "96"}
    inputs, facts = load(rows, tmp_path / "run", sweep__max_new_tokens="400", **same)
    assert [row.id for row in inputs.tests["mine"]] == ["first", "third", "fourth"]
    assert facts["left_out"]["mine"] == {"too long": 1} and facts["too_long"]["mine"]["second"] > 112
    assert "the model's 512 less config.sweep.max_new_tokens=400" in capsys.readouterr().err
    with pytest.raises(UserError, match=r"mine .*no row fits: 4 of 4 prompts"):
        load(rows, tmp_path / "none", sweep__max_new_tokens="511", **same)


def test_rows_of_a_sweep_fit_the_tokenizer(rows, tmp_path, capsys):
    folder = tiny.save_llava(tmp_path / "model")
    edit(folder / "tokenizer_config.json", lambda values: values.update(model_max_length=100))
    edit(folder / "config.json", lambda values: values["text_config"].update(max_position_embeddings=5000))
    same = {"model__checkpoint": str(folder), "sweep__datasets": f"{{'mine': {str(rows)!r}}}", "sweep__exits": "1"}
    inputs, facts = load(rows, tmp_path / "run", **same)
    assert [row.id for row in inputs.tests["mine"]] == ["first", "third", "fourth"]
    assert facts["left_out"]["mine"] == {"too long": 1}
    said = capsys.readouterr().err
    assert "1 of 4 prompts are longer than the tokenizer's model_max_length=100 (row second takes" in said
    assert "Token indices" not in said  # transformers' own warning
    with pytest.raises(UserError, match="model_max_length=100 .*; shorten the prompts, or leave them out"):
        load(rows, tmp_path / "stop", data__too_long="stop", data__max_prompt_tokens="2000", **same)


def edit(path, change):
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))


def test_the_published_prompts_fit_the_papers_configs():
    largest = {"llava15": 576, "llava15:13b": 576, "llava_next": 576 + 48 * 48 + 48, "llama32v": 1}  # of an image
    for name, image in largest.items():
        family, _, variant = name.partition(":")
        config = config_files.load(f"configs/{family}_lppo.py{f':{variant}' * bool(variant)}")
        assert config.data.max_prompt_tokens >= image + 205  # RedTeam-2K's longest, by Llama 2's tokenizer


def prepare(rows, directory, **changes):
    fields = settings(rows, **changes) | {"data__directory": str(directory), "sweep__datasets": "{}"}
    return front_door.main([*smoke.arguments(directory.parent / "work", **fields), "--mode=prepare"])


def test_prepare_counts_the_rows_that_are_too_long_and_keeps_them_for_other_models(rows, tmp_path, capsys):
    assert prepare(rows, tmp_path / "sets") == 0
    said = capsys.readouterr()
    report = json.loads((tmp_path / "sets" / "report.json").read_text())["sets"]["train"]
    assert list(report["too_long"]) == ["second"] and report["too_long"]["second"] > 200
    assert report["kept"] == 4 and "1 too long for the model, which runs leave out" in said.out
    assert "row second takes" in said.err


def test_prepare_stops_at_a_row_that_is_too_long_if_asked_to(rows, tmp_path, capsys):
    assert prepare(rows, tmp_path / "sets", data__too_long="stop") == 2
    assert "row second takes" in capsys.readouterr().err and not (tmp_path / "sets" / "report.json").exists()


def test_prepare_says_where_it_cannot_measure(rows, tmp_path, capsys):
    assert prepare(rows, tmp_path / "sets", model__checkpoint="someone/not-here") == 0
    report = json.loads((tmp_path / "sets" / "report.json").read_text())["sets"]["train"]
    assert "too_long" not in report and "config.model.checkpoint=someone/not-here" in capsys.readouterr().err
