"""Floating-point operations of the networks' parts: matrix products and attention, counted from their sizes."""

import dataclasses

from icet_jax.nn.clip import ClipConfig
from icet_jax.nn.llama import LlamaConfig, lora_shapes


def encoder_blocks(depth: int, tokens: int, width: int, ffn: int) -> int:
    """`depth` blocks of an image encoder over `tokens` positions that all attend to each other."""
    return depth * (2 * tokens * (4 * width**2 + 2 * width * ffn) + 4 * tokens**2 * width)


def clip(config: ClipConfig) -> int:
    """The tower over one image, every block."""
    patches = 2 * config.num_patches * config.num_channels * config.patch_size**2 * config.hidden_size
    sizes = config.num_hidden_layers, config.num_patches + 1, config.hidden_size, config.intermediate_size
    return patches + encoder_blocks(*sizes)


def llama_layers(config: LlamaConfig, length: int, cached: int) -> int:
    """The decoder's layers over `length` positions of a row, each compared with all `cached` places of the cache.

    Places that are still empty count too: they are computed.
    """
    weights = sum(depth * size_in * size_out for depth, size_in, size_out in lora_shapes(config).values())
    scores = 4 * length * cached * config.num_attention_heads * config.head_dim
    return 2 * length * weights + config.num_hidden_layers * scores


def llama_prefill(config: LlamaConfig, length: int) -> int:
    """The decoder's layers over a prompt, of whose last position alone the state is wanted."""
    shapes = {name: size_in * size_out for name, (_, size_in, size_out) in lora_shapes(config).items()}
    keys = shapes["k_proj"] + shapes["v_proj"]
    scores = 4 * length * config.num_attention_heads * config.head_dim
    last = 2 * (length * keys + sum(shapes.values()) - keys) + scores
    before = dataclasses.replace(config, num_hidden_layers=config.num_hidden_layers - 1)
    return llama_layers(before, length, length) + last


def logits(config: LlamaConfig) -> int:
    """The head at one position."""
    return 2 * config.hidden_size * config.vocab_size
