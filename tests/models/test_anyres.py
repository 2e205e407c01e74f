"""The packing of any-resolution images equals HF's `pack_image_features`, position for position."""

import itertools

import numpy as np
import pytest

from icet_jax.models.llava_next.anyres import canvas, gather_rows, packing
from icet_jax.models.llava_next.network import LlavaNextConfig
from icet_jax.nn.clip import ClipConfig
from icet_jax.nn.llama import LlamaConfig
from tests import tiny_families

TEXT = LlamaConfig(263, 8, 8, 1, 2, 2, 4, 1e-5)
PUBLISHED = ((336, 672), (672, 336), (672, 672), (1008, 336), (336, 1008))
CONFIGS = {
    "published": LlavaNextConfig(ClipConfig(8, 8, 2, 2, 336, 14), TEXT, 259, image_grid_pinpoints=PUBLISHED),
    "toy": LlavaNextConfig(
        ClipConfig(8, 8, 2, 2, 28, 7), TEXT, 259, image_grid_pinpoints=tuple(map(tuple, tiny_families.PINPOINTS))
    ),
    "odd grid": LlavaNextConfig(
        ClipConfig(8, 8, 2, 2, 15, 3), TEXT, 259, image_grid_pinpoints=((15, 45), (45, 15), (30, 30), (15, 15))
    ),
}


def sizes(count=150):
    """Ordinary, extreme, tiny and odd ones."""
    noise = np.random.default_rng(0)
    drawn = [tuple(map(int, size)) for size in np.exp(noise.uniform(0, 7.5, (count, 2))).astype(int)]
    return drawn + [
        (336, 336),
        (300, 500),
        (480, 640),
        (640, 480),
        (1, 1),
        (1, 500),
        (500, 1),
        (10, 2000),
        (1080, 1920),
    ]


def hf_packing(image_size, config):
    """HF's packing of features that are their own numbers; -1 is the newline."""
    import torch
    from transformers.models.llava_next import modeling_llava_next as hf

    side, size = config.vision.image_size // config.vision.patch_size, config.vision.image_size
    grid = [list(pair) for pair in config.image_grid_pinpoints]
    high, wide = hf.get_anyres_image_grid_shape(image_size, grid, size)
    numbers = torch.arange((1 + high * wide) * side * side, dtype=torch.float32).reshape(1 + high * wide, -1, 1)
    base, tiles = numbers[0], numbers[1:].view(high, wide, side, side, 1)
    tiles = tiles.permute(4, 0, 2, 1, 3).flatten(1, 2).flatten(2, 3)
    tiles = hf.unpad_image(tiles, image_size)
    newline = torch.full((1, tiles.shape[1], 1), -1.0)
    tiles = torch.cat([tiles, newline], dim=-1).flatten(1, 2).transpose(0, 1)
    return torch.cat([base, tiles]).squeeze(-1).numpy().astype(np.int32)


def hf_count(image_size, config):
    from transformers import LlavaNextProcessor
    from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil

    grid = [list(pair) for pair in config.image_grid_pinpoints]
    images = LlavaNextImageProcessorPil(image_grid_pinpoints=grid)
    holder = type("Holder", (), {"image_processor": images, "patch_size": config.vision.patch_size})()
    holder.num_additional_image_tokens = 1
    holder._get_unpadded_features = lambda *args: LlavaNextProcessor._get_unpadded_features(holder, *args)
    edge = config.vision.image_size
    return LlavaNextProcessor._get_number_of_features(holder, *image_size, edge, edge) - 1


@pytest.mark.parametrize("name", CONFIGS)
def test_packing_equals_hf(name):
    from transformers.image_processing_utils import select_best_resolution

    config = CONFIGS[name]
    for size in sizes():
        assert canvas(size, config.image_grid_pinpoints) == select_best_resolution(size, config.image_grid_pinpoints)
        ours = packing(size, config)
        np.testing.assert_array_equal(ours, hf_packing(size, config), err_msg=str(size))
        assert len(ours) == hf_count(size, config), size


def test_the_published_numbers_of_tokens():
    counts = {size: len(packing(size, CONFIGS["published"])) for size in sizes()}
    assert counts[336, 336] == 1176 and counts[300, 500] == 1560 and counts[480, 640] == 2340
    assert counts[640, 480] == 2352 and counts[1080, 1920] == 1948 and counts[10, 2000] == 576
    assert min(counts.values()) >= 576 and max(counts.values()) <= 2928
    assert CONFIGS["published"].max_tiles == 5


def test_rows_of_several_images_are_packed_one_after_the_other():
    config = CONFIGS["toy"]
    own = [(30, 50), (57, 57), (80, 20)]
    lengths = [len(packing(size, config)) for size in own]
    per_image, slots, length = 5 * 16, 6, sum(lengths) + 7
    layout = gather_rows(own, [0, 2, 2], 4, length, 5, config, num_images=slots)
    assert layout.shape == (4, length) and layout.dtype == np.int32
    assert (layout[1] == -1).all() and (layout[3] == -1).all()
    ends = list(itertools.accumulate(lengths[1:], initial=0))
    for image, row, start in ((0, 0, 0), (1, 2, ends[0]), (2, 2, ends[1])):
        places, wanted = layout[row, start : start + lengths[image]], packing(own[image], config)
        assert (places[wanted < 0] == slots * per_image).all()
        np.testing.assert_array_equal(places[wanted >= 0], wanted[wanted >= 0] + image * per_image)
    assert (layout[0, lengths[0] :] == -1).all() and (layout[2, ends[2] :] == -1).all()
