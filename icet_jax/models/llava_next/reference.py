"""LLaVA-NeXT in transformers, for `--mode=verify`."""

from typing import Any

import numpy as np

from icet_jax.files import JsonObject
from icet_jax.models.base.processor import Inputs
from icet_jax.models.base.reference import Reference, States, concatenate_images, random_pixels
from icet_jax.models.llava.reference import at_exit, prepare_processor
from icet_jax.models.llava_next.anyres import canvas, packing
from icet_jax.models.llava_next.network import LlavaNextConfig


def random_row(config: LlavaNextConfig, text: np.ndarray, count: int, noise: np.random.Generator) -> Inputs:
    """Returns the arrays of one row: `count` random images, then the tokens of `text`; see `Reference.random_row`."""
    sizes = [(int(height), int(width)) for height, width in noise.integers(20, 1200, (count, 2))]
    num_positions = sum(len(packing(size, config)) for size in sizes)
    ids = np.concatenate([np.full(num_positions, config.image_token_index), text])[None]
    row = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
    if count:
        pixels = random_pixels(noise, (count, config.max_tiles), config)
        for image, size in enumerate(sizes):
            rows, columns = (edge // config.vision.image_size for edge in canvas(size, config.image_grid_pinpoints))
            pixels[image, 1 + rows * columns :] = 0  # tiles that this image does not have
        row |= {"pixel_values": pixels, "image_sizes": np.array(sizes)}
    return row


def hidden_states(model: Any, config: LlavaNextConfig, row: JsonObject) -> States:
    """Returns hidden states 0..num_exits of the image encoder for one row's images; see `Reference.states`.

    Every image is padded with zeros to `config.max_tiles` tiles, as in this package.
    """
    pixels = row["pixel_values"]
    tiles = pixels.new_zeros((len(pixels), config.max_tiles, *pixels.shape[2:]))
    tiles[:, : pixels.shape[1]] = pixels
    return list(model.model.vision_tower(tiles.flatten(0, 1), output_hidden_states=True).hidden_states)


REFERENCE = Reference("LlavaNextProcessor", random_row, hidden_states, at_exit, concatenate_images, prepare_processor)
