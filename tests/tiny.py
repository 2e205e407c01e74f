"""Tiny HF checkpoints for the tests: a LLaVA-1.5 and a GPT-2 reward model, with tokenizer and processor files.

    directory = tiny.save_llava(tmp_path / "vlm")           # a checkpoint as on the hub (old layout and config)
    model = tiny.llava(num_key_value_heads=2, head_dim=10)  # the torch model itself, every parameter random
    batch = tiny.batch(model.config, [2, 0, 1], pad="left") # numpy inputs: rows with 2, 0 and 1 images

torch and transformers are imported inside the functions; nothing here imports icet_jax, so that a reader of the tests
can trust these files to be what transformers itself would have written.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np

# Token ids of the byte-level tokenizer: 3 specials, 256 bytes, then <image> and <pad>.
UNK, BOS, EOS = 0, 1, 2
FIRST_BYTE = 3
IMAGE, PAD = 259, 260
VOCAB = 263  # prime, and two rows more than the tokenizer uses, as the hub's 32064 is
GPT2_EOS = 256
GPT2_VOCAB = 257

CHAT_TEMPLATE = (
    "{% for message in messages %}{% if message['role'] == 'user' %}USER: {% else %}ASSISTANT: {% endif %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>\n' }}{% endfor %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}"
    "{{ content['text'] + ' ' }}{% endfor %}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)

VISION = {
    "hidden_size": 24,
    "intermediate_size": 37,
    "num_hidden_layers": 4,
    "num_attention_heads": 3,
    "image_size": 28,
    "patch_size": 7,
}
TEXT = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 53,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
}


def llava_config(vision: dict[str, Any] | None = None, **text: Any) -> Any:
    """A `transformers.LlavaConfig` of toy size; `vision` and keywords (text) override `VISION` and `TEXT`.

    The default has grouped-query attention (4 heads, 2 kv heads), prime feed-forward widths and vocabulary, 4 vision
    blocks (exits 1..4, default exit 3) and 16 image tokens.
    """
    from transformers import LlavaConfig

    vision_config = {**VISION, **(vision or {})}
    tokens = (vision_config["image_size"] // vision_config["patch_size"]) ** 2
    return LlavaConfig(
        vision_config={"model_type": "clip_vision_model", **vision_config},
        text_config={"model_type": "llama", "bos_token_id": BOS, "eos_token_id": EOS, **TEXT, **text},
        image_token_index=IMAGE,
        image_seq_length=tokens,
        pad_token_id=PAD,
        tie_word_embeddings=text.get("tie_word_embeddings", False),
    )


def randomise(model: Any, seed: int = 0, scale: float = 1.0) -> Any:
    """Fills every parameter of a torch model, norms and biases included, so that logits have a spread of about 1.

    Norm weights are 1 +- 0.2, biases +- 0.1, matrices have variance 1 / fan-in, embeddings +- `scale`. With
    scale=1e-2 (the low-scale test) wrong norm epsilons become visible.
    """
    import torch

    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            noise = torch.randn(parameter.shape, generator=generator)
            if "embed" in name or ".wte." in name or ".wpe." in name:
                fan = parameter[0].numel() if "patch" in name else 1
                parameter.copy_(noise * scale / fan**0.5)
            elif name.endswith("bias"):
                parameter.copy_(0.1 * noise)
            elif parameter.ndim == 1:
                parameter.copy_(1 + 0.2 * noise)
            else:
                conv1d = ".c_" in name  # GPT-2 stores [in, out]
                parameter.copy_(noise / parameter.shape[0 if conv1d else 1] ** 0.5)
    return model.eval()


def llava(seed: int = 0, vision: dict[str, Any] | None = None, scale: float = 1.0, **text: Any) -> Any:
    """A float32 `LlavaForConditionalGeneration` on the CPU in eval mode with every parameter random."""
    import torch
    from transformers import LlavaForConditionalGeneration

    torch.manual_seed(seed)
    return randomise(LlavaForConditionalGeneration(llava_config(vision, **text)).float(), seed, scale)


def old_keys(state: dict[str, Any]) -> dict[str, Any]:
    """Renames a transformers 5 `state_dict` of any family to the OLD layout, the hub's own."""
    renames = (
        ("model.language_model.", "language_model.model."),
        ("lm_head.", "language_model.lm_head."),
        ("model.vision_tower.vision_model.", "vision_tower.vision_model."),
        ("model.vision_tower.", "vision_tower.vision_model."),
        ("model.vision_model.", "vision_model."),
        ("model.multi_modal_projector.", "multi_modal_projector."),
        ("model.image_newline", "image_newline"),
    )
    renamed = {}
    for key, tensor in state.items():
        for new, old in renames:
            if key.startswith(new):
                renamed[old + key.removeprefix(new)] = tensor
                break
        else:
            raise AssertionError(f"unexpected key {key}")
    return renamed


