"""Qwen2.5-VL: a vision transformer for images of any size, a merger and a Qwen2 decoder with multimodal positions.

Source: HF `Qwen2_5_VLForConditionalGeneration`.

An image keeps its size, up to a limit of the processor, so images have different numbers of patches. For arrays whose
shapes do not depend on the images, every image of a batch is padded to one of a few numbers of patches
(`patch_bucket`).

Each token has three rotary positions: for frame, row and column. Those of text tokens are equal and count on; those of
an image begin behind the text before it, and the text after an image of h x w features goes on max(h, w) later.
"""

import dataclasses
from typing import Any, ClassVar

import flax
import jax.numpy as jnp
from flax import nnx

from icet_jax.models.base.encoder_work import EncoderWork
from icet_jax.models.llava.network import Llava, LlavaConfig, LlavaEncoded
from icet_jax.models.qwen2_5_vl import vision
from icet_jax.models.qwen2_5_vl.vision import NORM_EPSILON, QwenVisionConfig, QwenVisionTower
from icet_jax.nn import flops, layers
from icet_jax.nn.llama import Llama
from icet_jax.nn.protocols import Images, Operations
from icet_jax.parallel.traced import take_exit_states
from icet_jax.typing import Array, Bool, DType, Float, Int, Keywords

MAX_PATCHES = 65536
"""Largest number of patches of an image in the published checkpoints, whose `max_pixels` is 12,845,056."""


@dataclasses.dataclass(frozen=True)
class Qwen25VLConfig(LlavaConfig):
    """Holds the sizes of a Qwen2.5-VL.

    `max_patches`, which HF's config does not have, is the largest number of patches of an image. Of LLaVA's fields,
    `vision_feature_layer` is always -1 (the last block), and those of the projector are not used.
    """

    model_type: ClassVar[str] = "qwen2_5_vl"
    vision: QwenVisionConfig  # type: ignore[assignment]  # LLaVA's is a CLIP tower
    vision_feature_layer: int = -1
    max_patches: int = MAX_PATCHES

    @property
    def image_tokens(self) -> int:
        """Returns the number of positions of the largest image in the prompt."""
        return self.max_patches // self.vision.group_size


@flax.struct.dataclass
class ImageFeatures:
    """Holds the features of each row's M images (`Visual` of this family).

    Attributes:
      features: Float[B, M, N, E], features of each image, padded to N.
      grids: Int[B, M, 2], rows and columns of features of each image; (0, 0) where a row has fewer images.
    """

    # Not annotated as arrays: jax also builds this pytree with other leaves, for example in jit(...).lower.
    features: Any
    grids: Any


@flax.struct.dataclass
class MergerInputs:
    """Holds what the merger takes of each row's images; see `VisionLanguageModel.projector_inputs`.

    Attributes:
      states: Float[B, M, P, D], hidden states of each row's M images.
      grids: Int[B, M, 2], see `ImageFeatures`.
    """

    # Not annotated as arrays: jax also builds this pytree with other leaves, for example in jit(...).lower.
    states: Any
    grids: Any


def patch_bucket(config: Qwen25VLConfig, positions: int) -> int:
    """Returns the number of patches to which images with up to `positions` positions in the prompt are padded.

    Up to `config.max_patches`, the number of positions is a power of two or one and a half times one.
    """
    power = 1 << max(positions - 1, 0).bit_length()
    padded = power * 3 // 4 if positions <= power * 3 // 4 else power
    return min(padded * config.vision.group_size, config.max_patches)


def encoder_work(config: Qwen25VLConfig, exit_layer: int, length: int = 0) -> EncoderWork:
    """Returns what encoding one image takes if only an exit is used; see `Family`.

    The image has as many patches as images in prompts of `length` positions are padded to.
    """
    num_patches = patch_bucket(config, length) if length else config.max_patches
    return EncoderWork(exit_layer, vision.operations(config.vision, num_patches, exit_layer))


