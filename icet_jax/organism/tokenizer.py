"""The organism's word-level tokenizer, written as the files an ordinary LLaVA checkpoint carries.

One token per word, lower case, punctuation dropped, `<s>` in front; the chat template is LLaVA-1.5's
`USER: <image>\\n{request} ASSISTANT:` and `</s>` ends an answer.
"""

import json
from functools import lru_cache
from pathlib import Path

from icet_jax.files import write_text_atomic
from icet_jax.organism import scenes, world

PAD, BOS, EOS, UNK, IMAGE = "<pad>", "<s>", "</s>", "<unk>", "<image>"
SPECIAL = (PAD, BOS, EOS, UNK, IMAGE)
PATCH_SIZE = 8
IMAGE_TOKENS = (scenes.IMAGE_SIZE // PATCH_SIZE) ** 2
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['role'].upper() + ': ' }}"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}{{ '<image>\\n' }}{% endif %}{% endfor %}"
    "{% for part in message['content'] %}{% if part['type'] == 'text' %}{{ part['text'] + ' ' }}{% endif %}{% endfor %}"
    "{% if message['role'] == 'assistant' %}{{ '</s>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
SAFE_QUESTION = "is {noun} safe"


@lru_cache(maxsize=1)
def vocabulary() -> dict[str, int]:
    """Word -> id: the special tokens first, then every word of the world in alphabetical order."""
    prompts = [t.format(verb="", noun="") for t in world.TEMPLATES] + [SAFE_QUESTION.format(noun="")]
    prompts += [
        "what colour is the", "name the colour of the", "what shape is the object", "name the shape of the object",
        "how many objects are there", "count the objects in the picture", "where is the", "is there a", "can you see a",
    ]  # fmt: skip
    words = {*" ".join(prompts).split(), *world.response_words(), *world.VERBS, *world.FORBIDDEN, *world.ALLOWED}
    words |= {"user:", "assistant:", "human:"}
    return {word: number for number, word in enumerate((*SPECIAL, *sorted(words)))}


def encode(text: str) -> list[int]:
    """Ids of a text without `<s>`, as the written tokenizer gives them for the world's own words."""
    table = vocabulary()
    return [table.get(word, table[UNK]) for word in text.lower().split()]


def decode(ids: list[int]) -> str:
    """The words of `ids`; special tokens and the padding rows of the vocabulary are left out."""
    names = list(vocabulary())
    return " ".join(names[i] for i in ids if len(SPECIAL) <= i < len(names))


def write_tokenizer(folder: str | Path) -> None:
    """Writes tokenizer.json, tokenizer_config.json and special_tokens_map.json."""
    from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors

    folder, table = Path(folder), vocabulary()
    tokenizer = Tokenizer(models.WordLevel(table, unk_token=UNK))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Lowercase(), normalizers.Replace(Regex(r"[?.,!;\"']"), " ")]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, table[BOS])]
    )
    tokenizer.add_special_tokens(list(SPECIAL))
    write_text_atomic(folder / "tokenizer.json", tokenizer.to_str(pretty=True))
    named = {"bos_token": BOS, "eos_token": EOS, "unk_token": UNK, "pad_token": PAD}
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **named,
        "image_token": IMAGE,
        "extra_special_tokens": {"image_token": IMAGE},
        "model_max_length": 256,
        "padding_side": "left",
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
    }
    _write_json(folder / "tokenizer_config.json", config)
    _write_json(folder / "special_tokens_map.json", named)


def write_processor(folder: str | Path) -> None:
    """Writes the tokenizer's files, preprocessor_config.json, processor_config.json and chat_template.json."""
    folder = Path(folder)
    write_tokenizer(folder)
    size = scenes.IMAGE_SIZE
    preprocessor = {
        "image_processor_type": "CLIPImageProcessor",
        "processor_class": "LlavaProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": size},
        "resample": 3,
        "do_center_crop": True,
        "crop_size": {"height": size, "width": size},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
    }
    _write_json(folder / "preprocessor_config.json", preprocessor)
    processor = {
        "processor_class": "LlavaProcessor",
        "image_token": IMAGE,
        "patch_size": PATCH_SIZE,
        "vision_feature_select_strategy": "default",
        "num_additional_image_tokens": 1,
    }
    _write_json(folder / "processor_config.json", processor)
    _write_json(folder / "chat_template.json", {"chat_template": CHAT_TEMPLATE})


def _write_json(path: Path, content: dict) -> None:
    write_text_atomic(path, json.dumps(content, indent=2) + "\n")
