"""The images of a Llama 3.2 Vision batch: up to four tiles each, separate from the text."""

import numpy as np

from icet_jax.errors import UserError
from icet_jax.models.base.image_batches import ImageParts, Inputs, Placement, pixel_values, required_entry
from icet_jax.models.mllama.network import MllamaConfig


def image_shape(config: MllamaConfig, positions: int = 0) -> tuple[int, ...]:
    """Returns the shape of one image, (tiles, C, H, W); the same for any number of `positions`."""
    vision = config.vision
    return (vision.max_num_tiles, vision.num_channels, vision.image_size, vision.image_size)


def image_parts(config: MllamaConfig, inputs: Inputs, ids: np.ndarray) -> ImageParts:
    """Returns pixels and rows of the images; the layout is the aspect ratio id of each image (0 for filler images)."""
    counts = (ids == config.image_token_index).sum(axis=1)
    nested = pixel_values(inputs, image_shape(config), axes=2)
    ratio_id = np.zeros((0, 0), int)
    if nested.size:
        ratio_id = np.asarray(required_entry(inputs, "aspect_ratio_ids"))
        last_id = len(config.vision.supported_aspect_ratios)
        if (
            ratio_id.shape != nested.shape[:2]
            or len(ratio_id) > len(ids)
            or not 0 <= ratio_id.min() <= ratio_id.max() <= last_id
        ):
            raise UserError(f"inputs: aspect_ratio_ids must be [rows, images] as pixel_values are, each 0..{last_id}")
    exists = np.zeros((len(ids), ratio_id.shape[1]), bool)
    exists[: len(ratio_id)] = ratio_id > 0
    if (exists[:, 1:] & ~exists[:, :-1]).any():
        raise UserError("inputs: a row's images must stand before its padding images (aspect_ratio_ids 0)")
    if (exists.sum(axis=1) != counts).any():
        row = int((exists.sum(axis=1) != counts).argmax())
        raise UserError(
            f"input_ids: row {row} holds {counts[row]} image placeholders, pixel_values hold {exists[row].sum()} images"
        )
    rows = np.nonzero(exists)[0]
    ratios = ratio_id[exists[: len(ratio_id)]]

    def layout(placement: Placement) -> np.ndarray:
        ratio_of_image = np.zeros(placement.num_images, np.int32)
        ratio_of_image[placement.indices] = ratios
        return ratio_of_image

    return nested[exists[: len(ratio_id)]], rows, layout
