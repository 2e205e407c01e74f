"""Converts HF's `config.json` of LLaVA-1.5 to `LlavaConfig` and back."""

import copy
import dataclasses
from typing import Any, TypeVar

from icet_jax.checkpoints.decoders import attention_window, decoder_from_hf, decoder_to_hf
from icet_jax.checkpoints.hf_config import Fields, drop_new_keys, require_model_type
from icet_jax.config.names import FAMILIES
from icet_jax.errors import UserError
from icet_jax.files import JsonObject
from icet_jax.models.llava.network import LlavaConfig
from icet_jax.nn.clip import ClipConfig
from icet_jax.nn.layers import ACTIVATIONS
from icet_jax.nn.llama import LlamaConfig
from icet_jax.nn.protocols import check_exit

AnyLlavaConfig = TypeVar("AnyLlavaConfig", bound=LlavaConfig)

# transformers' class defaults, used for fields that the vision config leaves out.
_VISION_DEFAULTS = {
    "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12,
    "image_size": 224, "patch_size": 32, "num_channels": 3, "layer_norm_eps": 1e-5, "hidden_act": "quick_gelu",
}  # fmt: skip
_CLIP_FIELDS = tuple(_VISION_DEFAULTS)
# transformers' vision config for a file without `vision_config` (CLIP ViT-L/14-336).
_VISION_ABSENT = {
    "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16,
    "image_size": 336, "patch_size": 14,
}  # fmt: skip
_LLAVA_DEFAULTS = {
    "image_token_index": 32000, "vision_feature_layer": -2, "vision_feature_select_strategy": "default",
    "projector_hidden_act": "gelu", "multimodal_projector_bias": True, "tie_word_embeddings": False,
}  # fmt: skip


def llava_from_hf(values: JsonObject, where: str = "config.json") -> LlavaConfig:
    """Returns the network's config for a LLaVA-1.5 `config.json` (HF `LlavaConfig`).

    Args:
      values: the parsed file.
      where: name of the file in error messages.

    Raises:
      UserError: the model type differs, or a value would need a different network.
    """
    require_model_type(values, "llava", where)
    return LlavaConfig(**llava_values(values, where))


def llava_values(values: JsonObject, where: str) -> JsonObject:
    """Returns {field of `LlavaConfig`: value}, from a `config.json` of LLaVA-1.5 or LLaVA-NeXT; see `llava_from_hf`."""
    fields = Fields(values, _LLAVA_DEFAULTS, where)
    if "image_token_id" in fields.values and "image_token_index" not in values:
        fields.values["image_token_index"] = fields.values["image_token_id"]
    vision = _vision(values.get("vision_config"), f"{where}: vision_config")
    layer, depth = fields.values["vision_feature_layer"], vision.num_hidden_layers
    if isinstance(layer, bool) or not isinstance(layer, int) or not -depth - 1 <= layer <= depth:
        raise fields.fail("vision_feature_layer", f"one integer in -{depth + 1}..{depth}")
    return {
        "vision": vision,
        "text": _decoder(values.get("text_config"), bool(fields.values["tie_word_embeddings"]), where),
        "image_token_index": fields.size("image_token_index"),
        "vision_feature_layer": layer,
        "vision_feature_select_strategy": fields.choice("vision_feature_select_strategy", ("default", "full")),
        "projector_hidden_act": fields.choice("projector_hidden_act", ACTIVATIONS),
        "multimodal_projector_bias": fields.choice("multimodal_projector_bias", (True, False)),
    }


def _decoder(values: Any, tied: bool, where: str) -> LlamaConfig:
    """Returns the decoder's config from the file's `text_config`; refuses sliding-window attention.

    `values` is the content of `text_config`, and `tied` says whether input and output embeddings share their weights.
    """
    where, values = f"{where}: text_config", values or {}
    config, window = decoder_from_hf(values, where, tied=tied), attention_window(values, where)
    if window is not None:
        value = window if "sliding_window" in values else f"{window} (the default)"
        raise UserError(f"{where}: sliding_window={value} is not supported; needs null, attention to all tokens")
    return config


def _vision(values: Any, where: str) -> ClipConfig:
    """Returns the config of the image encoder from the file's `vision_config`, which may be missing."""
    fields = Fields(_VISION_ABSENT if values is None else values, _VISION_DEFAULTS, where)
    fields.only("model_type", "clip_vision_model")
    return clip_config(fields, where)


def clip_config(fields: Fields, where: str) -> ClipConfig:
    """Returns the sizes of a CLIP or SigLIP tower.

    Args:
      fields: fields of a `vision_config`.
      where: name of the `vision_config` in error messages.

    Raises:
      UserError: the sizes do not fit each other.
    """
    heads, width = fields.size("num_attention_heads"), fields.size("hidden_size")
    if width % heads:
        raise UserError(f"{where}: hidden_size={width} is not a multiple of num_attention_heads={heads}")
    if fields.size("patch_size") > fields.size("image_size"):
        raise fields.fail("patch_size", f"at most image_size={fields.size('image_size')}")
    return ClipConfig(
        hidden_size=width,
        intermediate_size=fields.size("intermediate_size"),
        num_hidden_layers=fields.size("num_hidden_layers"),
        num_attention_heads=heads,
        image_size=fields.size("image_size"),
        patch_size=fields.size("patch_size"),
        num_channels=fields.size("num_channels"),
        layer_norm_eps=fields.number("layer_norm_eps"),
        hidden_act=fields.choice("hidden_act", ACTIVATIONS),
    )


def llava_at_exit(config: AnyLlavaConfig, exit_layer: int, field: str) -> AnyLlavaConfig:
    """Returns the config of the model whose image encoder ends at an exit, of LLaVA-1.5 or LLaVA-NeXT.

    Its `vision_feature_layer` is -1, the state behind the last block. transformers and vLLM read that value alike: the
    output of the last block, without `post_layernorm`. A positive number means one block more in older versions of
    vLLM.

    Args:
      config: config of the whole network.
      exit_layer: the exit, 1..num_hidden_layers of the image encoder.
      field: name of the argument in error messages.

    Raises:
      UserError: the model has no such exit.
    """
    depth = check_exit(exit_layer, config.vision.num_hidden_layers, field)
    vision = dataclasses.replace(config.vision, num_hidden_layers=depth)
    return dataclasses.replace(config, vision=vision, vision_feature_layer=-1)


def llava_to_hf(config: LlavaConfig, source: JsonObject | None, dtype: str) -> JsonObject:
    """Returns the `config.json` to write, with keys that transformers 4.46 and later know.

    Args:
      config: config of the network.
      source: the `config.json` that the model was loaded with, whose other keys are kept; None for a new model.
      dtype: torch's name of the dtype of the stored weights, such as "float16".
    """
    out = copy.deepcopy(source or {})
    text, vision = out.get("text_config") or {}, out.get("vision_config") or {}
    for values in (out, text, vision):
        drop_new_keys(values)
    text |= decoder_to_hf(config.text, dtype, text.get("model_type") or "llama")
    vision |= {"model_type": "clip_vision_model", **{field: getattr(config.vision, field) for field in _CLIP_FIELDS}}
    out |= {
        "architectures": [FAMILIES["llava"].architecture],
        "model_type": "llava",
        **{field: getattr(config, field) for field in _LLAVA_DEFAULTS if field != "tie_word_embeddings"},
        "image_seq_length": config.image_tokens,
        "tie_word_embeddings": config.text.tie_word_embeddings,
        "torch_dtype": dtype,
        "text_config": text,
        "vision_config": vision,
    }
    return out
