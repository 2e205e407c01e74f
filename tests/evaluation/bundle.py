"""A tiny model and rows for it."""

import numpy as np

from icet_jax.data.records import Example
from icet_jax.runs.loading import load
from icet_jax.vlm import VLM
from tests import tiny


def tiny_vlm(directory) -> VLM:
    return load(tiny.save_llava(directory))


def picture(seed):
    return np.random.default_rng(seed).integers(0, 256, (30, 40, 3), dtype=np.uint8)


def rows():
    """Seven rows of every kind, of different lengths, with 0, 1 or 2 images."""
    return [
        Example("a", "short", (picture(0),)),
        Example("b", "a longer prompt than that", (picture(1),)),
        Example("c", "two images", (picture(2), picture(3)), kind="benign", answer="x"),
        Example("d", "no image", (), kind="benign"),
        Example("e", "what?", (picture(4),), kind="vqa", answer="red"),
        Example("f", "short", (picture(5),)),
        Example("g", "short", (picture(0),), kind="benign"),
    ]
