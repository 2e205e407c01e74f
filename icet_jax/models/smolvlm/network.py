"""SmolVLM, SmolVLM2 and Idefics3: a SigLIP tower, a connector and a Llama decoder.

Source: HF `SmolVLMForConditionalGeneration`, `Idefics3ForConditionalGeneration`, which compute the same.

An image is cut into tiles, of which the last is the whole image, scaled down. Every tile is an image of the tower and
takes `image_tokens` positions in the prompt. The connector puts neighbouring patches together (pixel shuffle) and
projects them to the decoder's width.

For arrays whose shape does not depend on the images, the tiles of a row are put into groups of `max_tiles`, as many
groups as the row has images. They fill the groups one after another, not image by image. So the features of a row's
tiles follow one another without gaps, and the k-th image position of the prompt takes the k-th feature.
"""

import dataclasses
from typing import Any, ClassVar

import flax
import jax.numpy as jnp
from flax import nnx

from icet_jax.models.base.encoder_work import EncoderWork
from icet_jax.models.llava.network import Llava, LlavaConfig, LlavaEncoded
from icet_jax.nn import flops, layers
from icet_jax.nn.llama import Llama
from icet_jax.nn.protocols import Images, Operations
from icet_jax.nn.siglip import SiglipVisionTower
from icet_jax.typing import Array, Bool, DType, Float, Int, Keywords

MAX_TILES = 17
"""Largest number of tiles of an image in all published checkpoints: 4 x 4, and the whole image scaled down."""


@dataclasses.dataclass(frozen=True)
class SmolVLMConfig(LlavaConfig):
    """Holds the sizes of a SmolVLM or SmolVLM2 under HF's names.

    `scale_factor` is the number of patches, along each side, that the connector puts together. `max_tiles`, which HF's
    config does not have, is the number of tiles of a group, the largest number of tiles of an image. Of LLaVA's fields,
    `vision_feature_layer` is always -1 (the last block), and those of the projector are not used.
    """

    model_type: ClassVar[str] = "smolvlm"
    vision_feature_layer: int = -1
    scale_factor: int = 2
    max_tiles: int = MAX_TILES

    @property
    def image_tokens(self) -> int:
        """Returns the number of positions of one tile in the prompt."""
        return self.vision.num_patches // self.scale_factor**2


@dataclasses.dataclass(frozen=True)
class Idefics3Config(SmolVLMConfig):
    """Holds the sizes of a model whose files name it Idefics3: the first SmolVLM models and Idefics3 itself."""

    model_type: ClassVar[str] = "idefics3"


@flax.struct.dataclass
class TileLayout:
    """Says which tiles of each group are real (`Images.layout` of this family).

    Attributes:
      num_tiles: Int[I], number of real tiles of each of I groups, which come first.
      positions: Int[I, tiles, P], result of `nn.siglip.patch_positions` for each tile; None if no tile has padding.
    """

    # Not annotated as arrays: jax also builds this pytree with other leaves, for example in jit(...).lower.
    num_tiles: Any
    positions: Any = None


def encoder_work(config: SmolVLMConfig, exit_layer: int, length: int = 0) -> EncoderWork:
    """Returns what encoding one image of the largest number of tiles takes if only an exit is used; see `Family`."""
    tower = dataclasses.replace(config.vision, num_hidden_layers=exit_layer)
    return EncoderWork(exit_layer, config.max_tiles * flops.siglip(tower))


class SmolVLM(Llava):
    """Implements `VisionLanguageModel` for SmolVLM, SmolVLM2 and Idefics3; see `nn/protocols.py` for its methods.

    `Images.pixels` are `[I, tiles, C, H, W]` for I groups of tiles, and `Images.layout` is a `TileLayout`.
    """

    config: SmolVLMConfig
    vision_tower: Any  # LLaVA has modules of other classes under these names
    projector: Any
    exit_definition = "output of block l of the SigLIP tower, every tile, through unchanged norm and connector (ICET-l)"

    def __init__(
        self, config: SmolVLMConfig, *, rngs: nnx.Rngs, dtype: DType = jnp.float32, param_dtype: DType = jnp.float32,
        remat: str = "none",
    ):  # fmt: skip
        self.config = config
        common: Keywords = dict(rngs=rngs, dtype=dtype, param_dtype=param_dtype)
        self.vision_tower = SiglipVisionTower(config.vision, remat=remat, **common)
        width = config.vision.hidden_size * config.scale_factor**2
        self.projector = layers.Linear(width, config.text.hidden_size, use_bias=False, **common)
        self.language_model = Llama(config.text, remat=remat, **common)

    def encode(self, images: Images, upto: int | None = None) -> LlavaEncoded:
        """Returns the hidden states of all tiles; see `VisionLanguageModel.encode`."""
        states = self._states(images, upto)
        return LlavaEncoded(
            states=states.reshape(states.shape[0], images.pixels.shape[0], -1, states.shape[-1]), images=images
        )

    def hidden_states(self, images: Images) -> Float[Array, "X I P D"]:
        """Returns hidden states 0..num_exits of the image encoder for every tile, those that fill up included."""
        return self._states(images, None)

    def _states(self, images: Images, upto: int | None) -> Float[Array, "X I P D"]:
        """Returns the hidden states of all I tiles, up to exit `upto` or at all exits if it is None."""
        pixels, positions = images.pixels, images.layout.positions
        if positions is not None:
            positions = positions.reshape(-1, positions.shape[-1])
        return self.vision_tower(pixels.reshape(-1, *pixels.shape[2:]), upto, positions)

    def features(self, states: Float[Array, "I P D"]) -> Float[Array, "I N E"]:
        """Returns the image features of the hidden states of I groups of tiles, in the order of the tiles.

        They are normalised, put together by the pixel shuffle and projected (HF `SmolVLMConnector`).
        """
        side = self.config.vision.image_size // self.config.vision.patch_size
        factor, width = self.config.scale_factor, states.shape[-1]
        normed = self.vision_tower.post_layernorm(states)
        # Each block of factor x factor patches becomes one vector (row in the block, column in the block, channel).
        blocks = normed.reshape(-1, side // factor, factor, side // factor, factor, width).transpose(0, 1, 3, 2, 4, 5)
        return self.projector(blocks.reshape(states.shape[0], -1, factor**2 * width))

    def image_features(
        self, encoded: LlavaEncoded, exits: Int[Array, "..."]
    ) -> tuple[Float[Array, "B MN E"], Bool[Array, "B MN"]]:
        """Returns (result of `visual` for all rows, whether each feature belongs to a real tile)."""
        images = encoded.images
        num_tiles = images.group_by_row(images.layout.num_tiles)
        is_tile = jnp.arange(images.pixels.shape[1]) < num_tiles[..., None]
        is_feature = jnp.repeat(is_tile.reshape(is_tile.shape[0], -1), self.config.image_tokens, axis=1)
        return self.visual(encoded, exits), is_feature

    def operations(self, length: int, cached: int, per_row: int) -> Operations:
        """Returns the numbers of operations for one image and for one row; see `VisionLanguageModel.operations`."""
        tokens = self.config.max_tiles * self.config.image_tokens
        width = self.config.vision.hidden_size * self.config.scale_factor**2
        project = flops.products(tokens, (width, self.hidden_size))
        encode = encoder_work(self.config, self.num_exits).operations
        return super().operations(length, cached, per_row)._replace(encode=encode, visual=project, project=project)
