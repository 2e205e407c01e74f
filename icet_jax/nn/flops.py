"""Numbers of floating-point operations of matrix products and attention, computed from the sizes of a network."""

import dataclasses
import math
from collections.abc import Iterable

from icet_jax.nn.clip import ClipConfig
from icet_jax.nn.llama import LlamaConfig, lora_shapes


def products(rows: int, *shapes: tuple[int, ...]) -> int:
    """Returns the operations of `rows` positions through matrices of these shapes, or stacks of matrices."""
    return 2 * rows * sum(math.prod(shape) for shape in shapes)


def attention(config: LlamaConfig, length: int, places: int) -> int:
    """Returns the operations of scores and weighted values of `length` positions that attend to `places`, in every
    layer."""
    return config.num_hidden_layers * 4 * length * places * config.num_attention_heads * config.head_dim


def encoder_blocks(depth: int, tokens: int, width: int, ffn: int) -> int:
    """Returns the operations of `depth` blocks of an image encoder over `tokens` positions that all attend to each
    other."""
    return products(tokens, (depth, 4, width, width), (depth, 2, width, ffn)) + depth * 4 * tokens**2 * width


def clip(config: ClipConfig) -> int:
    """Returns the operations of the whole CLIP tower for one image."""
    patches = products(config.num_patches, (config.num_channels, config.patch_size**2, config.hidden_size))
    sizes = config.num_hidden_layers, config.num_patches + 1, config.hidden_size, config.intermediate_size
    return patches + encoder_blocks(*sizes)


def llama_layers(config: LlamaConfig, length: int, cached: int) -> int:
    """Returns the operations of the decoder layers over `length` positions of a row with `cached` columns in the cache.

    Empty columns of the cache count too, because attention computes them.
    """
    return products(length, *lora_shapes(config).values()) + attention(config, length, cached)


def llama_prefill(config: LlamaConfig, length: int) -> int:
    """Returns the operations of the decoder layers over a prompt when only the state of the last position is needed."""
    before = dataclasses.replace(config, num_hidden_layers=config.num_hidden_layers - 1)
    last = dataclasses.replace(config, num_hidden_layers=1)
    beside = keys_and_values(last, length) - keys_and_values(last, 1)
    return llama_layers(before, length, length) + llama_layers(last, 1, length) + beside


def keys_and_values(config: LlamaConfig, length: int) -> int:
    """Returns the operations of the keys and values of `length` positions, in every layer."""
    shapes = lora_shapes(config)
    return products(length, shapes["k_proj"], shapes["v_proj"])


def cross_layers(config: LlamaConfig, length: int, places: int) -> int:
    """Returns the operations of layers over `length` positions that attend only to `places` cached image positions.

    Without images the layers are skipped.
    """
    if not places:
        return 0
    return llama_layers(config, length, places) - keys_and_values(config, length)


def logits(hidden_size: int, vocab_size: int) -> int:
    """Returns the operations of the language-model head at one position."""
    return products(1, (hidden_size, vocab_size))


def adapters(shapes: Iterable[tuple[int, int, int]], rank: int) -> int:
    """LoRA's two products at one position, in projections of `(layers, in, out)`."""
    return sum(products(1, (depth, size_in, rank), (depth, rank, size_out)) for depth, size_in, size_out in shapes)
