"""The sizes to which images are resized, and how many patches they have; everything here runs on the host."""

import math
from pathlib import Path

from icet_jax.errors import UserError
from icet_jax.files import JsonObject
from icet_jax.models.base.processor import image_settings
from icet_jax.models.qwen2_5_vl.network import MAX_PATCHES
from icet_jax.models.qwen2_5_vl.vision import QwenVisionConfig

_MOST_ELONGATED = 200  # largest ratio of the sides of an image
_DEFAULT_SIZE = {"shortest_edge": 56 * 56, "longest_edge": 28 * 28 * 1280}  # HF `Qwen2VLImageProcessorPil.size`


def smart_resize(size: tuple[int, int], factor: int, min_pixels: int, max_pixels: int, name: str) -> tuple[int, int]:
    """Returns (height, width) to which an image is resized (HF `smart_resize`).

    Both are multiples of `factor`, and their product is within the limits wherever the ratio of the sides allows it.

    Args:
      size: (height, width) of the image in pixels.
      factor: pixels along each side of a group of patches.
      min_pixels, max_pixels: limits of height * width.
      name: name of the image in error messages.

    Raises:
      UserError: one side is more than 200 times as long as the other.
    """
    height, width = size
    if max(size) > _MOST_ELONGATED * min(size):
        raise UserError(
            f"{name}: an image of {height} x {width} pixels is too elongated for this model: at most "
            f"{_MOST_ELONGATED} : 1; crop it"
        )
    high, wide = (round(side / factor) * factor for side in size)
    if high * wide > max_pixels:
        beta = math.sqrt((height * width) / max_pixels)
        high, wide = (max(factor, math.floor(side / beta / factor) * factor) for side in size)
    elif high * wide < min_pixels:
        beta = math.sqrt(min_pixels / (height * width))
        high, wide = (math.ceil(side * beta / factor) * factor for side in size)
    return high, wide


def pixel_limits(size: object) -> tuple[int, int] | None:
    """Returns (min_pixels, max_pixels) of an HF image processor's `size`; None unless it sets both."""
    names = ("shortest_edge", "longest_edge")
    values = [size.get(name) if isinstance(size, dict) else getattr(size, name, None) for name in names]
    low, high = (value if type(value) is int and value > 0 else None for value in values)
    return None if low is None or high is None else (low, high)


def most_patches(config: QwenVisionConfig, limits: tuple[int, int]) -> int:
    """Returns a number of patches that no image exceeds, for limits (min_pixels, max_pixels) of the image processor.

    It follows from `max_pixels` unless the limits are small: the shorter side of a very elongated image cannot be less
    than one group of patches, and both sides of a small image are rounded up.
    """
    min_pixels, max_pixels = limits
    factor = config.spatial_merge_size * config.patch_size
    elongated = factor * math.sqrt(_MOST_ELONGATED * max_pixels)
    enlarged = min_pixels + factor * (math.sqrt(_MOST_ELONGATED * min_pixels) + math.sqrt(min_pixels)) + factor**2
    groups = math.floor(max(max_pixels, elongated, enlarged) / factor**2)
    return max(groups, 1) * config.group_size


def patches_of(config: QwenVisionConfig, directory: Path) -> int:
    """Returns `most_patches` for the settings of a checkpoint's image processor.

    Where the directory has no settings with limits, the number is that of the published checkpoints.
    """
    settings = image_settings(directory)
    limits = None if settings is None else pixel_limits(_size(settings))
    return MAX_PATCHES if limits is None else most_patches(config, limits)


def _size(settings: JsonObject) -> JsonObject:
    """Returns `size` of the settings, in which `min_pixels` and `max_pixels` take precedence as in HF."""
    size = settings.get("size")
    out = dict(_DEFAULT_SIZE) if not isinstance(size, dict) else dict(size)
    for name, field in (("shortest_edge", "min_pixels"), ("longest_edge", "max_pixels")):
        if settings.get(field) is not None:
            out[name] = settings[field]
    return out
