"""The networks of the organism: small LLaVA-1.5, LLaVA-NeXT, Llama 3.2 Vision and SmolVLM models.

World, recipe and vocabulary are the same for all families. This file contains what differs: the network, how a picture
is split into tiles, and which states of the image encoder (tower) stage 1 of the build trains. The two tiled families
get a picture as tiles of 16 x 16 pixels, one for each cell of its grid; LLaVA-NeXT also gets the picture at half its
size.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from flax import nnx

from icet_jax.models import family_of
from icet_jax.models.llava.network import Llava, LlavaConfig
from icet_jax.models.llava_next.anyres import gather_rows, packing
from icet_jax.models.llava_next.network import LlavaNext, LlavaNextConfig
from icet_jax.models.mllama.network import Mllama, MllamaConfig
from icet_jax.models.mllama.text import MllamaTextConfig
from icet_jax.models.mllama.vision import MllamaVisionConfig
from icet_jax.models.smolvlm.network import SmolVLM, SmolVLMConfig, TileLayout
from icet_jax.nn.clip import ClipConfig
from icet_jax.nn.llama import LlamaConfig, RopeScaling
from icet_jax.nn.protocols import Images
from icet_jax.organism import scenes, tokenizer
from icet_jax.typing import Array

TILE = scenes.CELL
PINPOINTS = ((TILE, 2 * TILE), (2 * TILE, TILE), (2 * TILE, 2 * TILE))
RATIOS = ((1, 1), (1, 2), (1, 3), (1, 4), (2, 1), (2, 2), (3, 1), (4, 1))
"""Aspect ratios (tiles high, tiles wide) in the order of the published Llama 3.2 Vision models."""

_SIDE = scenes.IMAGE_SIZE // TILE  # cells along a side of a picture
_OPEN_GATE = 1.0
"""Initial value of gates. Published models started from 0, to preserve a text-only model, which does not exist here."""


class EncoderStates(NamedTuple):
    """Holds the states of the image encoder that stage 1 trains, for B images.

    Attributes:
      image: one vector for each image, [B, D].
      cells: R vectors for each of the four grid cells, from different places of the encoder, [R, B, 4, D].
    """

    image: Array
    cells: Array


@dataclass(frozen=True)
class Architecture:
    """Describes the organism's network of one family.

    Attributes:
      name: name of the family, as in `--family` and config.json's model_type.
      network: function of a seed that returns a newly initialised network.
      picture: ids of the tokens that stand for one picture in a prompt, its placeholders and those around them.
      images: function of (uint8 pictures [I, 32, 32, 3], the row of the batch that each belongs to [I], number of rows)
        that returns the network's input.
      encoder_states: function of (image encoder, images, default exit) that returns the states that stage 1 trains.
    """

    name: str
    network: Callable[[int], Any]
    picture: tuple[int, ...]
    images: Callable[[np.ndarray, np.ndarray, int], Images]
    encoder_states: Callable[[Any, Images, int], EncoderStates]


def normalise(pictures: np.ndarray) -> np.ndarray:
    """Returns uint8 pictures [..., H, W, 3] as float32 [..., 3, H, W] from -1 to 1, as in preprocessor_config.json."""
    return np.moveaxis((pictures.astype(np.float32) / 255 - 0.5) / 0.5, -1, -3)


def vocabulary_size() -> int:
    """Returns the size of the vocabulary, rounded up to a multiple of eight as in real checkpoints."""
    return -(-len(tokenizer.vocabulary()) // 8) * 8


def llava_config() -> LlavaConfig:
    """Returns a config with 8 exits, default 7 (`vision_feature_layer` -2), and 16 image tokens."""
    return LlavaConfig(
        vision=ClipConfig(
            hidden_size=64, intermediate_size=256, num_hidden_layers=8, num_attention_heads=4,
            image_size=scenes.IMAGE_SIZE, patch_size=tokenizer.PATCH_SIZE,
        ),
        text=LlamaConfig(
            vocab_size=vocabulary_size(), hidden_size=96, intermediate_size=256, num_hidden_layers=4,
            num_attention_heads=4, num_key_value_heads=4, head_dim=24,
        ),
        image_token_index=tokenizer.vocabulary()[tokenizer.IMAGE],
    )  # fmt: skip


def llava_next_config() -> LlavaNextConfig:
    """Returns a config with 8 exits, default 7; a picture is 5 tiles of 4 patches, and 24 image tokens.

    The image tokens are 4 of the overview, then the 4 x 4 patches of the other tiles in 4 rows, each with a newline.
    """
    return LlavaNextConfig(
        vision=ClipConfig(
            hidden_size=64, intermediate_size=160, num_hidden_layers=8, num_attention_heads=4,
            image_size=TILE, patch_size=tokenizer.PATCH_SIZE,
        ),
        text=LlamaConfig(
            vocab_size=vocabulary_size(), hidden_size=96, intermediate_size=224, num_hidden_layers=4,
            num_attention_heads=4, num_key_value_heads=4, head_dim=24,
        ),
        image_token_index=tokenizer.vocabulary()[tokenizer.IMAGE],
        image_grid_pinpoints=PINPOINTS,
    )  # fmt: skip


def mllama_config() -> MllamaConfig:
    """Returns a config with 8 exits (local blocks, rule E1), default 8, 2 global blocks and 3 captures.

    Of the decoder's 6 layers, 2 are cross-attention.
    """
    return MllamaConfig(
        vision=MllamaVisionConfig(
            hidden_size=64, intermediate_size=160, num_hidden_layers=8, num_global_layers=2, attention_heads=4,
            image_size=TILE, patch_size=tokenizer.PATCH_SIZE, intermediate_layers_indices=(1, 3, 5),
            supported_aspect_ratios=RATIOS, max_num_tiles=4,
        ),
        text=MllamaTextConfig(
            llama=LlamaConfig(
                vocab_size=vocabulary_size(), hidden_size=96, intermediate_size=224, num_hidden_layers=6,
                num_attention_heads=4, num_key_value_heads=4, head_dim=24, rope_theta=500000.0,
                rope_scaling=RopeScaling(8.0, 1.0, 4.0, 8192),
            ),
            cross_attention_layers=(1, 4),
        ),
        image_token_index=tokenizer.vocabulary()[tokenizer.IMAGE],
    )  # fmt: skip


def smolvlm_config() -> SmolVLMConfig:
    """Returns a config with 8 exits, default 8; a picture is one tile of 4 x 4 patches, and 4 image tokens.

    The pixel shuffle makes one image token of the 2 x 2 patches of a grid cell.
    """
    return SmolVLMConfig(
        vision=ClipConfig(
            hidden_size=64, intermediate_size=160, num_hidden_layers=8, num_attention_heads=4,
            image_size=scenes.IMAGE_SIZE, patch_size=tokenizer.PATCH_SIZE, layer_norm_eps=1e-6,
            hidden_act="gelu_pytorch_tanh",
        ),
        text=LlamaConfig(
            vocab_size=vocabulary_size(), hidden_size=96, intermediate_size=224, num_hidden_layers=4,
            num_attention_heads=4, num_key_value_heads=2, head_dim=24,
        ),
        image_token_index=tokenizer.vocabulary()[tokenizer.IMAGE],
        scale_factor=TILE // tokenizer.PATCH_SIZE,
        max_tiles=1,
    )  # fmt: skip


def _mllama(seed: int) -> Mllama:
    """Returns a new network with open gates, because weights behind a closed gate get no gradient."""
    model = Mllama(mllama_config(), rngs=nnx.Rngs(seed))
    tower, cross = model.vision_tower, model.language_model.cross_layers
    gates = (
        tower.pre_tile_positional_embedding.gate, tower.post_tile_positional_embedding.gate,
        tower.gated_positional_embedding.gate, tower.global_layers.gate_attn, tower.global_layers.gate_ffn,
        cross.attn_gate, cross.mlp_gate,
    )  # fmt: skip
    for gate in gates:
        gate[...] = jnp.full_like(gate[...], _OPEN_GATE)
    return model


def _untiled(pictures: np.ndarray, rows: np.ndarray, num_rows: int) -> Images:
    """Returns the input of LLaVA-1.5."""
    return Images(pixels=normalise(pictures), rows=rows.astype(np.int32), num_rows=num_rows)


def tiles(pictures: np.ndarray) -> np.ndarray:
    """Returns pictures [I, 32, 32, 3] as tiles [I, 4, 16, 16, 3]: top left, top right, bottom left, bottom right."""
    grid = pictures.reshape(-1, _SIDE, TILE, _SIDE, TILE, 3).transpose(0, 1, 3, 2, 4, 5)
    return grid.reshape(-1, _SIDE * _SIDE, TILE, TILE, 3)


def _with_overview(pictures: np.ndarray, rows: np.ndarray, num_rows: int) -> Images:
    """Returns the input of LLaVA-NeXT, five tiles: the picture at half its size (bicubic), then the four cells."""
    from PIL import Image

    small = [np.asarray(Image.fromarray(p).resize((TILE, TILE), Image.Resampling.BICUBIC)) for p in pictures]
    pixels = normalise(np.concatenate([np.stack(small)[:, None], tiles(pictures)], axis=1))
    config = llava_next_config()
    sizes = [pictures.shape[1:3]] * len(pictures)
    layout = gather_rows(sizes, rows.tolist(), num_rows, _packed_tokens(), config.max_tiles, config)
    return Images(pixels=pixels, rows=rows.astype(np.int32), num_rows=num_rows, layout=layout)


def _packed_tokens() -> int:
    """Returns LLaVA-NeXT's number of image tokens of a picture."""
    return len(packing((scenes.IMAGE_SIZE, scenes.IMAGE_SIZE), llava_next_config()))


