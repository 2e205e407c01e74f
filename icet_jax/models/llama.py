"""LLaMA / Vicuna decoder: scanned layers, GQA, rotary embedding, KV cache, LoRA (HF `LlamaForCausalLM`)."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from icet_jax.models import layers
from icet_jax.models.family import KVCache
from icet_jax.models.layers import Lora
from icet_jax.typing import Array, Bool, Float, Int


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """Llama-3 frequency scaling (`rope_type` "llama3")."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int


@dataclasses.dataclass(frozen=True)
class LlamaConfig:
    """Sizes of the decoder, under HF's names."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    tie_word_embeddings: bool = False


def inverse_frequencies(config: LlamaConfig) -> np.ndarray:
    """Rotary frequencies in radians per position, float32 `[head_dim / 2]` (HF `_compute_llama3_parameters`)."""
    exponent = np.arange(0, config.head_dim, 2, dtype=np.float32) / np.float32(config.head_dim)
    frequencies = (1.0 / np.float32(config.rope_theta) ** exponent).astype(np.float32)
    scaling = config.rope_scaling
    if scaling is None:
        return frequencies
    wavelength = 2 * math.pi / frequencies
    original = scaling.original_max_position_embeddings
    smooth = (original / wavelength - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    blended = frequencies * ((1 - smooth) / scaling.factor + smooth)
    out = np.where(wavelength > original / scaling.low_freq_factor, frequencies / scaling.factor, blended)
    return np.where(wavelength < original / scaling.high_freq_factor, frequencies, out).astype(np.float32)


def lora_shapes(config: LlamaConfig) -> dict[str, tuple[int, int, int]]:
    """`(layers, in, out)` of every decoder projection that LoRA can adapt."""
    depth, width, ffn = config.num_hidden_layers, config.hidden_size, config.intermediate_size
    q = config.num_attention_heads * config.head_dim
    kv = config.num_key_value_heads * config.head_dim
    return {
        "q_proj": (depth, width, q), "k_proj": (depth, width, kv), "v_proj": (depth, width, kv),
        "o_proj": (depth, q, width), "gate_proj": (depth, width, ffn), "up_proj": (depth, width, ffn),
        "down_proj": (depth, ffn, width),
    }  # fmt: skip


class LlamaBlocks(nnx.Module):
    """The stacked decoder layers; called on one layer's slice of the weights."""

    def __init__(self, config: LlamaConfig, *, rngs: nnx.Rngs, dtype: Any, param_dtype: Any):
        depth = config.num_hidden_layers
        self.config = config
        common: dict[str, Any] = dict(rngs=rngs, use_bias=False, dtype=dtype, param_dtype=param_dtype, layers=depth)
        norm: dict[str, Any] = dict(epsilon=config.rms_norm_eps, param_dtype=param_dtype, layers=depth)
        self.input_layernorm = layers.RMSNorm(config.hidden_size, **norm)
        self.post_attention_layernorm = layers.RMSNorm(config.hidden_size, **norm)
        shapes = lora_shapes(config)

        def projection(name: str, residual: bool = False) -> layers.Linear:
            _, size_in, size_out = shapes[name]
            stddev = layers.depth_scaled(size_in**-0.5, depth) if residual else None
            return layers.Linear(size_in, size_out, stddev=stddev, **common)

        self.q_proj, self.k_proj, self.v_proj = projection("q_proj"), projection("k_proj"), projection("v_proj")
        self.o_proj = projection("o_proj", residual=True)
        self.gate_proj, self.up_proj = projection("gate_proj"), projection("up_proj")
        self.down_proj = projection("down_proj", residual=True)

    def qkv(
        self, x: Float[Array, "B T E"], cos: Array, sin: Array, lora: Any, scale: float
    ) -> tuple[Float[Array, "B T H D"], Float[Array, "B T K D"], Float[Array, "B T K D"]]:
        """Rotated queries and keys, and values, of the normalised input."""
        y = self.input_layernorm(x)
        heads, kv_heads = self.config.num_attention_heads, self.config.num_key_value_heads
        q = layers.split_heads(self.q_proj(y, lora.get("q_proj"), scale), heads)
        k = layers.split_heads(self.k_proj(y, lora.get("k_proj"), scale), kv_heads)
        v = layers.split_heads(self.v_proj(y, lora.get("v_proj"), scale), kv_heads)
        return layers.rotate(q, cos, sin), layers.rotate(k, cos, sin), v

    def rest(
        self, x: Float[Array, "B T E"], attended: Float[Array, "B T HD"], lora: Any, scale: float
    ) -> Float[Array, "B T E"]:
        """Output projection and the SwiGLU MLP, with their residuals (HF `LlamaDecoderLayer`)."""
        x = x + self.o_proj(attended, lora.get("o_proj"), scale)
        y = self.post_attention_layernorm(x)
        gated = jax.nn.silu(self.gate_proj(y, lora.get("gate_proj"), scale))
        return x + self.down_proj(gated * self.up_proj(y, lora.get("up_proj"), scale), lora.get("down_proj"), scale)


