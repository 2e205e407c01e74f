"""Counts the floating-point operations of networks from their sizes.

Only matrix products and attention are counted; a multiplication and an addition are two operations.
"""

import dataclasses
import math
from collections.abc import Iterable

from icet_jax.nn.clip import ClipConfig
from icet_jax.nn.llama import LlamaConfig, lora_shapes


def products(rows: int, *shapes: tuple[int, ...]) -> int:
    """Returns the operations to multiply `rows` vectors with each matrix (or stack of matrices) of these shapes."""
    return 2 * rows * sum(math.prod(shape) for shape in shapes)


def attention(config: LlamaConfig, queries: int, keys: int) -> int:
    """Returns the operations of one row's attention scores and weighted sums of values, in all layers of a decoder.

    Args:
      config: sizes of the decoder.
      queries: positions that attend.
      keys: positions that each of them attends to.
    """
    return config.num_hidden_layers * 4 * queries * keys * config.num_attention_heads * config.head_dim


def encoder_blocks(depth: int, tokens: int, width: int, ffn: int) -> int:
    """Returns the operations of `depth` blocks of an image encoder, where each of `tokens` attends to all of them.

    Args:
      depth: number of blocks.
      tokens: positions of one image.
      width: size of the hidden states.
      ffn: inner size of the MLPs.
    """
    return products(tokens, (depth, 4, width, width), (depth, 2, width, ffn)) + depth * 4 * tokens**2 * width


def clip(config: ClipConfig) -> int:
    """Returns the operations of the whole CLIP tower for one image."""
    patches = products(config.num_patches, (config.num_channels, config.patch_size**2, config.hidden_size))
    sizes = config.num_hidden_layers, config.num_patches + 1, config.hidden_size, config.intermediate_size
    return patches + encoder_blocks(*sizes)


def siglip(config: ClipConfig) -> int:
    """Returns the operations of the whole SigLIP tower, which has no class token, for one image."""
    patches = products(config.num_patches, (config.num_channels, config.patch_size**2, config.hidden_size))
    sizes = config.num_hidden_layers, config.num_patches, config.hidden_size, config.intermediate_size
    return patches + encoder_blocks(*sizes)


def llama_layers(config: LlamaConfig, length: int, cached: int) -> int:
    """Returns the operations of all decoder layers for one row.

    Args:
      config: sizes of the decoder.
      length: positions that are computed.
      cached: columns of the KV cache, to each of which every position attends, whether they are filled or empty.
    """
    return products(length, *lora_shapes(config).values()) + attention(config, length, cached)


def llama_prefill(config: LlamaConfig, length: int) -> int:
    """Returns the operations of all decoder layers for one prompt of `length` positions.

    The last layer computes keys and values of all positions, but only the last position's output.
    """
    earlier_layers = dataclasses.replace(config, num_hidden_layers=config.num_hidden_layers - 1)
    last_layer = dataclasses.replace(config, num_hidden_layers=1)
    earlier_keys = keys_and_values(last_layer, length) - keys_and_values(last_layer, 1)
    return llama_layers(earlier_layers, length, length) + llama_layers(last_layer, 1, length) + earlier_keys


def keys_and_values(config: LlamaConfig, length: int) -> int:
    """Returns the operations of the key and value projections of `length` positions, in all layers."""
    shapes = lora_shapes(config)
    return products(length, shapes["k_proj"], shapes["v_proj"])


def cross_layers(config: LlamaConfig, length: int, image_positions: int) -> int:
    """Returns the operations of all cross-attention layers for `length` positions of one row.

    Each position attends to the cached keys of `image_positions` positions. For a row without images the layers are
    skipped.
    """
    if not image_positions:
        return 0
    return llama_layers(config, length, image_positions) - keys_and_values(config, length)


def logits(hidden_size: int, vocab_size: int) -> int:
    """Returns the operations of the language-model head at one position."""
    return products(1, (hidden_size, vocab_size))


def adapters(shapes: Iterable[tuple[int, int, int]], rank: int) -> int:
    """Returns the operations of LoRA adapters at one position.

    Args:
      shapes: (number of layers, input size, output size) of the adapted projections.
      rank: rank of the adapters.
    """
    return sum(products(1, (depth, size_in, rank), (depth, rank, size_out)) for depth, size_in, size_out in shapes)
