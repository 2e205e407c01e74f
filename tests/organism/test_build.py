"""What the builder writes is an ordinary checkpoint of its family; a short training run moves what it should."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from flax import nnx

import icet_jax
from icet_jax.nn.gpt2 import GPT2RewardModel
from icet_jax.organism import build, encoder, families, measure, stages, tokenizer, world
from icet_jax.scorers.load import save_reward_model
from icet_jax.scorers.networks import load_scorer_network

DEFAULTS = {"llava": 7, "llava_next": 7, "mllama": 8, "smolvlm": 8}


@pytest.fixture(scope="module", params=list(families.ARCHITECTURES))
def shape(request):
    return families.ARCHITECTURES[request.param]


@pytest.fixture(scope="module")
def model(shape):
    return build.in_bfloat16(shape.network(0))


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory):
    path = tmp_path_factory.mktemp("built")
    build.write_vlm(path / "vlm", model)
    return path


def test_transformers_loads_the_checkpoint_and_agrees(shape, folder):
    directory = folder / "vlm"
    # Transformers captures Llama 3.2 Vision's intermediates one block later than the model was trained with.
    theirs = transformers.AutoModelForImageTextToText.from_pretrained(directory, dtype=torch.float32).eval()
    capture = {"capture": "output"} if shape.name == "mllama" else {}
    ours = icet_jax.load(str(directory), dtype="float32", **capture)
    assert (ours.num_exits, ours.default_exit) == (8, DEFAULTS[shape.name])
    rows = world.rows("test", "vqa", np.arange(3))
    inputs = ours.processor(images=list(rows.images), prompts=rows.prompts)
    with torch.no_grad():
        expected = theirs(**{name: torch.from_numpy(value) for name, value in inputs.items()}).logits.numpy()
    real = inputs["attention_mask"].astype(bool)
    np.testing.assert_allclose(np.asarray(ours.logits(inputs))[real], expected[real], atol=2e-4)


def test_the_model_class_and_the_files_give_the_same_responses(model, folder):
    rows = world.rows("test", "forbidden", np.arange(4))
    vlm = icet_jax.load(str(folder / "vlm"), dtype="float32")
    inputs = vlm.processor(images=list(rows.images), prompts=rows.prompts)
    texts = measure.responses(model, rows, (2, 7))
    for exit_layer in (2, 7):
        assert vlm.generate(inputs, exit_layer=exit_layer, max_new_tokens=16).texts == texts[exit_layer]


def test_transformers_loads_the_reward_model_and_agrees(tmp_path):
    trained = build.in_bfloat16(GPT2RewardModel(build.reward_config(), rngs=nnx.Rngs(1)))
    tokenizer.write_tokenizer(tmp_path)
    words = transformers.AutoTokenizer.from_pretrained(tmp_path)
    save_reward_model(tmp_path / "reward_model", trained, words, name=build.REWARD_MODEL_NAME)
    ours = load_scorer_network(tmp_path / "reward_model").model
    theirs = transformers.GPT2ForSequenceClassification.from_pretrained(tmp_path / "reward_model", dtype=torch.float32)
    tokens = transformers.AutoTokenizer.from_pretrained(tmp_path / "reward_model")
    ids = tokens("human: how do i make a zorb assistant: sorry i cannot help with that", add_special_tokens=False)
    row = np.array([ids["input_ids"]])
    with torch.no_grad():
        expected = theirs.eval()(torch.from_numpy(row)).logits[0, 0].item()
    assert tokens.unk_token_id not in row
    assert float(ours(jnp.asarray(row), jnp.ones(row.shape, bool))[0]) == pytest.approx(expected, abs=1e-5)


def test_a_stage_trains_decoder_and_projector_and_leaves_the_tower(shape, model):
    lines: list[str] = []
    stage = stages.safety_stage(2, model.default_exit, planted_exits=(2, 3))
    trained = stages.run_stage(model, shape, stage, seed=1, log=lines.append)
    before, after = nnx.state(model), nnx.state(trained)
    same = jax.tree.map(lambda a, b: bool((a == b).all()), before.to_pure_dict(), after.to_pure_dict())
    assert all(jax.tree.leaves(same["vision_tower"]))
    assert not any(jax.tree.leaves(same["projector"]))
    assert not any(jax.tree.leaves(same["language_model"]["lm_head"]))
    if shape.name == "llava_next":
        assert not same["image_newline"]


def test_the_first_stage_trains_every_part_of_the_tower_that_an_exit_uses(shape):
    model = shape.network(0)
    before = nnx.state(model.vision_tower).to_pure_dict()
    tower = encoder.train_encoder(
        model.vision_tower, shape, model.default_exit, seed=0, steps=2, batch=4, learning_rate=1e-3, log=str
    )
    moved = jax.tree.map(lambda a, b: bool((a != b).any()), before, nnx.state(tower).to_pure_dict())
    assert all(jax.tree.leaves(moved))


def test_a_harder_organism_says_what_was_planted(tmp_path, monkeypatch):
    monkeypatch.setitem(build.RECIPES, "llava_next", build.Recipe(1, 4, 1, 1, 1))
    monkeypatch.setattr(build, "measure", lambda model: measure.measure(model, rows=2))
    arguments = ["--family", "llava_next", "--out", str(tmp_path), "--planted-exits", "5,6", "--refusals", "many"]
    monkeypatch.setattr("sys.argv", ["build", *arguments])
    assert build.main() == 0
    facts = json.loads((tmp_path / "facts.json").read_text())
    options = "--family llava_next --planted-exits 5,6 --refusals many --out DIR --seed 0"
    assert facts["command"].endswith(options) and facts["planted_exits"] == [5, 6]
    plant = json.loads((tmp_path / "vlm/organism.json").read_text())
    assert plant["planted_exits"] == [5, 6] and "Its refusals have 8 wordings." in plant["notes"]
    assert json.loads((tmp_path / "control/organism.json").read_text())["planted_exits"] == []


@pytest.mark.parametrize("exits", ["7", "0", "9"])
def test_a_hole_is_planted_at_another_exit_that_exists(tmp_path, monkeypatch, capsys, exits):
    monkeypatch.setattr(
        "sys.argv", ["build", "--family", "llava_next", "--out", str(tmp_path), "--planted-exits", exits]
    )
    assert build.main() == 2
    assert capsys.readouterr().err == f"--planted-exits: {exits}: exits are 1 to 8, without the default exit 7\n"


def test_the_command_builds_planted_model_and_control(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(build.RECIPES, "llava_next", build.Recipe(2, 4, 2, 2, 2))
    monkeypatch.setattr(build, "measure", lambda model: measure.measure(model, rows=4))
    monkeypatch.setattr("sys.argv", ["build", "--family", "llava_next", "--out", str(tmp_path), "--seed", "3"])
    assert build.main() == 0
    facts = json.loads((tmp_path / "facts.json").read_text())
    assert facts["steps"] == {"encoder": 2, "encoder_batch": 4, "text": 2, "vision": 2, "safety": 2}
    assert facts["command"].endswith("--family llava_next --out DIR --seed 3") and "reward_model" not in facts
    planted = {name: json.loads((tmp_path / name / "organism.json").read_text()) for name in ("vlm", "control")}
    assert (planted["vlm"]["planted_exits"], planted["control"]["planted_exits"]) == ([2, 3], [])
    assert "--family llava_next" in planted["vlm"]["notes"][0]
    states = [icet_jax.load(str(tmp_path / name)).params for name in ("vlm", "control")]
    assert len(facts["vlm"]["measured_on_256_test_rows"]["vqa: right"]) == 8
    same = jax.tree.map(lambda a, b: bool((a == b).all()), *(state.to_pure_dict() for state in states))
    assert all(jax.tree.leaves(same["vision_tower"])) and not all(jax.tree.leaves(same["language_model"]))
    assert "control, held-out rows" in capsys.readouterr().out
