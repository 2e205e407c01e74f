"""Qwen2.5-VL agrees with transformers: logits at every exit, hidden states, positions, greedy tokens."""

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
from icet_jax.models.qwen2_5_vl.reference import torch_order  # noqa: E402
from icet_jax.models.qwen2_5_vl.vision import QwenVisionConfig, patch_places  # noqa: E402
from tests import tiny_qwen  # noqa: E402
from tests.models import families  # noqa: E402

SIZES = [[(30, 50)], [], [(20, 200), (57, 57)], [(5, 100)], [(28, 28), (90, 41), (16, 16)]]
GRIDS = [(8, 12), (2, 30), (8, 8), (2, 24), (8, 8), (14, 6), (4, 4)]
"""Rows and columns of patches; a window is 4 x 4, so only some grids are whole windows."""
TOLERANCE = 2e-5

CASES = {
    "tied, all blocks with windows": {"tied": True, "vision": {"fullatt_block_indexes": []}},
    "all blocks without windows": {"sections": [1, 1, 2], "vision": {"fullatt_block_indexes": [0, 1, 2, 3]}},
    "prime widths, windows of 3 x 3": {
        "vision": {"hidden_size": 20, "intermediate_size": 41, "num_heads": 1, "depth": 3, "window_size": 24,
                   "fullatt_block_indexes": [1]},
        "hidden_size": 40, "intermediate_size": 59, "num_attention_heads": 1, "num_key_value_heads": 1,
        "num_hidden_layers": 2, "sections": [7, 8, 5],
    },
    "low scale": {"scale": 1e-2, "num_hidden_layers": 2},
}  # fmt: skip


@pytest.fixture(scope="module")
def usual(tmp_path_factory):
    """(transformers' model, ours, the processor's arrays)."""
    model = tiny_qwen.model(seed=2)
    vlm = icet_jax.load(tiny_qwen.save(tmp_path_factory.mktemp("qwen"), model))
    return model, vlm, tiny_qwen.batch(model.config, SIZES)


@contextlib.contextmanager
def cut(model, layer):
    """transformers' model without the blocks of its image encoder behind `layer`."""
    tower = model.model.visual
    blocks = tower.blocks
    tower.blocks = torch.nn.ModuleList(list(blocks)[:layer])
    yield
    tower.blocks = blocks


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
    assert list(map(tuple, inputs["image_grid_thw"][:, 1:].tolist())) == GRIDS
    compiled = front._logits._cache_size()
    encoded = vlm.encode(inputs)
    outputs = [compare(model, vlm, inputs, layer, encoded) for layer in range(1, 5)]
    assert front._logits._cache_size() == compiled + 1
    for first, second in zip(outputs, outputs[1:], strict=False):
        assert np.abs(first - second).max() > 0.05, "the exits must matter"
    whole = families.hf_logits(model, inputs)[inputs["attention_mask"] == 1]
    assert np.abs(outputs[-1] - whole).max() <= TOLERANCE


def test_types_of_tokens_may_be_left_out(usual):
    """transformers would then give image tokens the positions of text."""
    model, vlm, inputs = usual
    without = {name: array for name, array in inputs.items() if name != "mm_token_type_ids"}
    np.testing.assert_array_equal(vlm.logits(without), vlm.logits(inputs))
    real = inputs["attention_mask"] == 1
    assert np.abs(families.hf_logits(model, without)[real] - np.asarray(vlm.logits(inputs))[real]).max() > 0.1


def test_logits_agree_without_any_image(usual):
    model, vlm, _ = usual
    compare(model, vlm, tiny_qwen.batch(model.config, [[], []]), 4)


@pytest.mark.parametrize("case", CASES)
def test_other_shapes_agree(tmp_path, case):
    model = tiny_qwen.model(**{"seed": 3, **CASES[case]})
    vlm = icet_jax.load(tiny_qwen.save(tmp_path, model, processor=False))
    inputs = tiny_qwen.batch(model.config, SIZES[:3])
    for layer in (1, vlm.default_exit):
        compare(model, vlm, inputs, layer)


def test_every_hidden_state_agrees(usual):
    """transformers' states are in the order of windows; ours are padded with zeros."""
    model, vlm, inputs = usual
    states, tower = [], model.model.visual
    hooks = [tower.blocks[0].register_forward_pre_hook(lambda module, args: states.append(args[0]))]
    hooks += [block.register_forward_hook(lambda module, args, output: states.append(output)) for block in tower.blocks]
    grids = torch.from_numpy(inputs["image_grid_thw"])
    with torch.no_grad():
        tower(torch.from_numpy(inputs["pixel_values"]), grid_thw=grids)
    for hook in hooks:
        hook.remove()
    theirs = np.stack([state.numpy() for state in states])
    ours = np.asarray(vlm.hidden_states(inputs))
    counts = np.prod(GRIDS, axis=1)
    assert ours.shape == (5, 7, 96, 24)
    is_patch = np.arange(96) < counts[:, None]
    assert not ours[:, ~is_patch].any()
    own = ours[:, is_patch][:, torch_order(vlm.config, GRIDS)]
    assert np.abs(own - theirs).max() <= TOLERANCE


