"""SmolVLM and Idefics3 agree with transformers: logits at every exit, hidden states, positions, greedy tokens."""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")

from flax import nnx  # noqa: E402

import icet_jax  # noqa: E402
from icet_jax import vlm as front  # noqa: E402
from icet_jax.models.base.image_batches import batch_images  # noqa: E402
from icet_jax.nn.siglip import patch_positions  # noqa: E402
from tests import tiny_smolvlm  # noqa: E402
from tests.models import families  # noqa: E402

SIZES = [[(30, 50)], [], [(20, 200), (57, 57)], [(5, 100)], [(28, 28), (90, 41)]]
"""13 tiles, none, 5 + 17 next to each other (more than one group), 5, and 17 + 9 with text between them."""
TILES = [13, 0, 22, 5, 26]
TOLERANCE = 1e-5

CASES = {
    "tied, and one patch per token": {"kind": "idefics3", "tied": True, "factor": 1},
    "prime widths, four by four patches per token": {
        "vision": {"hidden_size": 23, "intermediate_size": 41, "num_attention_heads": 1, "num_hidden_layers": 2},
        "factor": 4, "hidden_size": 37, "intermediate_size": 59, "num_attention_heads": 1, "num_key_value_heads": 1,
        "head_dim": 10, "num_hidden_layers": 2,
    },
    "low scale": {"scale": 1e-2, "num_hidden_layers": 2},
}  # fmt: skip


@pytest.fixture(scope="module")
def usual(tmp_path_factory):
    """(transformers' model, ours, the processor's arrays)."""
    model = tiny_smolvlm.model(seed=2)
    vlm = icet_jax.load(tiny_smolvlm.save(tmp_path_factory.mktemp("smol"), model))
    return model, vlm, tiny_smolvlm.batch(model.config, SIZES)


@contextlib.contextmanager
def cut(model, layer):
    """transformers' model without the blocks of its image encoder behind `layer`."""
    encoder = model.model.vision_model.encoder
    blocks = encoder.layers
    encoder.layers = torch.nn.ModuleList(list(blocks)[:layer])
    yield
    encoder.layers = blocks


def compare(model, vlm, inputs, layer, encoded=None):
    """Our logits at real tokens, when they agree."""
    real = inputs["attention_mask"] == 1
    ours = np.asarray(vlm.logits(inputs, layer, encoded=encoded))[real]
    with cut(model, layer):
        families.assert_agree(ours, families.hf_logits(model, inputs)[real], TOLERANCE)
    return ours


def test_every_exit_agrees_and_is_compiled_once(usual):
    model, vlm, inputs = usual
    assert (vlm.num_exits, vlm.default_exit) == (4, 4)
    assert inputs["pixel_values"].shape == (5, 26, 3, 28, 28)
    assert inputs["pixel_values"].any(axis=(2, 3, 4)).sum(axis=1).tolist() == TILES
    compiled = front._logits._cache_size()
    encoded = vlm.encode(inputs)
    outputs = [compare(model, vlm, inputs, layer, encoded) for layer in range(1, 5)]
    assert front._logits._cache_size() == compiled + 1
    for first, second in zip(outputs, outputs[1:], strict=False):
        assert np.abs(first - second).max() > 0.05, "the exits must matter"
    whole = families.hf_logits(model, inputs)[inputs["attention_mask"] == 1]
    assert np.abs(outputs[-1] - whole).max() <= TOLERANCE


def test_tiles_with_padding_agree_at_every_exit(usual):
    """Padding moves the positions of the other patches, and is attended to by none of them."""
    model, vlm, inputs = usual
    padded = tiny_smolvlm.padded(inputs)
    encoded = vlm.encode(padded)
    outputs = [compare(model, vlm, padded, layer, encoded) for layer in range(1, 5)]
    whole = np.asarray(vlm.logits(inputs))[inputs["attention_mask"] == 1]
    assert np.abs(outputs[-1] - whole).max() > 0.1, "the padding must matter"
    masked = padded["pixel_values"] * padded["pixel_attention_mask"][:, :, None] + 0.5
    changed = np.where(padded["pixel_values"].any(axis=(2, 3, 4), keepdims=True), masked, 0).astype(np.float32)
    compare(model, vlm, padded | {"pixel_values": changed}, 4)


def test_a_mask_without_padding_may_be_left_out(usual):
    _, vlm, inputs = usual
    without = {name: array for name, array in inputs.items() if name != "pixel_attention_mask"}
    np.testing.assert_array_equal(vlm.logits(without), vlm.logits(inputs))


def test_logits_agree_without_any_image(usual):
    model, vlm, _ = usual
    compare(model, vlm, tiny_smolvlm.batch(model.config, [[], []]), 4)


@pytest.mark.parametrize("case", CASES)
def test_other_shapes_agree(tmp_path, case):
    model = tiny_smolvlm.model(**{"seed": 3, **CASES[case]})
    vlm = icet_jax.load(tiny_smolvlm.save(tmp_path, model, processor=False))
    inputs = tiny_smolvlm.batch(model.config, SIZES[:3])
    for layer in (1, vlm.default_exit):
        compare(model, vlm, inputs, layer)


def hf_states(model, tiles, mask):
    """What enters the first block and what leaves each, of transformers' image encoder, [X, tiles, P, D]."""
    states, tower = [], model.model.vision_model
    hooks = [tower.encoder.layers[0].register_forward_pre_hook(lambda module, args: states.append(args[0]))]
    hooks += [
        block.register_forward_hook(lambda module, args, output: states.append(output))
        for block in tower.encoder.layers
    ]
    size = model.config.vision_config.patch_size
    cells = mask.unfold(1, size, size).unfold(2, size, size).sum(dim=(-1, -2)) > 0
    with torch.no_grad():
        tower(pixel_values=tiles, patch_attention_mask=cells)
    for hook in hooks:
        hook.remove()
    return np.stack([state.numpy() for state in states])


