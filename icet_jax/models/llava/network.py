"""LLaVA-1.5: a CLIP tower, a two-layer projector and a LLaMA decoder (HF `LlavaForConditionalGeneration`)."""

import dataclasses
from typing import Any, ClassVar

import flax
import jax.numpy as jnp
from flax import nnx

from icet_jax.models.base.encoder_work import EncoderWork
from icet_jax.nn import flops, layers
from icet_jax.nn.clip import ClipConfig, ClipVisionTower
from icet_jax.nn.kv_cache import KVCache
from icet_jax.nn.layers import Lora
from icet_jax.nn.llama import DelegatesToDecoder, Llama, LlamaConfig, lora_shapes
from icet_jax.nn.protocols import Images, Operations, Visual
from icet_jax.parallel.traced import take_exit_states
from icet_jax.typing import Array, Bool, DType, Float, Int, Keywords


@dataclasses.dataclass(frozen=True)
class LlavaConfig:
    """Holds the sizes of a LLaVA-1.5 model under HF's names."""

    model_type: ClassVar[str] = "llava"
    vision: ClipConfig
    text: LlamaConfig
    image_token_index: int
    vision_feature_layer: int = -2
    vision_feature_select_strategy: str = "default"
    projector_hidden_act: str = "gelu"
    multimodal_projector_bias: bool = True

    @property
    def image_tokens(self) -> int:
        """Returns the number of positions of one image in the prompt: its patches, perhaps with the class token."""
        return self.vision.num_patches + (self.vision_feature_select_strategy == "full")

    @property
    def max_tiles(self) -> int:
        """Returns the largest number of tiles that one image is cut into: always 1 for LLaVA-1.5."""
        return 1

    def lora_shapes(self) -> dict[str, tuple[int, int, int]]:
        """Returns {projection that LoRA can adapt: (number of layers, input size, output size)}."""
        return lora_shapes(self.text)


@flax.struct.dataclass
class LlavaEncoded:
    """Holds every hidden state of the image encoder, and the images that they belong to.

    Attributes:
      states: Float[X, I, P, D] for X hidden states, I images (or tiles), P patches and class token, and width D.
      images: the images.
    """

    # Not annotated as arrays: jax also builds this pytree with other leaves, for example in jit(...).lower.
    states: Any
    images: Images


@flax.struct.dataclass
class LlavaProjectorInputs:
    """Holds what the projector takes of each row's images; see `VisionLanguageModel.projector_inputs`.

    Attributes:
      states: Float[B, M, P, D], or Float[B, M, T, P, D] with T tiles, the hidden states of a row's M images.
      is_present: Bool[B, M], whether there is such an image.
      places: Int[B, N] of LLaVA-NeXT, for each position of a row's features the feature of its own images that belongs
        there, the number after the last one for `image_newline`, or -1 for none. None for LLaVA-1.5.
    """

    # Not annotated as arrays: jax also builds this pytree with other leaves, for example in jit(...).lower.
    states: Any
    is_present: Any
    places: Any = None


def encoder_work(config: LlavaConfig, exit_layer: int, length: int = 0) -> EncoderWork:
    """Returns what encoding one image takes if only an exit is used, of LLaVA-1.5 or LLaVA-NeXT; see `Family`."""
    tower = dataclasses.replace(config.vision, num_hidden_layers=exit_layer)
    return EncoderWork(exit_layer, config.max_tiles * flops.clip(tower))


class Projector(nnx.Module):
    """Computes `linear_2(gelu(linear_1(x)))` (HF `LlavaMultiModalProjector`)."""

    def __init__(self, config: LlavaConfig, *, rngs: nnx.Rngs, dtype: DType, param_dtype: DType):
        common: Keywords = dict(
            rngs=rngs, use_bias=config.multimodal_projector_bias, dtype=dtype, param_dtype=param_dtype
        )
        self.activation = config.projector_hidden_act
        self.linear_1 = layers.Linear(config.vision.hidden_size, config.text.hidden_size, **common)
        self.linear_2 = layers.Linear(config.text.hidden_size, config.text.hidden_size, **common)

    def __call__(self, x: Float[Array, "*batch D"]) -> Float[Array, "*batch E"]:
        """Returns hidden states of the image encoder as features of the decoder's width."""
        return self.linear_2(layers.ACTIVATIONS[self.activation](self.linear_1(x)))


