"""import -> export keeps every byte, and transformers gets the same logits from what we write."""

import json

import ml_dtypes
import numpy as np
import pytest

torch = pytest.importorskip("torch")

from safetensors import safe_open  # noqa: E402
from transformers import AutoProcessor, GPT2ForSequenceClassification, LlavaForConditionalGeneration  # noqa: E402

from icet_jax.checkpoints.hf_config import gpt2_to_hf  # noqa: E402
from icet_jax.checkpoints.hf_export import COPIED, save_network  # noqa: E402
from icet_jax.checkpoints.tables import gpt2_table  # noqa: E402
from icet_jax.models.loading import load_vlm  # noqa: E402
from icet_jax.models.saving import save_vlm  # noqa: E402
from icet_jax.scorers.networks import load_scorer_network  # noqa: E402
from tests import tiny  # noqa: E402
from tests.models.references import load_value_head  # noqa: E402

LAYOUTS = ("old", "native4", "native5", "hybrid5")


def save_gpt2_reward(folder, config, params, source_dir=None):
    """A GPT-2 reward model's directory."""

    def config_json(values, dtype, tied):
        return gpt2_to_hf(config, values, dtype)

    return save_network(folder, gpt2_table(config), params, config_json, source_dir=source_dir)


def tensors(directory):
    """Every tensor of a directory as (dtype, shape, bytes)."""
    found = {}
    for path in sorted(directory.glob("model*.safetensors")):
        with safe_open(path, framework="numpy") as file:
            assert file.metadata() == {"format": "pt"}
            for key in file.keys():  # noqa: SIM118
                array = file.get_tensor(key)
                assert key not in found
                found[key] = array.dtype, array.shape, array.tobytes()
    return found


def hf_load(directory):
    """transformers' model; nothing may be missing, unexpected or mis-shaped."""
    model, info = LlavaForConditionalGeneration.from_pretrained(
        directory, dtype=torch.float32, output_loading_info=True, attn_implementation="eager"
    )
    assert not any(info.values()), info
    return model.eval()


def hf_logits(model, inputs):
    with torch.no_grad():
        return model(**{name: torch.from_numpy(x) for name, x in inputs.items()}).logits.numpy()


@pytest.fixture(scope="module")
def model():
    return tiny.llava(seed=1, attention_bias=True, mlp_bias=True)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_export_is_byte_identical_in_the_old_layout(tmp_path, model, layout, dtype):
    old = tiny.save_llava(tmp_path / "old", model, dtype=dtype, processor=False)
    source = tiny.save_llava(tmp_path / "in", model, layout=layout, dtype=dtype, shards=3, processor=False)
    loaded = load_vlm(source)
    out = save_vlm(tmp_path / "out", loaded.config, loaded.params, source_dir=source)
    assert tensors(out) == tensors(old)


def test_a_half_precision_load_still_exports_the_source_bytes(tmp_path, model):
    source = tiny.save_llava(tmp_path / "in", model, dtype="float32", processor=False)
    loaded = load_vlm(source, dtype="bfloat16")
    assert {str(leaf.dtype) for leaf in tiny_leaves(loaded)} == {"bfloat16"}
    out = save_vlm(tmp_path / "out", loaded.config, loaded.params, source_dir=source)
    assert tensors(out) == tensors(source)


def tiny_leaves(loaded):
    import jax

    return jax.tree.leaves(loaded.params)


def test_transformers_gives_the_same_logits_from_the_export(tmp_path, model):
    source = tiny.save_llava(tmp_path / "in", model, dtype="float16")
    loaded = load_vlm(source)
    out = save_vlm(tmp_path / "out", loaded.config, loaded.params, source_dir=source, max_shard_bytes=60_000)
    assert len(list(out.glob("model-*-of-*.safetensors"))) > 2
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(len(data) for _, _, data in tensors(out).values())
    inputs = tiny.batch(model.config, [1, 0])
    np.testing.assert_array_equal(hf_logits(hf_load(out), inputs), hf_logits(hf_load(source), inputs))


def test_files_beside_the_weights_come_along(tmp_path, model):
    source = tiny.save_llava(tmp_path / "in", model)
    (source / "notes.txt").write_text("stays behind")
    loaded = load_vlm(source)
    out = save_vlm(tmp_path / "out", loaded.config, loaded.params, source_dir=source)
    expected = {path.name for path in source.iterdir() if path.name in COPIED} | {"config.json", "model.safetensors"}
    assert {path.name for path in out.iterdir()} == expected
    assert {"tokenizer.json", "preprocessor_config.json", "generation_config.json"} <= expected
    processor = AutoProcessor.from_pretrained(out)
    assert processor.tokenizer("hi").input_ids == tiny.tokenizer()("hi").input_ids


def test_config_keeps_what_it_does_not_know_and_speaks_the_old_dialect(tmp_path, model):
    source = tiny.save_llava(tmp_path / "in", model, dtype="bfloat16", processor=False)
    config = json.loads((source / "config.json").read_text())
    theta = config["text_config"].pop("rope_theta")
    config["text_config"]["rope_parameters"] = {"rope_theta": theta, "rope_type": "default"}
    config["dtype"] = config.pop("torch_dtype")
    config |= {"house": "kept", "transformers_version": "5.23.0"}
    config["vision_config"]["projection_dim"] = 11
    (source / "config.json").write_text(json.dumps(config))
    loaded = load_vlm(source)
    out = save_vlm(tmp_path / "out", loaded.config, loaded.params, source_dir=source)
    written = json.loads((out / "config.json").read_text())
    assert written["house"] == "kept" and written["vision_config"]["projection_dim"] == 11
    assert written["torch_dtype"] == "bfloat16" and "dtype" not in written
    assert written["text_config"]["rope_theta"] == theta and "rope_parameters" not in written["text_config"]
    assert load_vlm(out).config == loaded.config


