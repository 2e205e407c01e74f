"""Key tables: for every tensor of an HF file, the parameter (and layer) it fills and how its axes are turned.

A table is data and is read in both directions: import fills parameters from tensors, export makes the same tensors from
parameters. Keys are those of the OLD layout, the hub's own and the only one that every transformers from 4.46 to 5.x
loads; `normalise` maps the other layouts to it.
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
    """How a torch tensor becomes a parameter and back; the two functions are exact inverses."""

    to_param: Callable[[np.ndarray], np.ndarray]
    to_hf: Callable[[np.ndarray], np.ndarray]
    hf_shape: Callable[[tuple[int, ...]], tuple[int, ...]]


SAME = Transform(lambda x: x, lambda x: x, lambda shape: shape)
TRANSPOSED = Transform(lambda x: x.T, lambda x: x.T, lambda shape: shape[::-1])


def patches(channels: int, size: int) -> Transform:
    """A strided convolution `[D, C, p, p]` as the kernel `[C*p*p, D]` applied to flattened patches."""
    return Transform(
        lambda x: x.reshape(x.shape[0], -1).T,
        lambda x: x.T.reshape(-1, channels, size, size),
        lambda shape: (shape[1], channels, size, size),
    )


@dataclasses.dataclass(frozen=True)
class Slot:
    """One HF tensor's place.

    Attributes:
      key: its name in the OLD layout.
      path: the parameter's path, `language_model/layers/q_proj/kernel`.
      layer: index along the parameter's first axis, or None where it is not stacked.
      transform: between the tensor and the parameter (of that layer).
      fallback: key whose tensor serves where this one is absent from the file (tied embeddings).
    """

    key: str
    path: str
    layer: int | None
    transform: Transform
    fallback: str | None = None


@dataclasses.dataclass(frozen=True)
class Table:
    """All slots of a family for one config.

    Attributes:
      slots: in export order; keys and (path, layer) pairs are unique.
      normalise: a file's key -> OLD key, or None where the tensor is to be ignored.
    """

    slots: tuple[Slot, ...]
    normalise: Callable[[str], str | None]


def stacked(
    keys: str, paths: str, modules: tuple[tuple[str, str], ...], leaves: tuple[Any, ...], depth: int
) -> Iterator[Slot]:
    """Slots of `depth` equal layers: every module (HF name, our name) has the same leaves (HF, ours, transform)."""
    for layer in range(depth):
        for theirs, ours in modules:
            for leaf, name, transform in leaves:
                yield Slot(f"{keys}.{layer}.{theirs}.{leaf}", f"{paths}/{ours}/{name}", layer, transform)


def single(modules: tuple[tuple[str, str], ...], leaves: tuple[Any, ...]) -> Iterator[Slot]:
    """Slots of modules that are not stacked, as `stacked` takes them."""
    for theirs, ours in modules:
        for leaf, name, transform in leaves:
            yield Slot(f"{theirs}.{leaf}", f"{ours}/{name}", None, transform)


# (HF leaf, our leaf, transform) of a torch Linear and a norm, for `stacked` and `single`.
LINEAR = (("weight", "kernel", TRANSPOSED), ("bias", "bias", SAME))
NORM = (("weight", "scale", SAME), ("bias", "bias", SAME))


def clip_slots(vision: ClipConfig, root: str, own: str) -> Iterator[Slot]:
    """Slots of a CLIP vision tower (HF `CLIPVisionTransformer`).

    Args:
      vision: sizes of the tower.
      root: prefix of its keys, "vision_tower.vision_model".
      own: our prefix of its paths.
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
    """Slots of a Llama decoder (HF `LlamaModel`).

    Args:
      config: of the decoder.
      root: prefix of its keys, "model" or "language_model.model".
      own: our prefix of its paths.
      head: key of the language-model head, or None where the network has none.
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
    """Key with the `transformer.` prefix that the original files lack; None for causal-mask buffers and an LM head."""
    bare = key.removeprefix("transformer.")
    if _GPT2_IGNORED.fullmatch(bare):
        return None
    return bare if bare.startswith("score.") else f"transformer.{bare}"


def gpt2_table(config: GPT2Config) -> Table:
    """GPT-2 reward model (HF `GPT2ForSequenceClassification`): Conv1D weights are `[in, out]` already."""
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
