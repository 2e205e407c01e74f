"""Converts HF's `config.json` of Qwen2.5-VL to `Qwen25VLConfig` and back.

In the published files the decoder's fields are at the root. transformers 5 writes them as `text_config`, which earlier
versions cannot read. Import accepts both forms, export writes the first.
"""

import copy
import dataclasses
from pathlib import Path
from typing import Any

from icet_jax.checkpoints.decoders import attention_window, decoder_from_hf, decoder_to_hf
from icet_jax.checkpoints.hf_config import Fields, drop_new_keys, require_model_type
from icet_jax.config.names import FAMILIES
from icet_jax.errors import UserError
from icet_jax.files import JsonObject
from icet_jax.models.qwen2_5_vl.network import Qwen25VLConfig
from icet_jax.models.qwen2_5_vl.resize import patches_of
from icet_jax.models.qwen2_5_vl.vision import QwenVisionConfig
from icet_jax.nn.llama import LlamaConfig

# transformers' class defaults, used for fields that the file leaves out.
_DEFAULTS = {"image_token_id": 151655, "tie_word_embeddings": False}
_TEXT_DEFAULTS = {
    "vocab_size": 152064, "hidden_size": 8192, "intermediate_size": 29568, "num_hidden_layers": 80,
    "num_attention_heads": 64, "num_key_value_heads": 8, "rms_norm_eps": 1e-5, "max_position_embeddings": 32768,
}  # fmt: skip
_VISION_DEFAULTS = {
    "depth": 32, "hidden_size": 3584, "intermediate_size": 3420, "num_heads": 16, "in_channels": 3, "patch_size": 14,
    "spatial_merge_size": 2, "temporal_patch_size": 2, "window_size": 112, "out_hidden_size": 3584,
    "fullatt_block_indexes": (7, 15, 23, 31),
}  # fmt: skip
_THETA, _SECTIONS = 1e6, (16, 24, 24)
# Fields of transformers 5's `text_config` that the published form does not have.
_NEW_TEXT_KEYS = ("model_type", "layer_types", "architectures")


def qwen_from_hf(values: JsonObject, where: str = "config.json") -> Qwen25VLConfig:
    """Returns the network's config for a Qwen2.5-VL `config.json` (HF `Qwen2_5_VLConfig`).

    Args:
      values: the parsed file.
      where: name of the file in error messages.

    Raises:
      UserError: the model type differs, or a value would need a different network.
    """
    require_model_type(values, "qwen2_5_vl", where)
    fields = Fields(values, _DEFAULTS, where)
    text = _decoder(values, fields.choice("tie_word_embeddings", (True, False)), where)
    return Qwen25VLConfig(
        vision=_vision(values.get("vision_config"), text.hidden_size, f"{where}: vision_config"),
        text=text,
        image_token_index=fields.size("image_token_id"),
    )


def with_patches(config: Qwen25VLConfig, directory: Path) -> Qwen25VLConfig:
    """Returns the config with the most patches that the image processor of the directory makes; see `Family`."""
    return dataclasses.replace(config, max_patches=patches_of(config.vision, directory))


def _decoder(values: JsonObject, tied: bool, where: str) -> LlamaConfig:
    """Returns the decoder's config, from the `text_config` of the file or, if it has none, from its root."""
    is_nested = values.get("text_config") is not None
    where = f"{where}: text_config" if is_nested else where
    fields = Fields(values["text_config"] if is_nested else values, _TEXT_DEFAULTS, where)
    fields.only("model_type", "qwen2_5_vl", "qwen2_5_vl_text")
    rope: JsonObject = {"rope_theta": fields.values.get("rope_theta", _THETA)}
    for name in ("rope_scaling", "rope_parameters"):
        part = fields.values.pop(name, {})
        if not isinstance(part, dict):
            raise UserError(f"{where}: {name}={part!r} is not supported; needs a mapping")
        rope |= part
    sections = tuple(rope.pop("mrope_section", _SECTIONS))
    kind = rope.pop("type", "default")
    rope["rope_type"] = "default" if rope.get("rope_type", kind) == "mrope" else rope.get("rope_type", kind)
    # Apart from its positions, the decoder is Qwen2's.
    decoder = fields.values | {"model_type": "qwen2", "rope_parameters": rope}
    config, window = decoder_from_hf(decoder, where, tied=tied), attention_window(decoder, where)
    if window is not None:
        raise UserError(f"{where}: sliding_window={window} is not supported; needs use_sliding_window false")
    if config.head_dim * config.num_attention_heads != config.hidden_size:
        raise UserError(f"{where}: head_dim={config.head_dim} is not supported; needs hidden_size / heads")
    counts = [count for count in sections if type(count) is int and count > 0]
    if not len(counts) == len(sections) == 3 or sum(counts) != config.head_dim // 2:
        raise UserError(
            f"{where}: mrope_section={list(sections)} is not supported; needs three positive integers with the sum "
            f"{config.head_dim // 2}"
        )
    return dataclasses.replace(config, mrope_section=sections)


