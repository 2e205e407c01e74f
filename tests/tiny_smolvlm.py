"""Tiny HF checkpoints of SmolVLM and Idefics3, beside `tests.tiny` and `tests.tiny_families`.

    directory = tiny_smolvlm.save(tmp_path / "smol")                      # as on the hub, with processor files
    model = tiny_smolvlm.model("idefics3", tied=True, num_hidden_layers=2)
    inputs = tiny_smolvlm.batch(model.config, [[(30, 50)], [], [(20, 200), (57, 57)]])

Images are given by their sizes (height, width) and filled with noise. Nothing here imports icet_jax.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np

from tests import tiny
from tests.tiny_families import Sizes, pictures

TILE, LONGEST_EDGE = 28, 112  # as in the published models, an image has at most 4 x 4 tiles and itself

# Token ids of a byte-level tokenizer as SmolLM2's: 256 bytes after three specials, then those of images.
END_OF_TEXT, BOS, PAD = 0, 1, 2
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
GRID = tuple(f"<row_{row}_col_{column}>" for row in range(1, 5) for column in range(1, 5))
LAST = ("<global-img>", *GRID, "<fake_token_around_image>", "<image>", "<end_of_utterance>")
FAKE, IMAGE, EOS = (3 + 256 + LAST.index(name) for name in LAST[-3:])
VOCAB = 283  # prime, and more rows than the tokenizer uses

CHAT_TEMPLATE = (
    "<|im_start|>{% for message in messages %}{{ message['role'] | capitalize }}"
    "{% if message['content'][0]['type'] == 'image' %}{{ ':' }}{% else %}{{ ': ' }}{% endif %}"
    "{% for line in message['content'] %}{% if line['type'] == 'text' %}{{ line['text'] }}"
    "{% elif line['type'] == 'image' %}{{ '<image>' }}{% endif %}{% endfor %}<end_of_utterance>\n{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)
VISION = {**tiny.VISION, "image_size": TILE}
TEXT = {**tiny.TEXT, "vocab_size": VOCAB, "max_position_embeddings": 2048}
TOKENS = {"bos_token_id": BOS, "eos_token_id": EOS, "pad_token_id": PAD}


def config(
    kind: str = "smolvlm", vision: dict[str, Any] | None = None, factor: int = 2, tied: bool = False, **text: Any
) -> Any:
    """A `transformers.SmolVLMConfig` or `Idefics3Config` of toy size: tiles of 28 x 28 pixels, 16 patches, 4 tokens.

    Args:
      kind: "smolvlm" or "idefics3".
      vision: overrides `VISION`.
      factor: `scale_factor`.
      tied: whether head and embeddings are one.
      text: overrides `TEXT`.
    """
    from transformers import Idefics3Config, SmolVLMConfig

    decoder = {"model_type": "llama", "rope_theta": 1e5, "tie_word_embeddings": tied, **TOKENS, **TEXT, **text}
    return {"smolvlm": SmolVLMConfig, "idefics3": Idefics3Config}[kind](
        vision_config={**VISION, **(vision or {})}, text_config=decoder, image_token_id=IMAGE, scale_factor=factor,
        tie_word_embeddings=tied,
    )  # fmt: skip


def model(kind: str = "smolvlm", seed: int = 0, scale: float = 1.0, **options: Any) -> Any:
    """A float32 model on the CPU in eval mode with every parameter random; `options` as for `config`."""
    import torch
    from transformers import Idefics3ForConditionalGeneration, SmolVLMForConditionalGeneration

    torch.manual_seed(seed)
    network = {"smolvlm": SmolVLMForConditionalGeneration, "idefics3": Idefics3ForConditionalGeneration}[kind]
    return tiny.randomise(network(config(kind, **options)).float(), seed, scale)


def hub_config(config: Any) -> dict[str, Any]:
    """The hub's config.json (old keys) of a config."""
    text, vision = config.text_config, config.vision_config
    names = (*TEXT, *TOKENS, "head_dim", "hidden_act", "tie_word_embeddings")
    return {
        "architectures": [
            {"smolvlm": "SmolVLM", "idefics3": "Idefics3"}[config.model_type] + "ForConditionalGeneration"
        ],
        "image_token_id": config.image_token_id,
        "model_type": config.model_type,
        "scale_factor": config.scale_factor,
        "text_config": {
            **{name: getattr(text, name) for name in names},
            "model_type": "llama",
            "rope_theta": text.rope_parameters["rope_theta"],
            "rope_scaling": None,
        },
        "tie_word_embeddings": config.tie_word_embeddings,
        "torch_dtype": "float32",
        "vision_config": {
            **{name: getattr(vision, name) for name in VISION},
            "model_type": f"{config.model_type}_vision",
            "tie_word_embeddings": False,
        },
    }


