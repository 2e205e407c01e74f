"""Converts HF's `config.json` of Llama 3.2 Vision to `MllamaConfig` and back."""

import copy
from typing import Any, NoReturn

from icet_jax.checkpoints.decoders import Decoder, decoder_from_hf, decoder_to_hf
from icet_jax.checkpoints.hf_config import Fields, drop_new_keys, require_model_type
from icet_jax.config.names import FAMILIES
from icet_jax.errors import UserError
from icet_jax.files import JsonObject
from icet_jax.models.mllama.network import MllamaConfig
from icet_jax.models.mllama.text import MllamaTextConfig
from icet_jax.models.mllama.vision import MllamaVisionConfig
from icet_jax.nn.layers import ACTIVATIONS

_RATIOS = [[1, 1], [1, 2], [1, 3], [1, 4], [2, 1], [2, 2], [3, 1], [4, 1]]
_VISION_DEFAULTS = {
    "hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_global_layers": 8,
    "attention_heads": 16, "image_size": 448, "patch_size": 14, "num_channels": 3, "max_num_tiles": 4,
    "norm_eps": 1e-5, "hidden_act": "gelu", "intermediate_layers_indices": [3, 7, 15, 23, 30],
    "supported_aspect_ratios": _RATIOS,
}  # fmt: skip
_DECODER = Decoder("mllama_text_model", {
    "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 40,
    "num_attention_heads": 32, "num_key_value_heads": 8, "rms_norm_eps": 1e-5, "rope_theta": 500000.0,
})  # fmt: skip
_CROSS_LAYERS = [3, 8, 13, 18, 23, 28, 33, 38]
_MOST_TILES = 64  # largest number of tiles along one side of an image
_EXTRA_EMBEDDINGS = 8  # HF's embedding always has this many more rows than the vocabulary


def mllama_from_hf(
    values: JsonObject, where: str = "config.json", *, capture: str = "input", exit_rule: str = "E1"
) -> MllamaConfig:
    """Returns the network's config for a Llama 3.2 Vision `config.json` (HF `MllamaConfig`).

    Args:
      values: the parsed file.
      where: name of the file in error messages.
      capture: what index i in `intermediate_layers_indices` means: the "input" of block i, as the model was trained, or
        its "output", as in transformers since 4.56.
      exit_rule: definition of exit l, one of `EXIT_RULES`.

    Raises:
      UserError: the model type differs, or a value would need a different network.
    """
    require_model_type(values, "mllama", where)
    hf_defaults = {"image_token_index": 128256, "tie_word_embeddings": False}
    fields = Fields(values, hf_defaults, where)
    if "image_token_id" in fields.values and "image_token_index" not in values:
        fields.values["image_token_index"] = fields.values["image_token_id"]
    fields.only("tie_word_embeddings", False)
    text_where = f"{where}: text_config"
    text = Fields(values.get("text_config") or {}, {}, text_where).values
    cross = text.get("cross_attention_layers") or _CROSS_LAYERS
    llama = decoder_from_hf(text, text_where, kind=_DECODER)
    if not _is_ascending(cross, llama.num_hidden_layers - 1) or len(cross) == llama.num_hidden_layers:
        raise UserError(f"{text_where}: cross_attention_layers={cross!r} is not supported; needs layers in order")
    return MllamaConfig(
        vision=_vision(values.get("vision_config"), f"{where}: vision_config", shift=int(capture == "output")),
        text=MllamaTextConfig(llama, tuple(cross), _EXTRA_EMBEDDINGS),
        image_token_index=fields.size("image_token_index"),
        exit_rule=exit_rule,
    )


