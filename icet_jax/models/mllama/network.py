"""Llama 3.2 Vision: tiled tower, projector, cross-attention decoder (HF `MllamaForConditionalGeneration`)."""

import dataclasses
from typing import Any, ClassVar

import flax
import jax.numpy as jnp
from flax import nnx

from icet_jax.config.names import EXIT_RULES
from icet_jax.models.mllama.text import CrossStates, MllamaCache, MllamaDecoder, MllamaTextConfig
from icet_jax.models.mllama.vision import MllamaVisionConfig, MllamaVisionTower
from icet_jax.nn import flops, layers
from icet_jax.nn.layers import Lora
from icet_jax.nn.llama import OverDecoder
from icet_jax.nn.protocols import Images, Operations
from icet_jax.typing import Array, Bool, Float, Int

EXIT_DEFINITIONS = {
    "E1": "E1: local blocks after l skipped, intermediates of skipped blocks replaced by the state of block l",
    "E2": "E2: the global blocks get the state of local block l, intermediates unchanged",
    "E5": "E5: the state of local block l itself in place of the global blocks' output, intermediates unchanged",
}


@dataclasses.dataclass(frozen=True)
class MllamaConfig:
    """Sizes of the model; `exit_rule` says what exit l means (`EXIT_RULES`)."""

    model_type: ClassVar[str] = "mllama"
    vision: MllamaVisionConfig
    text: MllamaTextConfig
    image_token_index: int
    exit_rule: str = "E1"

    def lora_shapes(self) -> dict[str, tuple[int, int, int]]:
        """`(layers, in, out)` of every decoder projection that LoRA can adapt, in both stacks."""
        return self.text.lora_shapes()


@flax.struct.dataclass
class MllamaEncoded:
    """Every state of the local blocks, `[X, I, Q, D]`, and where the images belong.

    Attributes:
      states: Float[X, I, Q, D].
      images: the images.
    """

    # Not annotated with shapes: jax also fills pytrees with what are no arrays (jit(...).lower does).
    states: Any
    images: Images


