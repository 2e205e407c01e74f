"""Decoder of Llama 3.2 Vision: LLaMA layers, some of which attend to the images instead (HF `MllamaTextModel`).

Self-attention and cross-attention layers are two stacks of weights. If every n-th layer attends to the images (n = 5 in
the published models), the decoder scans over groups of n layers, called super-blocks. In any other order, the layers
are one super-block.
"""

import dataclasses
from typing import Any

import flax
import jax
import jax.numpy as jnp
from flax import nnx

from icet_jax.nn import fused, layers
from icet_jax.nn.kv_cache import KVCache, attend
from icet_jax.nn.layers import Lora
from icet_jax.nn.llama import (
    HasLanguageModelHead,
    LlamaBlocks,
    LlamaConfig,
    NextToken,
    SelfAttention,
    UnstackedLayers,
    after_prefix,
    layer_at,
    lora_shapes,
    prompt_cache,
    rotary,
)
from icet_jax.parallel.traced import by_rows, gather_weights
from icet_jax.typing import Adapters, Array, Bool, DType, Float, Int, Keywords

CROSS = "cross_layers"
"""Name of the stack of cross-attention layers, and prefix of the keys of its adapters (`cross_layers/q_proj`)."""


@dataclasses.dataclass(frozen=True)
class MllamaTextConfig:
    """Holds the sizes of the decoder.

    Attributes:
      llama: sizes of the decoder's layers; `num_hidden_layers` counts both kinds of layers, `vocab_size` the logits.
      cross_attention_layers: indices (from 0) of the layers that attend to images instead of the text.
      extra_embeddings: number of embedding rows beyond the vocabulary, one of which is the image placeholder's.
    """

    llama: LlamaConfig
    cross_attention_layers: tuple[int, ...]
    extra_embeddings: int = 8

    @property
    def self_layers(self) -> LlamaConfig:
        """Returns the sizes of the stack of self-attention layers."""
        count = self.llama.num_hidden_layers - len(self.cross_attention_layers)
        return dataclasses.replace(self.llama, num_hidden_layers=count)

    @property
    def cross_layers(self) -> LlamaConfig:
        """Returns the sizes of the stack of cross-attention layers, whose projections have the same sizes."""
        return dataclasses.replace(self.llama, num_hidden_layers=len(self.cross_attention_layers))

    def lora_shapes(self) -> dict[str, tuple[int, int, int]]:
        """Returns {key of the adapter: (layers, input size, output size)} of the projections that LoRA can adapt."""
        cross = {f"{CROSS}/{name}": shape for name, shape in lora_shapes(self.cross_layers).items()}
        return lora_shapes(self.self_layers) | cross

    @property
    def super_blocks(self) -> tuple[int, tuple[bool, ...]]:
        """Returns (number of super-blocks, list that says for each layer of a super-block if it attends to images)."""
        kinds = tuple(layer in self.cross_attention_layers for layer in range(self.llama.num_hidden_layers))
        count = max(len(self.cross_attention_layers), 1)
        period, rest = divmod(len(kinds), count)
        is_periodic = not rest and kinds == kinds[:period] * count
        return (count, kinds[:period]) if is_periodic else (1, kinds)


@flax.struct.dataclass
class CrossStates:
    """Holds the image features for the cross-attention layers; the first axis of every leaf is the batch.

    Attributes:
      states: Float[B, M * N, E], the N image features of each of a row's M images, one image after another.
      tiles: Bool[B, M, tiles], which tiles exist; all False for an absent image.
    """

    # Not annotated as arrays: jax also builds this pytree with other leaves, for example in jit(...).lower.
    states: Any
    tiles: Any


