"""Images of any resolution: the canvas of tiles that an image is resized to, and the order of its features.

Everything here depends only on sizes and runs on the host (HF `select_best_resolution`, `pack_image_features`).
"""

from collections.abc import Sequence
from functools import lru_cache

import numpy as np

from icet_jax.models.llava_next.network import LlavaNextConfig

Size = tuple[int, int]
"""(height, width) in pixels."""


def canvas(size: Size, pinpoints: Sequence[Size]) -> Size:
    """Returns the size in `pinpoints` to which an image is resized, margins included.

    It is the size that keeps the most of the image's pixels. Of several such sizes, the one with the smallest area is
    chosen, and of several of these the first.
    """
    height, width = size
    best, most_pixels, least_waste = pinpoints[0], -1, 0
    for candidate in pinpoints:
        canvas_height, canvas_width = candidate
        scale = min(canvas_width / width, canvas_height / height)
        pixels = min(int(width * scale) * int(height * scale), width * height)
        waste = canvas_width * canvas_height - pixels
        if pixels > most_pixels or (pixels == most_pixels and waste < least_waste):
            best, most_pixels, least_waste = candidate, pixels, waste
    return best


@lru_cache(maxsize=4096)
def packing(size: Size, config: LlavaNextConfig) -> np.ndarray:
    """Returns the index of the feature at each of an image's N positions in the prompt, int32 [N].

    The network computes the features in this order, to which the indices refer: the patches of the scaled-down image,
    then the patches of the tiles, tile by tile. The prompt has them in another order: the patches of the scaled-down
    image, then the patches of the canvas row by row, across tiles and without the margins around the image. Each row of
    the canvas ends with `image_newline`, for which the index is -1.

    Args:
      size: (height, width) of the image in pixels.
      config: config of the network.
    """
    side = config.vision.image_size // config.vision.patch_size
    per_tile = config.image_tokens
    tiles_high, tiles_wide = (edge // config.vision.image_size for edge in canvas(size, config.image_grid_pinpoints))
    rows, columns = np.mgrid[: tiles_high * side, : tiles_wide * side]
    tile = 1 + (rows // side) * tiles_wide + columns // side
    grid = tile * per_tile + (rows % side) * side + columns % side
    grid = _without_margins(grid, size)
    with_newlines = np.concatenate([grid, np.full((len(grid), 1), -1, grid.dtype)], axis=1)
    return np.concatenate([np.arange(per_tile), with_newlines.reshape(-1)]).astype(np.int32)


def _without_margins(grid: np.ndarray, size: Size) -> np.ndarray:
    """Returns the part of a canvas's grid of patches that an image of this size covers (HF `unpad_image`).

    Two opposite margins have the same width. If the number of rows or columns to remove is odd, one more is kept.
    """
    height, width = size
    rows, columns = grid.shape
    # Rounding to 7 digits before cutting off the fraction is what HF does.
    if width / height > columns / rows:
        covered = int(round(height * (columns / width), 7))
        margin = (rows - covered) // 2
        return grid[margin : rows - margin]
    covered = int(round(width * (rows / height), 7))
    margin = (columns - covered) // 2
    return grid[:, margin : columns - margin]


def gather_rows(
    sizes: Sequence[Size],
    rows: Sequence[int],
    num_rows: int,
    length: int,
    tiles: int,
    config: LlavaNextConfig,
    image_numbers: Sequence[int] | np.ndarray | None = None,
    num_images: int | None = None,
) -> np.ndarray:
    """Returns LLaVA-NeXT's `Images.layout`: the index of the feature at each image position of each row.

    Args:
      sizes: (height, width) of each image in pixels.
      rows: row of each image, ascending.
      num_rows: number of rows B.
      length: largest number of image positions of a row.
      tiles: number of tiles that every image is padded to.
      config: config of the network.
      image_numbers: index of each image in the batch; None means 0, 1, ...
      num_images: number of images in the batch, filler images included; None means as many as `sizes`.

    Returns:
      int32 [B, length]. The features of all images of the batch are indexed consecutively; the index after that of the
      last feature means `image_newline`. A row is filled up with -1 after its last image position.
    """
    per_image = tiles * config.image_tokens
    newline = (len(sizes) if num_images is None else num_images) * per_image
    layout = np.full((num_rows, length), -1, np.int32)
    lengths = np.zeros(num_rows, int)
    image_numbers = range(len(sizes)) if image_numbers is None else image_numbers
    for image, size, row in zip(image_numbers, sizes, rows, strict=True):
        order = packing(tuple(size), config)
        indices = np.where(order < 0, newline, order + image * per_image)
        layout[row, lengths[row] : lengths[row] + len(indices)] = indices
        lengths[row] += len(indices)
    return layout