def _vision(values: Any, width: int, where: str) -> QwenVisionConfig:
    """Returns the sizes of the image encoder, whose features must have the decoder's `width`."""
    fields = Fields({} if values is None else values, _VISION_DEFAULTS, where)
    fields.only("model_type", "qwen2_5_vl", "qwen2_5_vl_vision")
    fields.only("hidden_act", "silu")
    fields.only("rope_parameters", {"rope_type": "axial", "rope_theta": 10000.0})
    if fields.size("out_hidden_size") != width:
        raise fields.fail("out_hidden_size", f"{width}, the hidden_size of the decoder")
    size, heads = fields.size("hidden_size"), fields.size("num_heads")
    if size % (4 * heads):
        raise fields.fail("hidden_size", f"a multiple of 4 * num_heads, {4 * heads}")
    full = fields.values["fullatt_block_indexes"]
    if not isinstance(full, list | tuple) or not all(type(index) is int and index >= 0 for index in full):
        raise fields.fail("fullatt_block_indexes", "a list of indices of blocks")
    config = QwenVisionConfig(
        hidden_size=size,
        intermediate_size=fields.size("intermediate_size"),
        num_hidden_layers=_depth(fields),
        num_attention_heads=heads,
        patch_size=fields.size("patch_size"),
        temporal_patch_size=fields.size("temporal_patch_size"),
        spatial_merge_size=fields.size("spatial_merge_size"),
        window_size=fields.size("window_size"),
        fullatt_block_indexes=tuple(full),
        num_channels=fields.size("in_channels"),
    )
    if config.window_side < 1:
        raise fields.fail("window_size", f"at least {config.spatial_merge_size * config.patch_size} pixels")
    return config


def _depth(fields: Fields) -> int:
    """Returns the number of blocks, which is limited against malicious files as other numbers of layers are."""
    return Fields({"num_hidden_layers": fields.values["depth"]}, {}, fields.where).size("num_hidden_layers")


def qwen_to_hf(config: Qwen25VLConfig, source: JsonObject | None, dtype: str) -> JsonObject:
    """Returns the `config.json` to write, in the published form, which transformers 4.49 and later know.

    Args:
      config: config of the network.
      source: the `config.json` that the model was loaded with, whose other keys are kept; None for a new model.
      dtype: torch's name of the dtype of the stored weights.
    """
    out = copy.deepcopy(source or {})
    text, vision = out.pop("text_config", None) or {}, out.get("vision_config") or {}
    for values in (out, text, vision):
        drop_new_keys(values)
    decoder = decoder_to_hf(config.text, dtype, "qwen2")
    del decoder["head_dim"]  # always hidden_size / num_attention_heads
    out = {key: value for key, value in text.items() if key not in _NEW_TEXT_KEYS} | out | decoder
    names = {"depth": "num_hidden_layers", "num_heads": "num_attention_heads", "in_channels": "num_channels"}
    vision |= {
        "model_type": "qwen2_5_vl",
        **{
            field: getattr(config.vision, names.get(field, field))
            for field in _VISION_DEFAULTS
            if field not in ("out_hidden_size", "fullatt_block_indexes")
        },
        "out_hidden_size": config.text.hidden_size,
        "fullatt_block_indexes": list(config.vision.fullatt_block_indexes),
    }
    return out | {
        "architectures": [FAMILIES[config.model_type].architecture],
        "model_type": config.model_type,
        "image_token_id": config.image_token_index,
        "rope_scaling": {"type": "mrope", "mrope_section": list(config.text.mrope_section)},
        "use_sliding_window": False,
        "vision_config": vision,
    }
