"""Stage 1: the image encoder, trained with the CLIP loss on captions and a label per grid cell."""

from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from icet_jax.models.clip import ClipVisionTower
from icet_jax.organism import scenes, tokenizer, training
from icet_jax.typing import Array, Float

CAPTION_TOKENS = 17
EMBEDDING = 64
CELL_CLASSES = 1 + len(scenes.SHAPES) * len(scenes.COLOURS)


def to_pixels(images: np.ndarray) -> np.ndarray:
    """uint8 [I, H, W, 3] to float32 [I, 3, H, W] in -1..1, as the written preprocessor_config.json says."""
    return ((images.astype(np.float32) / 255 - 0.5) / 0.5).transpose(0, 3, 1, 2)


def initial_heads(key: Array, width: int) -> dict[str, Array]:
    """Weights that stage 1 needs beside the tower and throws away: a caption encoder, projections, cell classifier."""
    keys = jax.random.split(key, 5)
    words, hidden = 24, 256

    def normal(key: Array, *shape: int) -> Array:
        return shape[0] ** -0.5 * jax.random.normal(key, shape)

    return {
        "words": jax.random.normal(keys[0], (len(tokenizer.vocabulary()), words)),
        "caption_in": normal(keys[1], CAPTION_TOKENS * words, hidden),
        "caption_out": normal(keys[2], hidden, EMBEDDING),
        "image_out": normal(keys[3], width, EMBEDDING),
        "cell": normal(keys[4], width, CELL_CLASSES),
        "log_scale": jnp.asarray(np.log(10.0), jnp.float32),
    }


def contrastive_loss(
    image: Float[Array, "B D"], text: Float[Array, "B D"], same: Array, scale: Float[Array, ""]
) -> Float[Array, ""]:
    """Symmetric CLIP loss on unit vectors; `same` bool [B, B] marks equal captions, all of which are positives."""
    logits = scale * image @ text.T
    target = same / same.sum(axis=1, keepdims=True)
    rows = -(target * jax.nn.log_softmax(logits, axis=1)).sum(axis=1).mean()
    columns = -(target * jax.nn.log_softmax(logits, axis=0)).sum(axis=0).mean()
    return 0.5 * (rows + columns)


def encoder_loss(
    tower: ClipVisionTower, heads: dict[str, Array], default_exit: int, pixels: Array, caption: Array, cells: Array
) -> tuple[Array, dict[str, Array]]:
    """CLIP loss on the class token of the last block, plus cross-entropy of each cell at the default exit.

    Args:
      pixels: float32 [B, 3, 32, 32].
      caption: int32 [B, 17], padded with 0.
      cells: int32 [B, 4] labels of the grid cells.
    """
    states = tower(pixels)
    image = tower.post_layernorm(states[-1, :, 0]) @ heads["image_out"]
    words = heads["words"][caption] * (caption > 0)[..., None]
    text = jax.nn.gelu(words.reshape(len(caption), -1) @ heads["caption_in"]) @ heads["caption_out"]
    image, text = (x / jnp.linalg.norm(x, axis=1, keepdims=True) for x in (image, text))
    same = jnp.all(caption[:, None] == caption[None], axis=2)
    clip = contrastive_loss(image, text, same, jnp.exp(heads["log_scale"]))
    side = int(states.shape[2] ** 0.5) // 2
    patches = states[default_exit, :, 1:].reshape(len(pixels), 2, side, 2, side, -1).mean(axis=(2, 4))
    logits = patches.reshape(len(pixels), 4, -1) @ heads["cell"]
    log_probs = jnp.take_along_axis(jax.nn.log_softmax(logits), cells[..., None], axis=-1)
    cell_loss = -log_probs.mean()
    found = (jnp.argmax(image @ text.T, axis=1) == jnp.arange(len(image))).mean()
    seen = (jnp.argmax(logits, axis=-1) == cells).mean()
    return clip + cell_loss, {"clip": clip, "cell": cell_loss, "retrieval": found, "cells": seen}


def train_encoder(
    tower: ClipVisionTower, default_exit: int, *, seed: int, steps: int, batch: int, learning_rate: float,
    log: Callable[[str], None],
) -> ClipVisionTower:  # fmt: skip
    """Trains a tower on fresh images, `batch` per step."""
    graph, weights = nnx.split(tower)
    params = {"tower": weights, "heads": initial_heads(jax.random.key(seed), tower.config.hidden_size)}

    def loss(params: Any, *data: Array) -> tuple[Array, dict[str, Array]]:
        return encoder_loss(nnx.merge(graph, params["tower"]), params["heads"], default_exit, *data)

    def batches() -> Iterator[tuple[np.ndarray, ...]]:
        for step in range(steps):
            scene = scenes.draw_scenes(3 + 64 * seed, np.arange(step * batch, (step + 1) * batch))
            words = np.zeros((batch, CAPTION_TOKENS), np.int32)
            for row, text in enumerate(scenes.captions(scene)):
                ids = tokenizer.encode(text)
                words[row, : len(ids)] = ids
            yield to_pixels(scenes.render(scene)), words, scenes.cell_labels(scene).astype(np.int32)

    optimiser = training.optimizer(learning_rate, steps)
    params = training.train("encoder", loss, params, batches(), optimiser, log=log)
    return nnx.merge(graph, params["tower"])
