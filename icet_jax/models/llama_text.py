"""Llama without images: a language model that judges, and a reward model (HF `LlamaForCausalLM`,
`LlamaForSequenceClassification`)."""

from typing import Any

import jax.numpy as jnp
from flax import nnx

from icet_jax.models import layers
from icet_jax.models.family import KVCache
from icet_jax.models.layers import Lora
from icet_jax.models.llama import Llama, LlamaConfig, LlamaDecoder
from icet_jax.typing import Array, Bool, Float, Int


class LlamaLM(nnx.Module):
    """A `LanguageModel`: `generation.decode.generate` runs it with `visual=None`."""

    def __init__(
        self, config: LlamaConfig, *, rngs: nnx.Rngs, dtype: Any = jnp.float32, param_dtype: Any = jnp.float32
    ):
        self.config = config
        self.language_model = Llama(config, rngs=rngs, dtype=dtype, param_dtype=param_dtype)

    @property
    def vocab_size(self) -> int:
        """Columns of the logits."""
        return self.config.vocab_size

    @property
    def hidden_size(self) -> int:
        """Width of the decoder."""
        return self.config.hidden_size

    def decode(
        self,
        tokens: Int[Array, "B T"],
        positions: Int[Array, "B T"],
        mask: Bool[Array, "B T"],
        visual: None = None,
        cache: KVCache | None = None,
        lora: Lora | None = None,
    ) -> tuple[Float[Array, "B T E"], KVCache | None]:
        """Hidden states after the final norm; with a cache, `tokens` continue what it holds."""
        return self.language_model(self.language_model.embed(tokens), positions, mask, cache, lora)

    def logits(self, hidden: Float[Array, "*batch E"]) -> Float[Array, "*batch V"]:
        """Float32 next-token logits."""
        return self.language_model.logits(hidden)

    def init_cache(self, batch: int, length: int) -> KVCache:
        """An empty cache for `length` tokens in each of `batch` rows."""
        return self.language_model.init_cache(batch, length)


class LlamaRewardModel(nnx.Module):
    """Scores a text with the head's output at its last real token."""

    def __init__(
        self, config: LlamaConfig, *, rngs: nnx.Rngs, dtype: Any = jnp.float32, param_dtype: Any = jnp.float32
    ):
        common: dict[str, Any] = dict(rngs=rngs, dtype=dtype, param_dtype=param_dtype)
        self.config = config
        self.language_model = LlamaDecoder(config, **common)
        self.score = layers.Linear(config.hidden_size, 1, use_bias=False, stddev=0.02, **common)

    def __call__(self, tokens: Int[Array, "B T"], mask: Bool[Array, "B T"]) -> Float[Array, "B"]:
        """Raw float32 rewards; padding may stand on either side, an empty row gets the score of its first column."""
        embeddings = self.language_model.embed(tokens)
        hidden, _ = self.language_model(embeddings, layers.positions_from_mask(mask), mask)
        last = jnp.max(jnp.where(mask, jnp.arange(tokens.shape[1]), 0), axis=1)
        final = jnp.take_along_axis(hidden, last[:, None, None], axis=1)[:, 0]
        return self.score(final)[:, 0].astype(jnp.float32)
