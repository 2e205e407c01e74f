"""What a checkpoint's folder may hold: weights, indices, configs, adapters."""

import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from icet_jax import models as families
from icet_jax.checkpoints import decoders, hf_config, scorer_config
from icet_jax.checkpoints.safetensors_io import DTYPES, TensorReader, safetensors_files, write_safetensors
from icet_jax.checkpoints.source import generation_tokens
from icet_jax.models.adapters import read_adapter
from icet_jax.scorers import networks
from tests.fuzz.damage import as_json, cases, files, mutated, outcome, torn

LLAMA = {
    "model_type": "llama", "vocab_size": 64, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "rms_norm_eps": 1e-5, "rope_theta": 1e4,
    "rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                     "original_max_position_embeddings": 32},
}  # fmt: skip
CLIP = {
    "model_type": "clip_vision_model", "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 3,
    "num_attention_heads": 2, "image_size": 28, "patch_size": 14,
}  # fmt: skip
LLAVA = {"model_type": "llava", "text_config": LLAMA, "vision_config": CLIP, "image_token_index": 60,
         "vision_feature_layer": -2, "vision_feature_select_strategy": "default"}  # fmt: skip
NEXT = LLAVA | {"model_type": "llava_next", "image_grid_pinpoints": [[28, 56], [56, 28]]}
MLLAMA = {
    "model_type": "mllama", "image_token_index": 60,
    "text_config": {**LLAMA, "model_type": "mllama_text_model", "num_hidden_layers": 5,
                    "cross_attention_layers": [1, 3]},
    "vision_config": {"model_type": "mllama_vision_model", "hidden_size": 16, "intermediate_size": 32,
                      "num_hidden_layers": 4, "num_global_layers": 2, "attention_heads": 2, "image_size": 28,
                      "patch_size": 14, "intermediate_layers_indices": [1, 2], "max_num_tiles": 2,
                      "supported_aspect_ratios": [[1, 1], [1, 2], [2, 1]]},
}  # fmt: skip
BERT = {
    "model_type": "bert", "architectures": ["BertForSequenceClassification"], "vocab_size": 64, "hidden_size": 16,
    "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32, "max_position_embeddings": 40,
    "id2label": {"0": "toxic", "1": "x"}, "pad_token_id": 0,
}  # fmt: skip
DEBERTA = {
    "model_type": "deberta-v2", "architectures": ["DebertaV2ForSequenceClassification"], "vocab_size": 64,
    "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32,
    "id2label": {"0": "x"}, "relative_attention": True, "position_biased_input": False, "type_vocab_size": 0,
    "share_att_key": True, "norm_rel_ebd": "layer_norm", "position_buckets": 8, "max_position_embeddings": 32,
    "pos_att_type": ["c2p", "p2c"],
}  # fmt: skip
GPT2 = {
    "model_type": "gpt2", "architectures": ["GPT2ForSequenceClassification"], "vocab_size": 64, "n_positions": 32,
    "n_embd": 16, "n_layer": 2, "n_head": 2, "id2label": {"0": "x"},
}  # fmt: skip
GUARD = LLAMA | {"architectures": ["LlamaForCausalLM"]}
MISTRAL = LLAMA | {"model_type": "mistral", "architectures": ["MistralForCausalLM"], "sliding_window": 32}
READERS = {
    "bert": scorer_config.bert_from_hf,
    "roberta": scorer_config.bert_from_hf,
    "deberta-v2": scorer_config.deberta_from_hf,
    "gpt2": hf_config.gpt2_from_hf,
    "llama": decoders.decoder_from_hf,
    "mistral": decoders.decoder_from_hf,
}


@pytest.mark.parametrize("valid", [LLAVA, NEXT, MLLAMA], ids=lambda config: config["model_type"])
def test_configs_of_vision_language_models(valid, tmp_path):
    assert outcome(families.vlm_config, valid)[1] is None

    @cases(120, part=3)
    @given(files(valid))
    def holds(content):
        (tmp_path / "config.json").write_bytes(content)
        read, _ = outcome(hf_config.read_hf_config, tmp_path)
        config = None if read is None else outcome(families.vlm_config, read)[0]
        if config is not None:
            outcome(families.family_of(config).table, config)
            assert all(size > 0 for shape in config.lora_shapes().values() for size in shape)
            outcome(families.family_of(config).config_to_hf, config, read, "float32")

    holds()


@pytest.mark.parametrize("valid", [BERT, DEBERTA, GPT2, GUARD, MISTRAL], ids=lambda config: config["model_type"])
def test_configs_of_scorers(valid):
    assert outcome(READERS[valid["model_type"]], valid)[1] is None

    @cases(100, part=4)
    @given(mutated(valid))
    def holds(config):
        if not isinstance(config, dict) or not isinstance(config.get("model_type"), str):
            return  # `read_hf_config` does not let these through
        outcome(networks.architecture, config)
        outcome(READERS.get(config["model_type"], hf_config.gpt2_from_hf), config)
        outcome(scorer_config.decoder_reward_from_hf, config)
        outcome(decoders.readable_tokens, config)

    holds()


