"""Tiny HF checkpoints of the other two families, beside `tests.tiny`: LLaVA-NeXT and Llama 3.2 Vision.

    directory = tiny_families.save_llava_next(tmp_path / "next")            # as on the hub: old keys, processor files
    model = tiny_families.mllama(cross_attention_layers=[1, 5], num_hidden_layers=7)
    inputs = tiny_families.next_batch(model.config, [[(30, 50)], [], [(20, 200), (57, 57)]], pad="left")
    rows = tiny_families.mllama_rows(model.config, [[(30, 50)], []])        # each row's own HF inputs, unpadded

Images are given by their sizes (height, width) and filled with noise. Nothing here imports icet_jax.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tests import tiny

Sizes = Sequence[Sequence[tuple[int, int]]]
"""For each row the (height, width) of its images."""

PINPOINTS = [[28, 56], [56, 28], [56, 56], [84, 28], [28, 84]]
RATIOS = [[1, 1], [1, 2], [1, 3], [1, 4], [2, 1], [2, 2], [3, 1], [4, 1]]
MISTRAL_TEMPLATE = (
    "{% for message in messages %}{% if message['role'] == 'user' %}[INST] "
    "{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>\n' }}{% endfor %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}{{ content['text'] }}{% endfor %}"
    " [/INST]{% endif %}{% endfor %}"
)
VICUNA_TEMPLATE = (
    "{{ 'A chat between a curious human and an artificial intelligence assistant. The assistant gives helpful, "
    "detailed, and polite answers to the human\\'s questions. ' }}" + tiny.CHAT_TEMPLATE
)

# Token ids of Llama 3's kind of tokenizer over bytes; the image's is one past the logits' columns.
BEGIN, EOT, START_HEADER = 0, 1, 2
END_HEADER, MLLAMA_PAD = 259, 260
MLLAMA_VOCAB = MLLAMA_IMAGE = 263
LLAMA3_TEMPLATE = (
    "{{ bos_token }}{% set ns = namespace(images=false) %}"
    "{% for message in messages %}{% if message['content'] is not string %}{% for content in message['content'] %}"
    "{% if content['type'] == 'image' %}{% set ns.images = true %}{% endif %}{% endfor %}{% endif %}{% endfor %}"
    "{% if not ns.images %}{{ '<|start_header_id|>system<|end_header_id|>\n\nCutting Knowledge Date: December 2023\n'"
    " + 'Today Date: ' + (date_string if date_string is defined else '26 Jul 2024') + '\n\n<|eot_id|>' }}{% endif %}"
    "{% for message in messages %}{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for content in message['content'] %}"
    "{% if content['type'] == 'image' %}{{ '<|image|>' }}{% else %}{{ content['text'] }}{% endif %}{% endfor %}"
    "{% endif %}{{ '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)

MLLAMA_VISION = {
    "hidden_size": 24,
    "intermediate_size": 37,
    "num_hidden_layers": 6,
    "num_global_layers": 2,
    "attention_heads": 3,
    "image_size": 28,
    "patch_size": 7,
    "intermediate_layers_indices": [1, 2, 4],
    "supported_aspect_ratios": RATIOS,
    "max_num_tiles": 4,
    "norm_eps": 1e-5,
}
MLLAMA_TEXT = {
    "vocab_size": MLLAMA_VOCAB,
    "hidden_size": 32,
    "intermediate_size": 53,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "cross_attention_layers": [1, 4],
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}


def llava_next_config(vision: dict[str, Any] | None = None, backbone: str = "llama", **text: Any) -> Any:
    """A `transformers.LlavaNextConfig` of toy size: tiles of 28 x 28 pixels, 16 patches each.

    Args:
      vision: overrides `tiny.VISION`.
      backbone: "llama" (v1.6 Vicuna) or "mistral", with Mistral's rotary base of 1e6.
      text: overrides `tiny.TEXT`.
    """
    from transformers import LlavaNextConfig

    vision_config = {**tiny.VISION, **(vision or {})}
    text_config = {"model_type": backbone, "bos_token_id": tiny.BOS, "eos_token_id": tiny.EOS, **tiny.TEXT, **text}
    if backbone == "mistral":
        theta = {"rope_type": "default", "rope_theta": 1e6}
        text_config = {"rope_parameters": theta, "sliding_window": None, **text_config}
    side = vision_config["image_size"]
    return LlavaNextConfig(
        vision_config={"model_type": "clip_vision_model", **vision_config},
        text_config=text_config,
        image_token_index=tiny.IMAGE,
        image_grid_pinpoints=[[high * side // 28, wide * side // 28] for high, wide in PINPOINTS],
        pad_token_id=tiny.PAD,
        tie_word_embeddings=False,
    )


def llava_next(
    seed: int = 0, vision: dict[str, Any] | None = None, backbone: str = "llama", scale: float = 1.0, **text: Any
) -> Any:
    """A float32 `LlavaNextForConditionalGeneration` on the CPU in eval mode with every parameter random."""
    import torch
    from transformers import LlavaNextForConditionalGeneration

    torch.manual_seed(seed)
    config = llava_next_config(vision, backbone, **text)
    return tiny.randomise(LlavaNextForConditionalGeneration(config).float(), seed, scale)


def mllama_config(vision: dict[str, Any] | None = None, **text: Any) -> Any:
    """A `transformers.MllamaConfig` of toy size; `vision` and keywords (text) override the tables above."""
    from transformers import MllamaConfig
    from transformers.models.mllama.configuration_mllama import MllamaTextConfig, MllamaVisionConfig

    vision_config = {**MLLAMA_VISION, **(vision or {})}
    states = 1 + len(vision_config["intermediate_layers_indices"])
    vision_config["vision_output_dim"] = vision_config["hidden_size"] * states
    text_config = {"rope_parameters": {"rope_theta": 500000.0, **LLAMA3_ROPE}, **MLLAMA_TEXT, **text}
    tokens = {"bos_token_id": BEGIN, "eos_token_id": EOT, "pad_token_id": MLLAMA_PAD}
    return MllamaConfig(
        vision_config=MllamaVisionConfig(**vision_config),
        text_config=MllamaTextConfig(**text_config, **tokens),
        image_token_index=text_config["vocab_size"],
    )


def mllama(seed: int = 0, vision: dict[str, Any] | None = None, scale: float = 1.0, **text: Any) -> Any:
    """A float32 `MllamaForConditionalGeneration` on the CPU in eval mode, every parameter and gate random.

    As transformers reads them since 4.56, the captured intermediates are one block late (see `mllama_as_trained`).
    """
    import torch
    from transformers import MllamaForConditionalGeneration

    torch.manual_seed(seed)
    return tiny.randomise(MllamaForConditionalGeneration(mllama_config(vision, **text)).float(), seed, scale)


def mllama_as_trained(model: Any) -> Any:
    """Lets this transformers capture what the model was trained with: the states that enter the blocks named."""
    tower = model.model.vision_model
    tower.intermediate_layers_indices = [index - 1 for index in tower.config.intermediate_layers_indices]
    return model


def old_next_config(config: Any) -> dict[str, Any]:
    """The hub's config.json (old keys) of a LLaVA-NeXT config."""
    values = tiny.old_config(_with_seq_length(config)) | {
        "architectures": ["LlavaNextForConditionalGeneration"],
        "model_type": "llava_next",
        "image_grid_pinpoints": config.image_grid_pinpoints,
        "use_image_newline_parameter": True,
    }
    values["text_config"]["model_type"] = config.text_config.model_type
    if config.text_config.model_type == "mistral":
        values["text_config"]["sliding_window"] = None
    return values


