"""Stage 1: trains the image encoder with the CLIP loss on captions and a label for each grid cell."""

from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from icet_jax.nn.protocols import Images
from icet_jax.organism import scenes, tokenizer, training
from icet_jax.organism.families import Readouts, Shape
from icet_jax.typing import Array, Float

CAPTION_TOKENS = 17
EMBEDDING = 64
CELL_CLASSES = 1 + len(scenes.SHAPES) * len(scenes.COLOURS)


def initial_heads(key: Array, width: int, readings: int) -> dict[str, Array]:
    """Returns weights that only stage 1 uses: a caption encoder, projections, and a classifier of cells for each of the
    tower's readings."""
    keys = jax.random.split(key, 5)
    words, hidden = 24, 256

    def normal(key: Array, *shape: int) -> Array:
        return shape[0] ** -0.5 * jax.random.normal(key, shape)

    return {
        "words": jax.random.normal(keys[0], (len(tokenizer.vocabulary()), words)),
        "caption_in": normal(keys[1], CAPTION_TOKENS * words, hidden),
        "caption_out": normal(keys[2], hidden, EMBEDDING),
        "image_out": normal(keys[3], width, EMBEDDING),
        "cell": width**-0.5 * jax.random.normal(keys[4], (readings, width, CELL_CLASSES)),
        "log_scale": jnp.asarray(np.log(10.0), jnp.float32),
    }


def contrastive_loss(
    image: Float[Array, "B D"], text: Float[Array, "B D"], same: Array, scale: Float[Array, ""]
) -> Float[Array, ""]:
    """Returns the symmetric CLIP loss on unit vectors; `same` bool [B, B] marks equal captions, all of which are
    positives."""
    logits = scale * image @ text.T
    target = same / same.sum(axis=1, keepdims=True)
    rows = -(target * jax.nn.log_softmax(logits, axis=1)).sum(axis=1).mean()
    columns = -(target * jax.nn.log_softmax(logits, axis=0)).sum(axis=0).mean()
    return 0.5 * (rows + columns)


def encoder_loss(
    readouts: Readouts, heads: dict[str, Array], caption: Array, cells: Array
) -> tuple[Array, dict[str, Array]]:
    """Returns the CLIP loss on each image's vector plus the cross-entropy of every reading of its cells, and metrics.

    Args:
      readouts: results of `Shape.readouts` for B images.
      heads: result of `initial_heads`.
      caption: int32 [B, 17], padded with 0.
      cells: int32 [B, 4], labels of the grid cells.
    """
    image, patches = readouts
    image = image @ heads["image_out"]
    words = heads["words"][caption] * (caption > 0)[..., None]
    text = jax.nn.gelu(words.reshape(len(caption), -1) @ heads["caption_in"]) @ heads["caption_out"]
    image, text = (x / jnp.linalg.norm(x, axis=1, keepdims=True) for x in (image, text))
    same = jnp.all(caption[:, None] == caption[None], axis=2)
    clip = contrastive_loss(image, text, same, jnp.exp(heads["log_scale"]))
    logits = jnp.einsum("rbcd,rdk->rbck", patches, heads["cell"])
    targets = jnp.broadcast_to(cells, logits.shape[:3])
    cell_loss = -jnp.take_along_axis(jax.nn.log_softmax(logits), targets[..., None], axis=-1).mean()
    retrieval = (jnp.argmax(image @ text.T, axis=1) == jnp.arange(len(image))).mean()
    cell_accuracy = (jnp.argmax(logits, axis=-1) == targets).mean(axis=(1, 2))
    metrics = {"clip": clip, "cell": cell_loss, "retrieval": retrieval}
    return clip + cell_loss, metrics | {f"cells{number}": share for number, share in enumerate(cell_accuracy)}


def train_encoder(
    tower: Any, shape: Shape, default_exit: int, *, seed: int, steps: int, batch: int, learning_rate: float,
    log: Callable[[str], None],
) -> Any:  # fmt: skip
    """Trains a tower on new images, `batch` per step, and returns a new tower."""
    graph, weights = nnx.split(tower)

    def readouts(weights: Any, images: Images) -> Readouts:
        return shape.readouts(nnx.merge(graph, weights), images, default_exit)

    one = shape.images(np.zeros((1, scenes.IMAGE_SIZE, scenes.IMAGE_SIZE, 3), np.uint8), np.zeros(1, int), 1)
    readings = jax.eval_shape(readouts, weights, one)[1].shape[0]
    params = {"tower": weights, "heads": initial_heads(jax.random.key(seed), tower.config.hidden_size, readings)}

    def loss(params: Any, images: Images, caption: Array, cells: Array) -> tuple[Array, dict[str, Array]]:
        return encoder_loss(readouts(params["tower"], images), params["heads"], caption, cells)

    def batches() -> Iterator[tuple[Any, ...]]:
        for step in range(steps):
            scene = scenes.draw_scenes(3 + 64 * seed, np.arange(step * batch, (step + 1) * batch))
            words = np.zeros((batch, CAPTION_TOKENS), np.int32)
            for row, text in enumerate(scenes.captions(scene)):
                ids = tokenizer.encode(text)
                words[row, : len(ids)] = ids
            images = shape.images(scenes.render(scene), np.arange(batch), batch)
            yield images, words, scenes.cell_labels(scene).astype(np.int32)

    optimiser = training.optimizer(learning_rate, steps)
    params = training.train("encoder", loss, params, batches(), optimiser, log=log)
    return nnx.merge(graph, params["tower"])
