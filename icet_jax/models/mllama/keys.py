"""Key table of Llama 3.2 Vision (HF `MllamaForConditionalGeneration`), 906 tensors at 11B."""

from collections.abc import Iterator, Sequence
from typing import Any

from icet_jax.checkpoints.tables import (
    LINEAR,
    LINEAR_KERNEL,
    NORM,
    NORM_SCALE,
    SAME,
    Table,
    TableEntry,
    patches,
    renaming,
    single,
    stacked,
)
from icet_jax.models.mllama.network import MllamaConfig

_ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
_MLP = ("gate_proj", "up_proj", "down_proj")
_TILE_POSITIONS = ("pre_tile_positional_embedding", "post_tile_positional_embedding")


def _vision_entries(config: MllamaConfig) -> Iterator[TableEntry]:
    """Yields the entries of the image encoder."""
    root, path = "vision_model", "vision_tower"
    vision = config.vision
    convolution = patches(vision.num_channels, vision.patch_size, vision.patch_size)
    yield TableEntry(f"{root}.class_embedding", f"{path}/class_embedding", None, SAME)
    yield TableEntry(f"{root}.patch_embedding.weight", f"{path}/patch_embedding/kernel", None, convolution)
    for leaf, name in (("gate", "gate"), ("embedding", "embedding"), ("tile_embedding.weight", "tile_embedding")):
        module = "gated_positional_embedding"
        yield TableEntry(f"{root}.{module}.{leaf}", f"{path}/{module}/{name}", None, SAME)
    for module in _TILE_POSITIONS:
        yield TableEntry(f"{root}.{module}.gate", f"{path}/{module}/gate", None, SAME)
        yield TableEntry(f"{root}.{module}.embedding.weight", f"{path}/{module}/embedding", None, SAME)
    yield from single(tuple((f"{root}.{name}", f"{path}/{name}") for name in ("layernorm_pre", "layernorm_post")), NORM)
    attention = tuple((f"self_attn.{name}", name) for name in _ATTENTION)
    mlp = (("mlp.fc1", "fc1"), ("mlp.fc2", "fc2"))
    norms = tuple((name, name) for name in ("input_layernorm", "post_attention_layernorm"))
    for hf_name, name_here, depth in (
        ("transformer", "layers", vision.num_hidden_layers),
        ("global_transformer", "global_layers", vision.num_global_layers),
    ):
        keys, paths = f"{root}.{hf_name}.layers", f"{path}/{name_here}"
        yield from stacked(keys, paths, norms, NORM, depth)
        yield from stacked(keys, paths, attention, LINEAR_KERNEL, depth)
        yield from stacked(keys, paths, mlp, LINEAR, depth)
    for layer in range(vision.num_global_layers):
        for gate in ("gate_attn", "gate_ffn"):
            yield TableEntry(
                f"{root}.global_transformer.layers.{layer}.{gate}", f"{path}/global_layers/{gate}", layer, SAME
            )


def _stack_entries(
    hf_layers: Sequence[int], stack: str, modules: Sequence[tuple[str, str]], leaves: tuple[Any, ...]
) -> Iterator[TableEntry]:
    """Yields the entries of one of the decoder's two stacks of layers.

    Args:
      hf_layers: indices of the stack's layers in HF's decoder.
      stack: name of the stack in this package.
      modules: (HF's name of a module, its name in this package).
      leaves: tensors of each module, such as `LINEAR`.
    """
    for layer, hf_layer in enumerate(hf_layers):
        for hf_name, name_here in modules:
            for leaf, name, transform in leaves:
                key = f"language_model.model.layers.{hf_layer}.{hf_name}.{leaf}"
                yield TableEntry(key, f"language_model/{stack}/{name_here}/{name}", layer, transform)


def _text_entries(config: MllamaConfig) -> Iterator[TableEntry]:
    """Yields the entries of the decoder."""
    root, path = "language_model.model", "language_model"
    text = config.text
    yield TableEntry(f"{root}.embed_tokens.weight", f"{path}/embed_tokens", None, SAME)
    yield TableEntry(f"{root}.norm.weight", f"{path}/norm/scale", None, SAME)
    cross = text.cross_attention_layers
    self_layers = [layer for layer in range(text.llama.num_hidden_layers) if layer not in cross]
    norms = [(name, name) for name in ("input_layernorm", "post_attention_layernorm")]
    mlp = [(f"mlp.{name}", name) for name in _MLP]
    self_attention = [(f"self_attn.{name}", name) for name in _ATTENTION]
    yield from _stack_entries(self_layers, "layers", norms, NORM_SCALE)
    yield from _stack_entries(self_layers, "layers", self_attention + mlp, LINEAR_KERNEL)
    head_norms = [(f"cross_attn.{name}", name) for name in ("q_norm", "k_norm")]
    cross_attention = [(f"cross_attn.{name}", name) for name in _ATTENTION]
    yield from _stack_entries(cross, "cross_layers", norms + head_norms, NORM_SCALE)
    yield from _stack_entries(cross, "cross_layers", cross_attention + mlp, LINEAR_KERNEL)
    for layer, hf_layer in enumerate(cross):
        for gate in ("attn_gate", "mlp_gate"):
            key = f"{root}.layers.{hf_layer}.cross_attn_{gate}"
            yield TableEntry(key, f"{path}/cross_layers/{gate}", layer, SAME)
    yield from single((("language_model.lm_head", f"{path}/lm_head"),), LINEAR_KERNEL)


normalise_mllama = renaming(
    (r"(model\.)?(language_model\.)?lm_head\.", "language_model.lm_head."),
    (r"(model\.)?language_model\.(model\.)?", "language_model.model."),
    (r"(model\.)?vision_model\.", "vision_model."),
    (r"(model\.)?multi_modal_projector\.", "multi_modal_projector."),
)
"""Function that takes a tensor's key, as any transformers from 4.46 to 5.x writes it, and returns the key in this
table, or None for a tensor that is not a parameter."""


def mllama_table(config: MllamaConfig) -> Table:
    """Returns the key table of the whole model: image encoder, projector, and both kinds of decoder layers."""
    projector = single((("multi_modal_projector", "projector"),), LINEAR)
    return Table((*_vision_entries(config), *projector, *_text_entries(config)), normalise_mllama)
