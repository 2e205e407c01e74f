"""Chooses the canvas that an image of any resolution fills, and the order in which its tiles' features are packed.

Everything here depends only on sizes and runs on the host (HF `select_best_resolution`, `pack_image_features`).
"""

from collections.abc import Sequence
from functools import lru_cache

import numpy as np

from icet_jax.models.llava_next.network import LlavaNextConfig

Size = tuple[int, int]
"""(height, width) in pixels."""


def canvas(size: Size, pinpoints: Sequence[Size]) -> Size:
    """Returns the canvas that keeps most of an image's pixels and, among those, wastes least; the first one wins
    ties."""
    height, width = size
    best, best_kept, least_waste = pinpoints[0], -1, 0
    for candidate in pinpoints:
        high, wide = candidate
        scale = min(wide / width, high / height)
        kept = min(int(width * scale) * int(height * scale), width * height)
        waste = wide * high - kept
        if kept > best_kept or (kept == best_kept and waste < least_waste):
            best, best_kept, least_waste = candidate, kept, waste
    return best


@lru_cache(maxsize=4096)
def packing(size: Size, config: LlavaNextConfig) -> np.ndarray:
    """Returns the index of the feature at each of an image's positions: int32 [N], -1 for `image_newline`.

    Indices count the patches of the whole image first, then those of the tiles in row-major order. The positions are in
    the same order, but without the margins of the letterboxed image, and each of its rows ends with `image_newline`.
    """
    side = config.vision.image_size // config.vision.patch_size
    base = config.image_tokens
    high, wide = (edge // config.vision.image_size for edge in canvas(size, config.image_grid_pinpoints))
    rows, columns = np.mgrid[: high * side, : wide * side]
    tile = 1 + (rows // side) * wide + columns // side
    grid = tile * base + (rows % side) * side + columns % side
    grid = _without_margins(grid, size)
    ended = np.concatenate([grid, np.full((len(grid), 1), -1, grid.dtype)], axis=1)
    return np.concatenate([np.arange(base), ended.reshape(-1)]).astype(np.int32)


def _without_margins(grid: np.ndarray, size: Size) -> np.ndarray:
    """Returns the part of a canvas's grid that the image covers; an odd margin leaves one more row or column (HF
    `unpad_image`)."""
    height, width = size
    high, wide = grid.shape
    if width / height > wide / high:
        kept = int(round(height * (wide / width), 7))
        margin = (high - kept) // 2
        return grid[margin : high - margin]
    kept = int(round(width * (high / height), 7))
    margin = (wide - kept) // 2
    return grid[:, margin : wide - margin]


def gather_rows(
    sizes: Sequence[Size],
    rows: Sequence[int],
    num_rows: int,
    length: int,
    tiles: int,
    config: LlavaNextConfig,
    numbers: Sequence[int] | np.ndarray | None = None,
    num_images: int | None = None,
) -> np.ndarray:
    """Returns `Images.layout`, int32 [B, length]: the index of the feature at each row's k-th image position, then -1.

    Args:
      sizes: sizes of the images, by row.
      rows: row of each image, ascending.
      num_rows: B.
      length: most image positions of a row.
      tiles: number of tiles that every image is padded to.
      config: config of the model.
      numbers: numbers of the images in the batch; 0, 1, ... if None.
      num_images: number of images of the batch including fillers, whose features come before `image_newline`; the
        number of sizes if None.
    """
    per_image = tiles * config.image_tokens
    newline = (len(sizes) if num_images is None else num_images) * per_image
    layout = np.full((num_rows, length), -1, np.int32)
    lengths = np.zeros(num_rows, int)
    numbers = range(len(sizes)) if numbers is None else numbers
    for index, size, row in zip(numbers, sizes, rows, strict=True):
        order = packing(tuple(size), config)
        indices = np.where(order < 0, newline, order + index * per_image)
        layout[row, lengths[row] : lengths[row] + len(indices)] = indices
        lengths[row] += len(indices)
    return layout
