"""Decoder of Llama 3.2 Vision: LLaMA layers, with gated cross-attention to the images in place of some (HF
`MllamaTextModel`).

Self-attention and cross-attention layers are stacked apart. Where cross-attention layers stand at a constant distance
(every fifth, in the published models) the decoder scans super-blocks; other layouts are unrolled.
"""

import dataclasses
import math
from typing import Any

import flax
import jax
import jax.numpy as jnp
from flax import nnx

from icet_jax.models import layers
from icet_jax.models.family import KVCache
from icet_jax.models.layers import Lora
from icet_jax.models.llama import (
    LlamaBlocks,
    LlamaConfig,
    SelfAttention,
    empty_cache,
    inverse_frequencies,
    lora_shapes,
)
from icet_jax.typing import Array, Bool, Float, Int

CROSS = "cross_layers"
"""Name of the cross-attention stack, and prefix of its adapters' keys (`cross_layers/q_proj`)."""


@dataclasses.dataclass(frozen=True)
class MllamaTextConfig:
    """Sizes of the decoder.

    Attributes:
      llama: its sizes; `num_hidden_layers` counts all layers, `vocab_size` the columns of the logits.
      cross_attention_layers: which layers (from 0) attend to images instead of to the text.
      extra_embeddings: rows of the embedding beyond the vocabulary (8: the image placeholder and its neighbours).
    """

    llama: LlamaConfig
    cross_attention_layers: tuple[int, ...]
    extra_embeddings: int = 8

    @property
    def self_layers(self) -> LlamaConfig:
        """The stack of self-attention layers."""
        count = self.llama.num_hidden_layers - len(self.cross_attention_layers)
        return dataclasses.replace(self.llama, num_hidden_layers=count)

    @property
    def cross_layers(self) -> LlamaConfig:
        """The stack of cross-attention layers, whose projections have the same sizes."""
        return dataclasses.replace(self.llama, num_hidden_layers=len(self.cross_attention_layers))

    def lora_shapes(self) -> dict[str, tuple[int, int, int]]:
        """`(layers, in, out)` of every projection that LoRA can adapt, by its adapter's key."""
        cross = {f"{CROSS}/{name}": shape for name, shape in lora_shapes(self.cross_layers).items()}
        return lora_shapes(self.self_layers) | cross

    def cross_keys_operations(self, image_tokens: int) -> int:
        """Operations of the keys and values of a row's `image_tokens`, in every cross-attention layer."""
        shapes = lora_shapes(self.cross_layers)
        return 2 * image_tokens * sum(math.prod(shapes[name]) for name in ("k_proj", "v_proj"))

    def cross_operations(self, length: int, image_tokens: int) -> int:
        """Operations of the cross-attention layers over `length` positions, but those keys and values."""
        if not image_tokens:
            return 0
        shapes, cross = lora_shapes(self.cross_layers), self.cross_layers
        weights = sum(math.prod(shape) for name, shape in shapes.items() if name not in ("k_proj", "v_proj"))
        scores = 4 * length * image_tokens * cross.num_attention_heads * cross.head_dim
        return 2 * length * weights + cross.num_hidden_layers * scores

    @property
    def super_blocks(self) -> tuple[int, tuple[bool, ...]]:
        """(number of equal super-blocks, for each of their layers whether it attends to images).

        An irregular layout is one super-block of all layers.
        """
        kinds = tuple(layer in self.cross_attention_layers for layer in range(self.llama.num_hidden_layers))
        count = max(len(self.cross_attention_layers), 1)
        period, rest = divmod(len(kinds), count)
        regular = not rest and kinds == kinds[:period] * count
        return (count, kinds[:period]) if regular else (1, kinds)


@flax.struct.dataclass
class CrossStates:
    """What cross-attention layers see of the images; every leaf is row-aligned.

    Attributes:
      states: Float[B, M * N, E], projected vision tokens of a row's images, one after the other.
      tiles: Bool[B, M, tiles], which tiles are there; all False for an absent image.
    """

    # Not annotated with shapes: jax also fills pytrees with what are no arrays (jit(...).lower does).
    states: Any
    tiles: Any


