"""Tiny HF checkpoints of Qwen2.5-VL, beside `tests.tiny` and `tests.tiny_families`.

    directory = tiny_qwen.save(tmp_path / "qwen")                  # as on the hub, with processor files
    model = tiny_qwen.model(tied=True, num_hidden_layers=2)
    inputs = tiny_qwen.batch(model.config, [[(30, 50)], [], [(20, 200), (57, 57)]])

Images are given by their sizes (height, width) and filled with noise. Nothing here imports icet_jax.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np

from tests import tiny
from tests.tiny_families import Sizes, pictures

SIDE = 8  # pixels along each side of an image position: 2 x 2 patches of 4 x 4 pixels
LIMITS = {"min_pixels": 4 * SIDE**2, "max_pixels": 24 * SIDE**2}  # an image takes about 4 to 24 positions

# Token ids of a byte-level tokenizer as Qwen's: specials, 256 bytes, then those of images and videos.
PAD, START, EOS = 0, 1, 2
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>")
LAST = ("<|image_pad|>", "<|video_pad|>")
IMAGE, VIDEO = (len(SPECIAL) + 256 + index for index in range(2))
VOCAB = 269  # prime, and more rows than the tokenizer uses

CHAT_TEMPLATE = (
    "{% for message in messages %}{% if loop.first and message['role'] != 'system' %}<|im_start|>system\n"
    "You are a helpful assistant.<|im_end|>\n{% endif %}<|im_start|>{{ message['role'] }}\n"
    "{% for content in message['content'] %}{% if content['type'] == 'image' %}"
    "<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ content['text'] }}{% endif %}{% endfor %}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
VISION = {
    "depth": 4, "hidden_size": 24, "intermediate_size": 37, "num_heads": 3, "patch_size": 4, "spatial_merge_size": 2,
    "temporal_patch_size": 2, "window_size": 16, "fullatt_block_indexes": [1, 3], "out_hidden_size": 32,
}  # fmt: skip
TEXT = {
    "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 53, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "rms_norm_eps": 1e-6, "max_position_embeddings": 1024,
}  # fmt: skip
SECTIONS = [2, 1, 1]
TOKENS = {"bos_token_id": PAD, "eos_token_id": EOS, "pad_token_id": PAD}
VISION_TOKENS = {"image_token_id": IMAGE, "video_token_id": VIDEO, "vision_start_token_id": 3, "vision_end_token_id": 4}


def config(
    vision: dict[str, Any] | None = None, tied: bool = False, sections: list[int] | None = None, **text: Any
) -> Any:
    """A `transformers.Qwen2_5_VLConfig` of toy size; an image position is 8 x 8 pixels, a window 2 x 2 positions.

    Args:
      vision: overrides `VISION`.
      tied: whether head and embeddings are one.
      sections: the rotary sections, which sum up to half the size of a head.
      text: overrides `TEXT`.
    """
    from transformers import Qwen2_5_VLConfig

    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": sections or SECTIONS}
    decoder = {"rope_parameters": rope, "tie_word_embeddings": tied, **TOKENS, **TEXT, **text}
    return Qwen2_5_VLConfig(
        vision_config={**VISION, "out_hidden_size": decoder["hidden_size"], **(vision or {})}, text_config=decoder,
        tie_word_embeddings=tied, **VISION_TOKENS,
    )  # fmt: skip


def model(seed: int = 0, scale: float = 1.0, **options: Any) -> Any:
    """A float32 model on the CPU in eval mode with every parameter random; `options` as for `config`."""
    import torch
    from transformers import Qwen2_5_VLForConditionalGeneration

    torch.manual_seed(seed)
    return tiny.randomise(Qwen2_5_VLForConditionalGeneration(config(**options)).float(), seed, scale)


def hub_config(config: Any, dtype: str = "float32") -> dict[str, Any]:
    """The hub's config.json of a config: the decoder's fields at the root, and old keys."""
    text, vision = config.text_config, config.vision_config
    rope = text.rope_parameters
    return {
        "architectures": ["Qwen2_5_VLForConditionalGeneration"],
        "model_type": "qwen2_5_vl",
        **{name: getattr(text, name) for name in (*TEXT, *TOKENS)},
        **VISION_TOKENS,
        "hidden_act": "silu",
        "attention_dropout": 0.0,
        "max_window_layers": text.num_hidden_layers,
        "sliding_window": 1024,
        "use_sliding_window": False,
        "rope_theta": rope["rope_theta"],
        "rope_scaling": {"type": "mrope", "mrope_section": rope["mrope_section"]},
        "tie_word_embeddings": config.tie_word_embeddings,
        "torch_dtype": dtype,
        "use_cache": True,
        "vision_config": {
            **{name: getattr(vision, name) for name in VISION},
            "fullatt_block_indexes": list(vision.fullatt_block_indexes),
            "in_chans": 3,
            "hidden_act": "silu",
            "model_type": "qwen2_5_vl",
            "tokens_per_second": 2,
        },
    }


def old_keys(state: dict[str, Any]) -> dict[str, Any]:
    """Renames a `state_dict` of transformers 5 to the hub's names."""
    renames = (("model.visual.", "visual."), ("model.language_model.", "model."))
    return {
        next((old + key.removeprefix(new) for new, old in renames if key.startswith(new)), key): tensor
        for key, tensor in state.items()
    }