def test_a_network_made_here_exports_without_a_source(tmp_path, model):
    """Its config is complete: transformers builds the same network from it."""
    loaded = load_vlm(tiny.save_llava(tmp_path / "in", model, processor=False))
    out = save_vlm(tmp_path / "out", loaded.config, loaded.params)
    inputs = tiny.batch(model.config, [1, 2])
    model.set_attn_implementation("eager")
    np.testing.assert_array_equal(hf_logits(hf_load(out), inputs), hf_logits(model, inputs))


def test_trained_parameters_are_cast_to_the_source_dtype_and_the_rest_is_copied(tmp_path, model):
    import jax

    source = tiny.save_llava(tmp_path / "in", model, dtype="bfloat16", processor=False)
    loaded = load_vlm(source)
    params = jax.tree.map(lambda x: x, loaded.params)
    kernel = params["language_model"]["layers"]["q_proj"]["kernel"]
    kernel.set_value(kernel.get_value().at[1].add(0.25))
    out = save_vlm(tmp_path / "out", loaded.config, params, source_dir=source)
    before, after = tensors(source), tensors(out)
    changed = [key for key in before if before[key] != after[key]]
    assert changed == ["language_model.model.layers.1.self_attn.q_proj.weight"]
    dtype, shape, data = after[changed[0]]
    expected = np.asarray(kernel.get_value()[1]).T.astype(ml_dtypes.bfloat16)
    assert dtype == ml_dtypes.bfloat16 and data == expected.tobytes()


def test_value_head_is_saved_beside_the_model(tmp_path, model):
    import jax.numpy as jnp

    loaded = load_vlm(tiny.save_llava(tmp_path / "in", model, processor=False))
    head = {"kernel": jnp.arange(32.0)[:, None], "bias": jnp.ones(1)}
    out = save_vlm(tmp_path / "out", loaded.config, loaded.params, value_head=head)
    restored = load_value_head(out)
    for name in head:
        np.testing.assert_array_equal(np.asarray(restored[name]), np.asarray(head[name]))
    hf_load(out)


def test_tied_embeddings_stay_tied_until_they_are_trained_apart(tmp_path):
    import jax

    model = tiny.llava(seed=2, tie_word_embeddings=True)
    source = tiny.save_llava(tmp_path / "in", model, processor=False)
    head = "language_model.lm_head.weight"
    assert head not in tensors(source)
    loaded = load_vlm(source)
    out = save_vlm(tmp_path / "out", loaded.config, loaded.params, source_dir=source)
    assert tensors(out) == tensors(source)
    assert json.loads((out / "config.json").read_text())["tie_word_embeddings"] is True
    params = jax.tree.map(lambda x: x, loaded.params)
    kernel = params["language_model"]["lm_head"]["kernel"]
    kernel.set_value(kernel.get_value() + 1)
    out = save_vlm(tmp_path / "apart", loaded.config, params, source_dir=source)
    assert head in tensors(out)
    assert json.loads((out / "config.json").read_text())["tie_word_embeddings"] is False
    apart = load_vlm(out)
    np.testing.assert_array_equal(
        np.asarray(apart.params["language_model"]["lm_head"]["kernel"].get_value()), np.asarray(kernel.get_value())
    )
    hf_load(out)


@pytest.mark.parametrize("prefix", [True, False])
def test_reward_model_round_trip(tmp_path, prefix):
    model = tiny.reward_model(seed=1)
    whole = tiny.save_reward_model(tmp_path / "whole", model)
    source = tiny.save_reward_model(tmp_path / "in", model, prefix=prefix)
    loaded = load_scorer_network(source)
    out = save_gpt2_reward(tmp_path / "out", loaded.config, loaded.params, source_dir=source)
    assert tensors(out) == tensors(whole)
    assert json.loads((out / "config.json").read_text())["pad_token_id"] == tiny.GPT2_EOS
    again, info = GPT2ForSequenceClassification.from_pretrained(out, output_loading_info=True)
    assert not any(info.values()), info
    ids = torch.randint(0, 256, (3, 20))
    with torch.no_grad():
        assert torch.equal(again.eval()(ids).logits, model(ids).logits)


def test_buffers_of_original_gpt2_files_are_ignored(tmp_path):
    model = tiny.reward_model(seed=1)
    source = tiny.save_reward_model(tmp_path, model, prefix=False)
    state = {key.removeprefix("transformer."): tensor.contiguous() for key, tensor in model.state_dict().items()}
    state |= {
        "h.0.attn.bias": torch.ones(1, 1, 8, 8, dtype=torch.uint8),
        "h.1.attn.masked_bias": torch.tensor(-1e4),
        "lm_head.weight": state["wte.weight"].clone(),
    }
    tiny.save_state(source, state)
    again = load_scorer_network(source)
    assert again.params["layers"]["c_attn"]["bias"].get_value().shape == (2, 72)


def test_reward_model_made_here_is_read_by_transformers(tmp_path):
    model = tiny.reward_model(seed=3)
    loaded = load_scorer_network(tiny.save_reward_model(tmp_path / "in", model))
    out = save_gpt2_reward(tmp_path / "out", loaded.config, loaded.params)
    again, info = GPT2ForSequenceClassification.from_pretrained(out, output_loading_info=True)
    assert not any(info.values()), info
    assert again.config.pad_token_id == tiny.GPT2_EOS and again.config.num_labels == 1
    ids = torch.randint(0, 256, (2, 9))
    with torch.no_grad():
        assert torch.equal(again.eval()(ids).logits, model(ids).logits)
