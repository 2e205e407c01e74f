"""Defines key tables: lists that pair every tensor of an HF file with the parameter (or one layer of it) that it fills.

A table is used in both directions: import fills parameters from tensors, export creates the same tensors from
parameters. Its keys (names of tensors in a file) follow the *old layout*: the names that transformers gave them before
version 4.52. It is the only layout that every transformers from 4.46 to 5.x loads. `Table.normalise` maps the keys of
newer layouts to it.
"""

import dataclasses
import re
from collections.abc import Callable, Iterator

import numpy as np

from icet_jax.nn.clip import ClipConfig
from icet_jax.nn.gpt2 import GPT2Config
from icet_jax.nn.llama import LlamaConfig


@dataclasses.dataclass(frozen=True)
class Transform:
    """Converts between an HF tensor and a parameter.

    Attributes:
      to_param: function from the tensor to the parameter.
      to_hf: function from the parameter to the tensor, the exact inverse of `to_param`.
      hf_shape: function from the parameter's shape to the tensor's.
    """

    to_param: Callable[[np.ndarray], np.ndarray]
    to_hf: Callable[[np.ndarray], np.ndarray]
    hf_shape: Callable[[tuple[int, ...]], tuple[int, ...]]


Leaf = tuple[str, str, Transform]
"""(HF's name of a module's tensor, such as "weight"; this package's name of the parameter, such as "kernel"; transform
between the two)."""

SAME = Transform(lambda x: x, lambda x: x, lambda shape: shape)
TRANSPOSED = Transform(lambda x: x.T, lambda x: x.T, lambda shape: shape[::-1])


def patches(*shape: int) -> Transform:
    """Returns the transform of the weights that embed image patches.

    HF has a convolution `[D, *shape]`; here it is a matrix `[prod(shape), D]`, by which flattened patches are
    multiplied.

    Args:
      shape: axes of a patch: channels, (frames,) rows, columns.
    """
    return Transform(
        lambda x: x.reshape(x.shape[0], -1).T, lambda x: x.T.reshape(-1, *shape), lambda matrix: (matrix[1], *shape)
    )


@dataclasses.dataclass(frozen=True)
class TableEntry:
    """Describes which parameter one HF tensor fills.

    Attributes:
      key: name of the tensor in the old layout.
      path: path of the parameter, `language_model/layers/q_proj/kernel`.
      layer: index along the parameter's first axis, or None if the parameter is not stacked.
      transform: conversion between the tensor and the parameter (or that layer of it).
      fallback: key of the tensor that is used if the file lacks this one (tied embeddings), or None.
    """

    key: str
    path: str
    layer: int | None
    transform: Transform
    fallback: str | None = None


@dataclasses.dataclass(frozen=True)
class Table:
    """Maps the checkpoint keys of one network to its parameters.

    Attributes:
      entries: entries in export order; keys and (path, layer) pairs are unique.
      normalise: function that takes a key as found in a checkpoint file, in the old layout or a newer one, and returns
        the key that `entries` use (old layout), or None for a tensor to ignore.
    """

    entries: tuple[TableEntry, ...]
    normalise: Callable[[str], str | None]


def stacked(
    keys: str, paths: str, modules: tuple[tuple[str, str], ...], leaves: tuple[Leaf, ...], depth: int
) -> Iterator[TableEntry]:
    """Yields the entries of `depth` equal layers, whose parameters are stacked.

    Args:
      keys: prefix of the layers' keys.
      paths: prefix of the parameters' paths.
      modules: (HF's name, this package's name) of each module of a layer.
      leaves: tensors of each module: `LINEAR`, `NORM` or similar.
      depth: number of layers.
    """
    for layer in range(depth):
        for hf_module, module in modules:
            for hf_leaf, leaf, transform in leaves:
                yield TableEntry(f"{keys}.{layer}.{hf_module}.{hf_leaf}", f"{paths}/{module}/{leaf}", layer, transform)


def single(modules: tuple[tuple[str, str], ...], leaves: tuple[Leaf, ...]) -> Iterator[TableEntry]:
    """Yields the entries of modules that are not stacked; arguments as in `stacked`."""
    for hf_module, module in modules:
        for hf_leaf, leaf, transform in leaves:
            yield TableEntry(f"{hf_module}.{hf_leaf}", f"{module}/{leaf}", None, transform)


