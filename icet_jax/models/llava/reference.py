"""LLaVA-1.5 in transformers, for `--mode=verify`."""

import contextlib
from collections.abc import Iterator
from typing import Any

import numpy as np

from icet_jax.files import JsonObject
from icet_jax.models.base.processor import Inputs
from icet_jax.models.base.reference import Reference, States, concatenate_images, random_pixels
from icet_jax.models.llava.network import LlavaConfig


def random_row(config: LlavaConfig, text: np.ndarray, count: int, noise: np.random.Generator) -> Inputs:
    """Returns the arrays of one row: `count` random images, then the tokens of `text`; see `Reference.random_row`."""
    ids = np.concatenate([np.full(count * config.image_tokens, config.image_token_index), text])[None]
    row = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
    if count:
        row["pixel_values"] = random_pixels(noise, (count,), config)
    return row


def hidden_states(model: Any, config: LlavaConfig, row: JsonObject) -> States:
    """Returns hidden states 0..num_exits of the image encoder for one row's images; see `Reference.states`."""
    pixels = row["pixel_values"]
    return list(model.model.vision_tower(pixels, output_hidden_states=True).hidden_states)


@contextlib.contextmanager
def at_exit(model: Any, config: LlavaConfig, layer: int) -> Iterator[None]:
    """Returns a context in which transformers' model answers at exit `layer`."""
    original_layer = model.config.vision_feature_layer
    model.config.vision_feature_layer = layer
    try:
        yield
    finally:
        model.config.vision_feature_layer = original_layer


def prepare_processor(processor: Any, config: LlavaConfig) -> None:
    """Changes transformers' `processor` so that an image gets as many positions as `config` says.

    The attributes that determine this number have other values in published processor files.
    """
    processor.patch_size = config.vision.patch_size
    processor.vision_feature_select_strategy = config.vision_feature_select_strategy
    processor.num_additional_image_tokens = 1


REFERENCE = Reference("LlavaProcessor", random_row, hidden_states, at_exit, concatenate_images, prepare_processor)