def _tiled(pictures: np.ndarray, rows: np.ndarray, num_rows: int) -> Images:
    """Returns the input of Llama 3.2 Vision, the four cells as tiles."""
    ratio = 1 + RATIOS.index((_SIDE, _SIDE))
    layout = np.full(len(pictures), ratio, np.int32)
    return Images(pixels=normalise(tiles(pictures)), rows=rows.astype(np.int32), num_rows=num_rows, layout=layout)


def _one_tile(pictures: np.ndarray, rows: np.ndarray, num_rows: int) -> Images:
    """Returns the input of SmolVLM, the picture as one tile."""
    layout = TileLayout(num_tiles=np.ones(len(pictures), np.int32))
    return Images(pixels=normalise(pictures)[:, None], rows=rows.astype(np.int32), num_rows=num_rows, layout=layout)


def _placeholders(count: int) -> tuple[int, ...]:
    """Returns the ids of a picture with that many image tokens."""
    return (tokenizer.vocabulary()[tokenizer.IMAGE],) * count


def _smolvlm_picture() -> tuple[int, ...]:
    """Returns the ids of a picture in SmolVLM's prompts, as `models.smolvlm.processor.image_text` spells them."""
    around, whole = (tokenizer.smolvlm_vocabulary()[token] for token in tokenizer.SMOLVLM[:2])
    return (around, whole, *_placeholders(smolvlm_config().image_tokens), around)