@flax.struct.dataclass
class MllamaCache:
    """Holds the keys and values of the text, and those of the images.

    Attributes:
      text: cache of the self-attention layers.
      k, v: keys (after `k_norm`) and values of the images, for each cross-attention layer `[B, K, M * N, D]`; empty
        without images.
      allowed: which image features the next token of a row attends to, bool `[B, M * N]`; None without images.
      real: which image features belong to an existing image, bool `[B, M * N]`; None without images.
    """

    text: KVCache
    k: tuple[Any, ...] = ()
    v: tuple[Any, ...] = ()
    allowed: Any = None
    real: Any = None

    @property
    def columns(self) -> int:
        """Returns the largest number of text tokens that a row can have."""
        return self.text.columns

    def with_room(self, columns: int) -> "MllamaCache":
        """Returns a cache with the same tokens and `columns` more columns."""
        return dataclasses.replace(self, text=self.text.with_room(columns))

    def trim(self, columns: int) -> "MllamaCache":
        """Returns a cache with only the first `columns` columns."""
        return dataclasses.replace(self, text=self.text.trim(columns))

    def replace_rows(self, slots: Int[Array, "R"], rows: "MllamaCache") -> "MllamaCache":
        """Returns a cache in which the rows `slots` are replaced by `rows`; see `KVCache.replace_rows`."""
        old_parts, new_parts = ((cache.k, cache.v, cache.allowed, cache.real) for cache in (self, rows))
        parts = jax.tree.map(lambda old, new: old.at[slots].set(new, mode="drop"), old_parts, new_parts)
        return MllamaCache(self.text.replace_rows(slots, rows.text), *parts)


class CrossBlocks(nnx.Module):
    """Holds the weights of all cross-attention layers, stacked along their first axis.

    The methods run one layer. Call them on a module of one layer, `nnx.merge(graphdef, that layer's slice)`. Their
    arguments `lora` are the layer's LoRA adapters, {} without any, and `scale` is the scale of the adapters.
    """

    def __init__(self, config: LlamaConfig, *, rngs: nnx.Rngs, dtype: DType, param_dtype: DType):
        depth = config.num_hidden_layers
        self.config, self.dtype = config, dtype
        common: Keywords = dict(rngs=rngs, use_bias=False, dtype=dtype, param_dtype=param_dtype, layers=depth)
        norm: Keywords = dict(epsilon=config.rms_norm_eps, param_dtype=param_dtype, layers=depth)
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
        self, states: Float[Array, "B MN E"], lora: Adapters, scale: float
    ) -> tuple[Float[Array, "B K MN D"], Float[Array, "B K MN D"]]:
        """Returns keys, normalised and without rotary embedding, and values of the image features."""
        heads = self.config.num_key_value_heads
        k = layers.split_heads(self.k_proj(states, lora.get("k_proj"), scale), heads)
        v = layers.split_heads(self.v_proj(states, lora.get("v_proj"), scale), heads)
        return self.k_norm(k).swapaxes(1, 2), v.swapaxes(1, 2)

    def query(self, x: Float[Array, "B T E"], lora: Adapters, scale: float) -> Float[Array, "B T H D"]:
        """Returns the queries of the tokens, normalised and without rotary embedding."""
        heads = self.config.num_attention_heads
        y = self.q_proj(self.input_layernorm(x), lora.get("q_proj"), scale)
        return self.q_norm(layers.split_heads(y, heads))

    def after_attention(
        self, x: Float[Array, "B T E"], attended: Float[Array, "B T HD"], vision: "Vision", lora: Adapters, scale: float
    ) -> Float[Array, "B T E"]:
        """Returns the output of the layer from its input x and the concatenated outputs of its attention heads.

        As in HF's `MllamaCrossAttentionDecoderLayer`, a token before the first image attends to all features of its
        row's images and skips the MLP. A row without images is returned unchanged. (This is what HF does for a single
        row; in HF's batches such tokens also attend to the filler images of the batch.)
        """
        attended = self.o_proj(attended, lora.get("o_proj"), scale)
        x = x + jnp.where(vision.real.any(-1)[:, None, None], self._gate(self.attn_gate) * attended, 0)
        y = self.post_attention_layernorm(x)
        y = jax.nn.silu(self.gate_proj(y, lora.get("gate_proj"), scale)) * self.up_proj(y, lora.get("up_proj"), scale)
        y = self.down_proj(y, lora.get("down_proj"), scale)
        return x + jnp.where(vision.sees[..., None], self._gate(self.mlp_gate) * y, 0)

    def _gate(self, gate: nnx.Param) -> Float[Array, "1"]:
        """Returns the factor `tanh(gate)` by which an output is multiplied."""
        return jnp.tanh(gate[...].astype(self.dtype))