@flax.struct.dataclass
class MllamaCache:
    """Keys and values of the text, and those of the images once they have been computed.

    Attributes:
      text: of the self-attention layers.
      k, v: of the images, after `k_norm`, `[C, B, M * N, K, D]`; None before the prefill and without images.
      allowed: image tokens that the next token of a row attends to, `[B, M * N]`.
      real: tokens of images that are there, `[B, M * N]`.
    """

    text: KVCache
    k: Float[Array, "C B MN K D"] | None = None
    v: Float[Array, "C B MN K D"] | None = None
    allowed: Bool[Array, "B MN"] | None = None
    real: Bool[Array, "B MN"] | None = None


class CrossBlocks(nnx.Module):
    """The stacked cross-attention layers; called on one layer's slice of the weights."""

    def __init__(self, config: LlamaConfig, *, rngs: nnx.Rngs, dtype: Any, param_dtype: Any):
        depth = config.num_hidden_layers
        self.config, self.dtype = config, dtype
        common: dict[str, Any] = dict(rngs=rngs, use_bias=False, dtype=dtype, param_dtype=param_dtype, layers=depth)
        norm: dict[str, Any] = dict(epsilon=config.rms_norm_eps, param_dtype=param_dtype, layers=depth)
        self.input_layernorm = layers.RMSNorm(config.hidden_size, **norm)
        self.post_attention_layernorm = layers.RMSNorm(config.hidden_size, **norm)
        self.q_norm = layers.RMSNorm(config.head_dim, **norm)
        self.k_norm = layers.RMSNorm(config.head_dim, **norm)
        shapes = lora_shapes(config)
        self.q_proj, self.k_proj, self.v_proj, self.o_proj, self.gate_proj, self.up_proj, self.down_proj = (
            layers.Linear(*shapes[name][1:], **common)
            for name in ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
        )
        self.attn_gate = nnx.Param(jnp.zeros((depth, 1), param_dtype))
        self.mlp_gate = nnx.Param(jnp.zeros((depth, 1), param_dtype))

    def keys_values(
        self, states: Float[Array, "B MN E"], lora: Any, scale: float
    ) -> tuple[Float[Array, "B MN K D"], Float[Array, "B MN K D"]]:
        """Keys (normalised, not rotated) and values of the image tokens."""
        heads = self.config.num_key_value_heads
        k = layers.split_heads(self.k_proj(states, lora.get("k_proj"), scale), heads)
        return self.k_norm(k), layers.split_heads(self.v_proj(states, lora.get("v_proj"), scale), heads)

    def __call__(
        self,
        x: Float[Array, "B T E"],
        keys_values: tuple[Float[Array, "B MN K D"], Float[Array, "B MN K D"]],
        allowed: Bool[Array, "B T MN"],
        real: Bool[Array, "B MN"],
        lora: Any,
        scale: float,
    ) -> Float[Array, "B T E"]:
        """One layer (HF `MllamaCrossAttentionDecoderLayer`).

        A token that may see no image attends to every token of its row's images (`real`; absent tiles included) and
        gets no MLP, as in HF. A row without any image passes unchanged. Both are what HF does with the row alone: in
        HF's batches such tokens also attend to the filler images that their neighbours make necessary.
        """
        sees, has_image = allowed.any(-1), real.any(-1)
        heads = self.config.num_attention_heads
        q = self.q_norm(layers.split_heads(self.q_proj(self.input_layernorm(x), lora.get("q_proj"), scale), heads))
        attended = layers.attention(q, *keys_values, jnp.where(sees[..., None], allowed, real[:, None])[:, None])
        attended = self.o_proj(attended, lora.get("o_proj"), scale)
        x = x + jnp.where(has_image[:, None, None], self._gate(self.attn_gate) * attended, 0)
        y = self.post_attention_layernorm(x)
        y = jax.nn.silu(self.gate_proj(y, lora.get("gate_proj"), scale)) * self.up_proj(y, lora.get("up_proj"), scale)
        y = self.down_proj(y, lora.get("down_proj"), scale)
        return x + jnp.where(sees[..., None], self._gate(self.mlp_gate) * y, 0)

    def _gate(self, gate: nnx.Param) -> Float[Array, "1"]:
        return jnp.tanh(gate[...].astype(self.dtype))