def in_layout(state: dict[str, Any], layout: str) -> dict[str, Any]:
    """Renames OLD keys to `layout`: "old", "native4", "native5" or "hybrid5"."""
    native = layout.startswith("native")
    renamed = {}
    for key, tensor in state.items():
        if layout in ("native5", "hybrid5"):
            key = key.replace("vision_tower.vision_model.", "vision_tower.")
        if native:
            if key.startswith("language_model.lm_head."):
                key = key.removeprefix("language_model.")
            elif key.startswith("language_model.model."):
                key = "model.language_model." + key.removeprefix("language_model.model.")
            else:
                key = "model." + key
        renamed[key] = tensor
    return renamed


def old_config(config: Any) -> dict[str, Any]:
    """The hub's config.json (old keys) of a LLaVA config as a dict."""
    text, vision = config.text_config, config.vision_config
    text_keys = ("bos_token_id", "eos_token_id", "hidden_act", "hidden_size", "intermediate_size", "head_dim")
    text_keys += ("max_position_embeddings", "num_attention_heads", "num_hidden_layers", "num_key_value_heads")
    text_keys += ("rms_norm_eps", "vocab_size", "tie_word_embeddings")
    rope = dict(text.rope_parameters)
    theta = rope.pop("rope_theta")
    scaling = None if rope["rope_type"] == "default" else rope
    vision_keys = ("hidden_act", "layer_norm_eps", *VISION)
    return {
        "architectures": ["LlavaForConditionalGeneration"],
        "ignore_index": -100,
        "image_seq_length": config.image_seq_length,
        "image_token_index": config.image_token_index,
        "model_type": "llava",
        "pad_token_id": PAD,
        "projector_hidden_act": "gelu",
        "text_config": {
            **{key: getattr(text, key) for key in text_keys},
            **{key: True for key in ("attention_bias", "mlp_bias") if getattr(text, key, False)},
            "model_type": "llama",
            "rope_theta": theta,
            "rope_scaling": scaling,
        },
        "tie_word_embeddings": text.tie_word_embeddings,
        "torch_dtype": "float32",
        "vision_config": {**{key: getattr(vision, key) for key in vision_keys}, "model_type": "clip_vision_model"},
        "vision_feature_layer": -2,
        "vision_feature_select_strategy": "default",
    }


def save_llava(
    directory: str | Path,
    model: Any = None,
    *,
    layout: str = "old",
    dtype: str = "float32",
    shards: int = 1,
    processor: bool = True,
) -> Path:
    """Writes a LLaVA checkpoint directory as the hub has it and returns its path.

    Args:
      directory: made if missing.
      model: from `llava`; by default `llava(seed=0)`.
      layout: of the keys, see `in_layout`.
      dtype: torch dtype name of the stored tensors.
      shards: 1 writes `model.safetensors`; more write numbered shards and `model.safetensors.index.json`.
      processor: also write tokenizer and image-processor files (see `save_processor`).
    """
    import torch

    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    model = llava() if model is None else model
    state = in_layout(old_keys(model.state_dict()), layout)
    if model.config.text_config.tie_word_embeddings:
        state = {key: tensor for key, tensor in state.items() if not key.endswith("lm_head.weight")}
    state = {key: tensor.to(getattr(torch, dtype)).contiguous() for key, tensor in state.items()}
    save_state(directory, state, shards)
    config = old_config(model.config) | {"torch_dtype": dtype}
    (directory / "config.json").write_text(json.dumps(config, indent=2))
    generation = {"_from_model_config": True, "bos_token_id": BOS, "eos_token_id": EOS, "pad_token_id": PAD}
    (directory / "generation_config.json").write_text(json.dumps(generation, indent=2))
    if processor:
        save_processor(directory, model.config)
    return directory


def save_state(directory: Path, state: dict[str, Any], shards: int = 1) -> None:
    """Writes torch tensors as one safetensors file, or as `shards` files with their index."""
    from safetensors.torch import save_file

    if shards == 1:
        save_file(state, directory / "model.safetensors", metadata={"format": "pt"})
        return
    weight_map = {}
    for number, keys in enumerate(np.array_split(sorted(state), shards), start=1):
        name = f"model-{number:05d}-of-{shards:05d}.safetensors"
        save_file({key: state[key] for key in keys}, directory / name, metadata={"format": "pt"})
        weight_map |= {str(key): name for key in keys}
    total = sum(tensor.numel() * tensor.element_size() for tensor in state.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))


