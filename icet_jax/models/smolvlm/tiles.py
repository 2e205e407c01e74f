"""The tiles that an image is cut into; everything here depends only on sizes and runs on the host."""

import math
from pathlib import Path

from icet_jax.models.base.processor import image_settings
from icet_jax.models.smolvlm.network import MAX_TILES

_LARGEST_EDGE = 4096  # HF's `MAX_IMAGE_SIZE`: no image is made larger than this


def tile_grid(size: tuple[int, int], longest_edge: int, tile: int) -> tuple[int, int]:
    """Returns the number of (rows, columns) of tiles that an image is cut into; (0, 0) if it is one tile only.

    The image is first resized, so that its longer edge has `longest_edge` pixels, and then again, so that both edges
    are multiples of the tile's (HF `SmolVLMImageProcessorPil.resize`, `resize_for_vision_encoder`).

    Args:
      size: (height, width) of the image in pixels.
      longest_edge: length of the longer edge in pixels.
      tile: length of a tile's edge in pixels.
    """
    height, width = _below(_with_edge(size, longest_edge))
    ratio = width / height
    if width >= height:
        width = math.ceil(width / tile) * tile
        height = math.ceil(int(width / ratio) / tile) * tile
    else:
        height = math.ceil(height / tile) * tile
        width = math.ceil(int(height * ratio) / tile) * tile
    return (height // tile, width // tile) if max(height, width) > tile else (0, 0)


def _with_edge(size: tuple[int, int], longest_edge: int) -> tuple[int, int]:
    """Returns (height, width) with that longer edge; the shorter one is even (HF
    `_resize_output_size_rescale_to_max_len`)."""
    height, width = size
    ratio = width / height
    if width >= height:
        shorter = int(longest_edge / ratio)
        return max(shorter + shorter % 2, 1), longest_edge
    shorter = int(longest_edge * ratio)
    return longest_edge, max(shorter + shorter % 2, 1)


def _below(size: tuple[int, int]) -> tuple[int, int]:
    """Returns (height, width) scaled down to `_LARGEST_EDGE` (HF `_resize_output_size_scale_below_upper_bound`)."""
    height, width = size
    ratio = width / height
    if width >= height and width > _LARGEST_EDGE:
        height, width = int(_LARGEST_EDGE / ratio), _LARGEST_EDGE
    elif height > width and height > _LARGEST_EDGE:
        height, width = _LARGEST_EDGE, int(_LARGEST_EDGE * ratio)
    return max(height, 1), max(width, 1)


def longest_edge(size: object) -> int | None:
    """Returns `longest_edge` of an HF image processor's `size` or `max_image_size`, None if it sets none."""
    value = size.get("longest_edge") if isinstance(size, dict) else getattr(size, "longest_edge", None)
    return value if type(value) is int and value > 0 else None


def most_tiles(directory: Path, tile: int) -> int:
    """Returns the largest number of tiles of an image, from the settings of a checkpoint's image processor.

    Args:
      directory: directory of the checkpoint. Where it has no settings with an edge, the number is that of all published
        checkpoints.
      tile: length of a tile's edge in pixels.
    """
    settings = image_settings(directory)
    if settings is None:
        return MAX_TILES
    if settings.get("do_image_splitting") is False:
        return 1
    edge = longest_edge(settings.get("size"))
    if edge is None:
        return MAX_TILES
    rows, columns = tile_grid((edge, edge), edge, tile)
    return rows * columns + 1