def _vision(values: Any, where: str, shift: int) -> MllamaVisionConfig:
    """Returns the config of the image encoder from the file's `vision_config`.

    `shift` is added to the indices of the captured states: 0 if they are inputs of blocks, 1 if they are outputs.
    """
    fields = Fields(values or {}, _VISION_DEFAULTS, where)
    fields.only("model_type", "mllama_vision_model")
    heads, width, depth = (fields.size(name) for name in ("attention_heads", "hidden_size", "num_hidden_layers"))
    if width % heads:
        raise UserError(f"{where}: hidden_size={width} is not a multiple of attention_heads={heads}")
    indices, ratios = fields.values["intermediate_layers_indices"], fields.values["supported_aspect_ratios"]
    if not _is_ascending(indices, depth - 1):
        raise fields.fail("intermediate_layers_indices", f"different block numbers in order, below {depth}")
    if not _are_pairs(ratios):
        raise fields.fail("supported_aspect_ratios", "pairs of tiles (high, wide)")
    fields.only("vision_output_dim", width * (1 + len(indices)))
    return MllamaVisionConfig(
        hidden_size=width,
        intermediate_size=fields.size("intermediate_size"),
        num_hidden_layers=depth,
        num_global_layers=fields.size("num_global_layers"),
        attention_heads=heads,
        image_size=fields.size("image_size"),
        patch_size=fields.size("patch_size"),
        intermediate_layers_indices=tuple(index + shift for index in indices),
        supported_aspect_ratios=tuple((high, wide) for high, wide in ratios),
        max_num_tiles=fields.size("max_num_tiles"),
        num_channels=fields.size("num_channels"),
        norm_eps=fields.number("norm_eps"),
        hidden_act=fields.choice("hidden_act", ACTIVATIONS),
    )


def _are_pairs(ratios: object) -> bool:
    """Returns whether `ratios` is a non-empty list of (tiles high, tiles wide)."""
    if not isinstance(ratios, list | tuple) or not all(isinstance(ratio, list | tuple) for ratio in ratios):
        return False
    return bool(ratios) and all(
        len(ratio) == 2 and all(type(side) is int and 1 <= side <= _MOST_TILES for side in ratio) for ratio in ratios
    )


def _is_ascending(numbers: Any, last: int) -> bool:
    """Returns whether `numbers` is a non-empty ascending list of different ints between 0 and `last`."""
    if not isinstance(numbers, list | tuple) or not numbers or any(type(number) is not int for number in numbers):
        return False
    return list(numbers) == sorted(set(numbers)) and numbers[0] >= 0 and numbers[-1] <= last


def mllama_at_exit(config: MllamaConfig, exit_layer: int, field: str) -> NoReturn:
    """Raises a `UserError`: HF's files of this family always describe the whole image encoder; see `Family`."""
    raise UserError(
        f"{field}: Llama 3.2 Vision has no files with one exit alone, because its config.json cannot name an exit: the "
        "projector always takes the states of fixed blocks and the output of all global blocks; export the whole model "
        "and choose the exit in icet_jax"
    )


def mllama_to_hf(config: MllamaConfig, source: JsonObject | None, dtype: str) -> JsonObject:
    """Returns the `config.json` to write, with keys that transformers 4.46 and later know.

    Args:
      config: config of the network.
      source: the `config.json` that the model was loaded with, whose `intermediate_layers_indices` and other keys are
        kept; None for a new model.
      dtype: torch's name of the dtype of the stored weights.
    """
    out = copy.deepcopy(source or {})
    text, vision = out.get("text_config") or {}, out.get("vision_config") or {}
    for values in (out, text, vision):
        drop_new_keys(values)
    text |= decoder_to_hf(config.text.llama, dtype, _DECODER.model_type)
    if source is None:
        text["pad_token_id"] = None  # the class default is a token that a smaller vocabulary does not have
    text["cross_attention_layers"] = list(config.text.cross_attention_layers)
    for name in set(_VISION_DEFAULTS) - {"intermediate_layers_indices", "supported_aspect_ratios"}:
        vision[name] = getattr(config.vision, name)
    vision.setdefault("intermediate_layers_indices", list(config.vision.intermediate_layers_indices))
    vision["supported_aspect_ratios"] = [list(ratio) for ratio in config.vision.supported_aspect_ratios]
    vision |= {"model_type": "mllama_vision_model", "vision_output_dim": config.vision.output_dim, "torch_dtype": dtype}
    return out | {
        "architectures": [FAMILIES["mllama"].architecture],
        "model_type": "mllama",
        "image_token_index": config.image_token_index,
        "tie_word_embeddings": False,
        "torch_dtype": dtype,
        "text_config": text,
        "vision_config": vision,
    }
