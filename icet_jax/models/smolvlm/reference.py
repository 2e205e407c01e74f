"""SmolVLM and Idefics3 in transformers, for `--mode=verify`."""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from icet_jax.files import JsonObject
from icet_jax.models.base.processor import Inputs
from icet_jax.models.base.reference import Reference, States, random_pixels, torch_hooks
from icet_jax.models.smolvlm.images import tiles_and_groups
from icet_jax.models.smolvlm.network import SmolVLMConfig


def random_row(config: SmolVLMConfig, text: np.ndarray, count: int, noise: np.random.Generator) -> Inputs:
    """Returns the arrays of one row: the tiles of `count` random images, then the tokens of `text`.

    The last tile has padding at the bottom and right. See `Reference.random_row`.
    """
    num_tiles = int(noise.integers(1, config.max_tiles, count).sum()) if count else 0
    ids = np.concatenate([np.full(num_tiles * config.image_tokens, config.image_token_index), text])[None]
    row = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
    if count:
        pixels = random_pixels(noise, (1, num_tiles), config)
        mask = np.ones((1, num_tiles, *pixels.shape[3:]), np.int64)
        patch, size = config.vision.patch_size, config.vision.image_size
        mask[0, -1, patch:] = mask[0, -1, :, size - patch :] = 0
        row |= {"pixel_values": pixels, "pixel_attention_mask": mask}
    return row


def hidden_states(model: Any, config: SmolVLMConfig, row: JsonObject) -> States:
    """Returns hidden states 0..num_exits of the image encoder for one row's images; see `Reference.states`.

    Tiles of zeros fill up the row's groups of `config.max_tiles` tiles.
    """
    states: States = []
    tower = model.model.vision_model
    blocks = tower.encoder.layers
    hooks = [blocks[0].register_forward_pre_hook(lambda module, args: states.append(args[0]))]
    hooks += [block.register_forward_hook(lambda module, args, output: states.append(output)) for block in blocks]
    pixels, mask = row["pixel_values"][0], row["pixel_attention_mask"][0]
    _, num_groups = tiles_and_groups(row["input_ids"].numpy(), config)
    missing = int(num_groups[0]) * config.max_tiles - len(pixels)
    all_pixels = pixels.new_zeros((len(pixels) + missing, *pixels.shape[1:]))
    all_pixels[: len(pixels)] = pixels
    all_masks = mask.new_ones((len(mask) + missing, *mask.shape[1:]))
    all_masks[: len(mask)] = mask
    size = config.vision.patch_size
    is_patch = all_masks.unfold(1, size, size).unfold(2, size, size).sum(dim=(-1, -2)) > 0
    with torch_hooks(hooks):
        tower(pixel_values=all_pixels, patch_attention_mask=is_patch)
    return states


@contextlib.contextmanager
def at_exit(model: Any, config: SmolVLMConfig, layer: int) -> Iterator[None]:
    """Returns a context in which transformers' model answers at exit `layer`: its image encoder has no later block."""
    encoder = model.model.vision_model.encoder
    blocks = encoder.layers
    encoder.layers = blocks[:layer]
    try:
        yield
    finally:
        encoder.layers = blocks


def join_images(rows: Sequence[Inputs], length: int) -> Inputs:
    """Returns the image arrays of all rows as one batch, filled up with zeros; `length` is not used."""
    with_images = [row for row in rows if "pixel_values" in row]
    out: Inputs = {}
    if not with_images:
        return out
    most = max(row["pixel_values"].shape[1] for row in with_images)
    for name in ("pixel_values", "pixel_attention_mask"):
        example = with_images[0][name]
        out[name] = np.zeros((len(rows), most, *example.shape[2:]), example.dtype)
        for number, row in enumerate(rows):
            if name in row:
                out[name][number, : row[name].shape[1]] = row[name][0]
    return out


# Idefics3's processor makes the same arrays as SmolVLM's, which needs num2words and torchvision, for videos.
REFERENCE = Reference("Idefics3Processor", random_row, hidden_states, at_exit, join_images)