class Mllama(OverDecoder, nnx.Module):
    """Llama 3.2 Vision behind the family interface (`nn/protocols.py`)."""

    def __init__(
        self, config: MllamaConfig, *, rngs: nnx.Rngs, dtype: Any = jnp.float32, param_dtype: Any = jnp.float32,
        remat: str = "none",
    ):  # fmt: skip
        if config.exit_rule not in EXIT_RULES:
            raise ValueError(f"exit_rule '{config.exit_rule}' is not one of {', '.join(EXIT_RULES)}")
        self.config = config
        common: dict[str, Any] = dict(rngs=rngs, dtype=dtype, param_dtype=param_dtype)
        self.vision_tower = MllamaVisionTower(config.vision, remat=remat, **common)
        width = config.text.llama.hidden_size
        self.projector = layers.Linear(config.vision.output_dim, width, use_bias=True, **common)
        self.language_model = MllamaDecoder(config.text, remat=remat, **common)

    @property
    def exit_definition(self) -> str:
        """What exit l means."""
        return EXIT_DEFINITIONS[self.config.exit_rule]

    @property
    def num_exits(self) -> int:
        """Local blocks of the tower."""
        return self.config.vision.num_hidden_layers

    @property
    def default_exit(self) -> int:
        """The model as it was trained: the last local block (under E5 no exit is)."""
        return self.num_exits

    @property
    def vocab_size(self) -> int:
        """Columns of the logits."""
        return self.config.text.llama.vocab_size

    @property
    def hidden_size(self) -> int:
        """Width of the decoder."""
        return self.config.text.llama.hidden_size

    def lora_shapes(self) -> dict[str, tuple[int, int, int]]:
        """`(layers, in, out)` of every decoder projection that LoRA can adapt, in both stacks."""
        return self.config.lora_shapes()

    @property
    def image_token_index(self) -> int:
        """Token id that stands for an image in the text."""
        return self.config.image_token_index

    def encode(self, images: Images, upto: int | None = None) -> MllamaEncoded:
        """Runs the local blocks once; a static `upto` skips those after it that no exit up to there needs."""
        if upto is not None and self.config.exit_rule != "E1":
            upto = max(upto, *self.config.vision.intermediate_layers_indices)
        states = self.vision_tower.local_states(images.pixels, images.layout, upto)
        return MllamaEncoded(states=states, images=images)

    def hidden_states(self, images: Images) -> Float[Array, "X I Q D"]:
        """States 0..num_exits of the local blocks, padding tokens included."""
        return self.vision_tower.local_states(images.pixels, images.layout)

    def visual(
        self, encoded: MllamaEncoded, exits: Int[Array, "..."], rows: Int[Array, "R"] | None = None
    ) -> CrossStates:
        """Projected vision tokens of each row's images at its exit, and which tiles there are."""
        images = encoded.images
        layers_of, numbers = images.exits_of(exits, rows)
        features = self.vision_tower.features(encoded.states, layers_of, images.layout, self.config.exit_rule, numbers)
        states = images.by_row(self.projector(features), rows)
        there = self.vision_tower.tiles(images.layout) & (images.layout > 0)[:, None]
        tiles = images.by_row(there if numbers is None else there[numbers], rows)
        return CrossStates(states=states.reshape(states.shape[0], -1, states.shape[-1]), tiles=tiles)

    def image_features(
        self, encoded: MllamaEncoded, exits: Int[Array, "..."]
    ) -> tuple[Float[Array, "B MN E"], Bool[Array, "B MN"]]:
        """The vision tokens of `visual`, and which belong to a tile that is there."""
        seen = self.visual(encoded, exits)
        return seen.states, jnp.repeat(
            seen.tiles.reshape(seen.tiles.shape[0], -1), self.config.vision.tokens_per_tile, 1
        )

    def operations(self, length: int, cached: int, per_row: int) -> Operations:
        """Operations of one image and of one row, see `VisionLanguageModel.operations`.

        The cross-attention layers of a row without images are skipped.
        """
        vision, text = self.config.vision, self.config.text
        encoder = vision.max_num_tiles * vision.padded_tokens, vision.hidden_size, vision.intermediate_size
        patches = vision.max_num_tiles * (vision.tokens_per_tile - 1)
        image_tokens = vision.max_num_tiles * vision.tokens_per_tile
        after = 0 if self.config.exit_rule == "E5" else vision.num_global_layers
        head = flops.logits(text.llama.hidden_size, text.llama.vocab_size)
        own = [flops.llama_layers(text.self_layers, *sizes) for sizes in ((length, length), (1, cached))]
        cross = [flops.cross_layers(text.cross_layers, count, per_row * image_tokens) for count in (length, 1)]
        made = flops.keys_and_values(text.cross_layers, per_row * image_tokens)
        return Operations(
            encode=flops.encoder_blocks(vision.num_hidden_layers, *encoder)
            + flops.products(patches, (vision.num_channels, vision.patch_size**2, vision.hidden_size)),
            visual=flops.encoder_blocks(after, *encoder)
            + flops.products(image_tokens, (vision.output_dim, text.llama.hidden_size)),
            prefill=own[0] + cross[0] + made + head,
            step=own[1] + cross[1] + head,
            forward=flops.llama_layers(text.self_layers, length, cached) + cross[0] + made,
        )

    def decode(
        self,
        tokens: Int[Array, "B T"],
        positions: Int[Array, "B T"],
        mask: Bool[Array, "B T"],
        visual: CrossStates | None = None,
        lora: Lora | None = None,
    ) -> Float[Array, "B T E"]:
        """Decoder over tokens and images; see `LanguageModel.decode`."""
        return self.language_model(tokens, positions, mask, visual, self.image_token_index, lora)

    def prefill(
        self,
        tokens: Int[Array, "B T"],
        mask: Bool[Array, "B T"],
        visual: CrossStates | None = None,
        prefix: MllamaCache | None = None,
        lora: Lora | None = None,
    ) -> tuple[Float[Array, "B E"], MllamaCache]:
        """Prompts, padded on the right, into a cache; see `LanguageModel.prefill`."""
        return self.language_model.prefill(tokens, mask, visual, self.image_token_index, prefix, lora)
