"""Contents of the published `config.json` of the models in `configs/`, so that `--mode=plan` needs no network.

Only plans use them; a run reads the checkpoint's own config.json. Values that do not determine shapes are left
out where they are transformers' class defaults.
"""

from pathlib import Path

from icet_jax.checkpoints.hf_config import read_hf_config
from icet_jax.errors import UserError
from icet_jax.files import JsonObject

_CLIP = {
    "model_type": "clip_vision_model", "hidden_size": 1024, "image_size": 336, "intermediate_size": 4096,
    "num_attention_heads": 16, "num_hidden_layers": 24, "patch_size": 14,
}  # fmt: skip
_VICUNA_7B = {"model_type": "llama", "max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "vocab_size": 32064}
_VICUNA_13B = _VICUNA_7B | {
    "hidden_size": 5120, "intermediate_size": 13824, "num_attention_heads": 40, "num_key_value_heads": 40,
    "num_hidden_layers": 40,
}  # fmt: skip
_MISTRAL_7B = {
    "model_type": "mistral", "intermediate_size": 14336, "num_key_value_heads": 8, "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-5, "rope_theta": 1e6, "sliding_window": None, "vocab_size": 32064,
}  # fmt: skip
_LLAMA3_ROPE = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}  # fmt: skip


def _llava(model_type: str, text: JsonObject, pad: int) -> JsonObject:
    """Returns the config of a LLaVA-1.5 or LLaVA-NeXT with decoder config `text` and padding token `pad`."""
    return {
        "model_type": model_type, "image_token_index": 32000, "pad_token_id": pad, "text_config": text,
        "vision_config": _CLIP,
    }  # fmt: skip


_SIGLIP_BASE = {
    "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12,
    "image_size": 512, "patch_size": 16,
}  # fmt: skip
_SIGLIP_SO400M = {
    "hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 27, "num_attention_heads": 16,
    "image_size": 384, "patch_size": 14,
}  # fmt: skip
_SMOLLM2_135M = {
    "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9,
    "num_key_value_heads": 3, "rope_theta": 1e5, "vocab_size": 49280,
}  # fmt: skip
_SMOLLM2_360M = {
    "hidden_size": 960, "intermediate_size": 2560, "num_hidden_layers": 32, "num_attention_heads": 15,
    "num_key_value_heads": 5, "rope_theta": 1e5, "vocab_size": 49280,
}  # fmt: skip
_SMOLLM2_1B7 = {
    "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 24, "num_attention_heads": 32,
    "rope_theta": 273768.0, "vocab_size": 49155,
}  # fmt: skip


def _smolvlm(
    text: JsonObject, vision: JsonObject, scale_factor: int, image_token: int, model_type: str = "idefics3"
) -> JsonObject:
    """Returns the config of a SmolVLM with these sub-configs, whose embeddings are not tied."""
    return {
        "model_type": model_type, "image_token_id": image_token, "scale_factor": scale_factor,
        "tie_word_embeddings": False, "vision_config": vision,
        "text_config": {"model_type": "llama", "rms_norm_eps": 1e-5, "pad_token_id": 2} | text,
    }  # fmt: skip


_QWEN25_VISION = {
    "depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16, "patch_size": 14,
    "spatial_merge_size": 2, "temporal_patch_size": 2, "window_size": 112, "fullatt_block_indexes": [7, 15, 23, 31],
}  # fmt: skip
_QWEN25_7B = {
    "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28, "num_attention_heads": 28,
    "num_key_value_heads": 4, "vocab_size": 152064,
}  # fmt: skip


def _qwen25vl(text: JsonObject, vision: JsonObject | None = None) -> JsonObject:
    """Returns the config of a Qwen2.5-VL with these decoder fields, and `vision` where it differs from 3B and 7B."""
    return {
        "model_type": "qwen2_5_vl", "image_token_id": 151655, "max_position_embeddings": 128000, "rms_norm_eps": 1e-6,
        "rope_theta": 1e6, "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]}, "pad_token_id": 151643,
        "eos_token_id": 151645, "use_sliding_window": False, "tie_word_embeddings": False,
        "vision_config": _QWEN25_VISION | {"out_hidden_size": text["hidden_size"]} | (vision or {}), **text,
    }  # fmt: skip


