"""What is wrong with a checkpoint is said in one line that names the file and the tensors."""

import json
import shutil

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from safetensors.torch import load_file  # noqa: E402

import icet_jax  # noqa: E402
from icet_jax.checkpoints.problems import compact  # noqa: E402
from icet_jax.checkpoints.safetensors_io import TensorReader  # noqa: E402
from icet_jax.errors import UserError  # noqa: E402
from icet_jax.models.llava.config import llava_from_hf  # noqa: E402
from icet_jax.models.loading import load_vlm  # noqa: E402
from icet_jax.models.saving import save_vlm  # noqa: E402
from icet_jax.scorers.networks import load_scorer_network  # noqa: E402
from tests import tiny  # noqa: E402


@pytest.fixture(scope="module")
def model():
    return tiny.llava(seed=1)


@pytest.fixture(scope="module")
def good(tmp_path_factory, model):
    return tiny.save_llava(tmp_path_factory.mktemp("good"), model, shards=3, processor=False)


@pytest.fixture
def directory(tmp_path, good):
    return shutil.copytree(good, tmp_path / "model")


@pytest.fixture
def single(tmp_path, model):
    return tiny.save_llava(tmp_path / "single", model, processor=False)


def error(directory, load=load_vlm):
    with pytest.raises(UserError) as caught:
        load(directory)
    line = str(caught.value)
    assert "\n" not in line and str(directory) in line
    return line


def test_a_missing_shard_is_named(directory):
    (directory / "model-00002-of-00003.safetensors").unlink()
    assert "missing shard model-00002-of-00003.safetensors" in error(directory)


@pytest.mark.parametrize("keep", [0, 5, 200, -1])
def test_a_truncated_shard_is_named(directory, keep):
    shard = directory / "model-00003-of-00003.safetensors"
    shard.write_bytes(shard.read_bytes()[:keep])
    line = error(directory)
    assert str(shard) in line and "corrupt or truncated" in line


def test_a_shard_that_is_something_else_is_named(directory):
    shard = directory / "model-00001-of-00003.safetensors"
    shard.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n" * 3)
    line = error(directory)
    assert str(shard) in line and "Git LFS pointer" in line


@pytest.mark.parametrize("text", ["", "{", "[]", '{"weight_map": {"x": "../other.safetensors"}}', '{"weight_map": {}}'])
def test_a_broken_index_is_named(directory, text):
    (directory / "model.safetensors.index.json").write_text(text)
    assert "model.safetensors.index.json" in error(directory)


def test_pickled_weights_are_refused(single):
    (single / "model.safetensors").rename(single / "pytorch_model.bin")
    line = error(single)
    assert "only pickled weights (pytorch_model.bin)" in line
    assert line.endswith(f"python scripts/convert_pickle.py {single}")


def test_a_directory_without_weights_or_config(single, tmp_path):
    (single / "model.safetensors").unlink()
    assert "neither model.safetensors nor" in error(single)
    assert "config.json: not found" in error(tmp_path / "nowhere")


def test_every_wrong_tensor_is_listed_in_one_line(single):
    state = load_file(single / "model.safetensors")
    for layer in range(3):
        del state[f"language_model.model.layers.{layer}.mlp.up_proj.weight"]
    del state["multi_modal_projector.linear_1.bias"]
    state["language_model.model.norm.weight"] = torch.ones(31)
    state["language_model.model.layers.7.mlp.up_proj.weight"] = torch.ones(53, 32)
    state["model.language_model.embed_tokens.weight"] = state["language_model.model.embed_tokens.weight"].clone()
    state["language_model.lm_head.weight"] = torch.ones(263, 32, dtype=torch.int8)
    tiny.save_state(single, state)
    line = error(single)
    assert (
        "missing (4): language_model.model.layers.{0-2}.mlp.up_proj.weight, multi_modal_projector.linear_1.bias" in line
    )
    assert "unexpected (1): language_model.model.layers.7.mlp.up_proj.weight" in line
    assert "of shape [31] instead of [32] (1): language_model.model.norm.weight" in line
    assert "duplicate (1): " in line and "model.language_model.embed_tokens.weight" in line
    assert "of dtype I8 (quantised weights are not supported) (1): language_model.lm_head.weight" in line


