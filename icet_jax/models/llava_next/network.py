"""LLaVA-NeXT (v1.6): LLaVA on tiles, for images of any resolution (HF `LlavaNextForConditionalGeneration`).

All tiles of an image use the same exit. In the prompt, an image takes the features of the scaled-down image, then the
features of the tiles in the order of the image's rows of patches, where each row ends with `image_newline`. This order
depends only on the image's size. It is therefore computed on the host as indices (`Images.layout`), so that the shapes
of the network's arrays do not depend on the sizes of images.
"""

import dataclasses
from typing import ClassVar

import jax.numpy as jnp
from flax import nnx

from icet_jax.models.llava.network import Llava, LlavaConfig, LlavaEncoded, LlavaProjectorInputs
from icet_jax.nn import layers
from icet_jax.nn.protocols import Images
from icet_jax.parallel.traced import take_exit_states
from icet_jax.typing import Array, Bool, DType, Float, Int


@dataclasses.dataclass(frozen=True)
class LlavaNextConfig(LlavaConfig):
    """Holds the sizes of a LLaVA-NeXT model under HF's names.

    `image_grid_pinpoints` are the sizes (height, width) in pixels to which images may be resized.
    """

    model_type: ClassVar[str] = "llava_next"
    image_grid_pinpoints: tuple[tuple[int, int], ...] = ()

    @property
    def max_tiles(self) -> int:
        """Returns the largest number of tiles of an image, plus one for the scaled-down image."""
        size = self.vision.image_size
        return 1 + max((height // size) * (width // size) for height, width in self.image_grid_pinpoints)


class LlavaNext(Llava):
    """Implements `VisionLanguageModel` for LLaVA-NeXT; see `nn/protocols.py` for its methods.

    `Images.pixels` are `[I, tiles, C, H, W]`, where the first tile is the scaled-down image. `Images.layout` is int32
    `[B, N]`, see `anyres.gather_rows`.
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
        """Returns the hidden states of all tiles; see `VisionLanguageModel.encode`."""
        return LlavaEncoded(states=self._states(images, upto), images=images)

    def hidden_states(self, images: Images) -> Float[Array, "X I P D"]:
        """Returns hidden states 0..num_exits of the image encoder for every tile, class token first."""
        return self._states(images, None)

    def _states(self, images: Images, upto: int | None) -> Float[Array, "X I P D"]:
        """Returns the hidden states of all I tiles of all images, up to exit `upto` or at all exits if it is None."""
        return self.vision_tower(images.pixels.reshape(-1, *images.pixels.shape[2:]), upto)

    def visual(
        self, encoded: LlavaEncoded, exits: Int[Array, "..."], rows: Int[Array, "R"] | None = None
    ) -> Float[Array, "R N E"]:
        """Returns the features of each row's images at its exit, in the order of the prompt, filled up with zeros."""
        images = encoded.images
        layout = images.layout if rows is None else images.layout[rows]
        image_exits, numbers = images.image_exits(exits, rows)
        count, tiles = images.pixels.shape[:2]
        states = encoded.states.reshape(encoded.states.shape[0], count, -1, encoded.states.shape[3])
        features = self.features(take_exit_states(states, image_exits, numbers).reshape(-1, *encoded.states.shape[2:]))
        per_image = tiles * features.shape[1]
        # The layout counts features from the first image of the batch, `by_row` from the first image of the row.
        by_row = images.group_by_row(features.reshape(-1, per_image, features.shape[-1]), rows)
        by_row = self._with_newline(by_row.reshape(layout.shape[0], -1, features.shape[-1]))
        places = _places_in_row(images, layout, per_image, rows)
        return _pack(by_row, places, layout)

    def projector_inputs(self, encoded: LlavaEncoded, exits: Int[Array, "..."]) -> LlavaProjectorInputs:
        """Returns the hidden states of all tiles of each row's images at its exit, and where their features go."""
        images = encoded.images
        count, tiles = images.pixels.shape[:2]
        states = encoded.states.reshape(encoded.states.shape[0], count, -1, encoded.states.shape[3])
        own = images.group_by_row(take_exit_states(states, *images.image_exits(exits)))
        own = own.reshape(*own.shape[:2], tiles, *encoded.states.shape[2:])
        places = _places_in_row(images, images.layout, tiles * self.config.image_tokens)
        return LlavaProjectorInputs(
            states=own, is_present=images.index() >= 0, places=jnp.where(images.layout >= 0, places, -1)
        )

    def project(self, inputs: LlavaProjectorInputs) -> Float[Array, "R N E"]:
        """Returns the features of each row's images in the order of the prompt; see `VisionLanguageModel.project`."""
        return _pack(self._with_newline(super().project(inputs)), inputs.places, inputs.places)

    def _with_newline(self, by_row: Float[Array, "R F E"]) -> Float[Array, "R F+1 E"]:
        """Returns the features of each row with `image_newline` behind them."""
        newline = jnp.broadcast_to(self.image_newline[...].astype(by_row.dtype), (by_row.shape[0], 1, by_row.shape[2]))
        return jnp.concatenate([by_row, newline], axis=1)

    def image_features(
        self, encoded: LlavaEncoded, exits: Int[Array, "..."]
    ) -> tuple[Float[Array, "B N E"], Bool[Array, "B N"]]:
        """Returns (result of `visual` for all rows, whether each feature belongs to an image)."""
        return self.visual(encoded, exits), encoded.images.layout >= 0


def _places_in_row(
    images: Images, layout: Int[Array, "R N"], per_image: int, rows: Int[Array, "R"] | None = None
) -> Int[Array, "R N"]:
    """Returns a layout that counts features from the first image of each row instead of the first of the batch.

    `image_newline` gets the number after the last feature. Positions without a feature get any number.

    Args:
      images: the images of the batch.
      layout: `Images.layout` of the requested rows.
      per_image: number of features of an image.
      rows: the requested rows; None for all.
    """
    is_newline = layout == images.pixels.shape[0] * per_image
    return jnp.where(is_newline, images.per_row * per_image, layout - images.index(rows)[:, :1] * per_image)


def _pack(
    features: Float[Array, "R F E"], places: Int[Array, "R N"], layout: Int[Array, "R N"]
) -> Float[Array, "R N E"]:
    """Returns `features[row, places[row, n]]` for each row and position n, and zeros where `layout` is negative."""
    packed = jnp.take_along_axis(features, jnp.maximum(places, 0)[:, :, None], axis=1)
    return jnp.where((layout >= 0)[:, :, None], packed, 0)
