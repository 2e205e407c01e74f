"""How far the features of every exit lie from those that the language model was trained on."""

import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from icet_jax.data.records import Example
from icet_jax.errors import UserError
from icet_jax.evaluation.batching import prompt_batch
from icet_jax.evaluation.sweep import encode
from icet_jax.typing import Array, Float, Int

SCHEMA = 1
_CKA_TOKENS = 1024  # tokens compared by CKA, evenly spread over the images: its Gram matrices are this wide


def geometry(vlm: Any, examples: Sequence[Example], *, max_images: int = 32) -> dict[str, Any]:
    """The content of `geometry.json`: P(e_l) against P(e_L), the default exit's, at every exit.

    Per layer, over the tokens of all images: `norm_ratio`, the mean norm over the default exit's; `cosine`, the mean
    cosine between the same token at the two exits; `cka`, see `linear_cka`. None where there is no such number.

    Args:
      vlm: the model, an `icet_jax.api.VLM`.
      examples: rows whose first images are looked at.
      max_images: the most images, all encoded at once.

    Raises:
      UserError: no row has an image, or one cannot be opened.
    """
    chosen = [example for example in examples if example.images][:max_images]
    if not chosen:
        raise UserError("geometry: no row has an image; give rows that have")
    rows = [Example(example.id, "", example.images[:1]) for example in chosen]
    encoded = encode(vlm.graphdef, vlm.params, prompt_batch(vlm, rows, len(rows), 1).images)
    layers = []
    for layer in range(1, vlm.num_exits + 1):
        exits = jnp.int32(layer), jnp.int32(vlm.default_exit)
        found = map(float, _compare(vlm.graphdef, vlm.params, encoded, *exits))
        numbers = [number if math.isfinite(number) else None for number in found]
        layers.append({"layer": layer, **dict(zip(("norm_ratio", "cosine", "cka"), numbers, strict=True))})
    return {
        "schema": SCHEMA,
        "exit_definition": vlm.exit_definition,
        "num_exits": vlm.num_exits,
        "default_exit": vlm.default_exit,
        "n_images": len(rows),
        "layers": layers,
    }


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


@functools.partial(jax.jit, static_argnames="graphdef")
def _compare(
    graphdef: nnx.GraphDef, params: nnx.State, encoded: Any, exit_layer: Int[Array, ""], default_exit: Int[Array, ""]
) -> tuple[Array, Array, Array]:
    """(norm ratio, cosine, CKA) of one exit against the default, both traced."""
    model = nnx.merge(graphdef, params)
    x, y = (_tokens(model.visual(encoded, layer)) for layer in (exit_layer, default_exit))
    norms = jnp.linalg.norm(x, axis=1), jnp.linalg.norm(y, axis=1)
    cosine = jnp.mean(jnp.sum(x * y, axis=1) / jnp.maximum(norms[0] * norms[1], 1e-30))
    stride = -(-x.shape[0] // _CKA_TOKENS)
    return norms[0].mean() / norms[1].mean(), cosine, linear_cka(x[::stride], y[::stride])


def _tokens(visual: Any) -> Float[Array, "n E"]:
    """All image tokens of a batch as float32 rows; a family's visual pytree starts with its features [B, ..., E]."""
    features = jax.tree.leaves(visual)[0].astype(jnp.float32)
    return features.reshape(-1, features.shape[-1])
