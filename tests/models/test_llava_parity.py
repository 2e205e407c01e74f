"""LLaVA-1.5 agrees with transformers: logits, hidden states, exits, padding, low scale."""

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from tests import tiny  # noqa: E402
from tests.models import parity  # noqa: E402

IMAGES = [2, 0, 1]

ROPE = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
CASES = {
    "gqa": {},
    "mha": {"num_key_value_heads": 4},
    "one kv head": {"num_key_value_heads": 1},
    "prime widths": {
        "vision": {"hidden_size": 23, "intermediate_size": 41, "num_attention_heads": 1, "image_size": 35},
        "hidden_size": 37,
        "intermediate_size": 59,
        "num_attention_heads": 1,
        "num_key_value_heads": 1,
        "head_dim": 10,
    },
    "head size of its own": {"head_dim": 14},
    "patches do not tile the image": {"vision": {"image_size": 30}},
    "llama3 rope": {"rope_parameters": ROPE},
    "tied": {"tie_word_embeddings": True},
    "deeper": {
        "vision": {"hidden_size": 64, "num_attention_heads": 4, "intermediate_size": 128, "num_hidden_layers": 12},
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_attention_heads": 8,
        "num_hidden_layers": 12,
    },
}


@pytest.mark.parametrize("pad", ["left", "right"])
@pytest.mark.parametrize("case", CASES)
def test_logits_agree(tmp_path, case, pad):
    model = tiny.llava(seed=2, **CASES[case])
    checkpoint = parity.load(tmp_path, model)
    inputs = tiny.batch(model.config, IMAGES, pad=pad)
    tolerance = 2e-5 if case == "deeper" else 1e-5
    parity.assert_logits_agree(
        parity.our_logits(checkpoint, inputs), parity.hf_logits(model, inputs), inputs, tolerance
    )


def test_logits_agree_without_any_image(tmp_path):
    model = tiny.llava(seed=2)
    checkpoint = parity.load(tmp_path, model)
    inputs = tiny.batch(model.config, [0, 0])
    parity.assert_logits_agree(parity.our_logits(checkpoint, inputs), parity.hf_logits(model, inputs), inputs)


@pytest.mark.parametrize("pad", ["left", "right"])
def test_logits_agree_at_low_scale(tmp_path, pad):
    """Embeddings of 1e-2: a wrong norm epsilon costs 1.5 (RMS) or 0.04 (CLIP) here, and near nothing elsewhere."""
    model = tiny.llava(seed=3, scale=1e-2)
    checkpoint = parity.load(tmp_path, model)
    inputs = tiny.batch(model.config, IMAGES, pad=pad)
    inputs["pixel_values"] *= 1e-2
    theirs = parity.hf_logits(model, inputs)
    parity.assert_logits_agree(parity.our_logits(checkpoint, inputs), theirs, inputs)
    assert theirs[inputs["attention_mask"] == 1].std() > 0.1


def test_low_scale_sees_a_wrong_epsilon(tmp_path):
    model = tiny.llava(seed=3, scale=1e-2)
    inputs = tiny.batch(model.config, IMAGES)
    theirs = parity.hf_logits(model, inputs)
    for norm in model.modules():
        if type(norm).__name__ == "LlamaRMSNorm":
            norm.variance_epsilon = 1e-6
    assert np.abs(parity.hf_logits(model, inputs) - theirs)[inputs["attention_mask"] == 1].max() > 1e-2


def test_every_exit_agrees(tmp_path):
    model = tiny.llava(seed=4)
    checkpoint = parity.load(tmp_path, model)
    inputs = tiny.batch(model.config, IMAGES)
    outputs = []
    for layer in range(model.config.vision_config.num_hidden_layers + 1):
        ours = parity.our_logits(checkpoint, inputs, layer)
        parity.assert_logits_agree(ours, parity.hf_logits(model, inputs, layer), inputs)
        outputs.append(ours[inputs["attention_mask"] == 1])
    for first, second in zip(outputs, outputs[1:], strict=False):
        assert np.abs(first - second).max() > 0.05, "the exits must matter"


def test_full_feature_strategy_keeps_the_class_token(tmp_path):
    model = tiny.llava(seed=5)
    model.config.vision_feature_select_strategy = "full"
    model.config.image_seq_length = 17
    directory = tiny.save_llava(tmp_path, model, processor=False)
    config = (directory / "config.json").read_text()
    (directory / "config.json").write_text(
        config.replace('"vision_feature_select_strategy": "default"', '"vision_feature_select_strategy": "full"')
    )
    checkpoint = parity.load_vlm(directory)
    inputs = tiny.batch(model.config, IMAGES)
    parity.assert_logits_agree(parity.our_logits(checkpoint, inputs), parity.hf_logits(model, inputs), inputs)


@pytest.mark.parametrize("case", ["gqa", "prime widths", "deeper"])
def test_every_hidden_state_agrees(tmp_path, case):
    model = tiny.llava(seed=6, **CASES[case])
    checkpoint = parity.load(tmp_path, model)
    inputs = tiny.batch(model.config, IMAGES)
    ours = np.asarray(checkpoint.model.hidden_states(parity.images_of(inputs, checkpoint.config)))
    with torch.no_grad():
        tower = model.model.vision_tower
        out = tower(torch.from_numpy(inputs["pixel_values"]), output_hidden_states=True)
    theirs = np.stack([state.numpy() for state in out.hidden_states])
    assert ours.shape == theirs.shape == (model.config.vision_config.num_hidden_layers + 1, *theirs.shape[1:])
    assert np.abs(ours - theirs).max() <= 1e-5 * max(1.0, theirs.std())


def test_decoder_hidden_states_are_those_after_the_final_norm(tmp_path):
    model = tiny.llava(seed=7)
    checkpoint = parity.load(tmp_path, model)
    inputs = tiny.batch(model.config, [0, 0])
    network = checkpoint.model
    mask = np.asarray(inputs["attention_mask"], bool)
    tokens = inputs["input_ids"].astype(np.int32)
    positions = np.maximum(np.cumsum(mask, 1) - 1, 0).astype(np.int32)
    hidden = network.decode(*(parity.jnp.asarray(x) for x in (tokens, positions, mask)))
    with torch.no_grad():
        tensors = {name: torch.from_numpy(x) for name, x in inputs.items()}
        theirs = model(**tensors, output_hidden_states=True).hidden_states[-1].numpy()
    assert np.abs(np.asarray(hidden) - theirs)[mask].max() <= 1e-5


def test_bfloat16_stays_near_float32(tmp_path):
    model = tiny.llava(seed=8)
    inputs = tiny.batch(model.config, IMAGES)
    half = parity.our_logits(parity.load(tmp_path, model, dtype="bfloat16"), inputs)
    theirs = parity.hf_logits(model, inputs)
    real = inputs["attention_mask"] == 1
    assert np.abs(half - theirs)[real].max() <= 0.15
    assert (half.argmax(-1) == theirs.argmax(-1))[real].mean() >= 0.9
