"""The images of a LLaVA-1.5 batch; each has the same square size."""

import numpy as np

from icet_jax.errors import UserError
from icet_jax.models.base.image_batches import ImageParts, Inputs, pixel_values
from icet_jax.models.llava.network import LlavaConfig


def image_shape(config: LlavaConfig, positions: int = 0) -> tuple[int, ...]:
    """Returns the shape of one image, (C, H, W); the same for any number of `positions`."""
    return (config.vision.num_channels, config.vision.image_size, config.vision.image_size)


def image_parts(config: LlavaConfig, inputs: Inputs, ids: np.ndarray) -> ImageParts:
    """Returns pixels and rows of the images; this family has no `Images.layout`."""
    pixels = pixel_values(inputs, image_shape(config), axes=1)
    return pixels, image_rows(ids, len(pixels), config), lambda placement: None


def image_rows(input_ids: np.ndarray, num_images: int, config: LlavaConfig) -> np.ndarray:
    """Returns the row of each image, int32 [I] ascending, from the placeholders in input_ids [B, T].

    Raises:
      UserError: the number of placeholders in a row is not a multiple of `config.image_tokens` (the positions of one
        image), or all rows together do not have placeholders for `num_images` images.
    """
    counts, rest = np.divmod((input_ids == config.image_token_index).sum(axis=1), config.image_tokens)
    if rest.any():
        raise UserError(
            f"input_ids: row {int(rest.argmax())} does not hold placeholders for whole images (each "
            f"{config.image_tokens} tokens)"
        )
    if counts.sum() != num_images:
        raise UserError(f"input_ids hold placeholders for {counts.sum()} images, pixel_values hold {num_images}")
    return np.repeat(np.arange(len(counts), dtype=np.int32), counts)
