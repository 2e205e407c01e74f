"""Puts a decoder, an image encoder and a new projector together to an ordinary Hugging Face LLaVA directory."""

import json
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from examples.real_vlm.dinov2 import PIXEL_MEAN, PIXEL_STD, Tower
from examples.real_vlm.smollm2 import Decoder
from icet_jax.files import JsonObject, write_text_atomic

IMAGE_TOKEN = "<image>"
FEATURE_LAYER = -2  # of the image encoder, as in LLaVA-1.5

CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] if part['type'] == 'image' %}{{ '<image>\\n' }}{% endfor %}"
    "{% for part in message['content'] if part['type'] == 'text' %}{{ part['text'] }}{% endfor %}"
    "{% endif %}{{ '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
"""ChatML without a default system prompt; images are lines before a message's text, as in LLaVA-1.5."""


def write_llava(folder: Path, decoder: Decoder, tower: Tower, seed: int) -> JsonObject:
    """Writes the LLaVA directory, and returns its sizes.

    Args:
      folder: an existing folder.
      decoder: the language model; its vocabulary gets one more token, the image placeholder.
      tower: the image encoder.
      seed: seed of the projector's first weights.
    """
    decoder.tokenizer.add_special_tokens([IMAGE_TOKEN])
    image_id = decoder.tokenizer.token_to_id(IMAGE_TOKEN)
    tensors = {f"language_model.{key}": array for key, array in decoder.tensors.items()}
    embeddings = [name for name in ("model.embed_tokens.weight", "lm_head.weight") if name in decoder.tensors]
    for name in embeddings:
        tensors[f"language_model.{name}"] = _with_row(decoder.tensors[name], image_id)
    tensors |= {f"vision_tower.vision_model.{key}": array for key, array in tower.tensors.items()}
    tensors |= _projector(tower.config["hidden_size"], decoder.tensors["model.embed_tokens.weight"], seed)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    _write_tokenizer(folder, decoder)
    _write_processor(folder, tower.config)
    special = {name: decoder.config[name] for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    _write_json(folder / "generation_config.json", special)
    _write_json(folder / "config.json", _config(decoder, tower, image_id))
    return {
        "parameters": sum(array.size for array in tensors.values()),
        "image_tokens": _image_tokens(tower.config),
        "image_size": tower.config["image_size"],
    }


def write_language_model(folder: Path, decoder: Decoder) -> None:
    """Writes the decoder alone as a Hugging Face `LlamaForCausalLM` directory into an existing folder."""
    save_file(decoder.tensors, folder / "model.safetensors", metadata={"format": "pt"})
    decoder.tokenizer.save(str(folder / "tokenizer.json"))
    _write_json(folder / "tokenizer_config.json", _tokenizer_settings(decoder))
    _write_json(folder / "config.json", {**decoder.config, "torch_dtype": "float32"})


def _with_row(embeddings: np.ndarray, image_id: int) -> np.ndarray:
    """Returns an embedding table with rows up to `image_id`; new rows are the mean of the others."""
    missing = image_id + 1 - len(embeddings)
    return np.concatenate([embeddings, np.repeat(embeddings.mean(axis=0, keepdims=True), missing, axis=0)])


def _projector(width: int, embeddings: np.ndarray, seed: int) -> dict[str, np.ndarray]:
    """Returns the weights of LLaVA's projector, drawn at random.

    Its outputs begin about as large as the embeddings of words, which is what the decoder is used to.
    """
    generator = np.random.default_rng(seed)
    text_width, size = embeddings.shape[1], float(np.sqrt(np.mean(np.square(embeddings, dtype=np.float64))))
    scales = {"linear_1": (width, 1.0), "linear_2": (text_width, size)}
    tensors = {}
    for name, (inputs, scale) in scales.items():
        weight = generator.normal(0.0, scale / inputs**0.5, (text_width, inputs))
        tensors[f"multi_modal_projector.{name}.weight"] = weight.astype(np.float32)
        tensors[f"multi_modal_projector.{name}.bias"] = np.zeros(text_width, np.float32)
    return tensors


def _config(decoder: Decoder, tower: Tower, image_id: int) -> JsonObject:
    """Returns the content of config.json (HF `LlavaConfig`)."""
    return {
        "architectures": ["LlavaForConditionalGeneration"],
        "model_type": "llava",
        "image_token_index": image_id,
        "image_seq_length": _image_tokens(tower.config),
        "vision_feature_layer": FEATURE_LAYER,
        "vision_feature_select_strategy": "default",
        "projector_hidden_act": "gelu",
        "multimodal_projector_bias": True,
        "tie_word_embeddings": decoder.config["tie_word_embeddings"],
        "pad_token_id": decoder.config["pad_token_id"],
        "torch_dtype": "float32",
        "text_config": {**decoder.config, "vocab_size": image_id + 1},
        "vision_config": tower.config,
    }


def _image_tokens(vision: JsonObject) -> int:
    """Returns the number of positions of an image in the prompt: its patches."""
    return (vision["image_size"] // vision["patch_size"]) ** 2


def _write_tokenizer(folder: Path, decoder: Decoder) -> None:
    """Writes the tokenizer's files."""
    decoder.tokenizer.save(str(folder / "tokenizer.json"))
    image = {"image_token": IMAGE_TOKEN, "extra_special_tokens": {"image_token": IMAGE_TOKEN}}
    _write_json(folder / "tokenizer_config.json", _tokenizer_settings(decoder) | image)


def _tokenizer_settings(decoder: Decoder) -> JsonObject:
    """Returns the content of tokenizer_config.json, without the image placeholder."""
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **decoder.special,
        "model_max_length": decoder.config["max_position_embeddings"],
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
    }


def _write_processor(folder: Path, vision: JsonObject) -> None:
    """Writes the files of the image processor and of HF's `LlavaProcessor`."""
    size = vision["image_size"]
    images = {
        "image_processor_type": "CLIPImageProcessor",
        "do_resize": True,
        "size": {"shortest_edge": size},
        "resample": 3,
        "do_center_crop": True,
        "crop_size": {"height": size, "width": size},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(PIXEL_MEAN),
        "image_std": list(PIXEL_STD),
        "do_convert_rgb": True,
    }
    _write_json(folder / "preprocessor_config.json", images)
    processor = {
        "processor_class": "LlavaProcessor",
        "image_token": IMAGE_TOKEN,
        "num_additional_image_tokens": 1,  # the class token, which "default" drops again
        "patch_size": vision["patch_size"],
        "vision_feature_select_strategy": "default",
    }
    _write_json(folder / "processor_config.json", processor)
    _write_json(folder / "chat_template.json", {"chat_template": CHAT_TEMPLATE})


def _write_json(path: Path, content: JsonObject) -> None:
    """Writes a JSON file."""
    write_text_atomic(path, json.dumps(content, indent=2) + "\n")
