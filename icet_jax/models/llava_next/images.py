"""The images of a LLaVA-NeXT batch: tiles, and the order of their features in the prompt."""

import numpy as np

from icet_jax.errors import UserError
from icet_jax.models.base.image_batches import ImageParts, Inputs, Placement, pixel_values, required_entry
from icet_jax.models.llava.images import image_shape as tile_shape
from icet_jax.models.llava_next.anyres import canvas, gather_rows, packing
from icet_jax.models.llava_next.network import LlavaNextConfig


def image_shape(config: LlavaNextConfig, positions: int = 0) -> tuple[int, ...]:
    """Returns the shape of one image, (tiles, C, H, W); the same for any number of `positions`."""
    return (config.max_tiles, *tile_shape(config))


def image_parts(config: LlavaNextConfig, inputs: Inputs, ids: np.ndarray) -> ImageParts:
    """Returns pixels and rows of the images, and a function that computes the layout (see `gather_rows`)."""
    pixels = pixel_values(inputs, image_shape(config), axes=1, some_tiles=True)
    sizes = (
        [(int(high), int(wide)) for high, wide in np.asarray(required_entry(inputs, "image_sizes"))]
        if len(pixels)
        else []
    )
    if len(sizes) != len(pixels):
        raise UserError(f"inputs: {len(sizes)} image_sizes, but pixel_values hold {len(pixels)} images")
    rows = anyres_rows(ids, sizes, config)
    side, tiles = config.vision.image_size, config.max_tiles
    for image, size in enumerate(sizes):
        high, wide = canvas(size, config.image_grid_pinpoints)
        needed = 1 + (high // side) * (wide // side)
        if needed > pixels.shape[1]:
            raise UserError(
                f"inputs: image {image} ({size[0]} x {size[1]}) has {needed} tiles, {pixels.shape[1]} given"
            )

    def layout(placement: Placement) -> np.ndarray:
        return gather_rows(
            sizes, rows.tolist(), placement.num_rows, ids.shape[1], tiles, config,
            image_numbers=placement.offset + placement.indices, num_images=placement.num_images_of_batch,
        )  # fmt: skip

    return pixels, rows, layout


def anyres_rows(input_ids: np.ndarray, sizes: list[tuple[int, int]], config: LlavaNextConfig) -> np.ndarray:
    """Returns the row of each image, int32 [I] ascending, from the placeholders in input_ids [B, T].

    Args:
      input_ids: token ids, with as many placeholders for an image as its size requires (`packing`).
      sizes: (height, width) of each image in pixels.
      config: config of the network.

    Raises:
      UserError: images of these sizes need another number of placeholders.
    """
    lengths = [len(packing(size, config)) for size in sizes]
    rows, image = [], 0
    for row, remaining in enumerate((input_ids == config.image_token_index).sum(axis=1)):
        while remaining > 0 and image < len(lengths):
            remaining -= lengths[image]
            rows.append(row)
            image += 1
        if remaining:
            raise UserError(f"input_ids: the placeholders of row {row} are not those of images of these image_sizes")
    if image != len(lengths):
        raise UserError(f"input_ids hold placeholders for {image} images, pixel_values hold {len(lengths)}")
    return np.array(rows, np.int32)