def weights(folder, specs):
    draw = np.random.default_rng(0)
    arrays = {key: draw.normal(size=shape).astype(DTYPES[dtype]) for key, (dtype, shape) in specs.items()}
    folder.mkdir(exist_ok=True)
    write_safetensors(folder / "model.safetensors", specs, arrays.__getitem__)
    return (folder / "model.safetensors").read_bytes()


def with_header(header, rest):
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + rest


def read_all(path):
    with TensorReader([path]) as reader:
        for key, dtype in reader.dtypes.items():
            if dtype in DTYPES:
                assert reader.read(key).shape == reader.shapes[key]


def test_safetensors(tmp_path):
    data = weights(tmp_path, {"a": ("F32", (2, 3)), "b.weight": ("BF16", (4,)), "empty": ("F16", (0, 2))})
    start = 8 + int.from_bytes(data[:8], "little")
    header, rest = json.loads(data[8:start]), data[start:]

    @cases(250)
    @given(
        torn(data)
        | mutated(header).map(lambda changed: with_header(changed, rest))
        | st.integers(0, 2**64 - 1).map(lambda size: size.to_bytes(8, "little") + data[8:])
        | torn(data[8:start]).map(lambda text: len(text).to_bytes(8, "little") + text + rest)
        | st.binary(max_size=64)
    )
    def holds(content):
        (tmp_path / "damaged.safetensors").write_bytes(content)
        outcome(read_all, tmp_path / "damaged.safetensors")

    holds()


def test_indices_of_shards(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    (tmp_path / "secret.safetensors").write_bytes(b"outside")
    for name in ("one.safetensors", "two.safetensors"):
        (folder / name).write_bytes(b"")

    @cases(100)
    @given(files({"metadata": {}, "weight_map": {"a": "one.safetensors", "b": "two.safetensors"}}))
    def holds(content):
        (folder / "model.safetensors.index.json").write_bytes(content)
        found, _ = outcome(safetensors_files, folder)
        assert all(path.parent == folder for path in found or ())

    holds()
    for name in ("../secret.safetensors", str(tmp_path / "secret.safetensors"), 3, "a" * 300):
        (folder / "model.safetensors.index.json").write_bytes(as_json({"weight_map": {"a": name}}))
        assert outcome(safetensors_files, folder)[1]


def test_adapters(tmp_path):
    config = families.vlm_config(LLAVA)
    key = "base_model.model.language_model.model.layers.{}.self_attn.q_proj.lora_{}.weight"
    specs = {key.format(0, "A"): ("F32", (2, 16)), key.format(0, "B"): ("F32", (16, 2))}
    data = weights(tmp_path, specs)
    (tmp_path / "adapter_model.safetensors").write_bytes(data)
    valid = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "bias": "none", "use_rslora": False}

    @cases(120, part=2)
    @given(files(valid))
    def configs(content):
        (tmp_path / "adapter_config.json").write_bytes(content)
        adapter, _ = outcome(read_adapter, tmp_path, config)
        assert adapter is None or (adapter.rank == 2 and math.isfinite(adapter.scale))

    configs()
    (tmp_path / "adapter_config.json").write_bytes(as_json(valid))
    start = 8 + int.from_bytes(data[:8], "little")

    @cases(80, part=2)
    @given(torn(data) | torn(data[8:start]).map(lambda text: len(text).to_bytes(8, "little") + text + data[start:]))
    def tensors(content):
        (tmp_path / "adapter_model.safetensors").write_bytes(content)
        outcome(read_adapter, tmp_path, config)

    tensors()
    for layer in ("9" * 5000, "\u0663", "7"):
        weights(tmp_path, {key.format(layer, side): spec for side, spec in zip("AB", specs.values(), strict=True)})
        (tmp_path / "model.safetensors").replace(tmp_path / "adapter_model.safetensors")
        assert "decoder projection" in outcome(read_adapter, tmp_path, config)[1]


def test_generation_tokens(tmp_path):
    @cases(60)
    @given(files({"eos_token_id": [2, 3], "pad_token_id": 0}), mutated(LLAVA | {"eos_token_id": 2}))
    def holds(content, config):
        (tmp_path / "generation_config.json").write_bytes(content)
        found, _ = outcome(generation_tokens, tmp_path, config if isinstance(config, dict) else {})
        assert found is None or all(type(token) is int for token in (*found[0], found[1]))

    holds()
