"""How far the features of every exit lie from those that the language model was trained on."""

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from icet_jax.data.records import Example
from icet_jax.errors import UserError
from icet_jax.evaluation.batching import prompt_batch
from icet_jax.evaluation.queue import encode
from icet_jax.parallel.distributed import fetch
from icet_jax.typing import Array, Bool, Float, Int
from icet_jax.vlm import VLM

SCHEMA = 1
_CKA_TOKENS = 1024  # tokens compared by CKA, evenly spread over the images: its Gram matrices are this wide
_MOST_IMAGES, _AT_ONCE = 32, 4  # images looked at, and of them encoded together


def geometry(vlm: VLM, examples: Sequence[Example]) -> dict[str, Any]:
    """The content of `geometry.json`: P(e_l) against P(e_L), the default exit's, at every exit.

    Per layer, over the tokens of all images: `norm_ratio`, the mean norm over the default exit's; `cosine`, the mean
    cosine between the same token at the two exits; `cka`, see `linear_cka`. None where there is no such number.

    Args:
      vlm: the model.
      examples: rows; the first 32 with an image are looked at, and of each its first image.

    Raises:
      UserError: no row has an image, or one cannot be opened.
    """
    chosen = [example for example in examples if example.images][:_MOST_IMAGES]
    if not chosen:
        raise UserError("geometry: no row has an image; give rows that have")
    rows = [Example(example.id, "", example.images[:1]) for example in chosen]
    parts: list[list[_Part]] = [[] for _ in range(vlm.num_exits)]
    for start in range(0, len(rows), _AT_ONCE):
        batch = rows[start : start + _AT_ONCE]
        encoded = encode(vlm.graphdef, vlm.params, prompt_batch(vlm, batch, min(_AT_ONCE, len(rows)), 1).images)
        chosen_tokens = -(-_CKA_TOKENS * len(batch) // len(rows))
        for layer, found in enumerate(parts, start=1):
            exits = jnp.int32(layer), jnp.int32(vlm.default_exit)
            found.append(_compare(vlm.graphdef, vlm.params, encoded, *exits, chosen_tokens))
    layers = []
    for layer, found in enumerate(parts, start=1):
        numbers = [number if math.isfinite(number) else None for number in _joined(fetch(found))]
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
    """Linear centred kernel alignment of the same n >= 4 tokens' features, 0 (unrelated) to 1 (equal up to rotation).

    The unbiased form (HSIC_1 of Song et al. 2012, as U-centred Gram matrices): the plain one is far from 0 for
    unrelated features where there are no more tokens than dimensions. What little falls below 0 is 0.
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


class _Part(NamedTuple):
    """Of the tokens of some images, x at one exit and y at the default one.

    Attributes:
      sums: of the norms of x, of those of y, and of the cosines between them, over the tokens that are there.
      tokens: how many those are.
      x, y: some of the tokens, evenly spread.
      taken: which of these are tokens that are there, each once.
    """

    sums: Float[Array, "3"]
    tokens: Int[Array, ""]
    x: Float[Array, "n E"]
    y: Float[Array, "n E"]
    taken: Bool[Array, "n"]


@functools.partial(jax.jit, static_argnames=("graphdef", "chosen"))
def _compare(
    graphdef: nnx.GraphDef,
    params: nnx.State,
    encoded: Any,
    exit_layer: Int[Array, ""],
    default_exit: Int[Array, ""],
    chosen: int,
) -> _Part:
    """One exit against the default, both traced; `chosen` tokens are kept."""
    model = nnx.merge(graphdef, params)
    (x, there), (y, _) = (model.image_features(encoded, layer) for layer in (exit_layer, default_exit))
    x, y = (features.astype(jnp.float32).reshape(-1, features.shape[-1]) for features in (x, y))
    there = there.reshape(-1)
    norms = jnp.linalg.norm(x, axis=1), jnp.linalg.norm(y, axis=1)
    cosine = jnp.sum(x * y, axis=1) / jnp.maximum(norms[0] * norms[1], 1e-30)
    sums = jnp.stack([jnp.sum(values, where=there) for values in (*norms, cosine)])
    count = there.sum()
    numbers = jnp.arange(chosen) * jnp.maximum(-(-count // chosen), 1)  # among the tokens that are there, from 0
    places = jnp.minimum(jnp.searchsorted(jnp.cumsum(there), numbers + 1), x.shape[0] - 1)
    return _Part(sums, count, x[places], y[places], numbers < count)


def _joined(parts: Sequence[_Part]) -> tuple[float, float, float]:
    """(norm ratio, cosine, CKA) of all images."""
    sums = np.sum([np.asarray(part.sums, np.float64) for part in parts], axis=0)
    tokens = sum(int(part.tokens) for part in parts)
    x, y = (
        np.concatenate(
            [np.asarray(features)[np.asarray(part.taken)] for part, features in zip(parts, side, strict=True)]
        )
        for side in ([part.x for part in parts], [part.y for part in parts])
    )
    cka = float(linear_cka(jnp.asarray(x), jnp.asarray(y))) if len(x) >= 4 else math.nan
    with np.errstate(divide="ignore", invalid="ignore"):
        return float(sums[0] / sums[1]), float(sums[2] / tokens), cka
