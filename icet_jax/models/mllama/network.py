"""Llama 3.2 Vision: image encoder, projector and cross-attention decoder (HF `MllamaForConditionalGeneration`)."""

import dataclasses
from typing import Any, ClassVar

import flax
import jax.numpy as jnp
from flax import nnx

from icet_jax.config.names import EXIT_RULES
from icet_jax.models.base.encoder_work import EncoderWork
from icet_jax.models.mllama.text import CrossStates, MllamaCache, MllamaDecoder, MllamaTextConfig
from icet_jax.models.mllama.vision import MllamaVisionConfig, MllamaVisionTower
from icet_jax.nn import flops, layers
from icet_jax.nn.layers import Lora
from icet_jax.nn.llama import DelegatesToDecoder
from icet_jax.nn.protocols import Images, Operations
from icet_jax.typing import Array, Bool, DType, Float, Int, Keywords

EXIT_DEFINITIONS = {
    "E1": "E1: local blocks after l skipped, intermediates of skipped blocks replaced by the state of block l",
    "E2": "E2: the global blocks get the state of local block l, intermediates unchanged",
    "E5": "E5: the state of local block l itself in place of the global blocks' output, intermediates unchanged",
}


@dataclasses.dataclass(frozen=True)
class MllamaConfig:
    """Holds the sizes of the model, and which of the `EXIT_DEFINITIONS` its exits have (`exit_rule`)."""

    model_type: ClassVar[str] = "mllama"
    vision: MllamaVisionConfig
    text: MllamaTextConfig
    image_token_index: int
    exit_rule: str = "E1"

    def lora_shapes(self) -> dict[str, tuple[int, int, int]]:
        """Returns {projection that LoRA can adapt: (layers, input size, output size)}, for both stacks of layers."""
        return self.text.lora_shapes()


def encoder_work(config: MllamaConfig, exit_layer: int, length: int = 0) -> EncoderWork:
    """Returns what encoding one image takes if only an exit is used: local blocks and global blocks; see `Family`."""
    vision = config.vision
    depth = exit_layer if config.exit_rule == "E1" else max(exit_layer, *vision.intermediate_layers_indices)
    patches = vision.max_num_tiles * (vision.tokens_per_tile - 1)
    embedding = flops.products(patches, (vision.num_channels, vision.patch_size**2, vision.hidden_size))
    blocks = flops.encoder_blocks(depth + _global_blocks(config), *_encoder_sizes(vision))
    return EncoderWork(depth, embedding + blocks)


def _global_blocks(config: MllamaConfig) -> int:
    """Returns the number of global blocks that run behind the local ones."""
    return 0 if config.exit_rule == "E5" else config.vision.num_global_layers


def _encoder_sizes(vision: MllamaVisionConfig) -> tuple[int, int, int]:
    """Returns (tokens of an image, width, inner size of the MLPs) of the encoder."""
    return vision.max_num_tiles * vision.padded_tokens, vision.hidden_size, vision.intermediate_size


@flax.struct.dataclass
class MllamaEncoded:
    """Holds every state of the image encoder's local blocks, and the images that they belong to.

    Attributes:
      states: Float[X, I, Q, D] for X states, I images, Q tokens of all tiles with padding, and width D.
      images: the images.
    """

    # Not annotated as arrays: jax also builds this pytree with other leaves, for example in jit(...).lower.
    states: Any
    images: Images


@flax.struct.dataclass
class MllamaProjectorInputs:
    """Holds what the projector takes of each row's images; see `VisionLanguageModel.projector_inputs`.

    Attributes:
      features: Float[B, M, N, D] of a row's M images, behind the image encoder's global blocks.
      is_present: Bool[B, M], whether there is such an image.
      tiles: Bool[B, M, T], which tiles exist.
    """

    # Not annotated as arrays: jax also builds this pytree with other leaves, for example in jit(...).lower.
    features: Any
    is_present: Any
    tiles: Any


