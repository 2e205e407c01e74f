"""LLaVA-NeXT agrees with transformers: logits, hidden states, exits, padding, generation, low scale."""

import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")

from tests import tiny, tiny_families  # noqa: E402
from tests.models import families  # noqa: E402

SIZES = [[(30, 50)], [], [(20, 200), (57, 57)], [(5, 400)], [(200, 30), (28, 28), (90, 41)]]
"""One image, none, two next to each other, one without a single row of tiles, three apart; both ways of unpadding."""

CASES = {
    "vicuna": {},
    "mistral": {"backbone": "mistral", "num_key_value_heads": 1},
    "prime widths": {
        "vision": {"hidden_size": 23, "intermediate_size": 41, "num_attention_heads": 1},
        "hidden_size": 37, "intermediate_size": 59, "num_attention_heads": 1, "num_key_value_heads": 1, "head_dim": 10,
    },
    "larger tiles": {"vision": {"image_size": 42, "patch_size": 14, "num_hidden_layers": 3}, "num_hidden_layers": 2},
    "deeper": {
        "vision": {"hidden_size": 64, "num_attention_heads": 4, "intermediate_size": 128, "num_hidden_layers": 12},
        "hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 8, "num_hidden_layers": 12,
    },
}  # fmt: skip

TOLERANCES = {"deeper": 2e-5, "larger tiles": 2e-5}
"""With larger patches torch's own distance to float64 is 7e-6, ours 3e-6."""


@pytest.fixture(scope="module")
def usual(tmp_path_factory):
    """(transformers' model, ours, transformers' inputs)."""
    model = tiny_families.llava_next(2)
    checkpoint = families.load_next(tmp_path_factory.mktemp("next"), model)
    return model, checkpoint, tiny_families.next_batch(model.config, SIZES)


def compare(model, checkpoint, inputs, tolerance=1e-5, layer=None):
    """Our logits at real tokens, when they agree."""
    batch = families.next_batch(inputs, checkpoint.config)
    real = inputs["attention_mask"] == 1
    ours = families.our_logits(checkpoint, batch, layer)[real]
    options = {} if layer is None else {"vision_feature_layer": layer}
    families.assert_agree(ours, families.hf_logits(model, inputs, **options)[real], tolerance)
    return ours


@pytest.mark.parametrize("case", CASES)
def test_logits_agree(tmp_path, case):
    model = tiny_families.llava_next(2, **CASES[case])
    checkpoint = families.load_next(tmp_path, model)
    for pad in ("left", "right"):
        inputs = tiny_families.next_batch(model.config, SIZES, pad=pad)
        compare(model, checkpoint, inputs, TOLERANCES.get(case, 1e-5))


def test_logits_agree_without_any_image(usual):
    model, checkpoint, _ = usual
    compare(model, checkpoint, tiny_families.next_batch(model.config, [[], []]))


def test_logits_agree_at_low_scale(tmp_path):
    """Embeddings of 1e-2, where a wrong norm epsilon is not lost among larger numbers."""
    model = tiny_families.llava_next(3, scale=1e-2)
    checkpoint = families.load_next(tmp_path, model)
    inputs = tiny_families.next_batch(model.config, SIZES)
    inputs["pixel_values"] *= 1e-2
    assert compare(model, checkpoint, inputs).std() > 0.1


def test_the_newline_matters(usual):
    model, checkpoint, inputs = usual
    batch, real = families.next_batch(inputs, checkpoint.config), inputs["attention_mask"] == 1
    params = checkpoint.params
    saved = params["image_newline"]
    ours = families.our_logits(checkpoint, batch)[real]
    params["image_newline"] = saved.replace(jnp.zeros_like(saved[...]))
    without = families.our_logits(checkpoint, batch)[real]
    params["image_newline"] = saved
    assert np.abs(ours - without).max() > 0.1


def test_every_exit_agrees_and_is_compiled_once(usual):
    """Every tile leaves at the same exit; 0 is left out, which transformers cannot be asked for by number."""
    model, checkpoint, inputs = usual
    compiled, outputs = families.logits_of._cache_size(), []
    for layer in range(1, checkpoint.model.num_exits + 1):
        outputs.append(compare(model, checkpoint, inputs, layer=layer))
    assert families.logits_of._cache_size() <= compiled + 1
    for first, second in zip(outputs, outputs[1:], strict=False):
        assert np.abs(first - second).max() > 0.05, "the exits must matter"
    default = families.hf_logits(model, inputs)[inputs["attention_mask"] == 1]
    assert np.abs(outputs[checkpoint.model.default_exit - 1] - default).max() <= 1e-5


