"""LLaMA and Vicuna decoder with grouped-query attention, rotary embedding and KV cache (HF `LlamaForCausalLM`)."""

import dataclasses
import math
from typing import Any

import flax
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from icet_jax.nn import fused, layers
from icet_jax.nn.alignment import align
from icet_jax.nn.kv_cache import KVCache, attend
from icet_jax.nn.layers import Lora
from icet_jax.parallel.traced import by_rows, gather_kernel, gather_weights
from icet_jax.typing import Adapters, Array, Bool, DType, Float, Int, Keywords

Angles = tuple[Any, Any]
"""(cos, sin) of the tokens' rotary angles, each `[B, T, 1, D]`."""


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """Holds the parameters of Llama 3's scaling of the rotary frequencies (`rope_type` "llama3")."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int


@dataclasses.dataclass(frozen=True)
class LlamaConfig:
    """Holds the sizes of the decoder under HF's names.

    Three fields do not exist in HF's config. `mrope_section` says how many rotary frequencies use the first, the second
    and the third position of a token (multimodal rotary embedding); it is empty if a token has one position. `biased`
    lists the projections that have a bias, such as "q_proj". `qk_norm` says whether each head's queries and keys are
    normalised before the rotary embedding (HF `Qwen3Attention`).
    """

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
    mrope_section: tuple[int, ...] = ()
    biased: tuple[str, ...] = ()
    qk_norm: bool = False


def inverse_frequencies(config: LlamaConfig) -> np.ndarray:
    """Returns the rotary frequencies in radians per position, float32 `[head_dim / 2]`.

    Source: HF `_compute_llama3_parameters`.
    """
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
    """Returns {projection that LoRA can adapt: (number of layers, input size, output size)}."""
    depth, width, ffn = config.num_hidden_layers, config.hidden_size, config.intermediate_size
    q = config.num_attention_heads * config.head_dim
    kv = config.num_key_value_heads * config.head_dim
    return {
        "q_proj": (depth, width, q), "k_proj": (depth, width, kv), "v_proj": (depth, width, kv),
        "o_proj": (depth, q, width), "gate_proj": (depth, width, ffn), "up_proj": (depth, width, ffn),
        "down_proj": (depth, ffn, width),
    }  # fmt: skip


class LlamaBlocks(nnx.Module):
    """Holds the weights of all decoder layers, stacked along their first axis.

    The methods run one layer. Call them on a module of one layer, `nnx.merge(graphdef, that layer's slice)`. Their
    arguments are the input `x` of the layer, its LoRA adapters `lora` ({} without any) and the `scale` of the adapters.
    """

    def __init__(self, config: LlamaConfig, *, rngs: nnx.Rngs, dtype: DType, param_dtype: DType):
        depth = config.num_hidden_layers
        self.config = config
        common: Keywords = dict(rngs=rngs, dtype=dtype, param_dtype=param_dtype, layers=depth)
        norm: Keywords = dict(epsilon=config.rms_norm_eps, param_dtype=param_dtype, layers=depth)
        self.input_layernorm = layers.RMSNorm(config.hidden_size, **norm)
        self.post_attention_layernorm = layers.RMSNorm(config.hidden_size, **norm)
        self.q_norm = layers.RMSNorm(config.head_dim, **norm) if config.qk_norm else None
        self.k_norm = layers.RMSNorm(config.head_dim, **norm) if config.qk_norm else None
        shapes = lora_shapes(config)

        def projection(name: str, residual: bool = False) -> layers.Linear:
            """Returns a projection; `residual`: its output is added to the residual, which needs smaller weights."""
            _, size_in, size_out = shapes[name]
            stddev = layers.depth_scaled(size_in**-0.5, depth) if residual else None
            return layers.Linear(size_in, size_out, use_bias=name in config.biased, stddev=stddev, **common)

        self.q_proj, self.k_proj, self.v_proj = projection("q_proj"), projection("k_proj"), projection("v_proj")
        self.o_proj = projection("o_proj", residual=True)
        self.gate_proj, self.up_proj = projection("gate_proj"), projection("up_proj")
        self.down_proj = projection("down_proj", residual=True)

    def qkv(
        self, x: Float[Array, "B T E"], angles: Angles, lora: Adapters, scale: float
    ) -> tuple[Float[Array, "B T H D"], Float[Array, "B T K D"], Float[Array, "B T K D"]]:
        """Returns queries and keys, both with rotary embedding, and values."""
        return self.query(x, angles, lora, scale), *self.keys_values(x, angles, lora, scale)

    def query(self, x: Float[Array, "B T E"], angles: Angles, lora: Adapters, scale: float) -> Float[Array, "B T H D"]:
        """Returns the queries, with rotary embedding."""
        y, heads = self.input_layernorm(x), self.config.num_attention_heads
        q = layers.split_heads(self.q_proj(y, lora.get("q_proj"), scale), heads)
        return layers.rotate(q if self.q_norm is None else self.q_norm(q), *angles)

    def keys_values(
        self, x: Float[Array, "B T E"], angles: Angles, lora: Adapters, scale: float
    ) -> tuple[Float[Array, "B T K D"], Float[Array, "B T K D"]]:
        """Returns the keys, with rotary embedding, and the values."""
        y, heads = self.input_layernorm(x), self.config.num_key_value_heads
        k = layers.split_heads(self.k_proj(y, lora.get("k_proj"), scale), heads)
        v = layers.split_heads(self.v_proj(y, lora.get("v_proj"), scale), heads)
        return layers.rotate(k if self.k_norm is None else self.k_norm(k), *angles), v

    def after_attention(
        self, x: Float[Array, "B T E"], attended: Float[Array, "B T HD"], lora: Adapters, scale: float
    ) -> Float[Array, "B T E"]:
        """Returns the output of the layer from its input x and the concatenated outputs of its attention heads.

        Output projection and SwiGLU MLP are each added to the residual (HF `LlamaDecoderLayer`).
        """
        x = x + self.o_proj(attended, lora.get("o_proj"), scale)
        y = self.post_attention_layernorm(x)
        gated = jax.nn.silu(self.gate_proj(y, lora.get("gate_proj"), scale))
        return x + self.down_proj(gated * self.up_proj(y, lora.get("up_proj"), scale), lora.get("down_proj"), scale)


class SelfAttention:
    """Runs decoder layers on whole sequences, with causal attention that ignores padding.

    With a prefix, the tokens also attend to all cached tokens of their row.
    """

    def __init__(
        self, angles: Angles, mask: Bool[Array, "B T"], prefix: KVCache | None = None, *, right_padded: bool = False
    ):  # fmt: skip
        """Prepares the attention of all layers.

        Args:
          angles: rotary angles of the tokens.
          mask: True at tokens that are not padding.
          prefix: cache of the tokens that come before these, or None.
          right_padded: whether all padding is known to be on the right.
        """
        self.angles, self.mask, self.right_padded = angles, mask, right_padded
        length = mask.shape[1]
        self.allowed = jnp.tril(jnp.ones((length, length), bool))[None, None] & mask[:, None, None, :]
        self.past = None if prefix is None else (jnp.stack(prefix.k), jnp.stack(prefix.v))
        if prefix is not None:
            is_cached = jnp.arange(prefix.columns) < prefix.length[:, None]
            shape = (mask.shape[0], 1, length, prefix.columns)
            is_cached = jnp.broadcast_to(is_cached[:, None, None], shape)
            self.allowed = jnp.concatenate([is_cached, jnp.broadcast_to(self.allowed, (*shape[:3], length))], axis=-1)

    def __call__(
        self, x: Float[Array, "B T E"], layer: LlamaBlocks, adapters: Adapters, scale: float, index: Any
    ) -> tuple[Float[Array, "B T E"], tuple[Array, Array]]:
        """Runs one layer and returns its output and the tokens' keys and values, `[B, K, T, D]`.

        Args:
          x: input of the layer.
          layer: weights of the layer.
          adapters: the layer's LoRA adapters, {} without any.
          scale: scale of the adapters.
          index: index of the layer, by which its cached prefix is found; not used without a prefix.
        """
        q, k, v = layer.qkv(x, self.angles, adapters, scale)
        if self.past is None:
            attended = layers.attention(q, k, v, real=self.mask, causal=True, right_padded=self.right_padded)
        else:
            attended = self._attend(q, k, v, self.allowed, index)
        return by_rows(layer.after_attention(x, attended, adapters, scale)), _heads_first(k, v)

    def last(
        self,
        x: Float[Array, "B T E"],
        layer: LlamaBlocks,
        adapters: Adapters,
        scale: float,
        index: Any,
        columns: Int[Array, "B"],
    ) -> tuple[Float[Array, "B 1 E"], tuple[Array, Array]]:
        """Runs the final layer. Returns its output at one column of each row, and the keys and values of all tokens.

        Args:
          x, layer, adapters, scale, index: see `__call__`.
          columns: the column of each row.
        """
        k, v = layer.keys_values(x, self.angles, adapters, scale)
        index_of_row = columns[:, None, None]
        x = jnp.take_along_axis(x, index_of_row, axis=1)
        cos, sin = (jnp.take_along_axis(part, index_of_row[..., None], axis=1) for part in self.angles)
        q = layer.query(x, (cos, sin), adapters, scale)
        allowed = jnp.take_along_axis(self.allowed, index_of_row[:, None], axis=2)
        return layer.after_attention(x, self._attend(q, k, v, allowed, index), adapters, scale), _heads_first(k, v)

    def _attend(self, q: Array, k: Array, v: Array, allowed: Array, index: Any) -> Array:
        """Returns the attention of queries to k and to layer `index` of the cached prefix, where `allowed` is True."""
        if self.past is not None:
            cached = [part.swapaxes(1, 2) for part in layer_at(self.past, index)]
            k, v = jnp.concatenate([cached[0], k], axis=1), jnp.concatenate([cached[1], v], axis=1)
        return layers.attention(q, k, v, allowed)


def _heads_first(k: Array, v: Array) -> tuple[Array, Array]:
    """Returns keys and values `[B, T, K, D]` as `[B, K, T, D]`, the order of the KV cache."""
    return k.swapaxes(1, 2), v.swapaxes(1, 2)


@flax.struct.dataclass
class UnstackedLayers:
    """Holds separate arrays for each layer of a decoder, for decoding steps.

    With arrays that hold all layers, a step over few rows would spend most of its time on slicing out each layer.

    Attributes:
      layers: (weights, LoRA adapters) of each layer, in the order of the decoder; or (`fused.FusedLayer`, {}).
      scale: scale of the adapters, static.
    """

    layers: tuple[Any, ...]
    scale: float = flax.struct.field(pytree_node=False)


class NextToken:
    """Runs decoder layers for one new token per row: writes it to the cache, then attends to the cache.

    Attributes:
      k, v: cached keys and values of all layers; a call replaces those of the layer that it runs.
    """

    def __init__(self, config: LlamaConfig, cache: KVCache):
        self.angles = rotary(config, cache.next_position[:, None])
        self.cache, self.visible = cache, cache.visible_columns()
        self.k, self.v = list(cache.k), list(cache.v)

    def __call__(
        self,
        x: Float[Array, "B 1 E"],
        layer: LlamaBlocks | fused.FusedLayer,
        adapters: Adapters,
        scale: float,
        index: int,
    ) -> Float[Array, "B 1 E"]:
        """Runs layer `index` on the new token, updates `k` and `v` and returns the output; see `SelfAttention`."""
        q, k, v = layer.qkv(x, self.angles, adapters, scale)
        self.k[index], self.v[index] = self.cache.append_to_layer(index, *_heads_first(k, v))
        attended = attend(q[:, 0], self.k[index], self.v[index], self.visible)
        return layer.after_attention(x, attended[:, None], adapters, scale)

    def updated_cache(self, active: Bool[Array, "B"]) -> KVCache:
        """Returns the cache with the new token; inactive rows keep their length and their next position."""
        return KVCache(
            k=tuple(self.k),
            v=tuple(self.v),
            length=self.cache.length + active,
            next_position=self.cache.next_position + active,
        )


def rotary(config: LlamaConfig, positions: Int[Array, "*sections B T"]) -> Angles:
    """Returns cos and sin of the tokens' rotary angles.

    With positions `[3, B, T]` the frequencies are split into the sections `config.mrope_section`, and each section uses
    one of a token's three positions (HF `apply_multimodal_rotary_pos_emb`).
    """
    frequencies = jnp.asarray(inverse_frequencies(config))
    if positions.ndim == 2:
        return layers.rotary_angles(positions[..., None], frequencies)
    section = np.repeat(np.arange(len(config.mrope_section)), config.mrope_section)
    return layers.rotary_angles(jnp.moveaxis(positions, 0, -1)[..., section], frequencies)


def after_prefix(positions: Int[Array, "*sections B T"], prefix: KVCache | None) -> Int[Array, "*sections B T"]:
    """Returns `positions`, which begin at 0, shifted to those of tokens that follow `prefix` (None: unchanged)."""
    return positions if prefix is None else positions + prefix.next_position[:, None]


def prompt_cache(
    k: tuple[Array, ...], v: tuple[Array, ...], positions: Int[Array, "*sections B T"], mask: Bool[Array, "B T"],
    prefix: KVCache | None,
) -> KVCache:  # fmt: skip
    """Returns the cache of right-padded tokens appended to `prefix`.

    Args:
      k, v: keys and values of each layer, `[B, K, T, D]`.
      positions: positions of the tokens, from `after_prefix`. The cache's next position of a row is the largest of them
        plus one.
      mask: True at real tokens.
      prefix: cache of the tokens that come before these, or None.
    """
    length = mask.sum(axis=1).astype(jnp.int32)
    last = jnp.where(mask, positions, -1).max(axis=(*range(positions.ndim - 2), -1)).astype(jnp.int32)
    if prefix is None:
        return KVCache(k=k, v=v, length=length, next_position=last + 1)
    wide = prefix.with_room(mask.shape[1])
    pairs = [wide.append_to_layer(layer, *pair) for layer, pair in enumerate(zip(k, v, strict=True))]
    all_k, all_v = (tuple(parts) for parts in zip(*pairs, strict=True))
    next_position = jnp.maximum(prefix.next_position, last + 1)
    return KVCache(k=all_k, v=all_v, length=prefix.length + length, next_position=next_position)


def layer_at(stacks: Any, index: int | Array) -> Any:
    """Returns layer `index` of a pytree whose arrays are stacked over layers; the index may be traced."""
    if isinstance(index, int):
        return jax.tree.map(lambda leaf: leaf[index], stacks)
    return jax.tree.map(lambda leaf: jax.lax.dynamic_index_in_dim(leaf, index, keepdims=False), stacks)


class LlamaDecoder(nnx.Module):
    """A decoder without its head: token embedding, decoder layers and final norm (HF `LlamaModel`)."""

    def __init__(
        self, config: LlamaConfig, *, rngs: nnx.Rngs, dtype: DType = jnp.float32, param_dtype: DType = jnp.float32,
        remat: str = "none",
    ):  # fmt: skip
        self.config, self.dtype, self.remat = config, dtype, remat
        width = config.hidden_size
        self.embed_tokens = layers.normal(rngs, (config.vocab_size, width), 0.02, param_dtype)
        self.layers = LlamaBlocks(config, rngs=rngs, dtype=dtype, param_dtype=param_dtype)
        self.norm = layers.RMSNorm(width, epsilon=config.rms_norm_eps, param_dtype=param_dtype)

    def embed(self, tokens: Int[Array, "*batch"]) -> Float[Array, "*batch E"]:
        """Returns the token embeddings in the compute dtype."""
        return self.embed_tokens[...][tokens].astype(self.dtype)

    def __call__(
        self,
        embeddings: Float[Array, "B T E"],
        positions: Int[Array, "*sections B T"],
        mask: Bool[Array, "B T"],
        lora: Lora | None = None,
    ) -> Float[Array, "B T E"]:
        """Returns the hidden states of whole sequences after the final norm, with causal attention.

        Args:
          positions: rotary position of each token, from 0; see `rotary`.
          mask: True at real tokens; padding may be on either side.
          lora: adapters, or None for the model without adapters.
        """
        aligned = align(embeddings.astype(self.dtype), positions, mask)
        self_attention = SelfAttention(
            rotary(self.config, aligned.positions), aligned.mask, right_padded=aligned.right_padded
        )
        graph, state, adapters, scale = self._stacks(lora)

        def body(x: Array, slices: Any) -> tuple[Array, None]:
            weights, adapters = (gather_weights(part, x) for part in slices)
            return self_attention(x, nnx.merge(graph, weights), adapters, scale, None)[0], None

        x = by_rows(aligned.embeddings)
        x, _ = jax.lax.scan(layers.rematerialise(body, self.remat), x, (state, adapters))
        return aligned.restore(self.norm(x))

    def prefill(
        self,
        embeddings: Float[Array, "B T E"],
        positions: Int[Array, "*sections B T"],
        mask: Bool[Array, "B T"],
        prefix: KVCache | None = None,
        lora: Lora | None = None,
    ) -> tuple[Float[Array, "B E"], KVCache]:
        """Returns the final state of each row's last token, and the cache of `prefix` and of these T tokens.

        Args:
          embeddings: embeddings of the tokens after `prefix`.
          positions: rotary positions of these tokens, which begin at 0 even if there is a prefix; see `rotary`.
          mask: True at real tokens; padding is on the right. The state of a row without any token has no meaning.
          prefix: cache of the tokens that come before these, or None.
          lora: adapters, or None.
        """
        positions = after_prefix(positions, prefix)
        self_attention = SelfAttention(rotary(self.config, positions), mask, prefix, right_padded=True)
        graph, state, adapters, scale = self._stacks(lora)
        depth = self.config.num_hidden_layers
        x = by_rows(embeddings.astype(self.dtype))
        k: list[Array] = []
        v: list[Array] = []
        # Not a scan, which would stack the keys and values of all layers before they are laid out for the cache.
        for index in range(depth):
            weights, layer_adapters = (gather_weights(layer_at(part, index), x) for part in (state, adapters))
            layer = nnx.merge(graph, weights)
            if index < depth - 1:
                x, keys_values = self_attention(x, layer, layer_adapters, scale, index)
            else:
                last = jnp.maximum(mask.sum(axis=1) - 1, 0)
                x, keys_values = self_attention.last(x, layer, layer_adapters, scale, index, last)
            k.append(keys_values[0])
            v.append(keys_values[1])
        return self.norm(x)[:, 0], prompt_cache(tuple(k), tuple(v), positions, mask, prefix)

    def unstack_layers(self, lora: Lora | None = None) -> UnstackedLayers:
        """Returns the layers as separate arrays, for `step`."""
        _, state, adapters, scale = self._stacks(lora)
        layers_apart = (layer_at((state, adapters), index) for index in range(self.config.num_hidden_layers))
        unstacked = (fused.for_steps(weights, pairs, scale, self.config, self.dtype) for weights, pairs in layers_apart)
        return UnstackedLayers(tuple(unstacked), scale)

    def step(
        self, tokens: Int[Array, "B"], active: Bool[Array, "B"], cache: KVCache, unstacked: UnstackedLayers
    ) -> tuple[Float[Array, "B E"], KVCache]:
        """Returns the final state of one new token per row and the new cache; see `LanguageModel.step`."""
        next_token = NextToken(self.config, cache)
        graph, _ = nnx.split(self.layers)
        x = self.embed(tokens)[:, None]
        for index, (weights, adapters) in enumerate(unstacked.layers):
            x = next_token(x, fused.layer_for_step(graph, weights), adapters, unstacked.scale, index)
        return self.norm(x)[:, 0], next_token.updated_cache(active)

    def _stacks(self, lora: Lora | None) -> tuple[Any, Any, dict[str, Any], float]:
        """Returns (structure of a layer, stacked weights, stacked adapters or {}, scale of the adapters)."""
        graph, state = nnx.split(self.layers)
        return graph, state, {} if lora is None else dict(lora.weights), 1.0 if lora is None else lora.scale


class HasLanguageModelHead:
    """Computes logits with a decoder's head `lm_head`; see `LanguageModel`."""

    lm_head: layers.Linear
    dtype: DType

    def logits(self, hidden: Float[Array, "*batch E"], head: Array | None = None) -> Float[Array, "*batch V"]:
        """Returns the float32 logits of the next token; see `LanguageModel.logits`."""
        kernel = self.lm_head.kernel[...] if head is None else head
        return jnp.matmul(hidden, kernel.astype(self.dtype), preferred_element_type=jnp.float32)

    def head_for(self, hidden: Float[Array, "B *rest E"]) -> Float[Array, "E V"]:
        """Returns the head's weight matrix for `logits`; see `LanguageModel.head_for`."""
        return gather_kernel(self.lm_head.kernel[...], hidden, "lm_head/kernel")


