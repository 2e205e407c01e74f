"""Images of a Llama 3.2 Vision batch: up to four tiles beside the text."""

import numpy as np

from icet_jax.errors import UserError
from icet_jax.models.base.image_batches import ImageParts, Inputs, Places, pixel_values, required_entry
from icet_jax.models.mllama.network import MllamaConfig


def image_shape(config: MllamaConfig) -> tuple[int, ...]:
    """Shape of one image, (tiles, C, H, W)."""
    vision = config.vision
    return (vision.max_num_tiles, vision.num_channels, vision.image_size, vision.image_size)


def image_parts(config: MllamaConfig, inputs: Inputs, ids: np.ndarray) -> ImageParts:
    """Pixels and rows of the images; their layout is the aspect ratio of each."""
    counts = (ids == config.image_token_index).sum(axis=1)
    nested = pixel_values(inputs, image_shape(config), axes=2)
    given = np.zeros((0, 0), int)
    if nested.size:
        given = np.asarray(required_entry(inputs, "aspect_ratio_ids"))
        known = len(config.vision.supported_aspect_ratios)
        if given.shape != nested.shape[:2] or len(given) > len(ids) or not 0 <= given.min() <= given.max() <= known:
            raise UserError(f"inputs: aspect_ratio_ids must be [rows, images] as pixel_values are, each 0..{known}")
    there = np.zeros((len(ids), given.shape[1]), bool)
    there[: len(given)] = given > 0
    if (there[:, 1:] & ~there[:, :-1]).any():
        raise UserError("inputs: a row's images must stand before its padding images (aspect_ratio_ids 0)")
    if (there.sum(axis=1) != counts).any():
        row = int((there.sum(axis=1) != counts).argmax())
        raise UserError(
            f"input_ids: row {row} holds {counts[row]} image placeholders, pixel_values hold {there[row].sum()} images"
        )
    rows = np.nonzero(there)[0]
    ratios = given[there[: len(given)]]

    def layout(places: Places) -> np.ndarray:
        filled = np.zeros(places.slots, np.int32)
        filled[places.numbers] = ratios
        return filled

    return nested[there[: len(given)]], rows, layout
