"""Writes the files from which transformers builds a family's processor for the world's pictures and prompts."""

from pathlib import Path

from icet_jax.files import JsonObject
from icet_jax.organism import families, scenes, tokenizer


def write_processor(folder: str | Path, family: str) -> None:
    """Writes the processor files of a family: those of the tokenizer, preprocessor_config.json, processor_config.json
    and chat_template.json."""
    folder = Path(folder)
    image = tokenizer.MLLAMA_IMAGE if family == "mllama" else tokenizer.IMAGE
    tokenizer.write_tokenizer(folder, image, tokenizer.SMOLVLM if family == "smolvlm" else ())
    image_settings, processor = _SETTINGS[family]()
    tokenizer.write_json(folder / "preprocessor_config.json", image_settings)
    tokenizer.write_json(folder / "processor_config.json", processor)
    tokenizer.write_json(folder / "chat_template.json", {"chat_template": tokenizer.chat_template(image)})


_PIXELS: JsonObject = {
    "do_convert_rgb": True,
    "do_resize": True,
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
}
"""The settings of preprocessor_config.json that all families share."""

# Each function returns the contents of preprocessor_config.json and processor_config.json.


def _llava(size: int = scenes.IMAGE_SIZE) -> tuple[JsonObject, JsonObject]:
    settings = {
        "image_processor_type": "CLIPImageProcessor",
        "processor_class": "LlavaProcessor",
        **_PIXELS,
        "size": {"shortest_edge": size},
        "resample": 3,
        "do_center_crop": True,
        "crop_size": {"height": size, "width": size},
    }
    processor = {
        "processor_class": "LlavaProcessor",
        "image_token": tokenizer.IMAGE,
        "patch_size": tokenizer.PATCH_SIZE,
        "vision_feature_select_strategy": "default",
        "num_additional_image_tokens": 1,
    }
    return settings, processor


def _llava_next() -> tuple[JsonObject, JsonObject]:
    settings, processor = _llava(families.TILE)
    names = {"image_processor_type": "LlavaNextImageProcessor", "processor_class": "LlavaNextProcessor"}
    tiling = {"do_pad": True, "image_grid_pinpoints": [list(size) for size in families.PINPOINTS]}
    return settings | names | tiling, processor | {"processor_class": "LlavaNextProcessor"}


def _mllama() -> tuple[JsonObject, JsonObject]:
    settings = {
        "image_processor_type": "MllamaImageProcessor",
        "processor_class": "MllamaProcessor",
        **_PIXELS,
        "size": {"height": families.TILE, "width": families.TILE},
        "resample": 2,
        "do_pad": True,
        "max_image_tiles": families.mllama_config().vision.max_num_tiles,
    }
    return settings, {"processor_class": "MllamaProcessor"}


def _smolvlm() -> tuple[JsonObject, JsonObject]:
    size = {"longest_edge": scenes.IMAGE_SIZE}
    settings = {
        "image_processor_type": "SmolVLMImageProcessor",
        "processor_class": "SmolVLMProcessor",
        **_PIXELS,
        "size": size,
        "resample": 1,
        "do_image_splitting": False,
        "max_image_size": size,
        "do_pad": True,
    }
    return settings, {"processor_class": "SmolVLMProcessor", "image_seq_len": families.smolvlm_config().image_tokens}


_SETTINGS = {"llava": _llava, "llava_next": _llava_next, "mllama": _mllama, "smolvlm": _smolvlm}