class SelfAttention:
    """Causal layers over the tokens at hand, with the cache that precedes them or without; padding is never seen."""

    def __init__(self, angles: tuple[Array, Array], mask: Bool[Array, "B T"], cache: KVCache | None):
        """`angles`: cos and sin of the tokens' positions; `mask`: which of them are real."""
        self.cos, self.sin = angles
        self.cache, length = cache, mask.shape[1]
        if cache is None:
            self.allowed = jnp.tril(jnp.ones((length, length), bool))[None, None] & mask[:, None, None, :]
            return
        self.valid = _write(cache.valid, mask, cache.cursor)
        self.cursor = cache.cursor + length
        reach = cache.cursor[:, None] + jnp.arange(length)[None]
        columns = jnp.arange(self.valid.shape[1])
        self.allowed = (self.valid[:, None, :] & (columns[None, None] <= reach[:, :, None]))[:, None]

    def __call__(self, carry: Any, layer: LlamaBlocks, adapters: Any, scale: float, index: Array) -> Any:
        """One layer; the carry is (hidden states, keys, values), the latter None without a cache."""
        x, keys, values = carry
        q, k, v = layer.qkv(x, self.cos, self.sin, adapters, scale)
        if self.cache is not None:
            k, v = _write(keys[index], k, self.cache.cursor), _write(values[index], v, self.cache.cursor)
            keys, values = keys.at[index].set(k), values.at[index].set(v)
        return layer.rest(x, layers.attention(q, k, v, self.allowed), adapters, scale), keys, values

    def advanced(self, keys_values: Any) -> KVCache:
        """The cache after these tokens."""
        keys, values = keys_values
        return KVCache(k=keys, v=values, valid=self.valid, cursor=self.cursor)


def _write(rows: Array, new: Array, starts: Array) -> Array:
    """Writes each row's new columns from its start on."""
    return jax.vmap(lambda row, part, start: jax.lax.dynamic_update_slice_in_dim(row, part, start, axis=0))(
        rows, new, starts
    )


def empty_cache(config: LlamaConfig, batch: int, length: int, dtype: Any) -> KVCache:
    """A cache of `length` columns for `batch` rows that holds nothing yet."""
    shape = (config.num_hidden_layers, batch, length, config.num_key_value_heads, config.head_dim)
    return KVCache(
        k=jnp.zeros(shape, dtype),
        v=jnp.zeros(shape, dtype),
        valid=jnp.zeros((batch, length), bool),
        cursor=jnp.zeros((batch,), jnp.int32),
    )


class LlamaDecoder(nnx.Module):
    """Token embedding, decoder layers and final norm (HF `LlamaModel`)."""

    def __init__(
        self, config: LlamaConfig, *, rngs: nnx.Rngs, dtype: Any = jnp.float32, param_dtype: Any = jnp.float32,
        remat: str = "none",
    ):  # fmt: skip
        self.config, self.dtype, self.remat = config, dtype, remat
        width = config.hidden_size
        self.embed_tokens = layers.normal(rngs, (config.vocab_size, width), 0.02, param_dtype)
        self.layers = LlamaBlocks(config, rngs=rngs, dtype=dtype, param_dtype=param_dtype)
        self.norm = layers.RMSNorm(width, epsilon=config.rms_norm_eps, param_dtype=param_dtype)

    def embed(self, tokens: Int[Array, "B T"]) -> Float[Array, "B T E"]:
        """Token embeddings in the compute dtype."""
        return self.embed_tokens[...][tokens].astype(self.dtype)

    def init_cache(self, batch: int, length: int) -> KVCache:
        """An empty cache of `length` columns for `batch` rows, in the compute dtype."""
        return empty_cache(self.config, batch, length, self.dtype)

    def __call__(
        self,
        embeddings: Float[Array, "B T E"],
        positions: Int[Array, "B T"],
        mask: Bool[Array, "B T"],
        cache: KVCache | None = None,
        lora: Lora | None = None,
    ) -> tuple[Float[Array, "B T E"], KVCache | None]:
        """Runs the layers over embeddings; causal, padding never attended to.

        Args:
          positions: rotary position of each token, from 0.
          mask: real tokens of `embeddings`; padding may stand on either side.
          cache: what precedes them; each row's tokens are written from its cursor on.
          lora: adapters, or None for the reference model.

        Returns:
          Hidden states after the final norm, and the advanced cache.
        """
        angles = layers.rotary_angles(positions, jnp.asarray(inverse_frequencies(self.config)))
        attend = SelfAttention(angles, mask, cache)
        adapters = {} if lora is None else dict(lora.weights)
        scale = 1.0 if lora is None else lora.scale
        graph, state = nnx.split(self.layers)

        def body(carry: Any, slices: Any) -> tuple[Any, None]:
            weights, adapters, index = slices
            return attend(carry, nnx.merge(graph, weights), adapters, scale, index), None

        x = embeddings.astype(self.dtype)
        start = (x, None, None) if cache is None else (x, cache.k, cache.v)
        stacks = (state, adapters, jnp.arange(self.config.num_hidden_layers))
        (x, *keys_values), _ = jax.lax.scan(layers.rematerialise(body, self.remat), start, stacks)
        return self.norm(x), None if cache is None else attend.advanced(keys_values)


class Llama(LlamaDecoder):
    """The decoder with its language-model head."""

    def __init__(
        self, config: LlamaConfig, *, rngs: nnx.Rngs, dtype: Any = jnp.float32, param_dtype: Any = jnp.float32,
        remat: str = "none",
    ):  # fmt: skip
        common: dict[str, Any] = dict(rngs=rngs, dtype=dtype, param_dtype=param_dtype)
        super().__init__(config, remat=remat, **common)
        self.lm_head = layers.Linear(config.hidden_size, config.vocab_size, use_bias=False, **common)

    def logits(self, hidden: Float[Array, "*batch E"]) -> Float[Array, "*batch V"]:
        """Float32 logits of hidden states taken after the final norm."""
        kernel = self.lm_head.kernel[...].astype(self.dtype)
        return jnp.matmul(hidden, kernel, preferred_element_type=jnp.float32)