def _with_seq_length(config: Any) -> Any:
    if getattr(config, "image_seq_length", None) is None:
        config.image_seq_length = (config.vision_config.image_size // config.vision_config.patch_size) ** 2
    return config


def old_mllama_config(config: Any) -> dict[str, Any]:
    """The hub's config.json (old keys) of an Mllama config."""
    text, vision = config.text_config, config.vision_config
    rope = dict(text.rope_parameters)
    theta = rope.pop("rope_theta")
    names = (*MLLAMA_TEXT, "bos_token_id", "eos_token_id", "pad_token_id", "hidden_act")
    vision_names = (*MLLAMA_VISION, "vision_output_dim", "num_channels", "hidden_act")
    return {
        "architectures": ["MllamaForConditionalGeneration"],
        "image_token_index": config.image_token_index,
        "model_type": "mllama",
        "text_config": {
            **{name: getattr(text, name) for name in names},
            "model_type": "mllama_text_model",
            "rope_theta": theta,
            "rope_scaling": rope,
            "tie_word_embeddings": False,
        },
        "torch_dtype": "float32",
        "vision_config": {
            **{name: getattr(vision, name) for name in vision_names},
            "model_type": "mllama_vision_model",
        },
    }


def save_llava_next(
    directory: str | Path, model: Any = None, *, dtype: str = "float32", shards: int = 1, processor: bool = True
) -> Path:
    """Writes a LLaVA-NeXT checkpoint directory as the hub has it and returns its path; see `tiny.save_llava`."""
    model = llava_next() if model is None else model
    eos = {"bos_token_id": tiny.BOS, "eos_token_id": tiny.EOS, "pad_token_id": tiny.PAD}
    directory = _save(Path(directory), model, old_next_config(model.config), eos, dtype, shards)
    if processor:
        save_next_processor(directory, model.config)
    return directory


def save_mllama(
    directory: str | Path, model: Any = None, *, dtype: str = "float32", shards: int = 1, processor: bool = True
) -> Path:
    """Writes a Llama 3.2 Vision checkpoint directory as the hub has it and returns its path."""
    model = mllama() if model is None else model
    eos = {"bos_token_id": BEGIN, "eos_token_id": [EOT], "pad_token_id": MLLAMA_PAD}
    directory = _save(Path(directory), model, old_mllama_config(model.config), eos, dtype, shards)
    if processor:
        save_mllama_processor(directory, model.config)
    return directory


def _save(
    directory: Path, model: Any, config: dict[str, Any], generation: dict[str, Any], dtype: str, shards: int
) -> Path:
    import torch

    directory.mkdir(parents=True, exist_ok=True)
    state = tiny.old_keys(model.state_dict())
    state = {key: tensor.to(getattr(torch, dtype)).contiguous() for key, tensor in state.items()}
    tiny.save_state(directory, state, shards)
    (directory / "config.json").write_text(json.dumps(config | {"torch_dtype": dtype}, indent=2))
    (directory / "generation_config.json").write_text(json.dumps(generation, indent=2))
    return directory


def mllama_tokenizer() -> Any:
    """A byte-level tokenizer with Llama 3's specials; `<|begin_of_text|>` is put in front; pads on the right."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {"<|begin_of_text|>": BEGIN, "<|eot_id|>": EOT, "<|start_header_id|>": START_HEADER}
    inner = Tokenizer(models.BPE(vocab=vocab | {letter: i for i, letter in enumerate(letters, 3)}, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    more = ("<|end_header_id|>", "<|finetune_right_pad_id|>", "<|python_tag|>", "<|reserved_special_token_0|>")
    names = (*vocab, *more, "<|image|>")
    inner.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in names])
    inner.post_processor = processors.TemplateProcessing(
        single="<|begin_of_text|> $A", pair="<|begin_of_text|> $A $B", special_tokens=[("<|begin_of_text|>", BEGIN)]
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=inner,
        bos_token="<|begin_of_text|>",
        eos_token="<|eot_id|>",
        pad_token="<|finetune_right_pad_id|>",
        model_max_length=4096,
        chat_template=LLAMA3_TEMPLATE,
    )
    found = fast.convert_tokens_to_ids(["<|end_header_id|>", "<|finetune_right_pad_id|>", "<|image|>"])
    assert found == [END_HEADER, MLLAMA_PAD, MLLAMA_IMAGE]
    return fast


def next_processor(config: Any) -> Any:
    """`LlavaNextProcessor` over the byte-level tokenizer and the torch-free image processor."""
    from transformers import LlavaNextProcessor
    from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil

    size, tokenizer = config.vision_config.image_size, tiny.tokenizer()
    tokenizer.chat_template = MISTRAL_TEMPLATE if config.text_config.model_type == "mistral" else VICUNA_TEMPLATE
    return LlavaNextProcessor(
        LlavaNextImageProcessorPil(
            size={"shortest_edge": size},
            crop_size={"height": size, "width": size},
            image_grid_pinpoints=config.image_grid_pinpoints,
        ),
        tokenizer,
        patch_size=config.vision_config.patch_size,
        vision_feature_select_strategy=config.vision_feature_select_strategy,
        num_additional_image_tokens=1,
        chat_template=tokenizer.chat_template,
    )


def mllama_processor(config: Any) -> Any:
    """`MllamaProcessor` over Llama 3's kind of tokenizer and the torch-free image processor, with the hub's numbers."""
    from transformers import MllamaProcessor
    from transformers.models.mllama.image_processing_pil_mllama import MllamaImageProcessorPil

    size, tokenizer = config.vision_config.image_size, mllama_tokenizer()
    images = MllamaImageProcessorPil(
        size={"height": size, "width": size},
        max_image_tiles=config.vision_config.max_num_tiles,
        image_mean=[0.48145466, 0.4578275, 0.40821073],
        image_std=[0.26862954, 0.26130258, 0.27577711],
    )
    return MllamaProcessor(images, tokenizer, chat_template=tokenizer.chat_template)


def save_next_processor(directory: str | Path, config: Any) -> None:
    """Writes tokenizer, image-processor and processor files of LLaVA-NeXT in the hub's (pre-5) form."""
    settings = {
        "image_token": "<image>",
        "num_additional_image_tokens": 1,
        "patch_size": config.vision_config.patch_size,
        "processor_class": "LlavaNextProcessor",
        "vision_feature_select_strategy": config.vision_feature_select_strategy,
    }
    _save_processor(Path(directory), next_processor(config), "LlavaNextImageProcessor", settings)


def save_mllama_processor(directory: str | Path, config: Any) -> None:
    """Writes tokenizer and image-processor files of Llama 3.2 Vision in the hub's (pre-5) form."""
    _save_processor(Path(directory), mllama_processor(config), "MllamaImageProcessor", None)


def _save_processor(directory: Path, processor: Any, images: str, settings: dict[str, Any] | None) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    processor.tokenizer.save_pretrained(directory)
    processor.image_processor.save_pretrained(directory)
    classes = {"processor_class": type(processor).__name__}
    _edit(directory / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast"})
    _edit(directory / "preprocessor_config.json", {"image_processor_type": images, **classes})
    if settings is not None:
        (directory / "processor_config.json").write_text(json.dumps(settings, indent=2))
    template = {"chat_template": processor.tokenizer.chat_template}
    (directory / "chat_template.json").write_text(json.dumps(template))


def _edit(path: Path, changes: dict[str, Any]) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes, indent=2))


