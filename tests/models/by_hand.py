"""Preprocessing of the two tiled families written out in Pillow and numpy, apart from transformers' code and ours."""

import math

import numpy as np
from PIL import Image

MEAN, STD = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]


def normalised(canvas):
    """uint8 [H, W, 3] to float32 [3, H, W]."""
    scaled = (np.asarray(canvas).astype(np.float64) * (1 / 255)).astype(np.float32)
    return np.moveaxis((scaled - np.array(MEAN, np.float32)) / np.array(STD, np.float32), -1, 0)


def on_canvas(image, size, high, wide, left, top, resample, edge):
    """Tiles [high * wide, 3, edge, edge] of an image that is resized to `size` and pasted on black."""
    canvas = Image.new("RGB", (wide * edge, high * edge))
    canvas.paste(image.resize(size, resample), (left, top))
    pixels = normalised(canvas).reshape(3, high, edge, wide, edge)
    return pixels.transpose(1, 3, 0, 2, 4).reshape(high * wide, 3, edge, edge)


def llava_next(image, pinpoints, edge):
    """Tiles of one image: the whole one squashed, then those of the letterboxed one."""
    width, height = image.size

    def rank(canvas):
        high, wide = canvas
        scale = min(wide / width, high / height)
        kept = min(int(width * scale) * int(height * scale), width * height)
        return kept, -(wide * high - kept)

    high, wide = max(pinpoints, key=rank)  # the first of equals
    across, down = wide / width, high / height
    if across < down:
        size = (wide, min(math.ceil(height * across), high))
    else:
        size = (min(math.ceil(width * down), wide), high)
    left, top = (wide - size[0]) // 2, (high - size[1]) // 2
    bicubic = Image.Resampling.BICUBIC
    whole = normalised(image.resize((edge, edge), bicubic))[None]
    return np.concatenate([whole, on_canvas(image, size, high // edge, wide // edge, left, top, bicubic, edge)])


def mllama(image, ratios, edge):
    """(tiles of one image, its aspect-ratio id)."""
    width, height = image.size
    scales = [min(high * edge / height, wide * edge / width) for high, wide in ratios]
    larger = [scale for scale in scales if scale >= 1]
    chosen = min(larger) if larger else max(scales)
    areas = [high * wide if scale == chosen else math.inf for scale, (high, wide) in zip(scales, ratios, strict=True)]
    index = areas.index(min(areas))
    high, wide = ratios[index]
    target_width, target_height = min(max(width, edge), wide * edge), min(max(height, edge), high * edge)
    across, down = target_width / width, target_height / height
    if across < down:
        size = (target_width, min(math.floor(height * across) or 1, target_height))
    else:
        size = (min(math.floor(width * down) or 1, target_width), target_height)
    return on_canvas(image, size, high, wide, 0, 0, Image.Resampling.BILINEAR, edge), index + 1