PUBLISHED: dict[str, JsonObject] = {
    "llava-hf/llava-1.5-7b-hf": _llava("llava", _VICUNA_7B, 32001),
    "llava-hf/llava-1.5-13b-hf": _llava("llava", _VICUNA_13B, 32001),
    "llava-hf/llava-v1.6-vicuna-7b-hf": _llava("llava_next", _VICUNA_7B, 0),
    "llava-hf/llava-v1.6-vicuna-13b-hf": _llava("llava_next", _VICUNA_13B, 0),
    "llava-hf/llava-v1.6-mistral-7b-hf": _llava("llava_next", _MISTRAL_7B, 32001),
    "meta-llama/Llama-3.2-11B-Vision-Instruct": {
        "model_type": "mllama",
        "image_token_index": 128256,
        "text_config": {
            "model_type": "mllama_text_model", "pad_token_id": 128004, "eos_token_id": [128001, 128008, 128009],
            "rope_theta": 5e5, "rope_scaling": _LLAMA3_ROPE,
        },
        "vision_config": {"model_type": "mllama_vision_model", "image_size": 560},
    },
    "HuggingFaceTB/SmolVLM-256M-Instruct": _smolvlm(_SMOLLM2_135M, _SIGLIP_BASE, 4, 49190),
    "HuggingFaceTB/SmolVLM-500M-Instruct": _smolvlm(_SMOLLM2_360M, _SIGLIP_BASE, 4, 49190),
    "HuggingFaceTB/SmolVLM-Instruct": _smolvlm(_SMOLLM2_1B7, _SIGLIP_SO400M, 3, 49153),
    "HuggingFaceTB/SmolVLM2-500M-Video-Instruct": _smolvlm(_SMOLLM2_360M, _SIGLIP_BASE, 4, 49190, "smolvlm"),
    "Qwen/Qwen2.5-VL-3B-Instruct": _qwen25vl({
        "hidden_size": 2048, "intermediate_size": 11008, "num_hidden_layers": 36, "num_attention_heads": 16,
        "num_key_value_heads": 2, "vocab_size": 151936, "tie_word_embeddings": True,
    }),
    "Qwen/Qwen2.5-VL-7B-Instruct": _qwen25vl(_QWEN25_7B),
    "Qwen/Qwen2.5-VL-32B-Instruct": _qwen25vl(
        _QWEN25_7B | {
            "hidden_size": 5120, "intermediate_size": 27648, "num_hidden_layers": 64, "num_attention_heads": 40,
            "num_key_value_heads": 8,
        },
        {"intermediate_size": 3456},
    ),
}  # fmt: skip
"""{hub id: parsed `config.json`} of the vision-language models in `configs/`."""

_LLAMA_7B = {"model_type": "llama", "rms_norm_eps": 1e-5, "vocab_size": 32000}
_ONE_LABEL = {"0": "LABEL_0"}

SCORERS: dict[str, JsonObject] = {
    "meta-llama/LlamaGuard-7b": _LLAMA_7B | {"architectures": ["LlamaForCausalLM"]},
    "meta-llama/Llama-Guard-3-8B": _LLAMA_7B | {
        "architectures": ["LlamaForCausalLM"], "intermediate_size": 14336, "num_key_value_heads": 8,
        "max_position_embeddings": 131072, "rope_theta": 5e5, "rope_scaling": _LLAMA3_ROPE, "vocab_size": 128256,
    },
    "cais/HarmBench-Llama-2-13b-cls": _LLAMA_7B | _VICUNA_13B | {
        "architectures": ["LlamaForCausalLM"], "vocab_size": 32000,
    },
    "unitary/toxic-bert": {
        "architectures": ["BertForSequenceClassification"], "model_type": "bert",
        "id2label": {str(label): f"LABEL_{label}" for label in range(6)},
    },
    "unitary/unbiased-toxic-roberta": {
        "architectures": ["RobertaForSequenceClassification"], "model_type": "roberta", "layer_norm_eps": 1e-5,
        "max_position_embeddings": 514, "type_vocab_size": 1,
        "id2label": {str(label): f"LABEL_{label}" for label in range(16)},
    },
    "Ray2333/gpt2-large-harmless-reward_model": {
        "architectures": ["GPT2ForSequenceClassification"], "model_type": "gpt2", "n_embd": 1280, "n_head": 20,
        "n_layer": 36, "id2label": _ONE_LABEL,
    },
    "OpenAssistant/reward-model-deberta-v3-large-v2": {
        "architectures": ["DebertaV2ForSequenceClassification"], "model_type": "deberta-v2", "hidden_size": 1024,
        "intermediate_size": 4096, "num_attention_heads": 16, "num_hidden_layers": 24, "vocab_size": 128100,
        "relative_attention": True, "position_biased_input": False, "share_att_key": True, "norm_rel_ebd": "layer_norm",
        "position_buckets": 256, "max_relative_positions": -1, "pos_att_type": "p2c|c2p", "id2label": _ONE_LABEL,
    },
}  # fmt: skip
"""{hub id: parsed `config.json`} of the scorers in `configs/`."""


def scorer_values(path_or_id: str) -> JsonObject | None:
    """Returns the parsed `config.json` of a scorer, from its directory or from `SCORERS`; None if it is in neither.

    Raises:
      UserError: the directory has no readable config.json.
    """
    return read_hf_config(path_or_id) if Path(path_or_id).is_dir() else SCORERS.get(path_or_id)


def config_values(path_or_id: str) -> JsonObject:
    """Returns the parsed `config.json` of a model, from its directory or from `PUBLISHED`.

    Raises:
      UserError: there is neither such a directory nor such an entry, or the directory has no readable config.json.
    """
    if Path(path_or_id).is_dir():
        return read_hf_config(path_or_id)
    if path_or_id not in PUBLISHED:
        raise UserError(
            f"{path_or_id}: no such directory, and its sizes are not known without the network; give --checkpoint=DIR, "
            f"a folder with its config.json, or one of {', '.join(PUBLISHED)}"
        )
    return PUBLISHED[path_or_id]