def save(
    directory: str | Path, network: Any = None, *, dtype: str = "float32", shards: int = 1, processor: bool = True
) -> Path:
    """Writes a checkpoint directory as the hub has it and returns its path; see `tiny.save_llava`."""
    import torch

    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    network = model() if network is None else network
    state = {key: tensor.to(getattr(torch, dtype)).contiguous() for key, tensor in network.state_dict().items()}
    if network.config.tie_word_embeddings:
        del state["lm_head.weight"]
    tiny.save_state(directory, state, shards)
    values = hub_config(network.config)
    values["torch_dtype"] = values["text_config"]["torch_dtype"] = dtype
    (directory / "config.json").write_text(json.dumps(values, indent=2))
    (directory / "generation_config.json").write_text(json.dumps(TOKENS, indent=2))
    if processor:
        save_processor(directory, network.config)
    return directory


def tokenizer() -> Any:
    """A byte-level tokenizer with SmolLM2's and SmolVLM's specials, which adds no token of its own; pads left."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {name: i for i, name in enumerate((*SPECIAL, *letters))}
    inner = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    inner.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in (*SPECIAL, *LAST)])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token="<|im_start|>", eos_token="<end_of_utterance>", pad_token="<|im_end|>",
        unk_token="<|endoftext|>", padding_side="left", model_max_length=2048, chat_template=CHAT_TEMPLATE,
    )  # fmt: skip
    assert fast.convert_tokens_to_ids(list(LAST[-3:])) == [FAKE, IMAGE, EOS]
    return fast


def processor(config: Any, **images: Any) -> Any:
    """`Idefics3Processor` over the byte-level tokenizer and the torch-free image processor of the config's family.

    `SmolVLMProcessor`, which makes the same arrays, needs num2words and torchvision. `images` are settings of the
    image processor.
    """
    from transformers import Idefics3Processor
    from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
    from transformers.models.smolvlm.image_processing_pil_smolvlm import SmolVLMImageProcessorPil

    kinds = {"smolvlm": SmolVLMImageProcessorPil, "idefics3": Idefics3ImageProcessorPil}
    tile = config.vision_config.image_size
    settings = {"size": {"longest_edge": 4 * tile}, "max_image_size": {"longest_edge": tile}, **images}
    return Idefics3Processor(
        kinds[config.model_type](**settings),
        tokenizer(),
        image_seq_len=(tile // config.vision_config.patch_size) ** 2 // config.scale_factor**2,
        chat_template=CHAT_TEMPLATE,
    )


def save_processor(directory: str | Path, config: Any, **images: Any) -> None:
    """Writes tokenizer, image-processor and processor files in the hub's (pre-5) form; arguments as for `processor`."""
    directory, hf = Path(directory), processor(config, **images)
    directory.mkdir(parents=True, exist_ok=True)
    hf.tokenizer.save_pretrained(directory)
    hf.image_processor.save_pretrained(directory)
    kind = {"smolvlm": "SmolVLM", "idefics3": "Idefics3"}[config.model_type]
    _edit(directory / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast"})
    names = {"image_processor_type": f"{kind}ImageProcessor", "processor_class": f"{kind}Processor"}
    _edit(directory / "preprocessor_config.json", names)
    settings = {"image_seq_len": hf.image_seq_len, "processor_class": f"{kind}Processor"}
    (directory / "processor_config.json").write_text(json.dumps(settings))
    (directory / "chat_template.json").write_text(json.dumps({"chat_template": CHAT_TEMPLATE}))


def _edit(path: Path, changes: dict[str, Any]) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes, indent=2))


def batch(config: Any, sizes: Sizes, *, seed: int = 0, **images: Any) -> dict[str, np.ndarray]:
    """What the processor makes of random rows with images of these sizes, padded on the left.

    Every row is longer than the one before. Two images stand next to each other in even rows and apart in odd ones.

    Returns:
      input_ids and attention_mask int64 [B, T]; pixel_values float32 [B, N, 3, S, S] and pixel_attention_mask int64
      [B, N, S, S] unless no row has an image.
    """
    hf, noise, texts = processor(config, **images), np.random.default_rng(seed), []
    for number, row in enumerate(sizes):
        letters = "".join(map(chr, noise.integers(33, 127, 7 + number)))
        between = letters[2:4] if number % 2 else ""
        texts.append(letters[:3] + between.join(["<image>"] * len(row)) + letters[3:])
    own = [pictures(row, seed + number) for number, row in enumerate(sizes)]
    inputs = hf(text=texts, images=own if any(own) else None, padding=True, return_tensors="np")
    return {name: np.asarray(array) for name, array in inputs.items()}


def padded(inputs: dict[str, np.ndarray], seed: int = 0) -> dict[str, np.ndarray]:
    """The same inputs, where some tiles have padding at the bottom and right, as images smaller than a tile have."""
    noise, mask = np.random.default_rng(seed), inputs["pixel_attention_mask"].copy()
    size = mask.shape[-1]
    for tile in mask.reshape(-1, size, size)[::2]:
        height, width = noise.integers(1, size + 1, 2)
        tile[height:] = tile[:, width:] = 0
    return inputs | {"pixel_attention_mask": mask}
