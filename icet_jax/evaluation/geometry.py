"""Compares the image features of every exit with those that the language model was trained on."""

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
_CKA_TOKENS = 1024  # tokens that CKA compares, evenly spread over the images; the width of its Gram matrices
_MOST_IMAGES, _AT_ONCE = 32, 4  # images looked at, and of them encoded together


def geometry(vlm: VLM, examples: Sequence[Example]) -> JsonObject:
    """Returns the content of `geometry.json`: the projected features of every exit against those of the default exit.

    For each exit, over the tokens of all images: `norm_ratio`, the mean norm divided by that of the default exit;
    `cosine`, the mean cosine between the same token at the two exits; `cka`, see `linear_cka`. A number that is
    undefined is None.

    Args:
      vlm: the model.
      examples: rows, of which the first image is used.
      max_images: most images that are used.

    Raises:
      UserError: no row has an image, or an image cannot be opened.
    """
    rows_with_images = [example for example in examples if example.images][:_MOST_IMAGES]
    if not rows_with_images:
        raise UserError("geometry: no row has an image; give rows that have")
    rows = [Example(example.id, "", example.images[:1]) for example in rows_with_images]
    parts: list[list[_Comparison]] = [[] for _ in range(vlm.num_exits)]
    for start in range(0, len(rows), _AT_ONCE):
        batch = rows[start : start + _AT_ONCE]
        encoded = encode(vlm.graphdef, vlm.params, prompt_batch(vlm, batch, min(_AT_ONCE, len(rows)), 1).images)
        chosen_tokens = -(-_CKA_TOKENS * len(batch) // len(rows))
        for layer, comparisons in enumerate(parts, start=1):
            exits = jnp.int32(layer), jnp.int32(vlm.default_exit)
            comparisons.append(_compare(vlm.graphdef, vlm.params, encoded, *exits, chosen_tokens))
    layers = []
    for layer, comparisons in enumerate(parts, start=1):
        numbers = [number if math.isfinite(number) else None for number in _combine(fetch(comparisons))]
        layers.append({"layer": layer, **dict(zip(("norm_ratio", "cosine", "cka"), numbers, strict=True))})
    return {
        "schema": SCHEMA,
        "exit_definition": vlm.exit_definition,
        "num_exits": vlm.num_exits,
        "default_exit": vlm.default_exit,
        "n_images": len(rows),
        "layers": layers,
    }


@jax.jit
def linear_cka(x: Float[Array, "n D"], y: Float[Array, "n D"]) -> Float[Array, ""]:
    """Returns the linear centred kernel alignment of n >= 4 tokens' features, from 0 (unrelated) to 1 (equal up to
    rotation).

    This is the unbiased form (HSIC_1 of Song et al. 2012, with U-centred Gram matrices). The plain form is far from 0
    for unrelated features if there are no more tokens than dimensions. Small negative values are set to 0.
    """
    gram_x, gram_y = _u_centred_gram(x), _u_centred_gram(y)
    scale = jnp.sqrt(jnp.sum(gram_x**2) * jnp.sum(gram_y**2))
    return jnp.clip(jnp.sum(gram_x * gram_y) / scale, 0.0, 1.0)


def _u_centred_gram(x: Float[Array, "n D"]) -> Float[Array, "n n"]:
    count = x.shape[0]
    x = x - x.mean(axis=0)
    x = x / jnp.sqrt(jnp.mean(x**2))  # keeps the sums of large features within float32
    others = ~jnp.eye(count, dtype=bool)
    gram = jnp.where(others, jnp.matmul(x, x.T, precision=jax.lax.Precision.HIGHEST), 0.0)
    rows = gram.sum(axis=0) / (count - 2)
    total = gram.sum() / ((count - 1) * (count - 2))
    return jnp.where(others, gram - rows[:, None] - rows[None, :] + total, 0.0)


class _Comparison(NamedTuple):
    """Holds sums and samples of the tokens of some images, x at one exit and y at the default exit.

    Attributes:
      sums: sums of the norms of x, of the norms of y, and of their cosines, over existing tokens.
      tokens: number of existing tokens.
      x, y: some of the tokens, evenly spread.
      is_used: which of these are existing tokens, each counted once.
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
    """Compares one exit with the default exit, both traced, and keeps `num_samples` tokens."""
    model = nnx.merge(graphdef, params)
    (x, is_present), (y, _) = (model.image_features(encoded, layer) for layer in (exit_layer, default_exit))
    x, y = (features.astype(jnp.float32).reshape(-1, features.shape[-1]) for features in (x, y))
    is_present = is_present.reshape(-1)
    norms = jnp.linalg.norm(x, axis=1), jnp.linalg.norm(y, axis=1)
    cosine = jnp.sum(x * y, axis=1) / jnp.maximum(norms[0] * norms[1], 1e-30)
    sums = jnp.stack([jnp.sum(values, where=is_present) for values in (*norms, cosine)])
    count = is_present.sum()
    numbers = jnp.arange(num_samples) * jnp.maximum(
        -(-count // num_samples), 1
    )  # numbers among the existing tokens, from 0
    places = jnp.minimum(jnp.searchsorted(jnp.cumsum(is_present), numbers + 1), x.shape[0] - 1)
    return _Comparison(sums, count, x[places], y[places], numbers < count)


def _combine(parts: Sequence[_Comparison]) -> tuple[float, float, float]:
    """Returns (norm ratio, cosine, CKA) of all images."""
    sums = np.sum([np.asarray(part.sums, np.float64) for part in parts], axis=0)
    tokens = sum(int(part.tokens) for part in parts)
    x, y = (
        np.concatenate(
            [np.asarray(features)[np.asarray(part.is_used)] for part, features in zip(parts, side, strict=True)]
        )
        for side in ([part.x for part in parts], [part.y for part in parts])
    )
    cka = float(linear_cka(jnp.asarray(x), jnp.asarray(y))) if len(x) >= 4 else math.nan
    with np.errstate(divide="ignore", invalid="ignore"):
        return float(sums[0] / sums[1]), float(sums[2] / tokens), cka
