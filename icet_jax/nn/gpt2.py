"""GPT-2 with a scalar head, used as a reward model (HF `GPT2ForSequenceClassification` with one label)."""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from icet_jax.nn import layers
from icet_jax.typing import Array, Bool, DType, Float, Int, Keywords


@dataclasses.dataclass(frozen=True)
class GPT2Config:
    """Holds the sizes of the network under HF's names."""

    vocab_size: int
    n_positions: int
    n_embd: int
    n_layer: int
    n_head: int
    n_inner: int
    layer_norm_epsilon: float = 1e-5


class GPT2Blocks(nnx.Module):
    """Holds the weights of all blocks, stacked along their first axis.

    It cannot be called in this stacked form. To run one block, call the module `nnx.merge(graphdef, slice)`, made
    of that block's slice of the weights.
    """

    def __init__(self, config: GPT2Config, *, rngs: nnx.Rngs, dtype: DType, param_dtype: DType):
        width, depth = config.n_embd, config.n_layer
        self.config = config
        common: Keywords = dict(rngs=rngs, use_bias=True, dtype=dtype, param_dtype=param_dtype, layers=depth)
        norm: Keywords = dict(epsilon=config.layer_norm_epsilon, param_dtype=param_dtype, layers=depth)
        residual = layers.depth_scaled(0.02, depth)
        self.ln_1 = layers.LayerNorm(width, **norm)
        self.c_attn = layers.Linear(width, 3 * width, stddev=0.02, **common)
        self.c_proj = layers.Linear(width, width, stddev=residual, **common)
        self.ln_2 = layers.LayerNorm(width, **norm)
        self.c_fc = layers.Linear(width, config.n_inner, stddev=0.02, **common)
        self.mlp_proj = layers.Linear(config.n_inner, width, stddev=residual, **common)

    def __call__(self, x: Float[Array, "B T E"], mask: Bool[Array, "B T"]) -> Float[Array, "B T E"]:
        """Applies one block: causal attention, then the MLP with tanh GELU (HF `GPT2Block`)."""
        q, k, v = (
            layers.split_heads(part, self.config.n_head) for part in jnp.split(self.c_attn(self.ln_1(x)), 3, axis=-1)
        )
        x = x + self.c_proj(layers.attention(q, k, v, real=mask, causal=True))
        return x + self.mlp_proj(layers.gelu_tanh(self.c_fc(self.ln_2(x))))


class GPT2Backbone(nnx.Module):
    """Computes the hidden states of GPT-2 after the final norm, without any head (HF `GPT2Model`)."""

    def __init__(
        self, config: GPT2Config, *, rngs: nnx.Rngs, dtype: DType = jnp.float32, param_dtype: DType = jnp.float32,
        remat: str = "none",
    ):  # fmt: skip
        self.config, self.dtype, self.remat = config, dtype, remat
        self.wte = layers.normal(rngs, (config.vocab_size, config.n_embd), 0.02, param_dtype)
        self.wpe = layers.normal(rngs, (config.n_positions, config.n_embd), 0.01, param_dtype)
        self.layers = GPT2Blocks(config, rngs=rngs, dtype=dtype, param_dtype=param_dtype)
        self.ln_f = layers.LayerNorm(config.n_embd, epsilon=config.layer_norm_epsilon, param_dtype=param_dtype)

    def hidden(self, tokens: Int[Array, "B T"], mask: Bool[Array, "B T"]) -> Float[Array, "B T E"]:
        """Returns the hidden states after the final norm, with causal attention that ignores padding.

        Args:
          tokens: one text per row.
          mask: True at tokens that are not padding; positions count these tokens only.

        Raises:
          ValueError: a text is longer than the position table.
        """
        length = tokens.shape[1]
        if length > self.config.n_positions:
            raise ValueError(f"{length} tokens exceed the {self.config.n_positions} positions of the reward model")
        positions = layers.positions_from_mask(mask)
        x = self.wte[...][tokens].astype(self.dtype) + self.wpe[...][positions].astype(self.dtype)
        graph, state = nnx.split(self.layers)

        def body(x: Array, weights: nnx.State) -> tuple[Array, None]:
            return nnx.merge(graph, weights)(x, mask), None

        x, _ = jax.lax.scan(layers.rematerialise(body, self.remat), x, state)
        return self.ln_f(x)


class GPT2RewardModel(GPT2Backbone):
    """Computes a scalar reward for each text: the output of a linear head at its last token."""

    def __init__(
        self, config: GPT2Config, *, rngs: nnx.Rngs, dtype: DType = jnp.float32, param_dtype: DType = jnp.float32,
        remat: str = "none",
    ):  # fmt: skip
        super().__init__(config, rngs=rngs, dtype=dtype, param_dtype=param_dtype, remat=remat)
        # In bfloat16 a reward near 8 would be rounded to a multiple of 1/16.
        head: Keywords = dict(dtype=jnp.float32, param_dtype=param_dtype)
        self.score = layers.Linear(config.n_embd, 1, use_bias=False, stddev=0.02, rngs=rngs, **head)

    def __call__(self, tokens: Int[Array, "B T"], mask: Bool[Array, "B T"]) -> Float[Array, "B"]:
        """Returns raw float32 rewards; the reward of a row without any token has no meaning.

        Args:
          tokens: one text per row.
          mask: True at tokens that are not padding.

        Raises:
          ValueError: a text is longer than the position table.
        """
        last = jnp.max(jnp.where(mask, jnp.arange(tokens.shape[1]), 0), axis=1)
        final = jnp.take_along_axis(self.hidden(tokens, mask), last[:, None, None], axis=1)[:, 0]
        return self.score(final)[:, 0]
