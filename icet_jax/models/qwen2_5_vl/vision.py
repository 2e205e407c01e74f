"""Vision transformer of Qwen2.5-VL, which returns the hidden state after every block.

Source: HF `Qwen2_5_VisionTransformerPretrainedModel`.

An image is a list of patches, in groups of `spatial_merge_size` x `spatial_merge_size` that later become one feature.
The order is that of HF's processor: (row of the group, column of the group, row in the group, column in the group). In
most blocks a patch attends to the patches of its window, in some to all patches of its image. HF reorders the patches
by windows before the first block and the features after the last one. Here they keep their order, and only queries,
keys and values are gathered by windows.

Every image of a batch has the same number of patches P, of which the last ones may be padding.
"""

import dataclasses
from typing import Any

import flax
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from icet_jax.nn import flops, layers
from icet_jax.nn.clip import run_blocks
from icet_jax.typing import Array, Bool, DType, Float, Int, Keywords

NORM_EPSILON = 1e-6  # HF's config has no field for it
_ROPE_THETA = 10000.0


@dataclasses.dataclass(frozen=True)
class QwenVisionConfig:
    """Holds the sizes of the tower.

    The names are HF's, except for `num_hidden_layers`, `num_attention_heads` and `num_channels`, which are `depth`,
    `num_heads` and `in_channels` there. `window_size` is in pixels.
    """

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    patch_size: int
    temporal_patch_size: int
    spatial_merge_size: int
    window_size: int
    fullatt_block_indexes: tuple[int, ...]
    num_channels: int = 3

    @property
    def group_size(self) -> int:
        """Returns the number of patches that become one feature."""
        return self.spatial_merge_size**2

    @property
    def window_side(self) -> int:
        """Returns the number of groups along each side of a window."""
        return self.window_size // self.spatial_merge_size // self.patch_size

    @property
    def window_patches(self) -> int:
        """Returns the number of patches of a whole window."""
        return self.window_side**2 * self.group_size

    @property
    def patch_shape(self) -> tuple[int, int, int, int]:
        """Returns the axes of a patch: channels, frames, rows, columns."""
        return self.num_channels, self.temporal_patch_size, self.patch_size, self.patch_size

    def num_windows(self, patches: int) -> int:
        """Returns the largest number of windows that an image with up to `patches` patches can have.

        An image that is one group high or wide has the most windows.
        """
        return -(-patches // self.group_size // self.window_side)


@flax.struct.dataclass
class PatchPlaces:
    """Says where the patches of I images are.

    With S patches in a whole window, patch s of window w is in slot w * S + s. Windows at the right and bottom edge of
    an image may be smaller, and an image may have fewer windows than others; so some slots are empty.

    Attributes:
      is_patch: Bool[I, P], False at padding.
      rows, columns: Int[I, P], place of each patch in its image.
      slots: Int[I, P], slot of each patch; padding has any.
      patches: Int[I, W * S], patch in each slot; an empty slot has any.
      is_filled: Bool[I, W * S], whether there is a patch in a slot.
    """

    # Not annotated as arrays: jax also builds this pytree with other leaves, for example in jit(...).lower.
    is_patch: Any
    rows: Any
    columns: Any
    slots: Any
    patches: Any
    is_filled: Any


def patch_places(config: QwenVisionConfig, grids: Int[Array, "I 2"], num_patches: int) -> PatchPlaces:
    """Returns the places of the patches of images.

    Args:
      config: sizes of the tower.
      grids: rows and columns of patches of each image; (0, 0) for a filler image.
      num_patches: P, a multiple of `config.group_size`.
    """
    merge, group, side = config.spatial_merge_size, config.group_size, config.window_side
    high, wide = (jnp.maximum(grids[:, axis, None] // merge, 1) for axis in range(2))  # in groups
    count = grids.prod(axis=1)[:, None]
    patch = jnp.arange(num_patches)
    group_row, group_column = jnp.divmod(patch // group, wide)
    row_in_group, column_in_group = np.divmod(np.arange(num_patches) % group, merge)
    windows_wide = -(-wide // side)
    window = group_row // side * windows_wide + group_column // side
    inner = (group_row % side * side + group_column % side) * group + patch % group
    num_slots = config.num_windows(num_patches) * config.window_patches
    slot_window, slot_inner = np.divmod(np.arange(num_slots), config.window_patches)
    inner_row, inner_column = np.divmod(slot_inner // group, side)
    window_row, window_column = jnp.divmod(jnp.asarray(slot_window), windows_wide)
    slot_row, slot_column = window_row * side + inner_row, window_column * side + inner_column
    patches = (slot_row * wide + slot_column) * group + slot_inner % group
    is_patch = patch < count
    return PatchPlaces(
        is_patch=is_patch,
        rows=group_row * merge + row_in_group,
        columns=group_column * merge + column_in_group,
        slots=jnp.where(is_patch, window * config.window_patches + inner, 0),
        patches=jnp.clip(patches, 0, num_patches - 1),
        is_filled=(slot_row < high) & (slot_column < wide) & (count > 0),
    )


def rotary(config: QwenVisionConfig, places: PatchPlaces) -> tuple[Float[Array, "I P 1 d"], Float[Array, "I P 1 d"]]:
    """Returns cos and sin of the patches' rotary angles.

    The first half of the frequencies uses a patch's row, the second half its column; both have the same frequencies.
    """
    size = config.hidden_size // config.num_attention_heads
    exponent = np.arange(0, size // 2, 2, dtype=np.float32) / np.float32(size // 2)
    frequencies = (1.0 / np.float32(_ROPE_THETA) ** exponent).astype(np.float32)
    both = jnp.stack([places.rows, places.columns], axis=-1)
    return layers.rotary_angles(jnp.repeat(both, len(frequencies), axis=-1), jnp.asarray(np.tile(frequencies, 2)))


class FusedQkv(nnx.Module):
    """Computes queries, keys and values by one projection; the three have an axis of their own in its weights."""

    def __init__(self, width: int, depth: int, *, rngs: nnx.Rngs, dtype: DType, param_dtype: DType):
        self.dtype = dtype
        self.kernel = layers.normal(rngs, (depth, 3, width, width), width**-0.5, param_dtype)
        self.bias = nnx.Param(jnp.zeros((depth, 3, width), param_dtype))

    def __call__(self, x: Float[Array, "I P D"]) -> Float[Array, "3 I P D"]:
        """Returns queries, keys and values."""
        y = jnp.einsum("ipd,cde->cipe", x.astype(self.dtype), self.kernel[...].astype(self.dtype))
        return y + self.bias[...].astype(self.dtype)[:, None, None]


class QwenVisionBlocks(nnx.Module):
    """Holds the weights of all blocks, stacked along their first axis.

    To run one block, call the module `nnx.merge(graphdef, slice)`, made of that block's slice of the weights.
    """

    def __init__(self, config: QwenVisionConfig, *, rngs: nnx.Rngs, dtype: DType, param_dtype: DType):
        width, ffn, depth = config.hidden_size, config.intermediate_size, config.num_hidden_layers
        self.config = config
        common: Keywords = dict(rngs=rngs, dtype=dtype, param_dtype=param_dtype)
        linear: Keywords = dict(use_bias=True, layers=depth, **common)
        norm: Keywords = dict(epsilon=NORM_EPSILON, param_dtype=param_dtype, layers=depth)
        self.norm1, self.norm2 = layers.RMSNorm(width, **norm), layers.RMSNorm(width, **norm)
        self.qkv = FusedQkv(width, depth, **common)
        self.out_proj = layers.Linear(width, width, stddev=layers.depth_scaled(width**-0.5, depth), **linear)
        self.gate_proj, self.up_proj = layers.Linear(width, ffn, **linear), layers.Linear(width, ffn, **linear)
        self.down_proj = layers.Linear(ffn, width, stddev=layers.depth_scaled(ffn**-0.5, depth), **linear)

    def __call__(
        self,
        x: Float[Array, "I P D"],
        angles: tuple[Array, Array],
        places: PatchPlaces,
        is_full: Bool[Array, ""] | bool,
    ) -> Float[Array, "I P D"]:
        """Applies one block: attention, then a SwiGLU MLP, each after a norm (HF `Qwen2_5_VLVisionBlock`).

        Args:
          x: input of the block.
          angles: result of `rotary`.
          places: result of `patch_places`.
          is_full: whether patches attend to all patches of their image, instead of those of their window; a bool if
            that is the same for all blocks.
        """
        heads = self.config.num_attention_heads
        q, k, v = (layers.split_heads(part, heads) for part in self.qkv(self.norm1(x)))
        q, k = (layers.rotate(part.astype(jnp.float32), *angles).astype(x.dtype) for part in (q, k))
        if isinstance(is_full, bool):
            attended = (self._in_image if is_full else self._in_windows)(q, k, v, places)
        else:
            attended = jax.lax.cond(is_full, self._in_image, self._in_windows, q, k, v, places)
        x = x + self.out_proj(attended)
        y = self.norm2(x)
        return x + self.down_proj(jax.nn.silu(self.gate_proj(y)) * self.up_proj(y))

    def _in_image(self, q: Array, k: Array, v: Array, places: PatchPlaces) -> Float[Array, "I P D"]:
        """Returns the attention of each patch to all patches of its image."""
        return layers.attention(q, k, v, real=places.is_patch, right_padded=True)

    def _in_windows(self, q: Array, k: Array, v: Array, places: PatchPlaces) -> Float[Array, "I P D"]:
        """Returns the attention of each patch to the patches of its window."""
        size = self.config.window_patches

        def by_window(part: Float[Array, "I P H d"]) -> Float[Array, "IW S H d"]:
            slots = jnp.take_along_axis(part, places.patches[:, :, None, None], axis=1)
            return slots.reshape(-1, size, *part.shape[2:])

        mask = places.is_filled.reshape(-1, 1, 1, size)
        attended = layers.attention(by_window(q), by_window(k), by_window(v), mask)
        slots = attended.reshape(q.shape[0], -1, attended.shape[-1])
        return jnp.take_along_axis(slots, places.slots[:, :, None], axis=1)


class QwenVisionTower(nnx.Module):
    """Computes the hidden states of images after every block. There is no norm before the first block."""

    def __init__(
        self, config: QwenVisionConfig, *, rngs: nnx.Rngs, dtype: DType, param_dtype: DType, remat: str = "none"
    ):
        self.config, self.remat = config, remat
        common: Keywords = dict(rngs=rngs, dtype=dtype, param_dtype=param_dtype)
        patch = int(np.prod(config.patch_shape))
        self.patch_embedding = layers.Linear(patch, config.hidden_size, use_bias=False, **common)
        self.layers = QwenVisionBlocks(config, **common)

    def __call__(
        self, patches: Float[Array, "I P patch"], grids: Int[Array, "I 2"], upto: int | None = None
    ) -> Float[Array, "X I P D"]:
        """Returns hidden states: index 0 is the input of the first block, index l the output of block l.

        Args:
          patches: flattened patches, each (channel, frame, row, column); padding has any values.
          grids: rows and columns of patches of each image; (0, 0) for a filler image.
          upto: number of blocks to compute, static; None computes all.

        Raises:
          ValueError: `upto` is negative or larger than the number of blocks.
        """
        places = patch_places(self.config, grids, patches.shape[1])
        angles = rotary(self.config, places)
        is_full = is_full_attention(self.config)
        kinds = set(is_full[:upto].tolist())
        arguments, per_block = ((kinds.pop(),), ()) if len(kinds) == 1 else ((), (jnp.asarray(is_full),))
        return run_blocks(
            self.layers, self.patch_embedding(patches), upto, self.remat, angles, places, *arguments,
            per_block=per_block,
        )  # fmt: skip


def is_full_attention(config: QwenVisionConfig) -> Bool[np.ndarray, " L"]:
    """Returns for each block whether its patches attend to all patches of their image."""
    return np.isin(np.arange(config.num_hidden_layers), config.fullatt_block_indexes)


def operations(config: QwenVisionConfig, num_patches: int, blocks: int) -> int:
    """Returns the floating-point operations of the first blocks of the tower for one image, as `nn.flops` counts them.

    Args:
      config: sizes of the tower.
      num_patches: patches of the image, padding included.
      blocks: number of blocks that run.
    """
    width, ffn = config.hidden_size, config.intermediate_size
    full = int(is_full_attention(config)[:blocks].sum())
    slots = config.num_windows(num_patches) * config.window_patches
    attention = 4 * width * (full * num_patches**2 + (blocks - full) * slots * config.window_patches)
    embedding = flops.products(num_patches, (*config.patch_shape, width))
    return embedding + flops.products(num_patches, (blocks, 4, width, width), (blocks, 3, width, ffn)) + attention