def image_visibility(tokens: Int[Array, "B T"], image_token: int, count: int) -> Bool[Array, "B T M"]:
    """Returns which of a row's images each token may attend to (HF `get_cross_attention_token_mask`).

    An image is visible from its placeholder up to the next image's placeholder. If the placeholders of several images
    follow one another directly, all these images stay visible as long as the last of them.

    Args:
      tokens: the tokens of the row, padding included.
      image_token: id of the placeholder.
      count: M, the largest number of images of a row.
    """
    placeholder = tokens == image_token
    follows_placeholder = jnp.pad(placeholder[:, :-1], ((0, 0), (1, 0)))
    group = jnp.cumsum(placeholder & ~follows_placeholder, axis=1)  # index of the group of consecutive placeholders
    number = jnp.cumsum(placeholder, axis=1)
    columns = jnp.arange(tokens.shape[1])
    images = jnp.arange(1, count + 1)
    starts = placeholder[:, :, None] & (number[:, :, None] == images)
    start = jnp.where(starts.any(1), jnp.argmax(starts, axis=1), tokens.shape[1])
    image_group = jnp.take_along_axis(group, jnp.minimum(start, tokens.shape[1] - 1), axis=1)
    return (columns[:, None] >= start[:, None, :]) & (group[:, :, None] == image_group[:, None, :])


