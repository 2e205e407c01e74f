"""Writes toy vision-language models, one per family, with random weights in the format of published checkpoints."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from icet_jax.media.templates import IMAGE_TOKEN, MLLAMA_IMAGE_TOKEN, QWEN_IMAGE_TOKEN
from icet_jax.miniatures.tokenizers import BYTES, write_json, write_tokenizer
from icet_jax.models.llava.network import Llava, LlavaConfig
from icet_jax.models.llava_next.network import LlavaNext, LlavaNextConfig
from icet_jax.models.mllama.network import Mllama, MllamaConfig
from icet_jax.models.mllama.text import MllamaTextConfig
from icet_jax.models.mllama.vision import MllamaVisionConfig
from icet_jax.models.qwen2_5_vl.network import Qwen25VL, Qwen25VLConfig
from icet_jax.models.qwen2_5_vl.vision import QwenVisionConfig
from icet_jax.models.saving import save_vlm
from icet_jax.models.smolvlm.network import SmolVLM, SmolVLMConfig
from icet_jax.nn.clip import ClipConfig
from icet_jax.nn.llama import LlamaConfig, RopeScaling
from icet_jax.typing import PyTree

IMAGE_SIZE, _PATCH_SIZE = 28, 14

# As in LLaVA: 24 blocks of the image encoder, default exit 23.
_CLIP = ClipConfig(
    hidden_size=16, intermediate_size=32, num_hidden_layers=24, num_attention_heads=2, image_size=IMAGE_SIZE,
    patch_size=_PATCH_SIZE,
)  # fmt: skip
# As in Vicuna: no grouped queries, and a vocabulary with unused rows.
_VICUNA = LlamaConfig(
    vocab_size=320, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=4, head_dim=8, rms_norm_eps=1e-5, rope_theta=10000.0, rope_scaling=None,
)  # fmt: skip
_LLAVA_SPECIAL = ("<unk>", "<s>", "</s>", IMAGE_TOKEN, "<pad>")
_LLAVA15 = LlavaConfig(vision=_CLIP, text=_VICUNA, image_token_index=_LLAVA_SPECIAL.index(IMAGE_TOKEN))
# Canvases of the published numbers of tiles. An image takes at most 24 positions: 4 of the overview, 16 of the tiles, 4
# newlines.
_NEXT = LlavaNextConfig(
    vision=_CLIP,
    text=_VICUNA,
    image_token_index=_LLAVA_SPECIAL.index(IMAGE_TOKEN),
    image_grid_pinpoints=tuple(
        (high * IMAGE_SIZE, wide * IMAGE_SIZE) for high, wide in ((1, 2), (2, 1), (2, 2), (3, 1), (1, 3))
    ),
)

_MLLAMA_SPECIAL = (
    "<|begin_of_text|>", "<|eot_id|>", "<|eom_id|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>",
    "<|finetune_right_pad_id|>", "<|python_tag|>",
)  # fmt: skip
_MLLAMA_VOCABULARY = len(_MLLAMA_SPECIAL) + BYTES
_RATIOS = ((1, 1), (1, 2), (1, 3), (1, 4), (2, 1), (2, 2), (3, 1), (4, 1))
# As in Llama 3.2 Vision: 32 local and 8 global blocks, the same captures, one decoder layer of five attends to the
# image, and the id of the image placeholder is the first after the vocabulary.
_MLLAMA = MllamaConfig(
    vision=MllamaVisionConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=32, num_global_layers=8, attention_heads=2,
        image_size=IMAGE_SIZE, patch_size=_PATCH_SIZE, intermediate_layers_indices=(3, 7, 15, 23, 30),
        supported_aspect_ratios=_RATIOS, max_num_tiles=4,
    ),
    text=MllamaTextConfig(
        LlamaConfig(
            vocab_size=_MLLAMA_VOCABULARY, hidden_size=32, intermediate_size=64, num_hidden_layers=5,
            num_attention_heads=4, num_key_value_heads=2, head_dim=8, rms_norm_eps=1e-5, rope_theta=500000.0,
            rope_scaling=RopeScaling(8.0, 1.0, 4.0, 64),
        ),
        cross_attention_layers=(3,),
    ),
    image_token_index=_MLLAMA_VOCABULARY,
)  # fmt: skip

_SMOLVLM_SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
_SMOLVLM_LAST = (
    "<global-img>", *(f"<row_{row}_col_{column}>" for row in range(1, 5) for column in range(1, 5)),
    "<fake_token_around_image>", IMAGE_TOKEN, "<end_of_utterance>",
)  # fmt: skip
_SMOLVLM_VOCABULARY = len(_SMOLVLM_SPECIAL) + BYTES + len(_SMOLVLM_LAST)
# As in SmolVLM 256M and 500M: 12 blocks of the image encoder, at most 4 x 4 tiles and the whole image. A tile takes 4
# positions.
_SMOLVLM = SmolVLMConfig(
    vision=ClipConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=12, num_attention_heads=2, image_size=IMAGE_SIZE,
        patch_size=IMAGE_SIZE // 4, layer_norm_eps=1e-6, hidden_act="gelu_pytorch_tanh",
    ),
    text=LlamaConfig(
        vocab_size=_SMOLVLM_VOCABULARY, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=8, rms_norm_eps=1e-5, rope_theta=100000.0,
    ),
    image_token_index=_SMOLVLM_VOCABULARY - 2,
)  # fmt: skip

_QWEN_SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>")
_QWEN_LAST = (QWEN_IMAGE_TOKEN, "<|video_pad|>")
_QWEN_VOCABULARY = len(_QWEN_SPECIAL) + BYTES + len(_QWEN_LAST)
# As in Qwen2.5-VL: 32 blocks of the image encoder, of which the same four attend to the whole image, and windows of 4 x
# 4 positions. An image takes up to 16 positions.
_QWEN = Qwen25VLConfig(
    vision=QwenVisionConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=32, num_attention_heads=2, patch_size=_PATCH_SIZE,
        temporal_patch_size=2, spatial_merge_size=2, window_size=112, fullatt_block_indexes=(7, 15, 23, 31),
    ),
    text=LlamaConfig(
        vocab_size=_QWEN_VOCABULARY, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, rms_norm_eps=1e-6, rope_theta=1000000.0, mrope_section=(2, 1, 1),
        biased=("q_proj", "k_proj", "v_proj"),
    ),
    image_token_index=_QWEN_VOCABULARY - 2,
)  # fmt: skip

_CLIP_PIXELS = {
    "do_resize": True,
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "do_convert_rgb": True,
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
}
_CROP = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}

# Chat templates: the published ones, simplified.
_VICUNA_TEMPLATE = (
    "{% for m in messages %}{{ m['role'].upper() + ': ' }}"
    "{% for part in m['content'] if part['type'] == 'image' %}{{ '<image>\n' }}{% endfor %}"
    "{% for part in m['content'] if part['type'] == 'text' %}{{ part['text'] + ' ' }}{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
_LLAMA3_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' }}"
    "{% for part in m['content'] %}{{ '<|image|>' if part['type'] == 'image' else part['text'] }}{% endfor %}"
    "{{ '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)

_SMOLVLM_TEMPLATE = (
    "<|im_start|>{% for m in messages %}{{ m['role'] | capitalize }}"
    "{{ ':' if m['content'][0]['type'] == 'image' else ': ' }}"
    "{% for part in m['content'] %}{{ '<image>' if part['type'] == 'image' else part['text'] }}{% endfor %}"
    "<end_of_utterance>\n{% endfor %}{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)
_QWEN_TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{% for part in m['content'] %}{{ '<|vision_start|><|image_pad|><|vision_end|>' if part['type'] == 'image' "
    "else part['text'] }}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def llava15(folder: Path) -> None:
    """Writes a miniature of llava-hf/llava-1.5-7b-hf."""
    save_vlm(folder, _LLAVA15, _random(Llava(_LLAVA15, rngs=nnx.Rngs(0))))
    _write_llava_tokenizer(folder)
    pixels = {"image_processor_type": "CLIPImageProcessor", "resample": 3, "do_center_crop": True}
    size = {"size": {"shortest_edge": IMAGE_SIZE}, "crop_size": _CROP}
    write_json(folder / "preprocessor_config.json", pixels | size | _CLIP_PIXELS)


def llava_next(folder: Path) -> None:
    """Writes a miniature of llava-hf/llava-v1.6-vicuna-7b-hf."""
    save_vlm(folder, _NEXT, _random(LlavaNext(_NEXT, rngs=nnx.Rngs(2))))
    _write_llava_tokenizer(folder)
    pixels = {"image_processor_type": "LlavaNextImageProcessor", "resample": 3, "do_center_crop": True, "do_pad": True}
    size = {"size": {"shortest_edge": IMAGE_SIZE}, "crop_size": _CROP}
    canvases = {"image_grid_pinpoints": [list(canvas) for canvas in _NEXT.image_grid_pinpoints]}
    write_json(folder / "preprocessor_config.json", pixels | size | canvases | _CLIP_PIXELS)
    processor = {
        "processor_class": "LlavaNextProcessor",
        "image_token": IMAGE_TOKEN,
        "patch_size": _PATCH_SIZE,
        "num_additional_image_tokens": 1,
        "vision_feature_select_strategy": _NEXT.vision_feature_select_strategy,
    }
    write_json(folder / "processor_config.json", processor)
    write_json(folder / "chat_template.json", {"chat_template": _VICUNA_TEMPLATE})


def mllama(folder: Path) -> None:
    """Writes a miniature of meta-llama/Llama-3.2-11B-Vision-Instruct."""
    save_vlm(folder, _MLLAMA, _random(Mllama(_MLLAMA, rngs=nnx.Rngs(3))))
    bos, eos, pad = "<|begin_of_text|>", "<|eot_id|>", "<|finetune_right_pad_id|>"
    roles = {"bos_token": bos, "eos_token": eos, "pad_token": pad}
    template = {"chat_template": _LLAMA3_TEMPLATE}
    vocabulary = write_tokenizer(
        folder, _MLLAMA_SPECIAL, last=(MLLAMA_IMAGE_TOKEN,), single=f"{bos} $A", settings=roles | template
    )
    ends = [vocabulary[name] for name in ("<|end_of_text|>", "<|eom_id|>", eos)]
    generation = {"bos_token_id": vocabulary[bos], "eos_token_id": ends, "pad_token_id": vocabulary[pad]}
    write_json(folder / "generation_config.json", generation)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config["text_config"] |= generation  # otherwise transformers uses the token ids of the published vocabulary
    write_json(folder / "config.json", config)
    pixels = {
        "image_processor_type": "MllamaImageProcessor",
        "resample": 2,
        "do_pad": True,
        "size": _CROP,
        "max_image_tiles": _MLLAMA.vision.max_num_tiles,
    }
    write_json(folder / "preprocessor_config.json", pixels | _CLIP_PIXELS)
    write_json(folder / "chat_template.json", template)


def smolvlm(folder: Path) -> None:
    """Writes a miniature of HuggingFaceTB/SmolVLM2-500M-Video-Instruct."""
    save_vlm(folder, _SMOLVLM, _random(SmolVLM(_SMOLVLM, rngs=nnx.Rngs(4))))
    roles = {"bos_token": "<|im_start|>", "eos_token": "<end_of_utterance>", "pad_token": "<|im_end|>"}
    template = {"chat_template": _SMOLVLM_TEMPLATE}
    vocabulary = write_tokenizer(folder, _SMOLVLM_SPECIAL, last=_SMOLVLM_LAST, settings=roles | template)
    write_json(folder / "generation_config.json", {f"{role}_id": vocabulary[name] for role, name in roles.items()})
    pixels = {
        "image_processor_type": "SmolVLMImageProcessor",
        "resample": 1,
        "do_image_splitting": True,
        "do_pad": True,
        "size": {"longest_edge": 4 * IMAGE_SIZE},
        "max_image_size": {"longest_edge": IMAGE_SIZE},
    }
    halves = {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]}
    write_json(folder / "preprocessor_config.json", pixels | _CLIP_PIXELS | halves)
    processor = {"processor_class": "SmolVLMProcessor", "image_seq_len": _SMOLVLM.image_tokens}
    write_json(folder / "processor_config.json", processor)
    write_json(folder / "chat_template.json", template)


def qwen2_5_vl(folder: Path) -> None:
    """Writes a miniature of Qwen/Qwen2.5-VL-7B-Instruct."""
    save_vlm(folder, _QWEN, _random(Qwen25VL(_QWEN, rngs=nnx.Rngs(5))))
    roles = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
    template = {"chat_template": _QWEN_TEMPLATE}
    vocabulary = write_tokenizer(folder, _QWEN_SPECIAL, last=_QWEN_LAST, settings=roles | template)
    write_json(folder / "generation_config.json", {f"{role}_id": vocabulary[name] for role, name in roles.items()})
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    names = {"video_token_id": "<|video_pad|>", "vision_start_token_id": "<|vision_start|>"}
    names |= {"vision_end_token_id": "<|vision_end|>", "bos_token_id": "<|endoftext|>", "eos_token_id": "<|im_end|>"}
    write_json(folder / "config.json", config | {field: vocabulary[name] for field, name in names.items()})
    side = 2 * _PATCH_SIZE
    pixels = {
        "image_processor_type": "Qwen2VLImageProcessor",
        "min_pixels": 4 * side**2,
        "max_pixels": 16 * side**2,
        "patch_size": _PATCH_SIZE,
        "temporal_patch_size": 2,
        "merge_size": 2,
    }
    write_json(folder / "preprocessor_config.json", pixels | _CLIP_PIXELS)
    write_json(folder / "chat_template.json", template)


WRITERS: dict[str, Callable[[Path], None]] = {
    "llava15": llava15, "llava_next": llava_next, "mllama": mllama, "smolvlm": smolvlm, "qwen2_5_vl": qwen2_5_vl,
}  # fmt: skip
"""{NAME in `toy:NAME`: function that writes the checkpoint to a directory}."""


def _write_llava_tokenizer(folder: Path) -> None:
    """Writes the tokenizer and generation config of both LLaVA families."""
    roles = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    write_tokenizer(folder, _LLAVA_SPECIAL, single="<s> $A", pair="<s> $A $B", settings=roles)
    ids = {f"{role}_id": _LLAVA_SPECIAL.index(name) for role, name in roles.items()}
    write_json(folder / "generation_config.json", ids)


def _random(network: nnx.Module) -> PyTree:
    """Returns the random weights of a network with half-open gates and a decoder whose weights are doubled.

    These changes make images and tokens affect the output. The weights of the image encoder are not doubled, because
    larger weights in its many blocks would amplify rounding errors.
    """

    def adjust(path: tuple[Any, ...], leaf: jax.Array) -> jax.Array:
        names = [str(getattr(key, "key", getattr(key, "name", key))) for key in path]
        if any(name in ("gate", "gate_attn", "gate_ffn") or name.endswith("_gate") for name in names):
            return jnp.full_like(leaf, 0.5)
        return leaf * 2 if leaf.ndim > 1 and "vision_tower" not in names else leaf

    return jax.tree_util.tree_map_with_path(adjust, nnx.split(network)[1])