class Llava(DelegatesToDecoder, nnx.Module):
    """Implements `VisionLanguageModel` for LLaVA-1.5; see `nn/protocols.py` for its methods."""

    exit_definition = "hidden_states[l] of the CLIP tower through the unchanged projector (ICET-l)"

    def __init__(
        self, config: LlavaConfig, *, rngs: nnx.Rngs, dtype: DType = jnp.float32, param_dtype: DType = jnp.float32,
        remat: str = "none",
    ):  # fmt: skip
        self.config = config
        common: Keywords = dict(rngs=rngs, dtype=dtype, param_dtype=param_dtype)
        self.vision_tower = ClipVisionTower(config.vision, remat=remat, **common)
        self.projector = Projector(config, **common)
        self.language_model = Llama(config.text, remat=remat, **common)

    @property
    def num_exits(self) -> int:
        """Returns the number of exits, one for each block of the image encoder."""
        return self.config.vision.num_hidden_layers

    @property
    def default_exit(self) -> int:
        """Returns the exit that the model was trained with: `vision_feature_layer`, which may count from the end."""
        layer = self.config.vision_feature_layer
        return layer if layer >= 0 else self.num_exits + 1 + layer

    @property
    def vocab_size(self) -> int:
        """Returns the number of logits, and of rows of the embedding."""
        return self.config.text.vocab_size

    @property
    def hidden_size(self) -> int:
        """Returns the width of the decoder."""
        return self.config.text.hidden_size

    def lora_shapes(self) -> dict[str, tuple[int, int, int]]:
        """Returns {projection that LoRA can adapt: (number of layers, input size, output size)}."""
        return self.config.lora_shapes()

    @property
    def image_token_index(self) -> int:
        """Returns the token id of the positions that image features replace."""
        return self.config.image_token_index

    def encode(self, images: Images, upto: int | None = None) -> LlavaEncoded:
        """Runs the tower once; with a static `upto`, only its first `upto` blocks."""
        return LlavaEncoded(states=self.vision_tower(images.pixels, upto), images=images)

    def hidden_states(self, images: Images) -> Float[Array, "X I P D"]:
        """Returns hidden states 0..num_exits of the tower, class token first."""
        return self.vision_tower(images.pixels)

    def visual(
        self, encoded: LlavaEncoded, exits: Int[Array, "..."], rows: Int[Array, "R"] | None = None
    ) -> Float[Array, "R MN E"]:
        """Returns the features of each row's M images at the row's exit; see `VisionLanguageModel.visual`.

        The N features of an image equal HF's `get_image_features`. The images of a row follow one another; a row with
        fewer than M images has zeros at the end.
        """
        images = encoded.images
        image_exits, numbers = images.image_exits(exits, rows)
        features = images.group_by_row(self.features(take_exit_states(encoded.states, image_exits, numbers)), rows)
        return features.reshape(features.shape[0], -1, features.shape[-1])

    def projector_inputs(self, encoded: LlavaEncoded, exits: Int[Array, "..."]) -> LlavaProjectorInputs:
        """Returns the hidden states of each row's images at its exit; see `VisionLanguageModel.projector_inputs`."""
        images = encoded.images
        states = take_exit_states(encoded.states, *images.image_exits(exits))
        return LlavaProjectorInputs(states=images.group_by_row(states), is_present=images.index() >= 0)

    def project(self, inputs: LlavaProjectorInputs) -> Float[Array, "R MN E"]:
        """Returns the features of each row's images; see `VisionLanguageModel.project`."""
        return self.row_features(inputs).reshape(inputs.states.shape[0], -1, self.hidden_size)

    def row_features(self, inputs: LlavaProjectorInputs) -> Float[Array, "R M N E"]:
        """Returns the projected states of each row's M images (with all their tiles), zeros where there is none."""
        rows, per_row = inputs.states.shape[:2]
        features = self.features(inputs.states.reshape(-1, *inputs.states.shape[-2:]))
        features = features.reshape(rows, per_row, -1, features.shape[-1])
        return jnp.where(inputs.is_present[:, :, None, None], features, jnp.zeros((), features.dtype))

    def features(self, states: Float[Array, "I P D"]) -> Float[Array, "I N E"]:
        """Returns the projected hidden states, without the class token unless the model uses it: the image features."""
        if self.config.vision_feature_select_strategy == "default":
            states = states[:, 1:]
        return self.projector(states)

    def image_features(
        self, encoded: LlavaEncoded, exits: Int[Array, "..."]
    ) -> tuple[Float[Array, "B MN E"], Bool[Array, "B MN"]]:
        """Returns (result of `visual` for all rows, whether each feature belongs to an image)."""
        is_present = encoded.images.index() >= 0
        return self.visual(encoded, exits), jnp.repeat(is_present, self.config.image_tokens, axis=1)

    def operations(self, length: int, cached: int, per_row: int) -> Operations:
        """Returns the numbers of operations for one image and for one row; see `VisionLanguageModel.operations`."""
        text, tiles = self.config.text, self.config.max_tiles
        projector = (self.config.vision.hidden_size, text.hidden_size), (text.hidden_size, text.hidden_size)
        head = flops.logits(text.hidden_size, text.vocab_size)
        project = flops.products(tiles * self.config.image_tokens, *projector)
        return Operations(
            encode=encoder_work(self.config, self.num_exits).operations,
            visual=project,
            project=project,
            prefill=flops.llama_prefill(text, length) + head,
            step=flops.llama_layers(text, 1, cached) + head,
            forward=flops.llama_layers(text, length, cached),
        )

    def merge(self, tokens: Int[Array, "B T"], visual: Float[Array, "B MN E"] | None) -> Float[Array, "B T E"]:
        """Returns the token embeddings, with the k-th image position of each row replaced by its k-th feature."""
        embeddings = self.language_model.embed(tokens)
        if visual is None or visual.shape[1] == 0:
            return embeddings
        placeholder = tokens == self.image_token_index
        order = jnp.clip(jnp.cumsum(placeholder, axis=1) - 1, 0, visual.shape[1] - 1)
        features = jnp.take_along_axis(visual, order[:, :, None], axis=1)
        return jnp.where(placeholder[:, :, None], features.astype(embeddings.dtype), embeddings)

    def decode(
        self,
        tokens: Int[Array, "B T"],
        positions: Int[Array, "*sections B T"],
        mask: Bool[Array, "B T"],
        visual: Visual | None = None,
        lora: Lora | None = None,
    ) -> Float[Array, "B T E"]:
        """Returns the hidden states of whole sequences with their images; see `LanguageModel.decode`."""
        return self.language_model(self.merge(tokens, visual), positions, mask, lora)

    def prefill(
        self,
        tokens: Int[Array, "B T"],
        mask: Bool[Array, "B T"],
        visual: Visual | None = None,
        prefix: KVCache | None = None,
        lora: Lora | None = None,
    ) -> tuple[Float[Array, "B E"], KVCache]:
        """Runs right-padded prompts and returns the last states and the cache; see `LanguageModel.prefill`."""
        positions = self.positions(tokens, mask, visual)
        return self.language_model.prefill(self.merge(tokens, visual), positions, mask, prefix, lora)