class MllamaDecoder(HasLanguageModelHead, nnx.Module):
    """The decoder: token embedding, both stacks of layers, final norm and head."""

    def __init__(
        self, config: MllamaTextConfig, *, rngs: nnx.Rngs, dtype: DType = jnp.float32, param_dtype: DType = jnp.float32,
        remat: str = "none",
    ):  # fmt: skip
        self.config, self.dtype, self.remat = config, dtype, remat
        llama = config.llama
        common: Keywords = dict(rngs=rngs, dtype=dtype, param_dtype=param_dtype)
        rows = llama.vocab_size + config.extra_embeddings
        self.embed_tokens = layers.normal(rngs, (rows, llama.hidden_size), 0.02, param_dtype)
        self.layers = LlamaBlocks(config.self_layers, **common)
        self.cross_layers = CrossBlocks(config.cross_layers, **common)
        self.norm = layers.RMSNorm(llama.hidden_size, epsilon=llama.rms_norm_eps, param_dtype=param_dtype)
        self.lm_head = layers.Linear(llama.hidden_size, llama.vocab_size, use_bias=False, **common)

    def embed(self, tokens: Int[Array, "*batch"]) -> Float[Array, "*batch E"]:
        """Returns the token embeddings in the compute dtype; image placeholders have an embedding too."""
        return self.embed_tokens[...][tokens].astype(self.dtype)

    def __call__(
        self,
        tokens: Int[Array, "B T"],
        positions: Int[Array, "B T"],
        mask: Bool[Array, "B T"],
        images: CrossStates | None,
        image_token: int,
        lora: Lora | None = None,
    ) -> Float[Array, "B T E"]:
        """Returns the hidden states of whole sequences after the final norm, with causal attention.

        Args:
          tokens: tokens, with the placeholders of the images.
          positions: rotary position of each token, from 0.
          mask: True at tokens that are not padding, which may be on either side.
          images: features of the rows' images; None without images.
          image_token: id of the placeholder.
          lora: adapters, or None for the model without adapters.
        """
        vision = new_images(tokens, mask, images, image_token)
        text = SelfAttention(rotary(self.config.llama, positions), mask)
        return self.norm(self._run(self.embed(tokens), text, vision, lora)[0])

    def prefill(
        self,
        tokens: Int[Array, "B T"],
        positions: Int[Array, "B T"],
        mask: Bool[Array, "B T"],
        images: CrossStates | None,
        image_token: int,
        prefix: MllamaCache | None = None,
        lora: Lora | None = None,
    ) -> tuple[Float[Array, "B E"], MllamaCache]:
        """Returns the final state of each row's last token, and the cache; see `LanguageModel.prefill`."""
        vision, stored = new_images(tokens, mask, images, image_token), None
        if prefix is not None and prefix.k:
            vision, stored = cached_images(prefix, tokens.shape[1]), (jnp.stack(prefix.k), jnp.stack(prefix.v))
        before = None if prefix is None else prefix.text
        positions = after_prefix(positions, before)
        text = SelfAttention(rotary(self.config.llama, positions), mask, before, right_padded=True)
        x, (text_kv, image_kv) = self._run(self.embed(tokens), text, vision, lora, stored=stored, keep=True)
        last = jnp.maximum(mask.sum(axis=1) - 1, 0)[:, None, None]
        k, v = map(tuple, text_kv)
        cache = MllamaCache(prompt_cache(k, v, positions, mask, before))
        if vision is not None:
            k, v = (tuple(stack) for stack in (image_kv if stored is None else stored))
            allowed = jnp.take_along_axis(vision.allowed, last, axis=1)[:, 0]
            cache = dataclasses.replace(cache, k=k, v=v, allowed=allowed, real=vision.real)
        return self.norm(jnp.take_along_axis(x, last, axis=1))[:, 0], cache

    def unstack_layers(self, lora: Lora | None = None) -> UnstackedLayers:
        """Returns the layers of both kinds one by one, in the decoder's order, for `step`."""
        self_adapters, cross_adapters = _split_adapters(lora)
        _, self_state = nnx.split(self.layers)
        _, cross_state = nnx.split(self.cross_layers)
        scale, unstacked = 1.0 if lora is None else lora.scale, []
        for is_cross, index in self._stack_indices():
            stacks = (cross_state, cross_adapters) if is_cross else (self_state, self_adapters)
            weights, adapters = layer_at(stacks, index)
            if not is_cross:
                weights, adapters = fused.for_steps(weights, adapters, scale, self.config.llama, self.dtype)
            unstacked.append((weights, adapters))
        return UnstackedLayers(tuple(unstacked), scale)

    def step(
        self, tokens: Int[Array, "B"], active: Bool[Array, "B"], cache: MllamaCache, unstacked: UnstackedLayers
    ) -> tuple[Float[Array, "B E"], MllamaCache]:
        """Returns the final state of one new token per row and the new cache; see `LanguageModel.step`."""
        text = NextToken(self.config.llama, cache.text)
        vision = cached_images(cache, 1) if cache.k else None
        self_graph, _ = nnx.split(self.layers)
        cross_graph, _ = nnx.split(self.cross_layers)
        x = self.embed(tokens)[:, None]
        for (is_cross, index), (weights, adapters) in zip(self._stack_indices(), unstacked.layers, strict=True):
            if not is_cross:
                x = text(x, fused.layer_for_step(self_graph, weights), adapters, unstacked.scale, index)
            elif vision is not None:
                layer = nnx.merge(cross_graph, weights)
                q = layer.query(x, adapters, unstacked.scale)[:, 0]
                attended = attend(q, cache.k[index], cache.v[index], vision.attended[:, 0])
                x = layer.after_attention(x, attended[:, None], vision, adapters, unstacked.scale)
        return self.norm(x)[:, 0], dataclasses.replace(cache, text=text.updated_cache(active))

    def _stack_indices(self) -> list[tuple[bool, int]]:
        """Returns (whether it attends to images, its index in the stack of such layers) for each layer."""
        counts, indices = [0, 0], []
        for number in range(self.config.llama.num_hidden_layers):
            is_cross = number in self.config.cross_attention_layers
            indices.append((is_cross, counts[is_cross]))
            counts[is_cross] += 1
        return indices

    def _run(
        self, x: Array, text: SelfAttention, vision: "Vision | None", lora: Lora | None, *, stored: Any = None,
        keep: bool = False,
    ) -> tuple[Array, Any]:  # fmt: skip
        """Runs all layers on whole sequences.

        Args:
          x: embeddings of the tokens.
          text: function that runs one self-attention layer.
          vision: the images and which tokens attend to them; None skips the cross-attention layers.
          lora: adapters.
          stored: keys and values of the images, each `[C, B, K, M * N, D]` for C cross-attention layers; None computes
            them.
          keep: whether to return keys and values.

        Returns:
          (hidden states, (keys and values of the text, keys and values of the images)). Keys and values are `[layers,
          B, K, tokens, D]`; they are None unless `keep` is set.
        """
        repeats, kinds = self.config.super_blocks
        scale = 1.0 if lora is None else lora.scale
        self_adapters, cross_adapters = _split_adapters(lora)
        self_graph, self_state = nnx.split(self.layers)
        cross_graph, cross_state = nnx.split(self.cross_layers)
        indices = jnp.arange(self.config.self_layers.num_hidden_layers)

        def run_super_block(x: Array, slices: Any) -> tuple[Array, Any]:
            """Runs the layers of one super-block; returns its output and, with `keep`, the layers' keys and values."""
            counts: list[int] = [0, 0]
            kept: tuple[list[Any], list[Any]] = ([], [])
            for is_cross in kinds:
                weights, adapters, extra = layer_at(slices[is_cross], counts[is_cross])
                weights, adapters = (
                    gather_weights(part, x, CROSS if is_cross else "layers") for part in (weights, adapters)
                )
                counts[is_cross] += 1
                if not is_cross:
                    x, keys_values = text(x, nnx.merge(self_graph, weights), adapters, scale, extra)
                elif vision is None:
                    continue
                else:
                    layer = nnx.merge(cross_graph, weights)
                    is_stored = extra is not None
                    keys_values = extra if is_stored else layer.keys_values(vision.states, adapters, scale)
                    k, v = (part.swapaxes(1, 2) for part in keys_values)
                    q = layer.query(x, adapters, scale)
                    attended = layers.attention(q, k, v, vision.attended[:, None])
                    x = by_rows(layer.after_attention(x, attended, vision, adapters, scale))
                kept[is_cross].append(keys_values)
            return x, tuple(
                jax.tree.map(lambda *parts: jnp.stack(parts), *keys_values) for keys_values in kept if keys_values
            ) if keep else None

        stacks = jax.tree.map(
            lambda leaf: leaf.reshape(repeats, -1, *leaf.shape[1:]),
            ((self_state, self_adapters, indices), (cross_state, cross_adapters, stored)),
        )
        x, kept = jax.lax.scan(layers.rematerialise(run_super_block, self.remat), by_rows(x), stacks)
        text_kv, image_kv = (*jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), kept or ()), None, None)[:2]
        return x, (text_kv, image_kv)