def renaming(*prefixes: tuple[str, str]) -> Callable[[str], str | None]:
    """Returns a function for `Table.normalise` that replaces the prefix of a key and ignores buffers (not parameters).

    Args:
      prefixes: (regular expression, prefix in the old layout). The first expression that matches the start of a key
        decides; a key without a match is not changed.
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

# The tensors of a torch Linear and of a norm, for `stacked` and `single`.
LINEAR: tuple[Leaf, ...] = (("weight", "kernel", TRANSPOSED), ("bias", "bias", SAME))
NORM: tuple[Leaf, ...] = (("weight", "scale", SAME), ("bias", "bias", SAME))
LINEAR_KERNEL, NORM_SCALE = LINEAR[:1], NORM[:1]
"""The tensors of a Linear and of a norm without a bias."""


def clip_entries(vision: ClipConfig, root: str, path: str) -> Iterator[TableEntry]:
    """Yields the entries of a CLIP vision tower (HF `CLIPVisionTransformer`).

    Args:
      vision: sizes of the tower.
      root: prefix of the tower's keys, such as "vision_tower.vision_model".
      path: prefix of the paths of the tower's parameters.
    """
    convolution = patches(vision.num_channels, vision.patch_size, vision.patch_size)
    yield TableEntry(f"{root}.embeddings.class_embedding", f"{path}/class_embedding", None, SAME)
    yield TableEntry(f"{root}.embeddings.patch_embedding.weight", f"{path}/patch_embedding/kernel", None, convolution)
    yield TableEntry(f"{root}.embeddings.position_embedding.weight", f"{path}/position_embedding", None, SAME)
    outer_norms = tuple((f"{root}.{name}", f"{path}/{name}") for name in ("pre_layrnorm", "post_layernorm"))
    yield from single(outer_norms, NORM)
    yield from _encoder_entries(vision, root, path)


def siglip_entries(vision: ClipConfig, root: str, path: str) -> Iterator[TableEntry]:
    """Yields the entries of a SigLIP vision tower (HF `SmolVLMVisionTransformer`); arguments as in `clip_entries`."""
    convolution = patches(vision.num_channels, vision.patch_size, vision.patch_size)
    embeddings, patch = f"{root}.embeddings", f"{path}/patch_embedding"
    yield TableEntry(f"{embeddings}.patch_embedding.weight", f"{patch}/kernel", None, convolution)
    yield TableEntry(f"{embeddings}.patch_embedding.bias", f"{patch}/bias", None, SAME)
    yield TableEntry(f"{embeddings}.position_embedding.weight", f"{path}/position_embedding", None, SAME)
    yield from single(((f"{root}.post_layernorm", f"{path}/post_layernorm"),), NORM)
    yield from _encoder_entries(vision, root, path)


def _encoder_entries(vision: ClipConfig, root: str, path: str) -> Iterator[TableEntry]:
    """Yields the entries of the blocks of a CLIP or SigLIP tower; arguments as in `clip_entries`."""
    attention = tuple((f"self_attn.{name}", name) for name in ("q_proj", "k_proj", "v_proj", "out_proj"))
    linears = (*attention, ("mlp.fc1", "fc1"), ("mlp.fc2", "fc2"))
    block_norms = (("layer_norm1", "layer_norm1"), ("layer_norm2", "layer_norm2"))
    keys, paths, depth = f"{root}.encoder.layers", f"{path}/layers", vision.num_hidden_layers
    yield from stacked(keys, paths, block_norms, NORM, depth)
    yield from stacked(keys, paths, linears, LINEAR, depth)


def llama_entries(config: LlamaConfig, root: str, path: str, head: str | None) -> Iterator[TableEntry]:
    """Yields the entries of a Llama decoder (HF `LlamaModel`).

    Args:
      config: config of the decoder.
      root: prefix of the decoder's keys, "model" or "language_model.model".
      path: prefix of the paths of the decoder's parameters.
      head: key of the language-model head, or None if the network has none.
    """
    embedding = f"{root}.embed_tokens.weight"
    yield TableEntry(embedding, f"{path}/embed_tokens", None, SAME)
    yield TableEntry(f"{root}.norm.weight", f"{path}/norm/scale", None, SAME)
    attention = tuple((f"self_attn.{name}", name) for name in ("q_proj", "k_proj", "v_proj", "o_proj"))
    linears = (*attention, *((f"mlp.{name}", name) for name in ("gate_proj", "up_proj", "down_proj")))
    norms = tuple((name, name) for name in ("input_layernorm", "post_attention_layernorm"))
    if config.qk_norm:
        norms += tuple((f"self_attn.{name}", name) for name in ("q_norm", "k_norm"))
    keys, paths, depth = f"{root}.layers", f"{path}/layers", config.num_hidden_layers
    yield from stacked(keys, paths, norms, NORM_SCALE, depth)
    yield from stacked(keys, paths, linears, LINEAR_KERNEL, depth)
    yield from stacked(keys, paths, tuple(pair for pair in linears if pair[1] in config.biased), LINEAR[1:], depth)
    if head is not None:
        tied = embedding if config.tie_word_embeddings else None
        yield TableEntry(head, f"{path}/lm_head/kernel", None, TRANSPOSED, fallback=tied)


_GPT2_IGNORED = re.compile(r"h\.\d+\.(attn\.(masked_)?bias|crossattention\..*)|lm_head\.weight")


def normalise_gpt2(key: str) -> str | None:
    """Returns a GPT-2 key with the prefix `transformer.`, which some files lack.

    Returns None for causal masks and a language-model head, which are ignored.
    """
    bare = key.removeprefix("transformer.")
    if _GPT2_IGNORED.fullmatch(bare):
        return None
    return bare if bare.startswith("score.") else f"transformer.{bare}"


def gpt2_table(config: GPT2Config) -> Table:
    """Returns the key table of a GPT-2 reward model (HF `GPT2ForSequenceClassification`)."""
    # HF's Conv1D stores its weight as `[in, out]`, so it is not transposed.
    conv1d: tuple[Leaf, ...] = (("weight", "kernel", SAME), ("bias", "bias", SAME))
    modules = (("attn.c_attn", "c_attn"), ("attn.c_proj", "c_proj"), ("mlp.c_fc", "c_fc"), ("mlp.c_proj", "mlp_proj"))
    entries = (
        TableEntry("transformer.wte.weight", "wte", None, SAME),
        TableEntry("transformer.wpe.weight", "wpe", None, SAME),
        *stacked("transformer.h", "layers", (("ln_1", "ln_1"), ("ln_2", "ln_2")), NORM, config.n_layer),
        *stacked("transformer.h", "layers", modules, conv1d, config.n_layer),
        *single((("transformer.ln_f", "ln_f"),), NORM),
        TableEntry("score.weight", "score/kernel", None, TRANSPOSED),
    )
    return Table(entries, normalise_gpt2)
