"""Converts HF's `config.json` of LLaVA-NeXT to `LlavaNextConfig` and back."""

from icet_jax.checkpoints.hf_config import Fields, require_model_type
from icet_jax.config.names import FAMILIES
from icet_jax.files import JsonObject
from icet_jax.models.llava.config import llava_to_hf, llava_values
from icet_jax.models.llava_next.network import LlavaNextConfig

_PINPOINTS = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]


def llava_next_from_hf(values: JsonObject, where: str = "config.json") -> LlavaNextConfig:
    """Returns the network's config for a LLaVA-NeXT (v1.6) `config.json`; see `llava_from_hf`."""
    require_model_type(values, "llava_next", where)
    common = llava_values(values, where)
    fields, tile = Fields(values, {"image_grid_pinpoints": _PINPOINTS}, where), common["vision"].image_size
    canvases = fields.values["image_grid_pinpoints"]
    if not _are_canvases(canvases, tile):
        raise fields.fail("image_grid_pinpoints", f"pairs (height, width), multiples of image_size={tile}")
    fields.only("vision_feature_select_strategy", "default")  # transformers itself fails on "full"
    return LlavaNextConfig(**common, image_grid_pinpoints=tuple((height, width) for height, width in canvases))


def _are_canvases(values: object, tile: int) -> bool:
    """Returns whether `values` is a non-empty list of (height, width), each a multiple of the size of a tile."""
    if not isinstance(values, list | tuple) or not all(isinstance(pair, list | tuple) for pair in values):
        return False
    return len(values) > 0 and all(
        len(pair) == 2 and all(type(edge) is int and edge > 0 and edge % tile == 0 for edge in pair) for pair in values
    )


def llava_next_to_hf(config: LlavaNextConfig, source: JsonObject | None, dtype: str) -> JsonObject:
    """Returns the `config.json` to write; see `llava_to_hf`."""
    return llava_to_hf(config, {"use_image_newline_parameter": True} | (source or {}), dtype) | {
        "architectures": [FAMILIES["llava_next"].architecture],
        "model_type": "llava_next",
        "image_grid_pinpoints": [list(canvas) for canvas in config.image_grid_pinpoints],
    }