class Merger(nnx.Module):
    """Makes one feature of each group of patches: a norm, then two projections (HF `Qwen2_5_VLPatchMerger`)."""

    def __init__(self, config: Qwen25VLConfig, *, rngs: nnx.Rngs, dtype: DType, param_dtype: DType):
        common: Keywords = dict(rngs=rngs, use_bias=True, dtype=dtype, param_dtype=param_dtype)
        width = config.vision.hidden_size * config.vision.group_size
        self.norm = layers.RMSNorm(config.vision.hidden_size, epsilon=NORM_EPSILON, param_dtype=param_dtype)
        self.linear_1 = layers.Linear(width, width, **common)
        self.linear_2 = layers.Linear(width, config.text.hidden_size, **common)

    def __call__(self, states: Float[Array, "I P D"]) -> Float[Array, "I N E"]:
        """Returns the features of images from the hidden states of their patches."""
        groups = self.norm(states).reshape(states.shape[0], -1, self.linear_1.kernel.shape[0])
        return self.linear_2(layers.gelu_erf(self.linear_1(groups)))


class Qwen25VL(Llava):
    """Implements `VisionLanguageModel` for Qwen2.5-VL; see `nn/protocols.py` for its methods.

    `Images.pixels` are flat patches `[I, P, patch]`, and `Images.layout` is int32 `[I, 2]`: rows and columns of patches
    of each image, (0, 0) for a filler image.
    """

    config: Qwen25VLConfig
    vision_tower: Any  # LLaVA has modules of other classes under these names
    projector: Any
    exit_definition = "output of block l of the vision transformer through the unchanged merger (ln_q and MLP; ICET-l)"

    def __init__(
        self, config: Qwen25VLConfig, *, rngs: nnx.Rngs, dtype: DType = jnp.float32, param_dtype: DType = jnp.float32,
        remat: str = "none",
    ):  # fmt: skip
        self.config = config
        common: Keywords = dict(rngs=rngs, dtype=dtype, param_dtype=param_dtype)
        self.vision_tower = QwenVisionTower(config.vision, remat=remat, **common)
        self.projector = Merger(config, **common)
        self.language_model = Llama(config.text, remat=remat, **common)

    def encode(self, images: Images, upto: int | None = None) -> LlavaEncoded:
        """Runs the tower once; with a static `upto`, only its first `upto` blocks."""
        states = self.vision_tower(images.pixels, images.layout, upto)
        # The patches are large and no longer needed.
        return LlavaEncoded(states=states, images=images.replace(pixels=None))  # type: ignore[attr-defined]

    def hidden_states(self, images: Images) -> Float[Array, "X I P D"]:
        """Returns hidden states 0..num_exits of the tower, in the order of the processor's patches; 0 at padding."""
        is_patch = jnp.arange(images.pixels.shape[1]) < images.layout.prod(axis=1)[:, None]
        states = self.vision_tower(images.pixels, images.layout)
        return jnp.where(is_patch[None, :, :, None], states, 0)

    def visual(self, encoded: LlavaEncoded, exits: Int[Array, "..."], rows: Int[Array, "R"] | None = None) -> Any:
        """Returns the `ImageFeatures` of each row at its exit; see `VisionLanguageModel.visual`."""
        states, grids = self._row_states(encoded, exits, rows)
        return ImageFeatures(features=self._row_features(states, grids), grids=grids)

    def projector_inputs(self, encoded: LlavaEncoded, exits: Int[Array, "..."]) -> Any:
        """Returns the `MergerInputs` of each row at its exit; see `VisionLanguageModel.projector_inputs`."""
        states, grids = self._row_states(encoded, exits, None)
        return MergerInputs(states=states, grids=grids)

    def project(self, inputs: Any) -> Any:
        """Returns the `ImageFeatures` of `MergerInputs`; see `VisionLanguageModel.project`."""
        return ImageFeatures(features=self._row_features(inputs.states, inputs.grids), grids=inputs.grids)

    def _row_states(
        self, encoded: LlavaEncoded, exits: Int[Array, "..."], rows: Int[Array, "R"] | None
    ) -> tuple[Float[Array, "R M P D"], Int[Array, "R M 2"]]:
        """Returns (hidden states of each row's images at its exit, rows and columns of their features)."""
        images = encoded.images
        image_exits, numbers = images.image_exits(exits, rows)
        grids = images.layout if numbers is None else images.layout[numbers]
        states = images.group_by_row(take_exit_states(encoded.states, image_exits, numbers), rows)
        return states, images.group_by_row(grids // self.config.vision.spatial_merge_size, rows)

    def _row_features(
        self, states: Float[Array, "R M P D"], grids: Int[Array, "R M 2"]
    ) -> Float[Array, "R M N E"]:  # fmt: skip
        """Returns the features of each row's images, 0 where there is none."""
        features = self.projector(states.reshape(-1, *states.shape[2:]))
        features = features.reshape(*states.shape[:2], *features.shape[1:])
        return jnp.where(_is_feature(grids, features.shape[2])[..., None], features, jnp.zeros((), features.dtype))

    def image_features(
        self, encoded: LlavaEncoded, exits: Int[Array, "..."]
    ) -> tuple[Float[Array, "B MN E"], Bool[Array, "B MN"]]:
        """Returns (features of all rows' images, whether each belongs to an image)."""
        found = self.visual(encoded, exits)
        rows, _, count, width = found.features.shape
        return found.features.reshape(rows, -1, width), _is_feature(found.grids, count).reshape(rows, -1)

    def operations(self, length: int, cached: int, per_row: int) -> Operations:
        """Returns the numbers of operations for one image and for one row; see `VisionLanguageModel.operations`."""
        sizes, num_patches = self.config.vision, patch_bucket(self.config, length)
        width = sizes.hidden_size * sizes.group_size
        project = flops.products(num_patches // sizes.group_size, (width, width), (width, self.hidden_size))
        text, head = self.config.text, flops.logits(self.hidden_size, self.vocab_size)
        return Operations(
            encode=encoder_work(self.config, self.num_exits, length).operations,
            visual=project,
            project=project,
            prefill=flops.llama_prefill(text, length) + head,
            step=flops.llama_layers(text, 1, cached) + head,
            forward=flops.llama_layers(text, length, cached),
        )

    def merge(self, tokens: Int[Array, "B T"], visual: Any) -> Float[Array, "B T E"]:
        """Returns the token embeddings, with the image positions of each row replaced by its images' features."""
        embeddings = self.language_model.embed(tokens)
        if visual is None:
            return embeddings
        rows, _, count, width = visual.features.shape
        is_image = tokens == self.image_token_index
        image, place = _image_places(is_image, visual.grids)
        index = jnp.clip(image * count + place, 0, visual.features.shape[1] * count - 1)
        features = jnp.take_along_axis(visual.features.reshape(rows, -1, width), index[:, :, None], axis=1)
        return jnp.where(is_image[:, :, None], features.astype(embeddings.dtype), embeddings)

    def positions(
        self, tokens: Int[Array, "B T"], mask: Bool[Array, "B T"], visual: Any = None
    ) -> Int[Array, "*sections B T"]:
        """Returns the three positions of each token, `[3, B, T]` (HF `get_rope_index`); without images `[B, T]`."""
        if visual is None:
            return layers.positions_from_mask(mask)
        grids = visual.grids
        is_image = (tokens == self.image_token_index) & mask
        image, place = _image_places(is_image, grids)
        is_text = mask & ~is_image
        text_before = jnp.cumsum(is_text, axis=1) - is_text
        taken = jnp.pad(jnp.cumsum(grids.max(axis=2), axis=1), ((0, 0), (1, 0)))  # positions of the first k images
        start = text_before + jnp.take_along_axis(taken, image, axis=1)
        own = jnp.minimum(image, grids.shape[1] - 1)
        row, column = jnp.divmod(place, jnp.maximum(jnp.take_along_axis(grids[:, :, 1], own, axis=1), 1))
        offsets = jnp.stack([jnp.zeros_like(row), row, column])
        return jnp.where(mask, start + jnp.where(is_image, offsets, 0), 0)


def _image_places(
    is_image: Bool[Array, "B T"], grids: Int[Array, "B M 2"]
) -> tuple[Int[Array, "B T"], Int[Array, "B T"]]:
    """Returns (number of the row's images that end before each token, index of a token among those of its image).

    For a token of an image, the first result is the number of this image. For other tokens the second result has no
    meaning.

    Args:
      is_image: True at the tokens of images.
      grids: rows and columns of features of each row's images, see `ImageFeatures`.
    """
    before = jnp.cumsum(is_image, axis=1) - is_image
    sizes = grids.prod(axis=2)
    ends = jnp.cumsum(sizes, axis=1)
    image = (ends[:, None, :] <= before[:, :, None]).sum(axis=2)
    starts = jnp.pad(ends, ((0, 0), (1, 0)))
    return image, before - jnp.take_along_axis(starts, image, axis=1)


def _is_feature(grids: Int[Array, "R M 2"], count: int) -> Bool[Array, "R M N"]:
    """Returns which of the `count` features of each image belong to the image, and not to its padding."""
    return jnp.arange(count) < grids.prod(axis=2)[:, :, None]
