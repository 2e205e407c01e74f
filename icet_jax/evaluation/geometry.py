"""Compares the image features of every exit with those of the default exit, which the language model was trained on."""

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from icet_jax.data.records import Example
from icet_jax.errors import UserError
from icet_jax.evaluation.batching import prompt_batch
from icet_jax.evaluation.queue import encode
from icet_jax.files import JsonObject
from icet_jax.nn.protocols import EncodedImages
from icet_jax.parallel.distributed import fetch
from icet_jax.typing import Array, Bool, Float, Int
from icet_jax.vlm import VLM

SCHEMA = 1
_CKA_TOKENS = 1024  # tokens that CKA compares, evenly spread over the images; its Gram matrices are of this size
_MIN_CKA_TOKENS = 4  # U-centred Gram matrices of fewer tokens are 0
_MAX_IMAGES = 32  # images that are compared
_BATCH_SIZE = 4  # images that are encoded together


def geometry(vlm: VLM, examples: Sequence[Example]) -> JsonObject:
    """Returns the content of `geometry.json`, which compares each exit's image features with the default exit's.

    Each exit has three values, over the tokens of all images; one that is undefined is None:

      norm_ratio: mean norm of the exit's features divided by that of the default exit's.
      cosine: mean cosine between the features of the same token at the exit and at the default exit.
      cka: see `linear_cka`.

    Args:
      vlm: the model.
      examples: rows; the first image of at most 32 of them is used.

    Raises:
      UserError: no row has an image, or an image cannot be opened.
    """
    batches = image_batches(examples)
    if not batches:
        raise UserError("geometry: no row has an image; give rows that have")
    num_images = sum(map(len, batches))
    comparisons_by_exit: list[list[_Comparison]] = [[] for _ in range(vlm.num_exits)]
    for batch in batches:
        encoded = encode(vlm.graphdef, vlm.params, prompt_batch(vlm, batch, len(batches[0]), 1).images)
        num_samples = -(-_CKA_TOKENS * len(batch) // num_images)
        for layer, comparisons in enumerate(comparisons_by_exit, start=1):
            exits = jnp.int32(layer), jnp.int32(vlm.default_exit)
            comparisons.append(_compare(vlm.graphdef, vlm.params, encoded, *exits, num_samples))
    layers = []
    for layer, comparisons in enumerate(comparisons_by_exit, start=1):
        values = [value if math.isfinite(value) else None for value in _combine(fetch(comparisons))]
        layers.append({"layer": layer, **dict(zip(("norm_ratio", "cosine", "cka"), values, strict=True))})
    return {
        "schema": SCHEMA,
        "exit_definition": vlm.exit_definition,
        "num_exits": vlm.num_exits,
        "default_exit": vlm.default_exit,
        "n_images": num_images,
        "layers": layers,
    }


def image_batches(examples: Sequence[Example]) -> list[list[Example]]:
    """Returns the images that are compared, as rows without a prompt, in batches of at most 4.

    Args:
      examples: rows; the first image of at most 32 of them is used.
    """
    with_images = [example for example in examples if example.images][:_MAX_IMAGES]
    rows = [Example(example.id, "", example.images[:1]) for example in with_images]
    return [rows[start : start + _BATCH_SIZE] for start in range(0, len(rows), _BATCH_SIZE)]


@jax.jit
def linear_cka(x: Float[Array, "n D"], y: Float[Array, "n D"]) -> Float[Array, ""]:
    """Returns the linear centred kernel alignment (CKA) of the features x and y of the same n >= 4 tokens.

    It is 0 for unrelated features and 1 for features that are equal up to a rotation. This is the unbiased form (HSIC_1
    of Song et al. 2012, with U-centred Gram matrices). The plain form is far from 0 for unrelated features if there are
    no more tokens than dimensions. Small negative values are set to 0.
    """
    gram_x, gram_y = _u_centred_gram(x), _u_centred_gram(y)
    scale = jnp.sqrt(jnp.sum(gram_x**2) * jnp.sum(gram_y**2))
    return jnp.clip(jnp.sum(gram_x * gram_y) / scale, 0.0, 1.0)


def _u_centred_gram(x: Float[Array, "n D"]) -> Float[Array, "n n"]:
    """Returns the U-centred Gram matrix of n tokens' features, scaled by a positive number; its diagonal is 0."""
    count = x.shape[0]
    x = x - x.mean(axis=0)
    x = x / jnp.sqrt(jnp.mean(x**2))  # keeps the sums of large features within float32
    off_diagonal = ~jnp.eye(count, dtype=bool)
    gram = jnp.where(off_diagonal, jnp.matmul(x, x.T, precision=jax.lax.Precision.HIGHEST), 0.0)
    row_means = gram.sum(axis=0) / (count - 2)
    mean = gram.sum() / ((count - 1) * (count - 2))
    return jnp.where(off_diagonal, gram - row_means[:, None] - row_means[None, :] + mean, 0.0)


class _Comparison(NamedTuple):
    """Compares features x at one exit with features y at the default exit, for the tokens of some images.

    Attributes:
      sums: sums of the norms of x, of the norms of y, and of the cosines of x and y, over all tokens of the images.
      tokens: number of tokens that were summed.
      x, y: features of n of these tokens, evenly spaced.
      is_used: False where x and y hold filler values, because the images have fewer than n tokens.
    """

    sums: Float[Array, "3"]
    tokens: Int[Array, ""]
    x: Float[Array, "n E"]
    y: Float[Array, "n E"]
    is_used: Bool[Array, "n"]


@functools.partial(jax.jit, static_argnames=("graphdef", "num_samples"))
def _compare(
    graphdef: nnx.GraphDef,
    params: nnx.State,
    encoded: EncodedImages,
    exit_layer: Int[Array, ""],
    default_exit: Int[Array, ""],
    num_samples: int,
) -> _Comparison:
    """Compares a batch's features at one exit and at the default exit; the result keeps `num_samples` features.

    The exits are traced, so one program serves all of them.
    """
    model = nnx.merge(graphdef, params)
    (x, is_present), (y, _) = (model.image_features(encoded, layer) for layer in (exit_layer, default_exit))
    x, y = (features.astype(jnp.float32).reshape(-1, features.shape[-1]) for features in (x, y))
    is_present = is_present.reshape(-1)
    norms = jnp.linalg.norm(x, axis=1), jnp.linalg.norm(y, axis=1)
    cosine = jnp.sum(x * y, axis=1) / jnp.maximum(norms[0] * norms[1], 1e-30)
    sums = jnp.stack([jnp.sum(values, where=is_present) for values in (*norms, cosine)])
    count = is_present.sum()
    step = jnp.maximum(-(-count // num_samples), 1)
    sampled = jnp.arange(num_samples) * step  # 0 is the first token that belongs to an image
    positions = jnp.minimum(jnp.searchsorted(jnp.cumsum(is_present), sampled + 1), x.shape[0] - 1)
    return _Comparison(sums, count, x[positions], y[positions], sampled < count)


def _combine(comparisons: Sequence[_Comparison]) -> tuple[float, float, float]:
    """Returns (norm ratio, cosine, CKA) of features x relative to y, pooled over the images of all comparisons.

    A value that is undefined is NaN.
    """
    sums = np.sum([np.asarray(comparison.sums, np.float64) for comparison in comparisons], axis=0)
    x_norms, y_norms, cosines = sums
    tokens = sum(int(comparison.tokens) for comparison in comparisons)
    x = np.concatenate([np.asarray(part.x)[np.asarray(part.is_used)] for part in comparisons])
    y = np.concatenate([np.asarray(part.y)[np.asarray(part.is_used)] for part in comparisons])
    cka = float(linear_cka(jnp.asarray(x), jnp.asarray(y))) if len(x) >= _MIN_CKA_TOKENS else math.nan
    with np.errstate(divide="ignore", invalid="ignore"):
        return float(x_norms / y_norms), float(cosines / tokens), cka