def image_visibility(tokens: Int[Array, "B T"], image_token: int, count: int) -> Bool[Array, "B T M"]:
    """Which of a row's images each token may attend to (HF `get_cross_attention_token_mask`).

    An image is seen from its placeholder on, up to the next placeholder; placeholders that directly follow each other
    share the later end.

    Args:
      tokens: the row, padding included.
      image_token: id of the placeholder.
      count: M, most images of a row.
    """
    placeholder = tokens == image_token
    before = jnp.pad(placeholder[:, :-1], ((0, 0), (1, 0)))
    group = jnp.cumsum(placeholder & ~before, axis=1)
    number = jnp.cumsum(placeholder, axis=1)
    columns = jnp.arange(tokens.shape[1])
    images = jnp.arange(1, count + 1)
    starts = placeholder[:, :, None] & (number[:, :, None] == images)
    start = jnp.where(starts.any(1), jnp.argmax(starts, axis=1), tokens.shape[1])
    own = jnp.take_along_axis(group, jnp.minimum(start, tokens.shape[1] - 1), axis=1)
    return (columns[:, None] >= start[:, None, :]) & (group[:, :, None] == own[:, None, :])


class MllamaDecoder(nnx.Module):
    """Embedding, both stacks, final norm and head."""

    def __init__(
        self, config: MllamaTextConfig, *, rngs: nnx.Rngs, dtype: Any = jnp.float32, param_dtype: Any = jnp.float32,
        remat: str = "none",
    ):  # fmt: skip
        self.config, self.dtype, self.remat = config, dtype, remat
        llama = config.llama
        common: dict[str, Any] = dict(rngs=rngs, dtype=dtype, param_dtype=param_dtype)
        rows = llama.vocab_size + config.extra_embeddings
        self.embed_tokens = layers.normal(rngs, (rows, llama.hidden_size), 0.02, param_dtype)
        self.layers = LlamaBlocks(config.self_layers, **common)
        self.cross_layers = CrossBlocks(config.cross_layers, **common)
        self.norm = layers.RMSNorm(llama.hidden_size, epsilon=llama.rms_norm_eps, param_dtype=param_dtype)
        self.lm_head = layers.Linear(llama.hidden_size, llama.vocab_size, use_bias=False, **common)

    def init_cache(self, batch: int, length: int) -> MllamaCache:
        """An empty cache for `length` text tokens in each of `batch` rows; the images' part comes with the prefill."""
        return MllamaCache(empty_cache(self.config.self_layers, batch, length, self.dtype))

    def __call__(
        self,
        tokens: Int[Array, "B T"],
        positions: Int[Array, "B T"],
        mask: Bool[Array, "B T"],
        images: CrossStates | None,
        image_token: int,
        cache: MllamaCache | None = None,
        lora: Lora | None = None,
    ) -> tuple[Float[Array, "B T E"], MllamaCache | None]:
        """Runs the layers; causal over the text, padding never attended to.

        Args:
          tokens: with the images' placeholders, which have rows of their own in the embedding.
          positions: rotary position of each token, from 0.
          mask: real tokens; padding may stand on either side.
          images: of these tokens; None without images, and for tokens that continue a cache.
          image_token: id of the placeholder.
          cache: what precedes the tokens; each row's are written from its cursor on.
          lora: adapters, or None for the reference model.

        Returns:
          Hidden states after the final norm, and the advanced cache.
        """
        vision = self._vision(tokens, mask, images, image_token, cache)
        x = self.embed_tokens[...][tokens].astype(self.dtype)
        angles = layers.rotary_angles(positions, jnp.asarray(inverse_frequencies(self.config.llama)))
        text = SelfAttention(angles, mask, None if cache is None else cache.text)
        x, text_kv, image_kv = self._run(x, text, vision, cache, lora)
        if cache is not None:
            cache = MllamaCache(text.advanced(text_kv))
            if vision is not None:
                last = vision.allowed.shape[1] - 1 - jnp.argmax(jnp.flip(mask, axis=1), axis=1)
                seen = jnp.take_along_axis(vision.allowed, last[:, None, None], axis=1)[:, 0]
                cache = dataclasses.replace(cache, k=image_kv[0], v=image_kv[1], allowed=seen, real=vision.real)
        return self.norm(x), cache

    def _vision(
        self, tokens: Array, mask: Array, images: CrossStates | None, image_token: int, cache: MllamaCache | None
    ) -> "_Vision | None":
        """What the cross-attention layers need for these tokens; None where they are skipped."""
        if images is not None and images.tiles.shape[1] > 0:
            count = images.tiles.shape[1]
            visible = image_visibility(tokens, image_token, count) & mask[:, :, None]
            per_tile = images.states.shape[1] // (count * images.tiles.shape[2])
            allowed = visible[:, :, :, None] & images.tiles[:, None]
            allowed = jnp.repeat(allowed.reshape(*tokens.shape, -1), per_tile, axis=2)
            real = jnp.repeat(images.tiles.any(2), per_tile * images.tiles.shape[2], axis=1)
            return _Vision(allowed, real, images.states)
        if cache is not None and cache.allowed is not None and cache.real is not None:
            allowed = jnp.broadcast_to(cache.allowed[:, None], (*tokens.shape, cache.allowed.shape[-1]))
            return _Vision(allowed, cache.real, None)
        return None

    def _run(
        self, x: Array, text: SelfAttention, vision: "_Vision | None", cache: MllamaCache | None, lora: Lora | None
    ) -> tuple[Array, Any, Any]:
        """Scans the super-blocks; returns the states, the text's keys and values, and the images'."""
        repeats, kinds = self.config.super_blocks
        scale = 1.0 if lora is None else lora.scale
        own, cross = _split_adapters(lora)
        self_graph, self_state = nnx.split(self.layers)
        cross_graph, cross_state = nnx.split(self.cross_layers)
        stored = (cache.k, cache.v) if cache is not None and vision is not None and vision.states is None else None
        indices = jnp.arange(self.config.self_layers.num_hidden_layers)

        def body(carry: Any, slices: Any) -> tuple[Any, Any]:
            selfs, crosses = slices
            taken, made = [0, 0], []
            for is_cross in kinds:
                place = taken[is_cross]
                taken[is_cross] += 1
                weights, adapters, extra = _at(crosses if is_cross else selfs, place)
                if not is_cross:
                    carry = text(carry, nnx.merge(self_graph, weights), adapters, scale, extra)
                elif vision is not None:
                    layer = nnx.merge(cross_graph, weights)
                    kv = extra if vision.states is None else layer.keys_values(vision.states, adapters, scale)
                    x = layer(carry[0], kv, vision.allowed, vision.real, adapters, scale)
                    carry = (x, *carry[1:])
                    made.append(kv)
            keep = vision is not None and vision.states is not None and cache is not None
            return carry, jax.tree.map(lambda *parts: jnp.stack(parts), *made) if keep and made else None

        stacks = jax.tree.map(
            lambda leaf: leaf.reshape(repeats, -1, *leaf.shape[1:]),
            ((self_state, own, indices), (cross_state, cross, stored)),
        )
        start = (x, None, None) if cache is None else (x, cache.text.k, cache.text.v)
        (x, *text_kv), made = jax.lax.scan(layers.rematerialise(body, self.remat), start, stacks)
        image_kv = jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), made) if stored is None else stored
        return x, text_kv, image_kv

    def logits(self, hidden: Float[Array, "*batch E"]) -> Float[Array, "*batch V"]:
        """Float32 logits of hidden states taken after the final norm."""
        kernel = self.lm_head.kernel[...].astype(self.dtype)
        return jnp.matmul(hidden, kernel, preferred_element_type=jnp.float32)


@dataclasses.dataclass(frozen=True)
class _Vision:
    """`allowed [B, T, M * N]` and `real [B, M * N]` of the tokens at hand; `states` unless keys are cached."""

    allowed: Array
    real: Array
    states: Array | None


def _at(stacks: Any, index: int) -> Any:
    """One layer of stacked arrays."""
    return jax.tree.map(lambda leaf: leaf[index], stacks)


def _split_adapters(lora: Lora | None) -> tuple[dict[str, Any], dict[str, Any]]:
    """Adapters of the self-attention and of the cross-attention stack, by projection."""
    weights = {} if lora is None else dict(lora.weights)
    prefix = f"{CROSS}/"
    return (
        {name: pair for name, pair in weights.items() if not name.startswith(prefix)},
        {name.removeprefix(prefix): pair for name, pair in weights.items() if name.startswith(prefix)},
    )
