"""Decoders by their config.json: defaults are transformers', biases and windows are read, what differs is refused."""

import pytest

from icet_jax.checkpoints.decoders import (
    DECODERS,
    attention_window,
    decoder_from_hf,
    decoder_to_hf,
    readable_tokens,
)
from icet_jax.config import names
from icet_jax.errors import UserError

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")


def test_every_decoder_of_the_config_is_known():
    assert list(DECODERS) == list(names.DECODERS)
    assert all(decoder.model_type == name for name, decoder in DECODERS.items())


@pytest.mark.parametrize("name", DECODERS)
def test_fields_that_a_file_leaves_out_have_the_defaults_of_transformers(name):
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoConfig.for_model(name)
    ours = decoder_from_hf({"model_type": name})
    for field in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
                  "num_key_value_heads", "rms_norm_eps", "tie_word_embeddings"):  # fmt: skip
        assert getattr(ours, field) == getattr(theirs, field), field
    assert ours.head_dim == (getattr(theirs, "head_dim", None) or theirs.hidden_size // theirs.num_attention_heads)
    assert ours.rope_theta == theirs.rope_parameters["rope_theta"]
    positions = theirs.max_position_embeddings
    assert readable_tokens({"model_type": name}) == min(positions, getattr(theirs, "sliding_window", None) or positions)


@pytest.mark.parametrize(
    ("values", "biased"),
    [
        ({}, ()),
        ({"attention_bias": True}, ATTENTION),
        ({"mlp_bias": True}, ("gate_proj", "up_proj", "down_proj")),
        ({"attention_bias": True, "mlp_bias": True}, (*ATTENTION, "gate_proj", "up_proj", "down_proj")),
        ({"model_type": "mistral"}, ()),
        ({"model_type": "qwen2"}, ATTENTION[:3]),
        ({"model_type": "qwen3"}, ()),
        ({"model_type": "qwen3", "attention_bias": True}, ATTENTION),
    ],
)
def test_biases_are_read_and_written(values, biased):
    config = decoder_from_hf(values)
    assert config.biased == biased
    written = decoder_to_hf(config, "float32", values.get("model_type", "llama"))
    assert decoder_from_hf(written) == config and values.items() <= written.items()


def test_biases_that_a_file_cannot_name_are_not_written():
    config = decoder_from_hf({"model_type": "qwen2"})
    with pytest.raises(ValueError, match="a llama decoder has no way to say"):
        decoder_to_hf(config, "float32", "llama")


def test_norms_of_queries_and_keys_belong_to_qwen3():
    config = decoder_from_hf({"model_type": "qwen3"})
    assert config.qk_norm and not decoder_from_hf({"model_type": "qwen2"}).qk_norm
    with pytest.raises(ValueError, match="a llama decoder has no way to say that qk_norm is True"):
        decoder_to_hf(config, "float32", "llama")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"layer_types": ["full_attention", "sliding_attention"]}, "needs a list of 'full_attention'$"),
        ({"layer_types": ["linear_attention"], "use_sliding_window": True}, "or 'sliding_attention'$"),
        ({"layer_types": "full_attention"}, "layer_types='full_attention' is not supported"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "rope_type 'yarn' is not supported; needs 'default'"),
        ({"mlp_bias": True}, "mlp_bias=True is not supported"),
    ],
)
def test_a_qwen3_with_other_layers_is_refused(values, message):
    with pytest.raises(UserError, match=message):
        decoder_from_hf({"model_type": "qwen3"} | values)


@pytest.mark.parametrize("name", ["mistral", "qwen2"])
def test_biases_that_transformers_does_not_read_are_refused(name):
    with pytest.raises(UserError, match="config.json: attention_bias=True is not supported; needs False"):
        decoder_from_hf({"model_type": name, "attention_bias": True})


@pytest.mark.parametrize(
    ("values", "window"),
    [
        ({"sliding_window": 7}, None),  # a Llama has none
        ({"model_type": "mistral"}, 4096),
        ({"model_type": "mistral", "sliding_window": 7}, 7),
        ({"model_type": "mistral", "sliding_window": None}, None),
        ({"model_type": "qwen2", "sliding_window": 7}, None),
        ({"model_type": "qwen2", "sliding_window": 7, "use_sliding_window": True}, 7),
        ({"model_type": "qwen3", "sliding_window": 7, "use_sliding_window": True}, 7),
        ({"model_type": "qwen3", "sliding_window": 7, "layer_types": ["full_attention"]}, None),
    ],
)
def test_texts_stay_within_the_window(values, window):
    assert attention_window(values) == window
    positions = {"max_position_embeddings": 100}
    assert readable_tokens(values | positions) == min(window or 100, 100)


def test_an_exported_mistral_has_no_window():
    config = decoder_from_hf({"model_type": "mistral", "sliding_window": None})
    assert attention_window(decoder_to_hf(config, "float32", "mistral")) is None