def test_positions_are_those_of_transformers(usual):
    model, vlm, inputs = usual
    tensors = families.tensors({name: array for name, array in inputs.items() if name != "pixel_values"})
    theirs, _ = model.model.get_rope_index(**tensors)
    images = batch_images(vlm.config, inputs, num_rows=5)

    @jax.jit
    def positions(params, images, tokens, mask):
        network = nnx.merge(vlm.graphdef, params)
        return network.positions(tokens, mask, network.visual(network.encode(images), jnp.int32(1)))

    ours = positions(vlm.params, images, inputs["input_ids"], inputs["attention_mask"] == 1)
    np.testing.assert_array_equal(ours, theirs.numpy())


@pytest.mark.parametrize("layer", [1, 4])
def test_greedy_tokens_are_the_same(usual, layer):
    model, vlm, inputs = usual
    vlm = vlm.with_weights(vlm.params)
    vlm.eos_ids = ()  # no answer ends before its 64th token
    with cut(model, layer):
        theirs = families.hf_greedy(model, inputs, 64, tiny_qwen.PAD, suppress=vlm.suppress_ids)
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
    picked = visual(vlm.params, images, jnp.asarray(exits), jnp.asarray(rows))
    for place, (row, layer) in enumerate(zip(rows, exits, strict=True)):
        whole = visual(vlm.params, images, jnp.full(5, layer))
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a[place], b[row], atol=1e-6), picked, whole)  # noqa: B023

    @jax.jit
    def in_two_steps(params, images, exits):
        model = nnx.merge(vlm.graphdef, params)
        return model.project(model.projector_inputs(model.encode(images), exits))

    def assert_same(other):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), other, whole)

    assert exits[-1] == 3, "whole is what exit 3 gives"
    assert_same(in_two_steps(vlm.params, images, jnp.full(5, exits[-1])))
    early = vlm.encode(inputs, upto=3).images
    assert early.states.shape[0] == 4
    assert_same(nnx.merge(vlm.graphdef, vlm.params).visual(early, jnp.int32(3)))


def test_the_image_features_are_those_of_transformers(usual):
    """Also where every row has the same number of places for images."""
    model, vlm, inputs = usual
    pixels, grids = (torch.from_numpy(inputs[name]) for name in ("pixel_values", "image_grid_thw"))
    with torch.no_grad():
        theirs = torch.cat(model.model.get_image_features(pixels, grids).pooler_output).numpy()
    images = batch_images(vlm.config, inputs, num_rows=6, per_row=3)

    @jax.jit
    def features(params, images):
        model = nnx.merge(vlm.graphdef, params)
        return model.image_features(model.encode(images), jnp.int32(4))

    ours, is_feature = map(np.asarray, features(vlm.params, images))
    assert is_feature.sum(axis=1).tolist() == [24, 0, 15 + 16, 12, 16 + 21 + 4, 0]
    np.testing.assert_allclose(ours[is_feature], theirs, atol=TOLERANCE)


@pytest.mark.parametrize(("side", "merge"), [(1, 2), (2, 2), (3, 1), (4, 2)])
def test_every_grid_has_its_windows(side, merge):
    """Patches of one window, and no others, are in one group of slots."""
    config = QwenVisionConfig(8, 8, 1, 1, 1, 1, merge, side * merge, ())
    grids = [(high * merge, wide * merge) for high in range(1, 8) for wide in range(1, 8)]
    places = jax.tree.map(np.asarray, patch_places(config, jnp.array([*grids, (0, 0)]), 49 * merge**2))
    assert not places.is_patch[-1].any() and not places.is_filled[-1].any()
    for image, (high, wide) in enumerate(grids):
        is_patch = places.is_patch[image]
        assert is_patch.sum() == high * wide == is_patch.argmin() + is_patch.all() * len(is_patch)
        rows, columns, slots = (array[image][is_patch] for array in (places.rows, places.columns, places.slots))
        assert {*zip(rows.tolist(), columns.tolist(), strict=True)} == {
            (row, column) for row in range(high) for column in range(wide)
        }
        assert np.flatnonzero(places.is_filled[image]).tolist() == sorted(slots.tolist())
        np.testing.assert_array_equal(places.patches[image][slots], np.arange(high * wide))
        windows = list(zip(rows // (side * merge), columns // (side * merge), strict=True))
        pairs = set(zip(windows, slots // config.window_patches, strict=True))
        assert len(pairs) == len(set(windows)) == len({group for _, group in pairs})


@pytest.mark.parametrize("side", [1, 2, 3, 4, 7])
def test_no_grid_has_more_windows_than_there_is_room_for(side):
    config = QwenVisionConfig(8, 8, 1, 1, 1, 1, 2, 2 * side, ())
    for high in range(1, 60):
        for wide in range(1, 60):
            assert -(-high // side) * -(-wide // side) <= config.num_windows(4 * high * wide)
