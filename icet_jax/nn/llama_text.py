"""Llama without images: as a language model that judges, and as a reward model.

Sources: HF `LlamaForCausalLM`, `LlamaForSequenceClassification`.
"""

import jax.numpy as jnp
from flax import nnx

from icet_jax.nn import layers
from icet_jax.nn.kv_cache import KVCache
from icet_jax.nn.layers import Lora
from icet_jax.nn.llama import DelegatesToDecoder, Llama, LlamaConfig, LlamaDecoder
from icet_jax.typing import Array, Bool, DType, Float, Int, Keywords


class LlamaLM(DelegatesToDecoder, nnx.Module):
    """A `LanguageModel` that takes no images: `visual` is always None."""

    def __init__(
        self,
        config: LlamaConfig,
        *,
        rngs: nnx.Rngs,
        dtype: DType = jnp.float32,
        param_dtype: DType = jnp.float32,
    ):
        self.config = config
        self.language_model = Llama(config, rngs=rngs, dtype=dtype, param_dtype=param_dtype)

    @property
    def vocab_size(self) -> int:
        """Returns the number of logits."""
        return self.config.vocab_size

    @property
    def hidden_size(self) -> int:
        """Returns the width of the decoder."""
        return self.config.hidden_size

    def decode(
        self,
        tokens: Int[Array, "B T"],
        positions: Int[Array, "B T"],
        mask: Bool[Array, "B T"],
        visual: None = None,
        lora: Lora | None = None,
    ) -> Float[Array, "B T E"]:
        """Returns the hidden states of whole sequences after the final norm; see `LanguageModel.decode`."""
        return self.language_model(self.language_model.embed(tokens), positions, mask, lora)

    def prefill(
        self,
        tokens: Int[Array, "B T"],
        mask: Bool[Array, "B T"],
        visual: None = None,
        prefix: KVCache | None = None,
        lora: Lora | None = None,
    ) -> tuple[Float[Array, "B E"], KVCache]:
        """Runs right-padded prompts and returns the last states and the cache; see `LanguageModel.prefill`."""
        positions = self.positions(tokens, mask, visual)
        return self.language_model.prefill(self.language_model.embed(tokens), positions, mask, prefix, lora)


class LlamaRewardModel(nnx.Module):
    """Computes a scalar reward for each text: the output of a linear head at its last token."""

    def __init__(
        self,
        config: LlamaConfig,
        *,
        rngs: nnx.Rngs,
        dtype: DType = jnp.float32,
        param_dtype: DType = jnp.float32,
        remat: str = "none",
    ):
        self.config = config
        self.language_model = LlamaDecoder(config, rngs=rngs, dtype=dtype, param_dtype=param_dtype, remat=remat)
        # In bfloat16 a reward near 8 would be rounded to a multiple of 1/16.
        head: Keywords = dict(dtype=jnp.float32, param_dtype=param_dtype)
        self.score = layers.Linear(config.hidden_size, 1, use_bias=False, stddev=0.02, rngs=rngs, **head)

    def __call__(self, tokens: Int[Array, "B T"], mask: Bool[Array, "B T"]) -> Float[Array, "B"]:
        """Returns raw float32 rewards; the reward of a row without any token has no meaning.

        Args:
          tokens: one text per row.
          mask: True at tokens that are not padding, which may be on either side.
        """
        embeddings = self.language_model.embed(tokens)
        hidden = self.language_model(embeddings, layers.positions_from_mask(mask), mask)
        last = jnp.max(jnp.where(mask, jnp.arange(tokens.shape[1]), 0), axis=1)
        final = jnp.take_along_axis(hidden, last[:, None, None], axis=1)[:, 0]
        return self.score(final)[:, 0]
