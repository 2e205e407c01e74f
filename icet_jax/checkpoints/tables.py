"""Key tables: the parameter (and layer) that every tensor of an HF file fills, and how its axes are permuted.

A table is data and is used in both directions: import fills parameters from tensors, export creates the same tensors
from parameters. Keys are those of the old layout, the only one that every transformers from 4.46 to 5.x loads;
`normalise` maps the other layouts to it.
"""

import dataclasses
import re
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from icet_jax.nn.clip import ClipConfig
from icet_jax.nn.gpt2 import GPT2Config
from icet_jax.nn.llama import LlamaConfig


@dataclasses.dataclass(frozen=True)
class Transform:
    """Converts a torch tensor to a parameter and back; the two functions are exact inverses."""

    to_param: Callable[[np.ndarray], np.ndarray]
    to_hf: Callable[[np.ndarray], np.ndarray]
    hf_shape: Callable[[tuple[int, ...]], tuple[int, ...]]


SAME = Transform(lambda x: x, lambda x: x, lambda shape: shape)
TRANSPOSED = Transform(lambda x: x.T, lambda x: x.T, lambda shape: shape[::-1])


def patches(channels: int, size: int) -> Transform:
    """Returns the transform of a strided convolution `[D, C, p, p]` to the kernel `[C*p*p, D]` for flattened
    patches."""
    return Transform(
        lambda x: x.reshape(x.shape[0], -1).T,
        lambda x: x.T.reshape(-1, channels, size, size),
        lambda shape: (shape[1], channels, size, size),
    )


@dataclasses.dataclass(frozen=True)
class Slot:
    """Describes which parameter one HF tensor fills.

    Attributes:
      key: name of the tensor in the old layout.
      path: path of the parameter, `language_model/layers/q_proj/kernel`.
      layer: index along the parameter's first axis, or None if it is not stacked.
      transform: conversion between the tensor and the parameter (of that layer).
      fallback: key of the tensor that is used if this one is absent from the file (tied embeddings).
    """

    key: str
    path: str
    layer: int | None
    transform: Transform
    fallback: str | None = None


@dataclasses.dataclass(frozen=True)
class Table:
    """Holds all slots of a family for one config.

    Attributes:
      slots: slots in export order; keys and (path, layer) pairs are unique.
      normalise: function from a file's key to the old key, or None if the tensor is to be ignored.
    """

    slots: tuple[Slot, ...]
    normalise: Callable[[str], str | None]


def stacked(
    keys: str, paths: str, modules: tuple[tuple[str, str], ...], leaves: tuple[Any, ...], depth: int
) -> Iterator[Slot]:
    """Yields the slots of `depth` equal layers; every module (HF name, our name) has the same leaves (HF, ours,
    transform)."""
    for layer in range(depth):
        for theirs, ours in modules:
            for leaf, name, transform in leaves:
                yield Slot(f"{keys}.{layer}.{theirs}.{leaf}", f"{paths}/{ours}/{name}", layer, transform)


def single(modules: tuple[tuple[str, str], ...], leaves: tuple[Any, ...]) -> Iterator[Slot]:
    """Yields the slots of modules that are not stacked; arguments as in `stacked`."""
    for theirs, ours in modules:
        for leaf, name, transform in leaves:
            yield Slot(f"{theirs}.{leaf}", f"{ours}/{name}", None, transform)


def renaming(*prefixes: tuple[str, str]) -> Callable[[str], str | None]:
    """Returns a `Table.normalise` that replaces the start of a key by its old name.

    Args:
      prefixes: (regular expression, old name), tried in this order; a key that none matches stays as it is. Buffers,
        which are no parameters, give None.
    """
    patterns = [(re.compile(pattern), old) for pattern, old in prefixes]

    def normalise(key: str) -> str | None:
        if _BUFFERS.fullmatch(key):
            return None
        for pattern, old in patterns:
            match = pattern.match(key)
            if match:
                return old + key[match.end() :]
        return key

    return normalise


_BUFFERS = re.compile(r".*(\.position_ids|rotary_emb\.inv_freq)")

# (HF leaf, our leaf, transform) of a torch Linear and a norm, for `stacked` and `single`.
LINEAR = (("weight", "kernel", TRANSPOSED), ("bias", "bias", SAME))
NORM = (("weight", "scale", SAME), ("bias", "bias", SAME))