def pictures(sizes: Sequence[tuple[int, int]], seed: int = 0) -> list[Any]:
    """Noise as PIL images of these (height, width)."""
    from PIL import Image

    noise = np.random.default_rng(seed)
    return [Image.fromarray(noise.integers(0, 256, (*size, 3), dtype=np.uint8)) for size in sizes]


def _texts(sizes: Sizes, token: str, seed: int) -> list[str]:
    """Rows of random letters, each longer than the one before, with their images' placeholders among them.

    Two images stand next to each other in even rows and apart in odd ones.
    """
    noise = np.random.default_rng(seed)
    texts = []
    for number, row in enumerate(sizes):
        letters = "".join(map(chr, noise.integers(33, 127, 7 + number)))
        between = letters[2:4] if number % 2 else ""
        texts.append(letters[:3] + between.join([token] * len(row)) + letters[3:])
    return texts


def next_batch(config: Any, sizes: Sizes, *, pad: str = "left", seed: int = 0) -> dict[str, np.ndarray]:
    """What `LlavaNextProcessor` makes of random rows with images of these sizes, padded on side `pad`.

    Returns:
      input_ids and attention_mask int64 [B, T]; pixel_values float32 [I, tiles, 3, S, S] and image_sizes [I, 2] unless
      no row has an image.
    """
    processor = next_processor(config)
    processor.tokenizer.padding_side = pad
    images = pictures([size for row in sizes for size in row], seed)
    inputs = processor(text=_texts(sizes, "<image>", seed), images=images or None, padding=True, return_tensors="np")
    return {name: np.asarray(array) for name, array in inputs.items()}


def mllama_rows(config: Any, sizes: Sizes, *, seed: int = 0) -> list[dict[str, np.ndarray]]:
    """What `MllamaProcessor` makes of each random row alone: its batches cannot mix rows with and without images.

    Returns:
      for each row input_ids and attention_mask int64 [1, T], and where it has images pixel_values [1, M, tiles, 3, S,
      S], aspect_ratio_ids [1, M], aspect_ratio_mask [1, M, tiles] and cross_attention_mask [1, T, M, tiles].
    """
    processor, rows = mllama_processor(config), []
    for number, (row, text) in enumerate(zip(sizes, _texts(sizes, "<|image|>", seed), strict=True)):
        images = [pictures(row, seed + number)] if row else None
        inputs = processor(text=[text], images=images, return_tensors="np")
        rows.append({name: np.asarray(array) for name, array in inputs.items()})
    return rows