def test_a_tensor_in_two_shards_is_refused(directory):
    state = load_file(directory / "model-00001-of-00003.safetensors")
    other = load_file(directory / "model-00002-of-00003.safetensors")
    key = next(iter(state))
    from safetensors.torch import save_file

    save_file(other | {key: state[key]}, directory / "model-00002-of-00003.safetensors", metadata={"format": "pt"})
    assert f"in more than one file (1): {key}" in error(directory)


def test_buffers_of_older_versions_are_ignored(single):
    state = load_file(single / "model.safetensors")
    state["vision_tower.vision_model.embeddings.position_ids"] = torch.arange(17)[None]
    state["language_model.model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    tiny.save_state(single, state)
    load_vlm(single)


@pytest.mark.parametrize("part", [None, "text_config"])
def test_a_config_that_says_quantised_is_refused_over_plain_weights(single, part):
    def quantised(config):
        (config if part is None else config[part])["quantization_config"] = {"quant_method": "gptq", "bits": 4}

    edit(single, quantised)
    where = "quantization_config" if part is None else f"{part}.quantization_config"
    assert f"{single / 'config.json'}: {where} ('gptq'): quantised weights are not supported" in error(single)


def test_an_end_outside_the_vocabulary_is_refused(single):
    path = single / "generation_config.json"
    path.write_text('{"eos_token_id": [2, 263]}')
    with pytest.raises(UserError, match=r"generation_config\.json: eos_token_id is 263, but .* 0\.\.262"):
        icet_jax.load(single)


def edit(directory, change):
    config = json.loads((directory / "config.json").read_text())
    change(config)
    (directory / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("part", "field", "value", "message"),
    [
        ("text_config", "attention_bias", "yes", "text_config: attention_bias='yes' is not supported; needs True or"),
        ("text_config", "hidden_act", "relu", "text_config: hidden_act='relu' is not supported; needs 'silu'"),
        ("text_config", "model_type", "gemma", "text_config: model_type='gemma' is not supported; needs 'llama' or"),
        ("text_config", "model_type", "mistral", "sliding_window=4096 (the default) is not supported; needs null"),
        ("text_config", "rope_scaling", {"type": "linear", "factor": 2.0}, "rope_type 'linear' is not supported"),
        ("text_config", "rope_theta", "big", "rope_theta='big' is not supported; needs a number"),
        ("text_config", "rope_parameters", [1], "rope_parameters=[1] is not supported; needs a mapping"),
        ("text_config", "hidden_size", "32", "hidden_size='32' is not supported; needs a positive integer"),
        ("text_config", "num_key_value_heads", 3, "a divisor of num_attention_heads=4"),
        ("vision_config", "hidden_act", "tanh", "vision_config: hidden_act='tanh' is not supported"),
        ("vision_config", "model_type", "siglip_vision_model", "needs 'clip_vision_model'"),
        (None, "vision_feature_layer", [-2, -5], "vision_feature_layer=[-2, -5] is not supported; needs one integer"),
        (None, "vision_feature_layer", 9, "needs one integer in -5..4"),
        (None, "model_type", "blip", "'blip' is not supported; a vision-language model is needed here: llava (LLaVA"),
        (None, "model_type", "gpt2", "is a GPT-2 reward model; a vision-language model is needed here"),
        (None, "model_type", "llava_next", "missing (1): image_newline"),
    ],
)
def test_configs_that_would_be_another_network_are_refused(single, part, field, value, message):
    edit(single, lambda config: (config[part] if part else config).update({field: value}))
    assert message in error(single)


def test_a_config_that_does_not_fit_the_weights_lists_all_of_them(single):
    edit(single, lambda config: config["text_config"].update(intermediate_size=54))
    line = error(single)
    assert "of shape [53, 32] instead of [54, 32] (6): " in line
    assert "language_model.model.layers.{0-2}.mlp.gate_proj.weight" in line


def test_reward_model_needs_its_head_and_one_label(tmp_path):
    model = tiny.reward_model()
    source = tiny.save_reward_model(tmp_path / "rm", model)
    state = load_file(source / "model.safetensors")
    tiny.save_state(source, {key: tensor for key, tensor in state.items() if key != "score.weight"})
    assert "missing (1): score.weight" in error(source, load_scorer_network)
    edit(source, lambda config: config.update(id2label={"0": "a", "1": "b"}))
    assert "needs one label" in error(source, load_scorer_network)


def test_sparse_hub_configs_mean_the_class_defaults():
    """The text config of llava-hf/llava-1.5-7b-hf names five fields only."""
    values = {
        "model_type": "llava",
        "image_token_index": 32000,
        "text_config": {"max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "vocab_size": 32064},
        "vision_config": {
            "hidden_size": 1024, "image_size": 336, "intermediate_size": 4096, "num_attention_heads": 16,
            "num_hidden_layers": 24, "patch_size": 14, "projection_dim": 768, "vocab_size": 32000,
        },
    }  # fmt: skip
    config = llava_from_hf(values)
    assert (config.text.hidden_size, config.text.intermediate_size, config.text.head_dim) == (4096, 11008, 128)
    assert (config.text.num_key_value_heads, config.text.rms_norm_eps, config.text.rope_theta) == (32, 1e-5, 1e4)
    assert config.vision.num_patches == 576 and config.vision_feature_layer == -2
    assert llava_from_hf({"model_type": "llava"}).vision == config.vision


def test_an_export_is_all_or_nothing(tmp_path, single, monkeypatch):
    loaded = load_vlm(single)
    out = save_vlm(tmp_path / "out", loaded.config, loaded.params)
    before = sorted(path.name for path in out.iterdir())
    from icet_jax.checkpoints import folder

    def fail(path, values):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(folder, "write_json", fail)
    with pytest.raises(UserError, match="No space left"):
        save_vlm(out, loaded.config, loaded.params)
    assert sorted(path.name for path in out.iterdir()) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "single"]


def test_an_export_overwrites_only_exports(tmp_path, single):
    loaded = load_vlm(single)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("x")
    with pytest.raises(UserError, match="contains something other"):
        save_vlm(tmp_path / "mine", loaded.config, loaded.params)
    with pytest.raises(UserError, match="loaded from this directory"):
        save_vlm(single, loaded.config, loaded.params, source_dir=single)
    with pytest.raises(UserError, match="is a file"):
        save_vlm(single / "config.json", loaded.config, loaded.params)
    out = save_vlm(tmp_path / "out", loaded.config, loaded.params)
    save_vlm(out, loaded.config, loaded.params)
    assert np.isfinite(np.asarray(load_vlm(out).params["language_model"]["embed_tokens"].get_value())).all()


def test_keys_that_differ_in_their_layer_are_listed_as_one():
    keys = [f"a.{layer}.b" for layer in (0, 1, 2, 5)] + ["c", "d.3.e"]
    assert compact(keys) == ["a.{0-2,5}.b", "c", "d.3.e"]


def test_an_empty_tensor_larger_than_any_array_is_named(tmp_path):
    header = {"big": {"dtype": "F16", "shape": [0, 2**63], "data_offsets": [0, 0]}}
    text = json.dumps(header).encode()
    (tmp_path / "x.safetensors").write_bytes(len(text).to_bytes(8, "little") + text)
    with pytest.raises(UserError, match="x.safetensors: tensor 'big' is empty and its shape too large for any array"):
        TensorReader([tmp_path / "x.safetensors"])
