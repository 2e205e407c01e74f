"""LLaVA-NeXT (v1.6): LLaVA on tiles of any resolution, packed by a gather (HF `LlavaNextForConditionalGeneration`).

Every tile of an image leaves the tower at the same exit. The sequence of an image is the features of the whole image,
then the unpadded rows of patches of its tiles, each ended by `image_newline`. This order depends only on the image's
size, so the processor computes it on the host as indices, and the network's shapes do not depend on sizes.
"""

import dataclasses
from typing import ClassVar

import jax.numpy as jnp
from flax import nnx

from icet_jax.models.llava.network import Llava, LlavaConfig, LlavaEncoded
from icet_jax.nn import layers
from icet_jax.nn.protocols import Images
from icet_jax.parallel.traced import take_exit_states
from icet_jax.typing import Array, Bool, DType, Float, Int


@dataclasses.dataclass(frozen=True)
class LlavaNextConfig(LlavaConfig):
    """Holds the sizes of a LLaVA-NeXT model; `image_grid_pinpoints` are the canvases (height, width) that images may
    fill."""

    model_type: ClassVar[str] = "llava_next"
    image_grid_pinpoints: tuple[tuple[int, int], ...] = ()

    @property
    def max_tiles(self) -> int:
        """Returns the number of tiles of the largest canvas, plus one for the whole image."""
        size = self.vision.image_size
        return 1 + max((height // size) * (width // size) for height, width in self.image_grid_pinpoints)


class LlavaNext(Llava):
    """Implements the interface of `nn/protocols.py` for LLaVA-NeXT.

    `Images.pixels` are `[I, tiles, C, H, W]`, the whole image first. `Images.layout` is int32 `[B, N]`: for each image
    position of a row the index of its feature among the features of all tiles of all images. The index after the last
    one means `image_newline`, and -1 fills up the rows.
    """

    exit_definition = "hidden_states[l] of the CLIP tower, every tile, through the unchanged projector (ICET-l)"

    def __init__(
        self, config: LlavaNextConfig, *, rngs: nnx.Rngs, dtype: DType = jnp.float32, param_dtype: DType = jnp.float32,
        remat: str = "none",
    ):  # fmt: skip
        super().__init__(config, rngs=rngs, dtype=dtype, param_dtype=param_dtype, remat=remat)
        width = config.text.hidden_size
        self.image_newline = layers.normal(rngs, (width,), width**-0.5, param_dtype)

    def encode(self, images: Images, upto: int | None = None) -> LlavaEncoded:
        """Runs the tower once over all tiles; a static `upto` skips the blocks after it."""
        return LlavaEncoded(states=self._states(images, upto), images=images)

    def hidden_states(self, images: Images) -> Float[Array, "X I P D"]:
        """Returns hidden states 0..num_exits of the tower for every tile, class token first."""
        return self._states(images, None)

    def _states(self, images: Images, upto: int | None) -> Float[Array, "X I P D"]:
        return self.vision_tower(images.pixels.reshape(-1, *images.pixels.shape[2:]), upto)

    def visual(
        self, encoded: LlavaEncoded, exits: Int[Array, "..."], rows: Int[Array, "R"] | None = None
    ) -> Float[Array, "R N E"]:
        """Returns the packed features of each row's images, one image after another, zeros where a row has fewer."""
        images = encoded.images
        layout = images.layout if rows is None else images.layout[rows]
        layers_of, numbers = images.image_exits(exits, rows)
        count, tiles = images.pixels.shape[:2]
        states = encoded.states.reshape(encoded.states.shape[0], count, -1, encoded.states.shape[3])
        features = self.features(take_exit_states(states, layers_of, numbers).reshape(-1, *encoded.states.shape[2:]))
        per_image = tiles * features.shape[1]
        # The layout counts features from the first image of the batch, the bank from the first image of the row.
        bank = images.group_by_row(features.reshape(-1, per_image, features.shape[-1]), rows)
        bank = bank.reshape(layout.shape[0], -1, features.shape[-1])
        newline = jnp.broadcast_to(self.image_newline[...].astype(bank.dtype), (bank.shape[0], 1, bank.shape[2]))
        bank = jnp.concatenate([bank, newline], axis=1)
        is_newline = layout == images.pixels.shape[0] * per_image
        place = jnp.where(is_newline, bank.shape[1] - 1, layout - images.index(rows)[:, :1] * per_image)
        packed = jnp.take_along_axis(bank, jnp.maximum(place, 0)[:, :, None], axis=1)
        return jnp.where((layout >= 0)[:, :, None], packed, 0)

    def image_features(
        self, encoded: LlavaEncoded, exits: Int[Array, "..."]
    ) -> tuple[Float[Array, "B N E"], Bool[Array, "B N"]]:
        """Returns the rows of `visual`, and which of their features belong to an image."""
        return self.visual(encoded, exits), encoded.images.layout >= 0
