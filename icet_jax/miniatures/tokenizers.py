"""Writes tokenizers of toy checkpoints, whose tokens are bytes, or byte pairs learned from a text."""

import json
from collections.abc import Sequence
from pathlib import Path

from icet_jax.files import JsonObject, write_text_atomic

BYTES = 256


def write_tokenizer(
    folder: Path,
    special: Sequence[str],
    *,
    single: str | None = None,
    pair: str | None = None,
    text: str | None = None,
    words: Sequence[str] = (),
    last: Sequence[str] = (),
    settings: JsonObject,
) -> dict[str, int]:
    """Writes tokenizer.json and tokenizer_config.json, and returns {token: id}.

    Args:
      folder: folder of the checkpoint.
      special: special tokens, with the ids 0, 1, ...
      single: special tokens that are added around a text, in the notation of `tokenizers`' TemplateProcessing ("[CLS]
        $A [SEP]"); None to add none.
      pair: the same for two texts.
      text: text from which byte pairs are learned, so that it has a fifth as many tokens as bytes; None for bytes.
      words: further words that are single tokens.
      last: special tokens with the highest ids.
      settings: content of tokenizer_config.json: roles of the special tokens, a chat template.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {name: index for index, name in enumerate([*special, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    if text is not None:
        trainer = trainers.BpeTrainer(
            vocab_size=len(vocabulary) + 512, special_tokens=list(special), initial_alphabet=alphabet,
            show_progress=False,
        )  # fmt: skip
        tokenizer.train_from_iterator([text], trainer)
    tokenizer.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in special])
    tokenizer.add_tokens([AddedToken(word, single_word=True, normalized=False) for word in words])
    tokenizer.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in last])
    if single is not None:
        ids = [(name, tokenizer.token_to_id(name)) for name in special]
        tokenizer.post_processor = processors.TemplateProcessing(single=single, pair=pair, special_tokens=ids)
    write_text_atomic(folder / "tokenizer.json", tokenizer.to_str())
    write_json(folder / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast", **settings})
    return tokenizer.get_vocab()


def write_json(path: Path, content: JsonObject) -> None:
    """Writes an indented JSON file."""
    write_text_atomic(path, json.dumps(content, indent=2) + "\n")