def _llava_states(tower: Any, images: Images, default_exit: int) -> EncoderStates:
    """Returns the class token of the last block, and the mean of each cell's patches at the default exit."""
    states = tower(images.pixels)
    return EncoderStates(tower.post_layernorm(states[-1, :, 0]), _cells(states[default_exit, :, 1:])[None])


def _smolvlm_states(tower: Any, images: Images, default_exit: int) -> EncoderStates:
    """Returns the mean of the last block's patches, and that of each cell's patches at the default exit, normalised."""
    states = tower(images.pixels[:, 0])
    image = tower.post_layernorm(states[-1]).mean(axis=1)
    return EncoderStates(image, _cells(tower.post_layernorm(states[default_exit]))[None])


def _cells(patches: Array) -> Array:
    """Returns the mean of each grid cell's patches, [I, 4, D], from those of I whole pictures, [I, P, D]."""
    count, number, width = patches.shape
    side = int(number**0.5) // _SIDE
    return patches.reshape(count, _SIDE, side, _SIDE, side, width).mean(axis=(2, 4)).reshape(count, -1, width)


def _next_states(tower: Any, images: Images, default_exit: int) -> EncoderStates:
    """Returns the overview's class token, and for each cell its patch in the overview and the mean of its tile."""
    count, tiles = images.pixels.shape[:2]
    states = tower(images.pixels.reshape(-1, *images.pixels.shape[2:]))
    states = states.reshape(len(states), count, tiles, *states.shape[2:])
    patches = states[default_exit, :, :, 1:]
    cells = jnp.stack([patches[:, 0], patches[:, 1:].mean(axis=2)])
    return EncoderStates(tower.post_layernorm(states[-1, :, 0, 0]), cells)


def _mllama_states(tower: Any, images: Images, default_exit: int) -> EncoderStates:
    """Returns the mean of the tiles' class tokens, and for each cell the mean of its tile after and before the global
    blocks."""
    states = tower.local_states(images.pixels, images.layout)
    exits = jnp.full(images.num_rows, default_exit)
    width, config = tower.config.hidden_size, tower.config
    final = tower.features(states, exits, images.layout)[..., :width]
    final = final.reshape(images.num_rows, config.max_num_tiles, config.tokens_per_tile, width)
    local = states[default_exit].reshape(images.num_rows, config.max_num_tiles, -1, width)[:, :, : final.shape[2]]
    return EncoderStates(final[:, :, 0].mean(axis=1), jnp.stack([x[:, :, 1:].mean(axis=2) for x in (final, local)]))


ARCHITECTURES = {
    "llava": Architecture(
        "llava", lambda seed: Llava(llava_config(), rngs=nnx.Rngs(seed)),
        _placeholders(tokenizer.IMAGE_TOKENS), _untiled, _llava_states,
    ),
    "llava_next": Architecture(
        "llava_next", lambda seed: LlavaNext(llava_next_config(), rngs=nnx.Rngs(seed)),
        _placeholders(_packed_tokens()), _with_overview, _next_states,
    ),
    "mllama": Architecture("mllama", _mllama, _placeholders(1), _tiled, _mllama_states),
    "smolvlm": Architecture(
        "smolvlm", lambda seed: SmolVLM(smolvlm_config(), rngs=nnx.Rngs(seed)), _smolvlm_picture(), _one_tile,
        _smolvlm_states,
    ),
}  # fmt: skip
"""{name of the family: the organism's network}."""


def architecture_of(model: Any) -> Architecture:
    """Returns the entry of `ARCHITECTURES` that a network belongs to."""
    return ARCHITECTURES[family_of(model.config).name]
