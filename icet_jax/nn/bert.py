"""BERT and RoBERTa text classifiers (HF `BertForSequenceClassification`, `RobertaForSequenceClassification`)."""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from icet_jax.nn import layers
from icet_jax.typing import Array, Bool, DType, Float, Int, Keywords


@dataclasses.dataclass(frozen=True)
class BertConfig:
    """Holds the sizes of the network under HF's names.

    Attributes:
      kind: "bert" or "roberta". They count positions differently and order the keys of the classification head
        differently.
      num_labels: number of logits.
    """

    kind: str
    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    intermediate_size: int
    max_position_embeddings: int
    type_vocab_size: int
    num_labels: int
    pad_token_id: int
    hidden_act: str = "gelu"
    layer_norm_eps: float = 1e-12

    @property
    def max_length(self) -> int:
        """Returns the most tokens that one text may have; RoBERTa reserves the positions up to its padding id."""
        reserved = self.pad_token_id + 1 if self.kind == "roberta" else 0
        return self.max_position_embeddings - reserved


class PostNormBlocks(nnx.Module):
    """Holds the stacked post-LN encoder blocks of BERT-like networks; methods are called on one layer's weights."""

    def __init__(
        self, width: int, inner: int, depth: int, heads: int, *, activation: str, epsilon: float, rngs: nnx.Rngs,
        dtype: DType, param_dtype: DType,
    ):  # fmt: skip
        self.heads, self.activation = heads, activation
        common: Keywords = dict(
            rngs=rngs, use_bias=True, dtype=dtype, param_dtype=param_dtype, layers=depth, stddev=0.02
        )
        norm: Keywords = dict(epsilon=epsilon, param_dtype=param_dtype, layers=depth)
        self.q_proj = layers.Linear(width, width, **common)
        self.k_proj = layers.Linear(width, width, **common)
        self.v_proj = layers.Linear(width, width, **common)
        self.out_proj = layers.Linear(width, width, **common)
        self.attention_norm = layers.LayerNorm(width, **norm)
        self.fc1 = layers.Linear(width, inner, **common)
        self.fc2 = layers.Linear(inner, width, **common)
        self.output_norm = layers.LayerNorm(width, **norm)

    def qkv(
        self, x: Float[Array, "B T E"]
    ) -> tuple[Float[Array, "B T H D"], Float[Array, "B T H D"], Float[Array, "B T H D"]]:
        """Returns queries, keys and values, split into heads."""
        q, k, v = (layers.split_heads(part(x), self.heads) for part in (self.q_proj, self.k_proj, self.v_proj))
        return q, k, v

    def rest(self, x: Float[Array, "B T E"], attended: Float[Array, "B T E"]) -> Float[Array, "B T E"]:
        """Applies the output projection and the MLP, each followed by a norm of its residual sum (HF `BertLayer`)."""
        x = self.attention_norm(self.out_proj(attended) + x)
        return self.output_norm(self.fc2(layers.ACTIVATIONS[self.activation](self.fc1(x))) + x)


def first_token_state(x: Float[Array, "B T E"], mask: Bool[Array, "B T"]) -> Float[Array, "B E"]:
    """Returns the state of each row's first real token, `[B, E]`; with padding on the right this is HF's `x[:, 0]`."""
    first = jnp.argmax(mask, axis=1)
    return jnp.take_along_axis(x, first[:, None, None], axis=1)[:, 0]


class BertClassifier(nnx.Module):
    """Computes one logit per label for a text from the state of its first token."""

    def __init__(
        self,
        config: BertConfig,
        *,
        rngs: nnx.Rngs,
        dtype: DType = jnp.float32,
        param_dtype: DType = jnp.float32,
    ):
        common: Keywords = dict(rngs=rngs, dtype=dtype, param_dtype=param_dtype)
        width, epsilon = config.hidden_size, config.layer_norm_eps
        self.config, self.dtype = config, dtype
        self.word_embeddings = layers.normal(rngs, (config.vocab_size, width), 0.02, param_dtype)
        self.position_embeddings = layers.normal(rngs, (config.max_position_embeddings, width), 0.02, param_dtype)
        self.token_type_embeddings = layers.normal(rngs, (config.type_vocab_size, width), 0.02, param_dtype)
        self.embeddings_norm = layers.LayerNorm(width, epsilon=epsilon, param_dtype=param_dtype)
        self.layers = PostNormBlocks(
            width, config.intermediate_size, config.num_hidden_layers, config.num_attention_heads,
            activation=config.hidden_act, epsilon=epsilon, **common,
        )  # fmt: skip
        self.pooler = layers.Linear(width, width, use_bias=True, stddev=0.02, **common)
        self.classifier = layers.Linear(width, config.num_labels, use_bias=True, stddev=0.02, **common)

    def __call__(self, tokens: Int[Array, "B T"], mask: Bool[Array, "B T"]) -> Float[Array, "B C"]:
        """Returns the raw float32 logits of all labels, `[B, C]`; a multi-label classifier applies a sigmoid to them.

        Args:
          tokens: one text per row with its special tokens; token type 0 throughout. RoBERTa gives no position to
            padding ids.
          mask: True at real tokens; padding may be on either side and does not change the result.

        Raises:
          ValueError: a text is longer than `config.max_length`.
        """
        if tokens.shape[1] > self.config.max_length:
            raise ValueError(f"{tokens.shape[1]} tokens exceed the classifier's {self.config.max_length} positions")
        x = self.word_embeddings[...][tokens] + self.token_type_embeddings[...][0]
        x = self.embeddings_norm((x + self.position_embeddings[...][self._positions(tokens, mask)]).astype(self.dtype))
        graph, state = nnx.split(self.layers)

        def body(x: Array, weights: nnx.State) -> tuple[Array, None]:
            layer = nnx.merge(graph, weights)
            return layer.rest(x, layers.attention(*layer.qkv(x), real=mask)), None

        x, _ = jax.lax.scan(body, x, state)
        pooled = jnp.tanh(self.pooler(first_token_state(x, mask)))
        return self.classifier(pooled).astype(jnp.float32)

    def _positions(self, tokens: Array, mask: Array) -> Array:
        if self.config.kind == "bert":
            return layers.positions_from_mask(mask)
        is_counted = (mask & (tokens != self.config.pad_token_id)).astype(jnp.int32)
        return jnp.cumsum(is_counted, axis=1) * is_counted + self.config.pad_token_id
