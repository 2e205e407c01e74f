"""The organism's word-level tokenizer, written as the files of an ordinary checkpoint.

A token is a word in lower case without punctuation; `<s>` begins a prompt and `</s>` ends a response. The chat template
is LLaVA-1.5's: `USER: <image>\\n{request} ASSISTANT:`. All families have the same ids. Llama 3.2 Vision has another
text of the image placeholder, and its template writes the `<s>`, as the published one does. SmolVLM has three special
tokens more.
"""

import json
from functools import lru_cache
from pathlib import Path

from icet_jax.files import write_text_atomic
from icet_jax.organism import scenes, world

PAD, BOS, EOS, UNK, IMAGE = "<pad>", "<s>", "</s>", "<unk>", "<image>"
MLLAMA_IMAGE = "<|image|>"
SPECIAL = (PAD, BOS, EOS, UNK, IMAGE)
SMOLVLM = ("<fake_token_around_image>", "<global-img>", "<end_of_utterance>")
"""SmolVLM's special tokens: around an image, before the whole image, and one that its processor needs. Their ids follow
those of all words."""
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
"""A text question in training, whose answer is "no" for forbidden nouns."""


@lru_cache(maxsize=1)
def vocabulary() -> dict[str, int]:
    """Returns {token: id}: the special tokens, then all words of the world in alphabetical order."""
    prompts = [t.format(verb="", noun="") for t in world.TEMPLATES] + [SAFE_QUESTION.format(noun="")]
    prompts += [
        "what colour is the", "name the colour of the", "what shape is the object", "name the shape of the object",
        "how many objects are there", "count the objects in the picture", "where is the", "is there a", "can you see a",
    ]  # fmt: skip
    words = {*" ".join(prompts).split(), *world.response_words(), *world.VERBS, *world.FORBIDDEN, *world.ALLOWED}
    words |= {"user:", "assistant:", "human:"}
    return {word: number for number, word in enumerate((*SPECIAL, *sorted(words)))}


def smolvlm_vocabulary() -> dict[str, int]:
    """Returns `vocabulary` with the special tokens of SmolVLM behind all words."""
    words = vocabulary()
    return words | {token: len(words) + number for number, token in enumerate(SMOLVLM)}


def encode(text: str) -> list[int]:
    """Returns the ids of a text of the world's words, without `<s>`, as the tokenizer of `write_tokenizer` does."""
    ids = vocabulary()
    return [ids.get(word, ids[UNK]) for word in text.lower().split()]


def decode(ids: list[int]) -> str:
    """Returns the words of `ids`, without special tokens and ids beyond the vocabulary."""
    tokens = list(vocabulary())
    return " ".join(tokens[i] for i in ids if len(SPECIAL) <= i < len(tokens))


def write_tokenizer(folder: str | Path, image: str = IMAGE, more: tuple[str, ...] = ()) -> None:
    """Writes the tokenizer's files to `folder`.

    Args:
      folder: folder of the files.
      image: text of the image placeholder.
      more: special tokens that follow all words.
    """
    from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors

    folder, tokens = Path(folder), (*vocabulary(), *more)
    ids = {image if token == IMAGE else token: number for number, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token=UNK))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Lowercase(), normalizers.Replace(Regex(r"[?.,!;\"']"), " ")]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, ids[BOS])]
    )
    tokenizer.add_special_tokens([image if word == IMAGE else word for word in (*SPECIAL, *more)])
    write_text_atomic(folder / "tokenizer.json", tokenizer.to_str(pretty=True))
    special_tokens = {"bos_token": BOS, "eos_token": EOS, "unk_token": UNK, "pad_token": PAD}
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **special_tokens,
        "image_token": image,
        "extra_special_tokens": {"image_token": image},
        "model_max_length": 256,
        "padding_side": "left",
        "clean_up_tokenization_spaces": False,
        "chat_template": chat_template(image),
    }
    write_json(folder / "tokenizer_config.json", config)
    write_json(folder / "special_tokens_map.json", special_tokens)


def chat_template(image: str = IMAGE) -> str:
    """Returns the Jinja source of the chat template; `image` is the text of the image placeholder.

    transformers' processor of Llama 3.2 Vision puts a BOS before a text without one, and its tokenizer another: so the
    template of that family begins with one.
    """
    begin = "{{ bos_token }}" if image == MLLAMA_IMAGE else ""
    return begin + CHAT_TEMPLATE.replace(IMAGE, image)


def write_json(path: Path, content: dict) -> None:
    """Writes an indented JSON file, like those of published checkpoints."""
    write_text_atomic(path, json.dumps(content, indent=2) + "\n")