class Mllama(DelegatesToDecoder, nnx.Module):
    """Implements `VisionLanguageModel` for Llama 3.2 Vision; see `nn/protocols.py` for its methods."""

    def __init__(
        self, config: MllamaConfig, *, rngs: nnx.Rngs, dtype: DType = jnp.float32, param_dtype: DType = jnp.float32,
        remat: str = "none",
    ):  # fmt: skip
        if config.exit_rule not in EXIT_RULES:
            raise ValueError(f"exit_rule '{config.exit_rule}' is not one of {', '.join(EXIT_RULES)}")
        self.config = config
        common: Keywords = dict(rngs=rngs, dtype=dtype, param_dtype=param_dtype)
        self.vision_tower = MllamaVisionTower(config.vision, remat=remat, **common)
        width = config.text.llama.hidden_size
        self.projector = layers.Linear(config.vision.output_dim, width, use_bias=True, **common)
        self.language_model = MllamaDecoder(config.text, remat=remat, **common)

    @property
    def exit_definition(self) -> str:
        """Returns the definition of exit l in words."""
        return EXIT_DEFINITIONS[self.config.exit_rule]

    @property
    def num_exits(self) -> int:
        """Returns the number of exits, one for each local block of the image encoder."""
        return self.config.vision.num_hidden_layers

    @property
    def default_exit(self) -> int:
        """Returns the last exit, at which exit rules E1 and E2 give the model as trained (with E5 no exit does)."""
        return self.num_exits

    @property
    def vocab_size(self) -> int:
        """Returns the number of logits."""
        return self.config.text.llama.vocab_size

    @property
    def hidden_size(self) -> int:
        """Returns the width of the decoder."""
        return self.config.text.llama.hidden_size

    def lora_shapes(self) -> dict[str, tuple[int, int, int]]:
        """Returns {projection that LoRA can adapt: (layers, input size, output size)}, for both stacks of layers."""
        return self.config.lora_shapes()

    @property
    def image_token_index(self) -> int:
        """Returns the token id that stands for an image in the text."""
        return self.config.image_token_index

    def encode(self, images: Images, upto: int | None = None) -> MllamaEncoded:
        """Returns the states of the local blocks; with a static `upto`, only of blocks that exits 1..upto need."""
        if upto is not None:
            upto = encoder_work(self.config, upto).blocks
        states = self.vision_tower.local_states(images.pixels, images.layout, upto)
        return MllamaEncoded(states=states, images=images)

    def hidden_states(self, images: Images) -> Float[Array, "X I Q D"]:
        """Returns states 0..num_exits of the local blocks, padding tokens included."""
        return self.vision_tower.local_states(images.pixels, images.layout)

    def visual(
        self, encoded: MllamaEncoded, exits: Int[Array, "..."], rows: Int[Array, "R"] | None = None
    ) -> CrossStates:
        """Returns each row's image features at its exit, and which tiles exist; see `VisionLanguageModel.visual`."""
        images = encoded.images
        image_exits, numbers = images.image_exits(exits, rows)
        features = self.vision_tower.features(
            encoded.states, image_exits, images.layout, self.config.exit_rule, numbers
        )
        states = images.group_by_row(self.projector(features), rows)
        is_present = self.vision_tower.tiles(images.layout) & (images.layout > 0)[:, None]
        tiles = images.group_by_row(is_present if numbers is None else is_present[numbers], rows)
        return CrossStates(states=states.reshape(states.shape[0], -1, states.shape[-1]), tiles=tiles)

    def projector_inputs(self, encoded: MllamaEncoded, exits: Int[Array, "..."]) -> MllamaProjectorInputs:
        """Returns each row's encoder states at its exit, behind the global blocks, and which tiles exist."""
        images = encoded.images
        image_exits, numbers = images.image_exits(exits)
        features = self.vision_tower.features(
            encoded.states, image_exits, images.layout, self.config.exit_rule, numbers
        )
        is_present = self.vision_tower.tiles(images.layout) & (images.layout > 0)[:, None]
        return MllamaProjectorInputs(
            features=images.group_by_row(features),
            is_present=images.index() >= 0,
            tiles=images.group_by_row(is_present),
        )

    def project(self, inputs: MllamaProjectorInputs) -> CrossStates:
        """Returns each row's image features, and which tiles exist; see `VisionLanguageModel.project`."""
        states = self.projector(inputs.features)
        is_present = inputs.is_present.reshape(*inputs.is_present.shape, *[1] * (states.ndim - 2))
        states = jnp.where(is_present, states, jnp.zeros((), states.dtype))
        return CrossStates(states=states.reshape(states.shape[0], -1, states.shape[-1]), tiles=inputs.tiles)

    def image_features(
        self, encoded: MllamaEncoded, exits: Int[Array, "..."]
    ) -> tuple[Float[Array, "B MN E"], Bool[Array, "B MN"]]:
        """Returns (image features of `visual` for all rows, whether each belongs to an existing tile)."""
        cross = self.visual(encoded, exits)
        return cross.states, jnp.repeat(
            cross.tiles.reshape(cross.tiles.shape[0], -1), self.config.vision.tokens_per_tile, 1
        )

    def operations(self, length: int, cached: int, per_row: int) -> Operations:
        """Returns the numbers of operations for one image and for one row; see `VisionLanguageModel.operations`.

        A row without images skips the cross-attention layers.
        """
        vision, text = self.config.vision, self.config.text
        image_tokens = vision.max_num_tiles * vision.tokens_per_tile
        global_operations = flops.encoder_blocks(_global_blocks(self.config), *_encoder_sizes(vision))
        head = flops.logits(text.llama.hidden_size, text.llama.vocab_size)
        text_prefill = flops.llama_layers(text.self_layers, length, length)
        text_step = flops.llama_layers(text.self_layers, 1, cached)
        cross_prefill = flops.cross_layers(text.cross_layers, length, per_row * image_tokens)
        cross_step = flops.cross_layers(text.cross_layers, 1, per_row * image_tokens)
        image_keys = flops.keys_and_values(text.cross_layers, per_row * image_tokens)
        project = flops.products(image_tokens, (vision.output_dim, text.llama.hidden_size))
        return Operations(
            encode=encoder_work(self.config, self.num_exits).operations - global_operations,
            visual=global_operations + project,
            project=project,
            prefill=text_prefill + cross_prefill + image_keys + head,
            step=text_step + cross_step + head,
            forward=flops.llama_layers(text.self_layers, length, cached) + cross_prefill + image_keys,
        )

    def decode(
        self,
        tokens: Int[Array, "B T"],
        positions: Int[Array, "B T"],
        mask: Bool[Array, "B T"],
        visual: CrossStates | None = None,
        lora: Lora | None = None,
    ) -> Float[Array, "B T E"]:
        """Returns the hidden states of whole sequences with their images; see `LanguageModel.decode`."""
        return self.language_model(tokens, positions, mask, visual, self.image_token_index, lora)

    def prefill(
        self,
        tokens: Int[Array, "B T"],
        mask: Bool[Array, "B T"],
        visual: CrossStates | None = None,
        prefix: MllamaCache | None = None,
        lora: Lora | None = None,
    ) -> tuple[Float[Array, "B E"], MllamaCache]:
        """Runs right-padded prompts and returns the last states and the cache; see `LanguageModel.prefill`."""
        positions = self.positions(tokens, mask, visual)
        return self.language_model.prefill(tokens, positions, mask, visual, self.image_token_index, prefix, lora)
