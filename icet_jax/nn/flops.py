"""What each part of a network costs, in floating-point operations: matrix products and attention, from their sizes.

The families' `operations` add these up; forecasts, plans and utilisation multiply those by how often a part runs.
"""

import dataclasses
import math
from collections.abc import Iterable

from icet_jax.nn.clip import ClipConfig
from icet_jax.nn.llama import LlamaConfig, lora_shapes


def products(rows: int, *shapes: tuple[int, ...]) -> int:
    """`rows` positions through matrices of these shapes, or stacks of matrices."""
    return 2 * rows * sum(math.prod(shape) for shape in shapes)


def attention(config: LlamaConfig, length: int, places: int) -> int:
    """Scores and mixed values of `length` positions that each look at `places`, in every layer."""
    return config.num_hidden_layers * 4 * length * places * config.num_attention_heads * config.head_dim


def encoder_blocks(depth: int, tokens: int, width: int, ffn: int) -> int:
    """`depth` blocks of an image encoder over `tokens` positions that all attend to each other."""
    return products(tokens, (depth, 4, width, width), (depth, 2, width, ffn)) + depth * 4 * tokens**2 * width


def clip(config: ClipConfig) -> int:
    """The tower over one image, every block."""
    patches = products(config.num_patches, (config.num_channels, config.patch_size**2, config.hidden_size))
    sizes = config.num_hidden_layers, config.num_patches + 1, config.hidden_size, config.intermediate_size
    return patches + encoder_blocks(*sizes)


def llama_layers(config: LlamaConfig, length: int, cached: int) -> int:
    """The decoder's layers over `length` positions of a row, each compared with all `cached` places of the cache.

    Places that are still empty count too: they are computed.
    """
    return products(length, *lora_shapes(config).values()) + attention(config, length, cached)


def llama_prefill(config: LlamaConfig, length: int) -> int:
    """The decoder's layers over a prompt, of whose last position alone the state is wanted."""
    before = dataclasses.replace(config, num_hidden_layers=config.num_hidden_layers - 1)
    last = dataclasses.replace(config, num_hidden_layers=1)
    beside = keys_and_values(last, length) - keys_and_values(last, 1)
    return llama_layers(before, length, length) + llama_layers(last, 1, length) + beside


def keys_and_values(config: LlamaConfig, length: int) -> int:
    """Those of `length` positions, in every layer."""
    shapes = lora_shapes(config)
    return products(length, shapes["k_proj"], shapes["v_proj"])


def cross_layers(config: LlamaConfig, length: int, places: int) -> int:
    """Layers over `length` positions that attend to `places` image positions alone, whose keys and values are there.

    Without images the layers are skipped.
    """
    if not places:
        return 0
    return llama_layers(config, length, places) - keys_and_values(config, length)


def logits(hidden_size: int, vocab_size: int) -> int:
    """The head at one position."""
    return products(1, (hidden_size, vocab_size))


def adapters(shapes: Iterable[tuple[int, int, int]], rank: int) -> int:
    """LoRA's two products at one position, in projections of `(layers, in, out)`."""
    return sum(products(1, (depth, size_in, rank), (depth, rank, size_out)) for depth, size_in, size_out in shapes)