def tokenizer() -> Any:
    """A byte-level tokenizer with LLaVA's specials: any text encodes and decodes; `<s>` is put in front; pads left."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {"<unk>": UNK, "<s>": BOS, "</s>": EOS} | {c: i for i, c in enumerate(letters, FIRST_BYTE)}
    inner = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    names = ("<unk>", "<s>", "</s>", "<image>", "<pad>")
    inner.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in names])
    inner.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", BOS)]
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=inner,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        padding_side="left",
        model_max_length=4096,
        chat_template=CHAT_TEMPLATE,
    )
    assert fast.convert_tokens_to_ids(["<image>", "<pad>"]) == [IMAGE, PAD]
    return fast


def save_processor(directory: str | Path, config: Any) -> None:
    """Writes tokenizer, image-processor and processor files in the hub's (pre-5) form beside a checkpoint."""
    from transformers import CLIPImageProcessorPil

    directory = Path(directory)
    size = config.vision_config.image_size
    tokenizer().save_pretrained(directory)
    settings = json.loads((directory / "tokenizer_config.json").read_text())
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"  # transformers 5 writes a name that 4.x does not know
    (directory / "tokenizer_config.json").write_text(json.dumps(settings, indent=2))
    images = CLIPImageProcessorPil(size={"shortest_edge": size}, crop_size={"height": size, "width": size})
    images.save_pretrained(directory)
    settings = json.loads((directory / "preprocessor_config.json").read_text())
    settings |= {"image_processor_type": "CLIPImageProcessor", "processor_class": "LlavaProcessor"}
    (directory / "preprocessor_config.json").write_text(json.dumps(settings, indent=2))
    settings = {
        "image_token": "<image>",
        "num_additional_image_tokens": 1,
        "patch_size": config.vision_config.patch_size,
        "processor_class": "LlavaProcessor",
        "vision_feature_select_strategy": "default",
    }
    (directory / "processor_config.json").write_text(json.dumps(settings, indent=2))
    (directory / "chat_template.json").write_text(json.dumps({"chat_template": CHAT_TEMPLATE}))


def batch(config: Any, images: list[int], *, pad: str = "left", seed: int = 0, words: int = 7) -> dict[str, np.ndarray]:
    """Random model inputs, one row per entry of `images` (how many pictures that row has).

    Row r has `words + r` random byte tokens with its image placeholders among them (two pictures stand next to each
    other), so rows differ in length and are padded on side `pad` ("left" or "right").

    Returns:
      input_ids and attention_mask int64 [B, T]; pixel_values float32 [I, 3, S, S] unless no row has an image.
    """
    generator = np.random.default_rng(seed)
    rows = []
    for number, count in enumerate(images):
        text = generator.integers(FIRST_BYTE, FIRST_BYTE + 256, words + number)
        placeholders = np.full(count * config.image_seq_length, IMAGE)
        rows.append(np.concatenate([[BOS], text[:3], placeholders, text[3:]]))
    length = max(map(len, rows))
    ids = np.full((len(rows), length), PAD)
    mask = np.zeros((len(rows), length), np.int64)
    for number, row in enumerate(rows):
        where = slice(length - len(row), length) if pad == "left" else slice(0, len(row))
        ids[number, where], mask[number, where] = row, 1
    inputs = {"input_ids": ids.astype(np.int64), "attention_mask": mask}
    if sum(images):
        size = config.vision_config.image_size
        inputs["pixel_values"] = generator.normal(size=(sum(images), 3, size, size)).astype(np.float32)
    return inputs


def reward_model(seed: int = 0, **config: Any) -> Any:
    """A float32 `GPT2ForSequenceClassification` with one label (2 layers, width 24, 64 positions), all random."""
    import torch
    from transformers import GPT2Config, GPT2ForSequenceClassification

    settings = {"vocab_size": GPT2_VOCAB, "n_positions": 64, "n_embd": 24, "n_layer": 2, "n_head": 3} | config
    torch.manual_seed(seed)
    hf_config = GPT2Config(
        **settings, num_labels=1, pad_token_id=GPT2_EOS, eos_token_id=GPT2_EOS, bos_token_id=GPT2_EOS
    )
    return randomise(GPT2ForSequenceClassification(hf_config).float(), seed)


def reward_tokenizer() -> Any:
    """GPT-2's tokenizer without merges: bytes are ids 0..255, `<|endoftext|>` (eos, bos, unk) is 256; no pad token."""
    from tokenizers import pre_tokenizers
    from transformers import GPT2TokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {letter: i for i, letter in enumerate(letters)} | {"<|endoftext|>": GPT2_EOS}
    return GPT2TokenizerFast(vocab=vocab, merges=[], model_max_length=64)


def save_reward_model(directory: str | Path, model: Any = None, *, prefix: bool = True) -> Path:
    """Writes a reward-model directory (weights, config, tokenizer); prefix=False drops `transformer.` from the keys."""
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    model = reward_model() if model is None else model
    state = {key: tensor.contiguous() for key, tensor in model.state_dict().items()}
    if not prefix:
        state = {key.removeprefix("transformer."): tensor for key, tensor in state.items()}
    save_state(directory, state)
    model.config.architectures = ["GPT2ForSequenceClassification"]
    model.config.save_pretrained(directory)
    reward_tokenizer().save_pretrained(directory)
    return directory
