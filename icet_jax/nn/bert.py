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
      kind: "bert" or "roberta", which count positions differently.
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
        """Returns the largest number of tokens of a text; RoBERTa's first token has position `pad_token_id + 1`."""
        reserved = self.pad_token_id + 1 if self.kind == "roberta" else 0
        return self.max_position_embeddings - reserved


class PostNormBlocks(nnx.Module):
    """Holds the weights of all encoder blocks of a BERT-like network, stacked along their first axis.

    Each block applies its norms after the residual sums (post-LN). The methods run one block. Call them on a module
    of one block, `nnx.merge(graphdef, that block's slice)`.
    """

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
        """Returns queries, keys and values of one block, split into heads."""
        q, k, v = (layers.split_heads(part(x), self.heads) for part in (self.q_proj, self.k_proj, self.v_proj))
        return q, k, v

    def after_attention(self, x: Float[Array, "B T E"], attended: Float[Array, "B T E"]) -> Float[Array, "B T E"]:
        """Returns the output of one block (HF `BertLayer`) from its input and the output of its attention.

        Output projection and MLP are each followed by a norm of the residual sum.

        Args:
          x: input of the block.
          attended: concatenated outputs of the attention heads.
        """
        x = self.attention_norm(self.out_proj(attended) + x)
        return self.output_norm(self.fc2(layers.ACTIVATIONS[self.activation](self.fc1(x))) + x)


def first_token_state(x: Float[Array, "B T E"], mask: Bool[Array, "B T"]) -> Float[Array, "B E"]:
    """Returns the state of each row's first token that is not padding.

    HF's classifiers read `x[:, 0]`, which is the same if padding is on the right.
    """
    first = jnp.argmax(mask, axis=1)
    return jnp.take_along_axis(x, first[:, None, None], axis=1)[:, 0]


class BertClassifier(nnx.Module):
    """Computes one logit per label for each text, from the state of the text's first token."""

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
        """Returns the float32 logits of all C labels; a multi-label classifier applies a sigmoid to them.

        Args:
          tokens: one text per row with its special tokens.
          mask: True at tokens that are not padding, which may be on either side and does not change the result.

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
            return layer.after_attention(x, layers.attention(*layer.qkv(x), real=mask)), None

        x, _ = jax.lax.scan(body, x, state)
        pooled = jnp.tanh(self.pooler(first_token_state(x, mask)))
        return self.classifier(pooled).astype(jnp.float32)

    def _positions(self, tokens: Array, mask: Array) -> Array:
        """Returns each token's row of the position table `[B, T]`.

        BERT counts from 0. RoBERTa counts from `pad_token_id + 1` and gives padding the row `pad_token_id`.
        """
        if self.config.kind == "bert":
            return layers.positions_from_mask(mask)
        is_counted = (mask & (tokens != self.config.pad_token_id)).astype(jnp.int32)
        return jnp.cumsum(is_counted, axis=1) * is_counted + self.config.pad_token_id