def base_keys(state: dict[str, Any]) -> dict[str, Any]:
    """Renames a `state_dict` of transformers 5 to the names of a `Qwen2_5_VLModel` alone; the head keeps its name."""
    return {key.removeprefix("model."): tensor for key, tensor in state.items()}


LAYOUTS = {"hub": old_keys, "native": lambda state: state, "base": base_keys}


def save(
    directory: str | Path, network: Any = None, *, dtype: str = "float32", shards: int = 1, processor: bool = True,
    layout: str = "hub",
) -> Path:  # fmt: skip
    """Writes a checkpoint directory as the hub has it and returns its path; see `tiny.save_llava`."""
    import torch

    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    network = model() if network is None else network
    state = {key: tensor.to(getattr(torch, dtype)).contiguous() for key, tensor in network.state_dict().items()}
    if network.config.tie_word_embeddings:
        del state["lm_head.weight"]
    tiny.save_state(directory, LAYOUTS[layout](state), shards)
    (directory / "config.json").write_text(json.dumps(hub_config(network.config, dtype), indent=2))
    (directory / "generation_config.json").write_text(json.dumps(TOKENS, indent=2))
    if processor:
        save_processor(directory, network.config)
    return directory


def tokenizer() -> Any:
    """A byte-level tokenizer with Qwen's specials, which adds no token of its own; pads left."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {name: i for i, name in enumerate((*SPECIAL, *letters))}
    inner = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    inner.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in (*SPECIAL, *LAST)])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=inner, eos_token="<|im_end|>", pad_token="<|endoftext|>", padding_side="left",
        model_max_length=1024, chat_template=CHAT_TEMPLATE,
    )  # fmt: skip
    assert fast.convert_tokens_to_ids(list(LAST)) == [IMAGE, VIDEO]
    return fast


def processor(config: Any, **images: Any) -> Any:
    """`Qwen2_5_VLProcessor` over the byte-level tokenizer and the torch-free image processor.

    It has no video processor, which would need torchvision. `images` are settings of the image processor.
    """
    from transformers.models.qwen2_5_vl.processing_qwen2_5_vl import Qwen2_5_VLProcessor
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    class ImageProcessor(Qwen2_5_VLProcessor):
        def __init__(self, image_processor=None, tokenizer=None, chat_template=None):
            self.image_token, self.video_token = LAST
            self.image_token_id, self.video_token_id = IMAGE, VIDEO
            super(Qwen2_5_VLProcessor, self).__init__(image_processor, tokenizer, chat_template=chat_template)

    vision = config.vision_config
    sizes = {"patch_size": vision.patch_size, "temporal_patch_size": vision.temporal_patch_size}
    settings = {**sizes, "merge_size": vision.spatial_merge_size, **LIMITS, **images}
    return ImageProcessor(Qwen2VLImageProcessorPil(**settings), tokenizer(), chat_template=CHAT_TEMPLATE)


def save_processor(directory: str | Path, config: Any, **images: Any) -> None:
    """Writes tokenizer, image-processor and processor files in the hub's (pre-5) form; arguments as for `processor`."""
    directory, hf = Path(directory), processor(config)
    directory.mkdir(parents=True, exist_ok=True)
    hf.tokenizer.save_pretrained(directory)
    path = directory / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"tokenizer_class": "PreTrainedTokenizerFast"}))
    vision = config.vision_config
    settings = {
        "patch_size": vision.patch_size, "temporal_patch_size": vision.temporal_patch_size,
        "merge_size": vision.spatial_merge_size, "image_mean": hf.image_processor.image_mean,
        "image_std": hf.image_processor.image_std, "image_processor_type": "Qwen2VLImageProcessor",
        "processor_class": "Qwen2_5_VLProcessor", **LIMITS, **images,
    }  # fmt: skip
    (directory / "preprocessor_config.json").write_text(json.dumps(settings))
    (directory / "chat_template.json").write_text(json.dumps({"chat_template": CHAT_TEMPLATE}))


def batch(config: Any, sizes: Sizes, *, seed: int = 0, **images: Any) -> dict[str, np.ndarray]:
    """What the processor makes of random rows with images of these sizes, padded on the left.

    Every row is longer than the one before. Of an odd row, the image is the first token.

    Returns:
      input_ids, attention_mask and mm_token_type_ids int64 [B, T]; pixel_values float32 [patches, 96] and
      image_grid_thw int64 [I, 3] unless no row has an image.
    """
    hf, noise, texts = processor(config, **images), np.random.default_rng(seed), []
    for number, row in enumerate(sizes):
        letters = "".join(map(chr, noise.integers(33, 127, 7 + number)))
        before = "" if number % 2 else letters[:3]
        texts.append(before + letters[3:5].join(["<|image_pad|>"] * len(row)) + letters[5:])
    own = [image for number, row in enumerate(sizes) for image in pictures(row, seed + number)]
    inputs = hf(text=texts, images=own or None, padding=True, return_tensors="np")
    return {name: np.asarray(array) for name, array in inputs.items()}