@pytest.mark.parametrize("with_padding", [False, True])
def test_every_hidden_state_agrees(usual, with_padding):
    model, vlm, inputs = usual
    inputs = tiny_smolvlm.padded(inputs) if with_padding else inputs
    is_tile = torch.from_numpy(inputs["pixel_values"].any(axis=(2, 3, 4)))
    arrays = (torch.from_numpy(inputs[name])[is_tile] for name in ("pixel_values", "pixel_attention_mask"))
    theirs = hf_states(model, *arrays)
    num_tiles = batch_images(vlm.config, inputs, num_rows=5).layout.num_tiles
    assert num_tiles.tolist() == [13, 17, 5, 5, 17, 9], "groups of at most 17 tiles, as many as a row has images"
    ours = np.asarray(vlm.hidden_states(inputs)).reshape(5, 6, 17, 16, 24)
    own = np.concatenate([ours[:, group, :count] for group, count in enumerate(num_tiles)], axis=1)
    assert own.shape == theirs.shape == (5, 66, 16, 24)
    assert np.abs(own - theirs).max() <= TOLERANCE


@pytest.mark.parametrize("layer", [1, 4])
def test_greedy_tokens_are_the_same(usual, layer):
    model, vlm, inputs = usual
    vlm = vlm.with_weights(vlm.params)
    vlm.eos_ids = ()  # no answer ends before its 64th token
    with cut(model, layer):
        theirs = families.hf_greedy(model, inputs, 64, tiny_smolvlm.PAD, suppress=vlm.suppress_ids)
    ours = vlm.generate(inputs, layer, 64).tokens
    assert ours.shape == (5, 64) and len({tuple(row) for row in ours.tolist()}) == 5
    np.testing.assert_array_equal(ours, theirs)


def test_rows_are_picked_in_any_order_and_may_have_exits_of_their_own(usual):
    _, vlm, inputs = usual
    images = batch_images(vlm.config, inputs, num_rows=5)

    @jax.jit
    def visual(params, images, exits, rows=None):
        model = nnx.merge(vlm.graphdef, params)
        return model.visual(model.encode(images), exits, rows)

    rows, exits = np.array([3, 0, 4, 1, 4, 0, 2]), np.array([1, 3, 2, 4, 1, 2, 3])
    picked = np.asarray(visual(vlm.params, images, jnp.asarray(exits), jnp.asarray(rows)))
    for place, (row, layer) in enumerate(zip(rows, exits, strict=True)):
        whole = visual(vlm.params, images, jnp.full(5, layer))
        np.testing.assert_allclose(picked[place], whole[row], atol=1e-6)

    @jax.jit
    def in_two_steps(params, images, exits):
        model = nnx.merge(vlm.graphdef, params)
        return model.project(model.projector_inputs(model.encode(images), exits))

    assert exits[-1] == 3, "whole is what exit 3 gives"
    projected = in_two_steps(vlm.params, images, jnp.full(5, exits[-1]))
    np.testing.assert_allclose(projected, whole, atol=1e-6)
    early = vlm.encode(inputs, upto=3).images
    assert early.states.shape[0] == 4
    first = nnx.merge(vlm.graphdef, vlm.params).visual(early, jnp.int32(3))
    np.testing.assert_allclose(first, whole, atol=1e-6)


def test_the_image_features_are_those_of_the_real_tiles(usual):
    model, vlm, inputs = usual
    pixels, mask = (torch.from_numpy(inputs[name]) for name in ("pixel_values", "pixel_attention_mask"))
    with torch.no_grad():
        theirs = torch.cat(model.model.get_image_features(pixels, mask).pooler_output).numpy()
    images = batch_images(vlm.config, inputs, num_rows=6, per_row=3)

    @jax.jit
    def features(params, images):
        model = nnx.merge(vlm.graphdef, params)
        return model.image_features(model.encode(images), jnp.int32(4))

    ours, is_feature = map(np.asarray, features(vlm.params, images))
    assert is_feature.sum(axis=1).tolist() == [4 * count for count in [*TILES, 0]]
    np.testing.assert_allclose(ours[is_feature], theirs, atol=TOLERANCE)


@pytest.mark.parametrize("side", [4, 8, 26, 27, 32])
def test_positions_of_smaller_images_are_spread_as_in_torch(side):
    """Sides of the published models, and of the tests."""
    from transformers.models.smolvlm.modeling_smolvlm import SmolVLMVisionConfig, SmolVLMVisionEmbeddings

    config = SmolVLMVisionConfig(hidden_size=1, image_size=side, patch_size=1, num_channels=1)
    embeddings = SmolVLMVisionEmbeddings(config)
    with torch.no_grad():
        embeddings.position_embedding.weight.copy_(torch.arange(side * side)[:, None])
        embeddings.patch_embedding.weight.zero_()
        embeddings.patch_embedding.bias.zero_()
    mask = np.zeros((side, side, side), bool)
    for rows in range(1, side + 1):
        mask[rows - 1, :rows, : side + 1 - rows] = True
    with torch.no_grad():
        theirs = embeddings(torch.zeros(side, 1, side, side), torch.from_numpy(mask))[:, :, 0].numpy()
    ours = patch_positions(mask, side)
    assert ((ours >= 0) == mask.reshape(side, -1)).all()
    np.testing.assert_array_equal(np.maximum(ours, 0), theirs)
    whole = patch_positions(np.ones((1, side, side), bool), side)
    np.testing.assert_array_equal(whole[0], np.arange(side * side))
