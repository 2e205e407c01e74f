"""Converts HF's `config.json` of SmolVLM and Idefics3 to `SmolVLMConfig` and back."""

import copy
import dataclasses
from pathlib import Path
from typing import Any

from icet_jax.checkpoints.decoders import DECODERS, decoder_from_hf, decoder_to_hf
from icet_jax.checkpoints.hf_config import Fields, drop_new_keys
from icet_jax.config.names import FAMILIES
from icet_jax.errors import UserError
from icet_jax.files import JsonObject
from icet_jax.models.llava.config import clip_config
from icet_jax.models.smolvlm.network import Idefics3Config, SmolVLMConfig
from icet_jax.models.smolvlm.tiles import most_tiles
from icet_jax.nn.clip import ClipConfig

_CONFIGS = {config.model_type: config for config in (SmolVLMConfig, Idefics3Config)}
# transformers' class defaults, used for fields that the file leaves out.
_DEFAULTS = {"image_token_id": 128257, "scale_factor": 2, "tie_word_embeddings": False}
_VISION_DEFAULTS = {
    "hidden_size": 1152, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 16,
    "image_size": 224, "patch_size": 32, "num_channels": 3, "layer_norm_eps": 1e-6, "hidden_act": "gelu_pytorch_tanh",
}  # fmt: skip


def smolvlm_from_hf(values: JsonObject, where: str = "config.json") -> SmolVLMConfig:
    """Returns the network's config for a SmolVLM, SmolVLM2 or Idefics3 `config.json` (HF `SmolVLMConfig`).

    Args:
      values: the parsed file.
      where: name of the file in error messages.

    Raises:
      UserError: the model type differs, or a value would need a different network.
    """
    config_class = _CONFIGS.get(str(values.get("model_type")))
    if config_class is None:
        raise UserError(f"{where}: model_type '{values.get('model_type')}' is not {' or '.join(_CONFIGS)}")
    fields = Fields(values, _DEFAULTS, where)
    vision = _vision(values.get("vision_config"), f"{where}: vision_config")
    side, factor = vision.image_size // vision.patch_size, fields.size("scale_factor")
    if side % factor:
        raise fields.fail("scale_factor", f"a divisor of the {side} patches along each side of a tile")
    text = values.get("text_config")
    return config_class(
        vision=vision,
        text=decoder_from_hf(
            {"rms_norm_eps": 1e-5} if text is None else text,
            f"{where}: text_config",
            kind=DECODERS["llama"],
            tied=fields.choice("tie_word_embeddings", (True, False)),
        ),
        image_token_index=fields.size("image_token_id"),
        scale_factor=factor,
    )


def with_tiles(config: SmolVLMConfig, directory: Path) -> SmolVLMConfig:
    """Returns the config with the number of tiles that the image processor of the directory makes; see `Family`."""
    return dataclasses.replace(config, max_tiles=most_tiles(directory, config.vision.image_size))


def _vision(values: Any, where: str) -> ClipConfig:
    """Returns the config of the image encoder from the file's `vision_config`, which may be missing."""
    fields = Fields({} if values is None else values, _VISION_DEFAULTS, where)
    fields.only("model_type", *(f"{name}{suffix}" for name in _CONFIGS for suffix in ("", "_vision")))
    return clip_config(fields, where)


def smolvlm_to_hf(config: SmolVLMConfig, source: JsonObject | None, dtype: str) -> JsonObject:
    """Returns the `config.json` to write, with keys that transformers 4.50 and later know.

    Root and `text_config` both say whether the embeddings are tied, because versions before 5 read the one and later
    ones the other.

    Args:
      config: config of the network.
      source: the `config.json` that the model was loaded with, whose other keys are kept; None for a new model.
      dtype: torch's name of the dtype of the stored weights.
    """
    out = copy.deepcopy(source or {})
    text, vision = out.get("text_config") or {}, out.get("vision_config") or {}
    for values in (out, text, vision):
        drop_new_keys(values)
    text |= decoder_to_hf(config.text, dtype)
    vision = {"model_type": f"{config.model_type}_vision"} | vision
    vision |= {field: getattr(config.vision, field) for field in _VISION_DEFAULTS}
    return out | {
        "architectures": [FAMILIES[config.model_type].architecture],
        "model_type": config.model_type,
        "image_token_id": config.image_token_index,
        "scale_factor": config.scale_factor,
        "tie_word_embeddings": config.text.tie_word_embeddings,
        "torch_dtype": dtype,
        "text_config": text,
        "vision_config": vision,
    }