def test_every_hidden_state_agrees(usual):
    """Of every tile; those that only fill up are not looked at by transformers, nor by the decoder here."""
    model, checkpoint, inputs = usual
    ours = np.asarray(checkpoint.model.hidden_states(families.next_batch(inputs, checkpoint.config).images))
    pixels = torch.from_numpy(inputs["pixel_values"]).flatten(0, 1)
    with torch.no_grad():
        out = model.model.vision_tower(pixels, output_hidden_states=True)
    theirs = np.stack([state.numpy() for state in out.hidden_states])
    assert ours.shape == theirs.shape == (5, 7 * 5, 17, 24)
    assert np.abs(ours - theirs).max() <= 1e-5 * max(1.0, theirs.std())


@pytest.mark.parametrize("layer", [1, 3])
def test_packed_features_agree(usual, layer):
    """Each row's features in order, zeros after them; more tiles than any image has change nothing."""
    model, checkpoint, inputs = usual
    batch, network = families.next_batch(inputs, checkpoint.config), checkpoint.model
    pixels, sizes = (torch.from_numpy(inputs[name]) for name in ("pixel_values", "image_sizes"))
    with torch.no_grad():
        out = model.model.get_image_features(pixels, sizes, vision_feature_layer=layer)
    packed = [part.numpy() for part in out.pooler_output]
    visual = np.asarray(network.visual(network.encode(batch.images), jnp.int32(layer)))
    for row in range(len(SIZES)):
        own = [part for part, place in zip(packed, batch.images.rows, strict=True) if place == row]
        own = np.concatenate(own) if own else np.zeros((0, visual.shape[-1]))
        assert np.abs(visual[row, : len(own)] - own).max(initial=0) <= 1e-5
        assert not visual[row, len(own) :].any()


@pytest.mark.parametrize("layer", [1, 3])
def test_greedy_tokens_are_the_same(usual, layer):
    model, checkpoint, inputs = usual
    kept = model.config.vision_feature_layer
    model.config.vision_feature_layer = layer
    theirs = families.hf_greedy(model, inputs, 64, tiny.PAD, suppress=[tiny.IMAGE])
    model.config.vision_feature_layer = kept
    batch = families.next_batch(inputs, checkpoint.config)
    ours = families.our_greedy(checkpoint, batch, layer, 64, tiny.PAD, suppress=(tiny.IMAGE,))
    assert ours.shape == (5, 64) and len({tuple(row) for row in ours.tolist()}) == 5
    np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("suffix", [0, 3])
def test_cached_equals_uncached(usual, suffix):
    _, checkpoint, inputs = usual
    batch = families.next_batch(inputs, checkpoint.config)
    arguments = (checkpoint.graphdef, checkpoint.params, batch, jnp.int32(2), suffix)
    found, expected, _ = families.cached_and_uncached(*arguments)
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_rows_are_picked_in_any_order(usual):
    _, checkpoint, inputs = usual
    families.assert_rows_are_picked(checkpoint, families.next_batch(inputs, checkpoint.config))


def test_each_row_may_have_its_own_exit(usual):
    _, checkpoint, inputs = usual
    batch, exits = families.next_batch(inputs, checkpoint.config), np.array([1, 2, 4, 3, 2])
    ours = np.asarray(families.logits_of(checkpoint.graphdef, checkpoint.params, batch, jnp.asarray(exits)))
    for row, layer in enumerate(exits):
        np.testing.assert_allclose(ours[row], families.our_logits(checkpoint, batch, layer)[row], atol=1e-5)


def test_bfloat16_stays_near_float32(usual, tmp_path):
    model, _, inputs = usual
    half = families.load_next(tmp_path, model, dtype="bfloat16")
    real = inputs["attention_mask"] == 1
    ours = families.our_logits(half, families.next_batch(inputs, half.config))[real]
    theirs = families.hf_logits(model, inputs)[real]
    assert np.abs(ours - theirs).max() <= 0.2
    assert (ours.argmax(-1) == theirs.argmax(-1)).mean() >= 0.9
