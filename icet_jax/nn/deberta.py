"""DeBERTa-v2 and -v3 reward model (HF `DebertaV2ForSequenceClassification`).

Attention depends on the distance of two tokens, where large distances share logarithmically spaced buckets.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from icet_jax.nn import layers
from icet_jax.nn.bert import PostNormBlocks, first_token_state
from icet_jax.typing import Array, ArrayLike, Bool, DType, Float, Int, Keywords


@dataclasses.dataclass(frozen=True)
class DebertaConfig:
    """Holds the sizes of the network under HF's names.

    Attributes:
      position_buckets: number of buckets of distances in each direction.
      max_relative_positions: smallest distance, in tokens, that falls into the last bucket.
    """

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    intermediate_size: int
    position_buckets: int
    max_relative_positions: int
    hidden_act: str = "gelu"
    pooler_hidden_act: str = "gelu"
    layer_norm_eps: float = 1e-7


def relative_index(length: int, buckets: int, max_distance: int) -> Int[np.ndarray, "T T"]:
    """Returns for query i and key j the row of their distance i - j in the table of distance embeddings.

    Distances up to `buckets / 2` have a row each; larger ones share logarithmically spaced rows up to `max_distance`.
    Source: HF `build_relative_position`.

    Args:
      length: T, the number of tokens of a text.
      buckets: half the number of rows of the table; row `buckets` is for distance 0.
      max_distance: see `DebertaConfig.max_relative_positions`.
    """
    distance = np.arange(length)[:, None] - np.arange(length)[None]
    largest_exact = buckets // 2
    far_distance = np.maximum(np.abs(distance), largest_exact)
    log_fraction = np.log(far_distance / largest_exact) / math.log((max_distance - 1) / largest_exact)
    logarithmic = np.ceil(log_fraction * (largest_exact - 1)) + largest_exact
    bucket = np.where(np.abs(distance) <= largest_exact, distance, np.sign(distance) * logarithmic)
    return np.clip(bucket + buckets, 0, 2 * buckets - 1).astype(np.int32)


def disentangled_attention(
    q: Float[Array, "B T H D"],
    k: Float[Array, "B T H D"],
    v: Float[Array, "B T H D"],
    position_q: Float[Array, "R H D"],
    position_k: Float[Array, "R H D"],
    index: Int[ArrayLike, "T T"],
    allowed: Bool[Array, "B 1 1 T"],
) -> Float[Array, "B T HD"]:
    """Computes attention whose scores depend on tokens and distances (HF `DisentangledSelfAttention`).

    With `r = index[i, j]`, the score of query i and key j is
    `(q_i . k_j + q_i . position_k[r] + k_j . position_q[r]) / sqrt(3 D)`.

    Args:
      q, k, v: queries, keys and values of the tokens.
      position_q: the R distance embeddings after the query projection.
      position_k: the R distance embeddings after the key projection.
      index: result of `relative_index`.
      allowed: True at keys that may be attended to.

    Returns:
      The outputs of the heads, concatenated.
    """
    index = jnp.asarray(index)[None, None]
    float32: Keywords = dict(preferred_element_type=jnp.float32)
    content = jnp.einsum("bihd,bjhd->bhij", q, k, **float32)
    by_query = jnp.einsum("bihd,rhd->bhir", q, position_k, **float32)
    by_key = jnp.einsum("bjhd,rhd->bhjr", k, position_q, **float32)
    to_position = jnp.take_along_axis(by_query, index, axis=-1)
    from_position = jnp.take_along_axis(by_key, index.swapaxes(-1, -2), axis=-1).swapaxes(-1, -2)
    scores = (content + to_position + from_position) * (3 * q.shape[-1]) ** -0.5
    # The lowest finite number instead of -inf, so that a row without any allowed key gets the mean and not NaN.
    weights = jax.nn.softmax(jnp.where(allowed, scores, jnp.finfo(jnp.float32).min), axis=-1).astype(v.dtype)
    out = jnp.einsum("bhij,bjhd->bihd", weights, v)
    return out.reshape(*out.shape[:2], -1)


class DebertaRewardModel(nnx.Module):
    """Computes a scalar reward for each text from the state of its first token."""

    def __init__(
        self,
        config: DebertaConfig,
        *,
        rngs: nnx.Rngs,
        dtype: DType = jnp.float32,
        param_dtype: DType = jnp.float32,
    ):
        common: Keywords = dict(rngs=rngs, dtype=dtype, param_dtype=param_dtype)
        width, epsilon = config.hidden_size, config.layer_norm_eps
        self.config, self.dtype = config, dtype
        self.word_embeddings = layers.normal(rngs, (config.vocab_size, width), 0.02, param_dtype)
        self.embeddings_norm = layers.LayerNorm(width, epsilon=epsilon, param_dtype=param_dtype)
        self.rel_embeddings = layers.normal(rngs, (2 * config.position_buckets, width), 0.02, param_dtype)
        self.rel_norm = layers.LayerNorm(width, epsilon=epsilon, param_dtype=param_dtype)
        self.layers = PostNormBlocks(
            width, config.intermediate_size, config.num_hidden_layers, config.num_attention_heads,
            activation=config.hidden_act, epsilon=epsilon, **common,
        )  # fmt: skip
        self.pooler = layers.Linear(width, width, use_bias=True, stddev=0.02, **common)
        self.classifier = layers.Linear(width, 1, use_bias=True, stddev=0.02, **common)

    def __call__(self, tokens: Int[Array, "B T"], mask: Bool[Array, "B T"]) -> Float[Array, "B"]:
        """Returns raw float32 rewards; the probability that text a is preferred to text b is `sigmoid(r_a - r_b)`.

        Args:
          tokens: `[CLS] question [SEP] answer [SEP]`, of any length.
          mask: True at tokens that are not padding, which may be on either side and does not change the result.
        """
        config = self.config
        index = relative_index(tokens.shape[1], config.position_buckets, config.max_relative_positions)
        x = self.embeddings_norm(self.word_embeddings[...][tokens].astype(self.dtype))
        table = self.rel_norm(self.rel_embeddings[...].astype(self.dtype))
        allowed = mask[:, None, None, :]
        graph, state = nnx.split(self.layers)

        def body(x: Array, weights: nnx.State) -> tuple[Array, None]:
            layer = nnx.merge(graph, weights)
            position_q, position_k, _ = (part[0] for part in layer.qkv(table[None]))
            attended = disentangled_attention(*layer.qkv(x), position_q, position_k, index, allowed)
            return layer.after_attention(x, attended), None

        x, _ = jax.lax.scan(body, x, state)
        pooled = layers.ACTIVATIONS[config.pooler_hidden_act](self.pooler(first_token_state(x, mask)))
        return self.classifier(pooled)[:, 0].astype(jnp.float32)
