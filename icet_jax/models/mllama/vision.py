"""Image encoder of Llama 3.2 Vision: local blocks, then gated global blocks (HF `MllamaVisionModel`).

An image has up to four tiles. The sequence of one image is all its tiles, each a class token and its patches, padded to
a multiple of 8. The local blocks run once, and their states serve all exits; the global blocks run for the requested
exit. At full size the attention scores of one image take 2.6 GB, so each block processes a batch in chunks of images.
"""

import dataclasses
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from icet_jax.nn import layers
from icet_jax.parallel.sharding import joined_slices, row_shards, row_slices
from icet_jax.parallel.traced import by_rows, gather_kernel, gather_weights, mesh_of, take_exit_states
from icet_jax.typing import Array, Bool, DType, Float, Int, Keywords

_EMBED_EPS = 1e-5  # epsilon of layernorm_pre and layernorm_post, which ignore the config's norm_eps
_SCORE_BYTES = 4 << 30  # most bytes that the float32 attention scores of one block may take on a device


@dataclasses.dataclass(frozen=True)
class MllamaVisionConfig:
    """Holds the sizes of the encoder under HF's names.

    Attributes:
      intermediate_layers_indices: states of the local blocks that the projector gets besides the final one. Index i is
        the output of the first i blocks, as in the model's training.
      max_num_tiles: largest number of tiles of an image, each `[num_channels, image_size, image_size]` pixels.
    """

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_global_layers: int
    attention_heads: int
    image_size: int
    patch_size: int
    intermediate_layers_indices: tuple[int, ...]
    supported_aspect_ratios: tuple[tuple[int, int], ...]
    max_num_tiles: int = 4
    num_channels: int = 3
    norm_eps: float = 1e-5
    hidden_act: str = "gelu"

    @property
    def tokens_per_tile(self) -> int:
        """Returns the number of patches of a tile, plus one for the class token."""
        return (self.image_size // self.patch_size) ** 2 + 1

    @property
    def padded_tokens(self) -> int:
        """Returns `tokens_per_tile` rounded up to a multiple of 8."""
        return -(-self.tokens_per_tile // 8) * 8

    @property
    def output_dim(self) -> int:
        """Returns the width of the projector's input: the last state joined with every captured intermediate state."""
        return self.hidden_size * (1 + len(self.intermediate_layers_indices))


class MllamaVisionBlocks(nnx.Module):
    """Holds the weights of all local or all global blocks, stacked along their first axis.

    Call it on a module of one block, `nnx.merge(graphdef, that block's slice)`. In `gated` blocks a trained gate scales
    what is added to the residual.
    """

    def __init__(
        self,
        config: MllamaVisionConfig,
        depth: int,
        gated: bool,
        *,
        rngs: nnx.Rngs,
        dtype: DType,
        param_dtype: DType,
    ):
        width, ffn = config.hidden_size, config.intermediate_size
        self.config, self.gated = config, gated
        common: Keywords = dict(rngs=rngs, dtype=dtype, param_dtype=param_dtype, layers=depth)
        norm: Keywords = dict(epsilon=config.norm_eps, param_dtype=param_dtype, layers=depth)
        residual = layers.depth_scaled(width**-0.5, depth)
        self.input_layernorm = layers.LayerNorm(width, **norm)
        self.q_proj = layers.Linear(width, width, use_bias=False, **common)
        self.k_proj = layers.Linear(width, width, use_bias=False, **common)
        self.v_proj = layers.Linear(width, width, use_bias=False, **common)
        self.o_proj = layers.Linear(width, width, use_bias=False, stddev=residual, **common)
        self.post_attention_layernorm = layers.LayerNorm(width, **norm)
        self.fc1 = layers.Linear(width, ffn, use_bias=True, **common)
        self.fc2 = layers.Linear(ffn, width, use_bias=True, stddev=layers.depth_scaled(ffn**-0.5, depth), **common)
        if gated:
            self.gate_attn = nnx.Param(jnp.zeros((depth, 1), param_dtype))
            self.gate_ffn = nnx.Param(jnp.zeros((depth, 1), param_dtype))

    def __call__(self, x: Float[Array, "I Q D"], allowed: Bool[Array, "I 1 Q Q"]) -> Float[Array, "I Q D"]:
        """Applies one block (HF `MllamaVisionEncoderLayer`): attention where `allowed` is True, then the MLP."""
        heads = self.config.attention_heads
        y = self.input_layernorm(x)
        q, k, v = (layers.split_heads(proj(y), heads) for proj in (self.q_proj, self.k_proj, self.v_proj))
        attended = self.o_proj(layers.attention(q, k, v, allowed))
        x = x + (self._gate(self.gate_attn) * attended if self.gated else attended)
        y = self.fc2(layers.ACTIVATIONS[self.config.hidden_act](self.fc1(self.post_attention_layernorm(x))))
        return x + (self._gate(self.gate_ffn) * y if self.gated else y)

    def _gate(self, gate: nnx.Param) -> Float[Array, "1"]:
        """Returns the factor `tanh(gate)` by which an output is multiplied."""
        return jnp.tanh(gate[...].astype(self.fc1.dtype))


class TileEmbedding(nnx.Module):
    """Holds a vector for each tile of each aspect ratio (HF `MllamaPrecomputedAspectRatioEmbedding`)."""

    def __init__(self, config: MllamaVisionConfig, *, rngs: nnx.Rngs, param_dtype: DType):
        shape = (len(config.supported_aspect_ratios) + 1, config.max_num_tiles * config.hidden_size)
        self.config = config
        self.gate = nnx.Param(jnp.zeros((1,), param_dtype))
        self.embedding = layers.normal(rngs, shape, 0.02, param_dtype)

    def __call__(self, aspect_ratio_ids: Int[Array, "I"], dtype: DType) -> Float[Array, "I M 1 D"]:
        """Returns for each tile of each image the gated vector that is to be added to all tokens of the tile."""
        vectors = self.embedding[...][aspect_ratio_ids].astype(dtype)
        vectors = vectors.reshape(-1, self.config.max_num_tiles, 1, self.config.hidden_size)
        return jnp.tanh(self.gate[...].astype(dtype)) * vectors


class GatedPositions(nnx.Module):
    """Holds position embeddings within a tile: one set for all tiles, and one set for each tile of each aspect ratio.

    Source: HF `MllamaPrecomputedPositionEmbedding`.
    """

    def __init__(self, config: MllamaVisionConfig, *, rngs: nnx.Rngs, param_dtype: DType):
        tokens, width = config.tokens_per_tile, config.hidden_size
        ratios = len(config.supported_aspect_ratios) + 1
        self.config = config
        self.gate = nnx.Param(jnp.zeros((1,), param_dtype))
        self.embedding = layers.normal(rngs, (tokens, width), 0.02, param_dtype)
        self.tile_embedding = layers.normal(rngs, (ratios, config.max_num_tiles * tokens * width), 0.02, param_dtype)

    def __call__(self, aspect_ratio_ids: Int[Array, "I"], dtype: DType) -> Float[Array, "I M P D"]:
        """Returns `(1 - tanh gate) * shared embedding + tanh gate * embedding of the tile`."""
        gate = jnp.tanh(self.gate[...].astype(dtype))
        # The table is gathered because the compiler would otherwise look up every row of the batch on each device.
        name = "gated_positional_embedding/tile_embedding"
        per_tile = gather_kernel(self.tile_embedding[...], aspect_ratio_ids, name)[aspect_ratio_ids].astype(dtype)
        per_tile = per_tile.reshape(-1, self.config.max_num_tiles, self.config.tokens_per_tile, self.config.hidden_size)
        return (1 - gate) * self.embedding[...].astype(dtype) + gate * per_tile


class MllamaVisionTower(nnx.Module):
    """Computes the states of the local blocks, and from them the projector's input at an exit.

    An image is a sequence of `Q = max_num_tiles * padded_tokens` tokens, of which some are padding.
    """

    def __init__(
        self,
        config: MllamaVisionConfig,
        *,
        rngs: nnx.Rngs,
        dtype: DType,
        param_dtype: DType,
        remat: str = "none",
    ):
        width = config.hidden_size
        patch = config.num_channels * config.patch_size**2
        self.config, self.dtype, self.remat = config, dtype, remat
        common: Keywords = dict(rngs=rngs, dtype=dtype, param_dtype=param_dtype)
        self.class_embedding = layers.normal(rngs, (width,), width**-0.5, param_dtype)
        self.patch_embedding = layers.Linear(patch, width, use_bias=False, **common)
        self.gated_positional_embedding = GatedPositions(config, rngs=rngs, param_dtype=param_dtype)
        self.pre_tile_positional_embedding = TileEmbedding(config, rngs=rngs, param_dtype=param_dtype)
        self.post_tile_positional_embedding = TileEmbedding(config, rngs=rngs, param_dtype=param_dtype)
        self.layernorm_pre = layers.LayerNorm(width, epsilon=_EMBED_EPS, param_dtype=param_dtype)
        self.layernorm_post = layers.LayerNorm(width, epsilon=_EMBED_EPS, param_dtype=param_dtype)
        self.layers = MllamaVisionBlocks(config, config.num_hidden_layers, gated=False, **common)
        self.global_layers = MllamaVisionBlocks(config, config.num_global_layers, gated=True, **common)

    def embed(self, pixels: Float[Array, "I M C H W"], aspect_ratio_ids: Int[Array, "I"]) -> Float[Array, "I Q D"]:
        """Returns state 0, the input of the first local block; padding tokens are zero."""
        config = self.config
        count, tiles, channels, height, width = pixels.shape
        size = config.patch_size
        rows, columns = height // size, width // size
        patches = pixels[..., : rows * size, : columns * size]
        patches = patches.reshape(count, tiles, channels, rows, size, columns, size).transpose(0, 1, 3, 5, 2, 4, 6)
        x = self.patch_embedding(patches.reshape(count, tiles, rows * columns, -1))
        x = x + self.pre_tile_positional_embedding(aspect_ratio_ids, x.dtype)
        class_token = jnp.broadcast_to(self.class_embedding[...].astype(x.dtype), (count, tiles, 1, config.hidden_size))
        x = jnp.concatenate([class_token, x], axis=2)
        x = self.layernorm_pre(x + self.gated_positional_embedding(aspect_ratio_ids, x.dtype))
        x = jnp.pad(x, ((0, 0), (0, 0), (0, config.padded_tokens - config.tokens_per_tile), (0, 0)))
        return x.reshape(count, -1, config.hidden_size)

    def local_states(
        self, pixels: Float[Array, "I M C H W"], aspect_ratio_ids: Int[Array, "I"], upto: int | None = None
    ) -> Float[Array, "X I Q D"]:
        """Returns the states of the local blocks: index 0 is the input of the first, index l the output of block l.

        Args:
          pixels: tiles of the images.
          aspect_ratio_ids: aspect ratio of each image, 0 for a filler image.
          upto: number of blocks to compute, static; None computes all.

        Raises:
          ValueError: `upto` is negative or larger than the number of blocks.
        """
        depth = self.config.num_hidden_layers if upto is None else upto
        if not 0 <= depth <= self.config.num_hidden_layers:
            raise ValueError(f"upto={upto} is outside 0..{self.config.num_hidden_layers}")
        graph, state = nnx.split(self.layers)
        state = jax.tree.map(lambda weight: weight[:depth], state)

        def body(x: Array, weights: nnx.State) -> tuple[Array, Array]:
            x = self._block(nnx.merge(graph, gather_weights(weights, x)), x, aspect_ratio_ids)
            return x, x

        embedded = by_rows(self.embed(pixels, aspect_ratio_ids))
        _, outputs = jax.lax.scan(layers.rematerialise(body, self.remat), embedded, state)
        return jnp.concatenate([embedded[None], outputs], axis=0)

    def attention_mask(self, aspect_ratio_ids: Int[Array, "I"]) -> Bool[Array, "I 1 Q Q"]:
        """Returns True where a token may attend to another: everywhere except from padding to padding.

        Real tokens attend to padding, because the model was trained in this way.
        """
        config = self.config
        real = jnp.arange(config.padded_tokens) < config.tokens_per_tile
        real = (self.tiles(aspect_ratio_ids)[:, :, None] & real).reshape(aspect_ratio_ids.shape[0], -1)
        return (real[:, None, :] | real[:, :, None])[:, None]

    def tiles(self, aspect_ratio_ids: Int[Array, "I"]) -> Bool[Array, "I M"]:
        """Returns which of its M tiles each image has; a filler image (id 0) has one (HF's `aspect_ratio_mask`)."""
        counts = np.array([1, *(math.prod(ratio) for ratio in self.config.supported_aspect_ratios)])
        return jnp.arange(self.config.max_num_tiles) < jnp.asarray(counts)[aspect_ratio_ids][:, None]

    def features(
        self,
        states: Float[Array, "X I Q D"],
        exits: Int[Array, "R"],
        aspect_ratio_ids: Int[Array, "I"],
        rule: str = "E1",
        images: Int[Array, "R"] | None = None,
    ) -> Float[Array, "R N O"]:
        """Returns the projector's input for each image at its exit l.

        Let h_l be the output of l local blocks, G the norm, tile embedding and global blocks that follow, and i each of
        `intermediate_layers_indices`. The input consists of one final state and the captured states:
        rule "E1": G(h_l) and h_min(i, l), as if the local blocks after l did not exist;
        rule "E2": G(h_l) and h_i;
        rule "E5": h_l and h_i.
        At the last exit "E1" and "E2" are the model as trained.

        Args:
          states: result of `local_states`.
          exits: exit of each requested image.
          aspect_ratio_ids: aspect ratio of each of the I images.
          rule: "E1", "E2" or "E5".
          images: indices of the R requested images; None requests all.

        Returns:
          For N = M * tokens_per_tile tokens of M tiles, vectors of size O = output_dim: the final state, then the
          captured states with their channels interleaved (channel 0 of each, channel 1 of each, ...).
        """
        indices, last = self.config.intermediate_layers_indices, self.config.num_hidden_layers
        exit_states = take_exit_states(states, exits, images)
        ratios = aspect_ratio_ids if images is None else aspect_ratio_ids[images]
        final = exit_states if rule == "E5" else self._global_blocks(exit_states, ratios)
        limit = exits if rule == "E1" else jnp.full_like(exits, last)
        captures = jnp.stack(
            [take_exit_states(states, jnp.minimum(index, limit), images) for index in indices], axis=-1
        )
        out = jnp.concatenate([final, captures.reshape(*final.shape[:2], -1)], axis=-1)
        return self._without_padding(out)

    def _global_blocks(self, x: Float[Array, "I Q D"], aspect_ratio_ids: Int[Array, "I"]) -> Float[Array, "I Q D"]:
        """Applies what follows the local blocks to one of their states: norm, tile embedding and global blocks."""
        count, length, width = x.shape
        x = self.layernorm_post(x).reshape(count, self.config.max_num_tiles, -1, width)
        x = (x + self.post_tile_positional_embedding(aspect_ratio_ids, x.dtype)).reshape(count, length, width)
        graph, state = nnx.split(self.global_layers)

        def body(x: Array, weights: nnx.State) -> tuple[Array, None]:
            return self._block(nnx.merge(graph, gather_weights(weights, x, "global_layers")), x, aspect_ratio_ids), None

        return jax.lax.scan(layers.rematerialise(body, self.remat), by_rows(x), state)[0]

    def _block(self, layer: MllamaVisionBlocks, x: Float[Array, "I Q D"], aspect_ratio_ids: Int[Array, "I"]) -> Array:
        """Applies one block in chunks of images, so that attention scores take at most `_SCORE_BYTES`."""
        score_bytes_per_image = 4 * self.config.attention_heads * x.shape[1] ** 2

        def run(x: Array, aspect_ratio_ids: Array) -> Array:
            return by_rows(layer(by_rows(x), self.attention_mask(aspect_ratio_ids)))

        return by_rows(in_chunks(run, max(1, _SCORE_BYTES // score_bytes_per_image), x, aspect_ratio_ids))

    def _without_padding(self, x: Float[Array, "I Q O"]) -> Float[Array, "I N O"]:
        """Returns the tokens of all tiles without those that pad a tile to a multiple of 8."""
        config = self.config
        x = x.reshape(x.shape[0], config.max_num_tiles, config.padded_tokens, -1)[:, :, : config.tokens_per_tile]
        return x.reshape(x.shape[0], -1, x.shape[-1])


def in_chunks(function: Callable[..., Array], size: int, *arrays: Array) -> Array:
    """Returns `function(*arrays)`, computed in chunks of elements one after another, to save memory.

    The elements of a chunk are evenly spaced over the axis. If the axis is split over devices, so is each chunk.

    Args:
      function: function of arrays with equal first axes that treats each element of these axes independently.
      size: largest number of elements that a device processes at once, at least 1.
      arrays: I elements each, `[I, ...]`.
    """
    count, mesh = arrays[0].shape[0], mesh_of(*arrays)
    shards = 1 if mesh is None else row_shards(mesh)
    steps = -(-count // (size * shards))
    if steps <= 1:
        return function(*arrays)
    chunk = -(-count // (steps * shards)) * shards

    padded = [jnp.pad(x, [(0, chunk * steps - count), *[(0, 0)] * (x.ndim - 1)]) for x in arrays]
    return joined_slices(jax.lax.map(lambda parts: function(*parts), row_slices(padded, steps)))[:count]