@dataclasses.dataclass(frozen=True)
class Vision:
    """Holds the images of a batch, and which of their features each token attends to.

    Attributes:
      allowed: [B, T, M * N], whether a token may attend to an image feature.
      real: [B, M * N], whether an image feature belongs to an existing image.
      states: the image features [B, M * N, E]; None if their keys and values are cached.
    """

    allowed: Array
    real: Array
    states: Any = None

    @property
    def sees(self) -> Bool[Array, "B T"]:
        """Returns which tokens may attend to an image at all."""
        return self.allowed.any(-1)

    @property
    def attended(self) -> Bool[Array, "B T MN"]:
        """Returns which image features each token attends to: those allowed, or all of the row if none is allowed."""
        return jnp.where(self.sees[..., None], self.allowed, self.real[:, None])


def new_images(
    tokens: Int[Array, "B T"], mask: Bool[Array, "B T"], images: CrossStates | None, image_token: int
) -> Vision | None:
    """Returns `images` together with which of these tokens attend to them; None if `images` is None or empty.

    Args:
      tokens: tokens with the placeholders of the images.
      mask: True at tokens that are not padding.
      images: features of the images.
      image_token: id of the placeholder.
    """
    if images is None or images.tiles.shape[1] == 0:
        return None
    count = images.tiles.shape[1]
    visible = image_visibility(tokens, image_token, count) & mask[:, :, None]
    per_tile = images.states.shape[1] // (count * images.tiles.shape[2])
    allowed = visible[:, :, :, None] & images.tiles[:, None]
    allowed = jnp.repeat(allowed.reshape(*tokens.shape, -1), per_tile, axis=2)
    real = jnp.repeat(images.tiles.any(2), per_tile * images.tiles.shape[2], axis=1)
    return Vision(allowed, real, images.states)


def cached_images(cache: MllamaCache, length: int) -> Vision:
    """Returns the cached images and which of them the next `length` tokens of each row attend to."""
    shape = (cache.allowed.shape[0], length, cache.allowed.shape[1])
    return Vision(jnp.broadcast_to(cache.allowed[:, None], shape), cache.real)


def _split_adapters(lora: Lora | None) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns {projection: adapter} of the self-attention layers, and the same of the cross-attention layers."""
    weights = {} if lora is None else dict(lora.weights)
    prefix = f"{CROSS}/"
    return (
        {name: pair for name, pair in weights.items() if not name.startswith(prefix)},
        {name.removeprefix(prefix): pair for name, pair in weights.items() if name.startswith(prefix)},
    )
