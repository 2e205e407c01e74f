"""Answers at chosen exits, side by side: what is printed is what the model says there."""

import argparse
import json
import shutil

import jax
import numpy as np
import pytest
from PIL import Image

import icet_jax
from icet_jax import main
from icet_jax.commands import ask
from icet_jax.errors import UserError
from icet_jax.models.adapter_export import save_adapter
from icet_jax.nn.protocols import init_lora
from tests import tiny

pytest.importorskip("torch")


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return tiny.save_llava(tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture(scope="module")
def picture(tmp_path_factory):
    path = tmp_path_factory.mktemp("images") / "picture.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 30, 3), dtype=np.uint8)).save(path)
    return path


def arguments(directory, *more):
    return ["--mode=ask", f"--checkpoint={directory}", "--config.model.dtype=float32", *more]


SHORT = "--config.sweep.max_new_tokens=6"


def test_what_is_printed_is_what_the_model_says(directory, picture, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    code = main.run(arguments(directory, f"--image={picture}", "--prompt=what is this?", "--exits=1,3", SHORT))
    assert code == 0
    header, _, *body = capsys.readouterr().out.splitlines()
    vlm = icet_jax.load(directory)
    inputs = vlm.processor(images=[[picture]], prompts=["what is this?"])
    for column, exit_layer in enumerate((1, 3)):
        start = header.index(f"exit {exit_layer}")
        end = header.index("exit 3") if column == 0 else None
        printed = "".join(line[start:end].strip() for line in body)
        said = vlm.generate(inputs, exit_layer, 6).texts[0]
        assert "".join(printed.split()) == ("".join(said.split()) or "(empty)")
    assert "exit 3 (default)" in header


@pytest.mark.parametrize(
    "more, complaint",
    [
        ([], "needs a question"),
        (["--prompt= "], "needs a question"),
        (["--prompt=x", "--exits=0"], "exit 0 is out of range; this model has exits 1..4"),
        (["--prompt=x", "--exits=2,5"], "exit 5 is out of range"),
        (["--prompt=x", "--exits=two"], 'give "all" or numbers'),
        (["--prompt=x", "--image=/no/such.png"], "/no/such.png: no such image file"),
        (["--prompt=x", "--image=https://a.b/c.png"], "c.png: an address; images are files: download it"),
    ],
)
def test_bad_questions_are_one_line(directory, capsys, more, complaint):
    assert main.main(arguments(directory, *more)) == 2
    said = capsys.readouterr().err
    assert complaint in said and said.count("\n") == 1


@pytest.mark.parametrize(
    ("file", "limits", "more", "complaint"),
    [
        ("config.json", {"text_config": {"max_position_embeddings": 40}}, [SHORT], "and the answer up to 6 (max_new"),
        ("config.json", {"text_config": {"max_position_embeddings": 60}}, [], "lower max_new_tokens"),
        ("tokenizer_config.json", {"model_max_length": 20}, [SHORT], "texts have at most 20 (tokenizer_config.json"),
    ],
)
def test_a_prompt_longer_than_the_model_takes_is_one_line(tmp_path, directory, file, limits, more, complaint, capsys):
    shutil.copytree(directory, tmp_path, dirs_exist_ok=True)
    values = json.loads((tmp_path / file).read_text())
    for name, value in limits.items():
        values[name] = values[name] | value if isinstance(value, dict) else value
    (tmp_path / file).write_text(json.dumps(values))
    assert main.main(arguments(tmp_path, f"--prompt={'box ' * 10}", *more)) == 2
    said = capsys.readouterr().err
    assert "the prompt takes" in said and complaint in said and said.count("\n") == 1


def test_exits():
    assert ask.parse_exits("all", 4, 3) == [1, 2, 3, 4]
    assert ask.parse_exits("3, 1,3", 4, 3) == [1, 3]
    assert ask.parse_exits(None, 24, 23) == [1, 7, 12, 18, 23, 24]
    assert ask.parse_exits(None, 2, 1) == [1, 2]
    with pytest.raises(UserError, match="1..4"):
        ask.parse_exits("-1", 4, 3)


def test_columns_wrap_into_bands():
    answers = {f"exit {i}": "word " * (10 * i) for i in range(5)}
    page = ask.side_by_side(answers, 100)
    assert max(map(len, page.splitlines())) <= 100
    bands = page.split("\n\n")
    assert [band.splitlines()[0].count("exit") for band in bands] == [3, 2]
    assert "(empty)" in bands[0] and page.count("word") == 100
    narrow = ask.side_by_side(answers, 10)
    assert len(narrow.split("\n\n")) == 5


def test_a_question_without_an_image(directory, capsys):
    options = argparse.Namespace(prompt="hello", image=[], exits="1,4")
    from icet_jax.runs.config_files import load

    config = load(
        None, [("model.checkpoint", str(directory)), ("model.dtype", "float32"), ("sweep.max_new_tokens", "4")]
    )
    assert ask.run(config, None, options) == 0
    assert "exit 1" in capsys.readouterr().out


def test_a_damaged_checkpoint_is_one_line(tmp_path, capsys):
    model = tiny.llava()
    model.lm_head.weight.data.fill_(float("nan"))
    damaged = tiny.save_llava(tmp_path / "damaged", model)
    with pytest.raises(UserError, match="^exit 2, row 0: the model's logits are NaN or infinite; the checkpoint is"):
        main.run(arguments(damaged, "--prompt=hello", "--exits=2", SHORT))
    assert not capsys.readouterr().out


def test_an_adapter_answers_too(tmp_path, directory, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    vlm = icet_jax.load(directory)
    fresh = init_lora(
        vlm.config.lora_shapes(), rank=2, alpha=2.0, targets=("q_proj", "down_proj"), key=jax.random.key(0)
    )
    lora = jax.tree.map(lambda x: jax.random.normal(jax.random.key(1), x.shape), fresh)
    adapter = save_adapter(tmp_path / "adapter", lora, vlm.config, base=str(directory))
    printed = []
    for more in ([], [f"--config.model.adapter={adapter}"]):
        assert main.run(arguments(directory, "--prompt=what is this?", "--exits=1", SHORT, *more)) == 0
        printed.append(capsys.readouterr().out)
    assert printed[0] != printed[1]