def clip_slots(vision: ClipConfig, root: str, own: str) -> Iterator[Slot]:
    """Yields the slots of a CLIP vision tower (HF `CLIPVisionTransformer`).

    Args:
      vision: sizes of the tower.
      root: prefix of its keys, "vision_tower.vision_model".
      own: prefix of its paths here.
    """
    convolution = patches(vision.num_channels, vision.patch_size)
    yield Slot(f"{root}.embeddings.class_embedding", f"{own}/class_embedding", None, SAME)
    yield Slot(f"{root}.embeddings.patch_embedding.weight", f"{own}/patch_embedding/kernel", None, convolution)
    yield Slot(f"{root}.embeddings.position_embedding.weight", f"{own}/position_embedding", None, SAME)
    norms = tuple((f"{root}.{name}", f"{own}/{name}") for name in ("pre_layrnorm", "post_layernorm"))
    yield from single(norms, NORM)
    attention = tuple((f"self_attn.{name}", name) for name in ("q_proj", "k_proj", "v_proj", "out_proj"))
    linears = (*attention, ("mlp.fc1", "fc1"), ("mlp.fc2", "fc2"))
    norms = (("layer_norm1", "layer_norm1"), ("layer_norm2", "layer_norm2"))
    keys, paths, depth = f"{root}.encoder.layers", f"{own}/layers", vision.num_hidden_layers
    yield from stacked(keys, paths, norms, NORM, depth)
    yield from stacked(keys, paths, linears, LINEAR, depth)


def llama_slots(config: LlamaConfig, root: str, own: str, head: str | None) -> Iterator[Slot]:
    """Yields the slots of a Llama decoder (HF `LlamaModel`).

    Args:
      config: config of the decoder.
      root: prefix of its keys, "model" or "language_model.model".
      own: prefix of its paths here.
      head: key of the language-model head, or None if the network has none.
    """
    embedding = f"{root}.embed_tokens.weight"
    yield Slot(embedding, f"{own}/embed_tokens", None, SAME)
    yield Slot(f"{root}.norm.weight", f"{own}/norm/scale", None, SAME)
    attention = tuple((f"self_attn.{name}", name) for name in ("q_proj", "k_proj", "v_proj", "o_proj"))
    linears = (*attention, *((f"mlp.{name}", name) for name in ("gate_proj", "up_proj", "down_proj")))
    norms = tuple((name, name) for name in ("input_layernorm", "post_attention_layernorm"))
    keys, paths, depth = f"{root}.layers", f"{own}/layers", config.num_hidden_layers
    yield from stacked(keys, paths, norms, NORM[:1], depth)
    yield from stacked(keys, paths, linears, LINEAR[:1], depth)
    if head is not None:
        tied = embedding if config.tie_word_embeddings else None
        yield Slot(head, f"{own}/lm_head/kernel", None, TRANSPOSED, fallback=tied)


_GPT2_IGNORED = re.compile(r"h\.\d+\.(attn\.(masked_)?bias|crossattention\..*)|lm_head\.weight")


def normalise_gpt2(key: str) -> str | None:
    """Returns a key with the prefix `transformer.`, which the original files lack; None for causal-mask buffers and an
    LM head."""
    bare = key.removeprefix("transformer.")
    if _GPT2_IGNORED.fullmatch(bare):
        return None
    return bare if bare.startswith("score.") else f"transformer.{bare}"


def gpt2_table(config: GPT2Config) -> Table:
    """Returns the key table of a GPT-2 reward model (HF `GPT2ForSequenceClassification`); Conv1D weights are already
    `[in, out]`."""
    conv1d = (("weight", "kernel", SAME), ("bias", "bias", SAME))
    modules = (("attn.c_attn", "c_attn"), ("attn.c_proj", "c_proj"), ("mlp.c_fc", "c_fc"), ("mlp.c_proj", "mlp_proj"))
    slots = (
        Slot("transformer.wte.weight", "wte", None, SAME),
        Slot("transformer.wpe.weight", "wpe", None, SAME),
        *stacked("transformer.h", "layers", (("ln_1", "ln_1"), ("ln_2", "ln_2")), NORM, config.n_layer),
        *stacked("transformer.h", "layers", modules, conv1d, config.n_layer),
        *single((("transformer.ln_f", "ln_f"),), NORM),
        Slot("score.weight", "score/kernel", None, TRANSPOSED),
    )
    return Table(slots, normalise_gpt2)
