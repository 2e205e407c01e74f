"""SigLIP vision tower, which returns the hidden state after every block (HF `SmolVLMVisionTransformer`).

It differs from CLIP's tower: there is no class token and no norm before the first block, the patch embedding has a
bias, and `post_layernorm` is used. Images may have padding at the bottom and right. The position of a patch is the
fraction of the image that lies before it, so the patches of a smaller image are spread over the whole position table.
"""

import math

import jax.numpy as jnp
import numpy as np
from flax import nnx

from icet_jax.nn import layers
from icet_jax.nn.clip import ClipBlocks, ClipConfig, flat_patches, run_blocks
from icet_jax.typing import Array, Bool, DType, Float, Int


class SiglipVisionTower(nnx.Module):
    """Computes the hidden states of images after every block.

    `post_layernorm` is not applied to them. Callers apply it to the state of the exit that they use.
    """

    def __init__(self, config: ClipConfig, *, rngs: nnx.Rngs, dtype: DType, param_dtype: DType, remat: str = "none"):
        width, patch = config.hidden_size, config.num_channels * config.patch_size**2
        self.config, self.dtype, self.remat = config, dtype, remat
        self.patch_embedding = layers.Linear(
            patch, width, rngs=rngs, use_bias=True, dtype=dtype, param_dtype=param_dtype
        )
        self.position_embedding = layers.normal(rngs, (config.num_patches, width), 0.02, param_dtype)
        self.layers = ClipBlocks(config, rngs=rngs, dtype=dtype, param_dtype=param_dtype)
        self.post_layernorm = layers.LayerNorm(width, epsilon=config.layer_norm_eps, param_dtype=param_dtype)

    def embed(self, pixels: Float[Array, "I C H W"], positions: Int[Array, "I P"] | None = None) -> Array:
        """Returns hidden state 0, `[I, P, D]`: embeddings of the patches in row-major order plus their positions."""
        if positions is None:
            side = self.config.image_size // self.config.patch_size
            positions = jnp.asarray(patch_positions(np.ones((1, side, side), bool), side))
        table = self.position_embedding[...].astype(self.dtype)
        return self.patch_embedding(flat_patches(pixels, self.config.patch_size)) + table[jnp.maximum(positions, 0)]

    def __call__(
        self, pixels: Float[Array, "I C H W"], upto: int | None = None, positions: Int[Array, "I P"] | None = None
    ) -> Float[Array, "X I P D"]:
        """Returns hidden states: index 0 is the input of the first block, index l the output of block l.

        Args:
          pixels: I normalised images of `image_size` x `image_size` pixels.
          upto: number of blocks to compute, static; None computes all.
          positions: result of `patch_positions` for images with padding. None means that no image has padding, which
            allows a faster attention kernel.

        Raises:
          ValueError: `upto` is negative or larger than the number of blocks.
        """
        is_attended = None if positions is None else (positions >= 0)[:, None, None, :]
        return run_blocks(self.layers, self.embed(pixels, positions), upto, self.remat, is_attended)


def patch_positions(is_patch: Bool[np.ndarray, "I rows columns"], side: int) -> Int[np.ndarray, "I P"]:
    """Returns the index in the position table of each patch, -1 for padding, int32 with P = rows * columns.

    A patch's fraction of the height is its row divided by the number of rows that are no padding; the row of the table
    is the number of boundaries 1/side, 2/side, ... that are not above this fraction. Columns are treated alike.

    torch rounds the boundaries differently on each kind of processor. For some sides this moves patches by a row
    of the table, in torch as well as here, but not for the published 26, 27 and 32.

    Args:
      is_patch: False at padding.
      side: number of rows, and of columns, of the position table.

    Source: HF `SmolVLMVisionEmbeddings`.
    """
    step = 1 / side
    boundaries = (step + step * np.arange(math.ceil((1.0 - step) / step))).astype(np.float32)

    def buckets(counts: np.ndarray, length: int) -> np.ndarray:
        """Returns the table's row (or column) of `length` rows, for images with `counts` rows that are no padding."""
        fractions = np.arange(length, dtype=np.float32) * (np.float32(1) / np.maximum(counts, 1).astype(np.float32))
        return np.searchsorted(boundaries, np.minimum(fractions, np.float32(1 - 1e-6)), side="right")

    rows, columns = is_patch.shape[1:]
    of_rows = buckets(is_patch[:, :, 0].sum(axis=1, keepdims=True), rows)
    of_columns = buckets(is_patch[:, 0, :].sum(axis=1, keepdims=True), columns)
    positions = of_rows[:, :, None] * side + of_columns[:, None, :]
    return np.where(is_patch, positions, -1).reshape(len(is_patch), -1).astype(np.int32)