class Llama(HasLanguageModelHead, LlamaDecoder):
    """A decoder with its language-model head (HF `LlamaForCausalLM`)."""

    def __init__(
        self, config: LlamaConfig, *, rngs: nnx.Rngs, dtype: DType = jnp.float32, param_dtype: DType = jnp.float32,
        remat: str = "none",
    ):  # fmt: skip
        common: Keywords = dict(rngs=rngs, dtype=dtype, param_dtype=param_dtype)
        super().__init__(config, remat=remat, **common)
        self.lm_head = layers.Linear(config.hidden_size, config.vocab_size, use_bias=False, **common)


class DelegatesToDecoder:
    """Forwards the decoding methods of a network to its decoder, `language_model`; see `LanguageModel`.

    Positions count the tokens of a row, images included. A family with other positions overrides `positions`.
    """

    language_model: Any

    def positions(
        self, tokens: Int[Array, "B T"], mask: Bool[Array, "B T"], visual: Any = None
    ) -> Int[Array, "*sections B T"]:
        """Returns the position of each token among its row's real tokens."""
        return layers.positions_from_mask(mask)

    def unstack_layers(self, lora: Lora | None = None) -> UnstackedLayers:
        """Returns the decoder's layers as separate arrays, for `step`."""
        return self.language_model.unstack_layers(lora)

    def step(
        self, tokens: Int[Array, "B"], active: Bool[Array, "B"], cache: Any, unstacked: UnstackedLayers
    ) -> tuple[Float[Array, "B E"], Any]:
        """Returns the final state of one new token per row and the new cache; see `LanguageModel.step`."""
        return self.language_model.step(tokens, active, cache, unstacked)

    def logits(self, hidden: Float[Array, "*batch E"], head: Array | None = None) -> Float[Array, "*batch V"]:
        """Returns the float32 logits of the next token; see `LanguageModel.logits`."""
        return self.language_model.logits(hidden, head)

    def head_for(self, hidden: Float[Array, "B *rest E"]) -> Float[Array, "E V"]:
        """Returns the head's weight matrix for `logits`; see `LanguageModel.head_for`."""
        return self.language_model.head_for(hidden)
