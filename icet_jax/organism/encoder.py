"""Stage 1 of an organism's build: trains the image encoder on captions (CLIP loss) and labels of grid cells.

The organism is the small embedded test model; its images are a grid of four cells.
"""

from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from icet_jax.nn.protocols import Images
from icet_jax.organism import scenes, tokenizer, training
from icet_jax.organism.families import Architecture, EncoderStates
from icet_jax.typing import Array, Bool, Float, PyTree

CAPTION_TOKENS = 17
EMBEDDING = 64
CELL_CLASSES = 1 + len(scenes.SHAPES) * len(scenes.COLOURS)


def initial_heads(key: Array, width: int, readings: int) -> dict[str, Array]:
    """Returns new weights that only this stage uses: a caption encoder, projections, and R classifiers of cells.

    `width` is the width of the image encoder. `readings` is R, the number of vectors of a cell in `EncoderStates`.
    """
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
    image: Float[Array, "B D"], text: Float[Array, "B D"], is_same: Bool[Array, "B B"], scale: Float[Array, ""]
) -> Float[Array, ""]:
    """Returns the symmetric CLIP loss of unit vectors, with inverse temperature `scale`.

    Images and captions of different rows also count as matching pairs if the captions are equal (`is_same`).
    """
    logits = scale * image @ text.T
    target = is_same / is_same.sum(axis=1, keepdims=True)
    image_to_text = -(target * jax.nn.log_softmax(logits, axis=1)).sum(axis=1).mean()
    text_to_image = -(target * jax.nn.log_softmax(logits, axis=0)).sum(axis=0).mean()
    return 0.5 * (image_to_text + text_to_image)


def encoder_loss(
    states: EncoderStates, heads: dict[str, Array], caption: Array, cells: Array
) -> tuple[Array, dict[str, Array]]:
    """Returns the loss (CLIP loss of captions plus cross-entropy of the cells' labels) and metrics.

    Args:
      states: result of `Architecture.encoder_states` for B images.
      heads: result of `initial_heads`.
      caption: token ids, int32 [B, 17], padded with 0.
      cells: labels of the grid's cells, int32 [B, 4].
    """
    image = states.image @ heads["image_out"]
    words = heads["words"][caption] * (caption > 0)[..., None]
    text = jax.nn.gelu(words.reshape(len(caption), -1) @ heads["caption_in"]) @ heads["caption_out"]
    image, text = (x / jnp.linalg.norm(x, axis=1, keepdims=True) for x in (image, text))
    is_same = jnp.all(caption[:, None] == caption[None], axis=2)
    clip = contrastive_loss(image, text, is_same, jnp.exp(heads["log_scale"]))
    logits = jnp.einsum("rbcd,rdk->rbck", states.cells, heads["cell"])
    targets = jnp.broadcast_to(cells, logits.shape[:3])
    cell_loss = -jnp.take_along_axis(jax.nn.log_softmax(logits), targets[..., None], axis=-1).mean()
    retrieval = (jnp.argmax(image @ text.T, axis=1) == jnp.arange(len(image))).mean()
    cell_accuracy = (jnp.argmax(logits, axis=-1) == targets).mean(axis=(1, 2))
    metrics = {"clip": clip, "cell": cell_loss, "retrieval": retrieval}
    return clip + cell_loss, metrics | {f"cells{number}": share for number, share in enumerate(cell_accuracy)}


def train_encoder(
    tower: Any, architecture: Architecture, default_exit: int, *, seed: int, steps: int, batch: int,
    learning_rate: float, log: Callable[[str], None],
) -> Any:  # fmt: skip
    """Returns a copy of an image encoder after `steps` optimizer steps, each on `batch` new images.

    The cell labels are learned from the states at the default exit.
    """
    graph, weights = nnx.split(tower)

    def encoder_states(weights: PyTree, images: Images) -> EncoderStates:
        return architecture.encoder_states(nnx.merge(graph, weights), images, default_exit)

    blank = architecture.images(np.zeros((1, scenes.IMAGE_SIZE, scenes.IMAGE_SIZE, 3), np.uint8), np.zeros(1, int), 1)
    readings = jax.eval_shape(encoder_states, weights, blank).cells.shape[0]
    params = {"tower": weights, "heads": initial_heads(jax.random.key(seed), tower.config.hidden_size, readings)}

    def loss(params: PyTree, images: Images, caption: Array, cells: Array) -> tuple[Array, dict[str, Array]]:
        return encoder_loss(encoder_states(params["tower"], images), params["heads"], caption, cells)

    def batches() -> Iterator[tuple[Any, ...]]:
        for step in range(steps):
            scene = scenes.draw_scenes(3 + 64 * seed, np.arange(step * batch, (step + 1) * batch))
            words = np.zeros((batch, CAPTION_TOKENS), np.int32)
            for row, text in enumerate(scenes.captions(scene)):
                ids = tokenizer.encode(text)
                words[row, : len(ids)] = ids
            images = architecture.images(scenes.render(scene), np.arange(batch), batch)
            yield images, words, scenes.cell_labels(scene).astype(np.int32)

    optimiser = training.optimizer(learning_rate, steps)
    params = training.train("encoder", loss, params, batches(), optimiser, log=log)
    return nnx.merge(graph, params["tower"])
