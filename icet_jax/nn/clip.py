"""CLIP vision tower that returns the hidden state after every block (HF `CLIPVisionModel`, as of transformers 5)."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from icet_jax.nn import layers
from icet_jax.parallel.traced import by_rows, gather_weights
from icet_jax.typing import Array, Bool, DType, Float, Keywords


@dataclasses.dataclass(frozen=True)
class ClipConfig:
    """Holds the sizes of the tower under HF's names; pixels are `[num_channels, image_size, image_size]`."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    image_size: int
    patch_size: int
    num_channels: int = 3
    layer_norm_eps: float = 1e-5
    hidden_act: str = "quick_gelu"

    @property
    def num_patches(self) -> int:
        """Returns the number of patches in one image, without the class token."""
        return (self.image_size // self.patch_size) ** 2


class ClipBlocks(nnx.Module):
    """Holds the weights of all blocks, stacked along their first axis.

    It cannot be called in this stacked form. To run one block, call the module `nnx.merge(graphdef, slice)`, made
    of that block's slice of the weights.
    """

    def __init__(self, config: ClipConfig, *, rngs: nnx.Rngs, dtype: DType, param_dtype: DType):
        width, ffn, depth = config.hidden_size, config.intermediate_size, config.num_hidden_layers
        self.config = config
        common: Keywords = dict(rngs=rngs, use_bias=True, dtype=dtype, param_dtype=param_dtype, layers=depth)
        norm: Keywords = dict(epsilon=config.layer_norm_eps, param_dtype=param_dtype, layers=depth)
        residual = layers.depth_scaled(width**-0.5, depth)
        self.layer_norm1 = layers.LayerNorm(width, **norm)
        self.q_proj = layers.Linear(width, width, **common)
        self.k_proj = layers.Linear(width, width, **common)
        self.v_proj = layers.Linear(width, width, **common)
        self.out_proj = layers.Linear(width, width, stddev=residual, **common)
        self.layer_norm2 = layers.LayerNorm(width, **norm)
        self.fc1 = layers.Linear(width, ffn, **common)
        self.fc2 = layers.Linear(ffn, width, stddev=layers.depth_scaled(ffn**-0.5, depth), **common)

    def __call__(
        self, x: Float[Array, "I P D"], is_attended: Bool[Array, "I 1 1 P"] | None = None
    ) -> Float[Array, "I P D"]:
        """Applies one block: bidirectional attention, then the MLP, each after a norm (HF `CLIPEncoderLayer`).

        `is_attended` is True at the positions that all positions of the image attend to; None means all.
        """
        heads = self.config.num_attention_heads
        y = self.layer_norm1(x)
        q, k, v = (layers.split_heads(proj(y), heads) for proj in (self.q_proj, self.k_proj, self.v_proj))
        x = x + self.out_proj(layers.attention(q, k, v, is_attended))
        y = layers.ACTIVATIONS[self.config.hidden_act](self.fc1(self.layer_norm2(x)))
        return x + self.fc2(y)


class ClipVisionTower(nnx.Module):
    """Computes the hidden states of images after every block.

    `post_layernorm` is not used. It is kept so that an exported checkpoint has all weights.
    """

    def __init__(self, config: ClipConfig, *, rngs: nnx.Rngs, dtype: DType, param_dtype: DType, remat: str = "none"):
        width = config.hidden_size
        patch = config.num_channels * config.patch_size**2
        self.config, self.dtype, self.remat = config, dtype, remat
        self.class_embedding = layers.normal(rngs, (width,), width**-0.5, param_dtype)
        self.patch_embedding = layers.Linear(
            patch, width, rngs=rngs, use_bias=False, dtype=dtype, param_dtype=param_dtype
        )
        self.position_embedding = layers.normal(rngs, (config.num_patches + 1, width), 0.02, param_dtype)
        self.pre_layrnorm = layers.LayerNorm(width, epsilon=config.layer_norm_eps, param_dtype=param_dtype)
        self.layers = ClipBlocks(config, rngs=rngs, dtype=dtype, param_dtype=param_dtype)
        self.post_layernorm = layers.LayerNorm(width, epsilon=config.layer_norm_eps, param_dtype=param_dtype)

    def embed(self, pixels: Float[Array, "I C H W"]) -> Float[Array, "I P D"]:
        """Returns hidden state 0: embeddings of the class token and of the patches in row-major order, normalised."""
        x = self.patch_embedding(flat_patches(pixels, self.config.patch_size))
        class_token = jnp.broadcast_to(self.class_embedding[...].astype(self.dtype), (x.shape[0], 1, x.shape[-1]))
        x = jnp.concatenate([class_token, x], axis=1) + self.position_embedding[...].astype(self.dtype)
        return self.pre_layrnorm(x)

    def __call__(self, pixels: Float[Array, "I C H W"], upto: int | None = None) -> Float[Array, "X I P D"]:
        """Returns hidden states: index 0 is the input of the first block, index l the output of block l.

        No norm is applied after the last block.

        Args:
          pixels: I normalised images.
          upto: number of blocks to compute, static; None computes all.

        Returns:
          X = `upto + 1` hidden states of I images, each with P positions (class token and patches) of width D.

        Raises:
          ValueError: `upto` is negative or larger than the number of blocks.
        """
        return run_blocks(self.layers, self.embed(pixels), upto, self.remat)


def flat_patches(pixels: Float[Array, "I C H W"], size: int) -> Float[Array, "I P patch"]:
    """Returns the patches of images in row-major order, each flattened to (channel, row, column).

    Incomplete patches at the bottom and right are dropped, as torch's strided convolution does.

    Args:
      pixels: I images.
      size: height and width of a patch.
    """
    count, channels, height, width = pixels.shape
    rows, columns = height // size, width // size
    patches = pixels[:, :, : rows * size, : columns * size].reshape(count, channels, rows, size, columns, size)
    return patches.transpose(0, 2, 4, 1, 3, 5).reshape(count, -1, channels * size * size)


def run_blocks(
    blocks: Any, embedded: Float[Array, "I P D"], upto: int | None, remat: str, *arguments: Any,
    per_block: tuple[Any, ...] = (),
) -> Float[Array, "X I P D"]:  # fmt: skip
    """Returns the input of the first block, and the output of each block up to block `upto`.

    Args:
      blocks: module with the weights of all blocks, such as `ClipBlocks`.
      embedded: input of the first block.
      upto: number of blocks to compute, static; None computes all.
      remat: activations to store for the backward pass, see `layers.REMAT_POLICIES`.
      arguments: what every block takes after its input.
      per_block: arrays whose first axis is that of the blocks; each block takes its parts after `arguments`.

    Raises:
      ValueError: `upto` is negative or larger than the number of blocks.
    """
    depth = blocks.config.num_hidden_layers if upto is None else upto
    if not 0 <= depth <= blocks.config.num_hidden_layers:
        raise ValueError(f"upto={upto} is outside 0..{blocks.config.num_hidden_layers}")
    graph, state = nnx.split(blocks)
    slices = jax.tree.map(lambda leaf: leaf[:depth], (state, per_block))

    def body(x: Array, slices: tuple[nnx.State, tuple[Any, ...]]) -> tuple[Array, Array]:
        weights, parts = slices
        x = by_rows(nnx.merge(graph, gather_weights(weights, x))(x, *arguments, *parts))
        return x, x

    embedded = by_rows(embedded)
    _, outputs = jax.lax.scan(layers.rematerialise(body, remat), embedded, slices)
    return jnp.concatenate([embedded[None], outputs], axis=0)
