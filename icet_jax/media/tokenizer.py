"""Loads the transformers tokenizer of a checkpoint directory, and keeps texts free of its special tokens."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol, cast, runtime_checkable

from icet_jax.errors import UserError
from icet_jax.media.library_messages import quiet_transformers

# If a directory contains any of these files, it has a tokenizer.
_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")


@runtime_checkable
class Tokenizer(Protocol):
    """The parts of transformers' tokenizers that this package uses.

    Attributes:
      pad_token, eos_token, bos_token: special tokens as text; None if the tokenizer has none.
      eos_token_id, bos_token_id: token ids of these tokens.
      added_tokens_decoder: {token id: token with the attribute `special`}.
      padding_side: "left" or "right".
      chat_template: the Jinja template in the tokenizer's files, if there is one.
    """

    pad_token: str | None
    eos_token: str | None
    bos_token: str | None
    eos_token_id: Any
    bos_token_id: Any
    added_tokens_decoder: Any
    padding_side: str
    chat_template: Any

    @property
    def pad_token_id(self) -> int:
        """Returns the id of the padding token."""
        ...

    def __call__(self, text: str | list[str], **options: Any) -> Any:
        """Tokenises one or several texts; `input_ids` of the result are the token ids."""
        ...

    def decode(self, token_ids: Sequence[int], **options: Any) -> str:
        """Returns the text of tokens."""
        ...

    def convert_tokens_to_ids(self, tokens: str) -> Any:
        """Returns the id of a token, given as text."""
        ...

    def save_pretrained(self, save_directory: Any) -> Any:
        """Writes the tokenizer's files to a directory."""
        ...


def has_tokenizer(directory: str | Path) -> bool:
    """Returns whether a directory contains tokenizer files."""
    return any((Path(directory) / name).is_file() for name in _FILES)


def load_tokenizer(directory: str | Path) -> Tokenizer:
    """Loads `AutoTokenizer` from the files of a directory.

    Raises:
      UserError: there are no tokenizer files, or they cannot be read.
    """
    directory = Path(directory)
    if not has_tokenizer(directory):
        raise UserError(
            f"{directory}: no tokenizer files (tokenizer.json); copy them from the checkpoint's source, "
            "or work on token ids"
        )
    quiet_transformers()
    from transformers import AutoTokenizer

    try:
        return cast(Tokenizer, AutoTokenizer.from_pretrained(directory, local_files_only=True))
    except Exception as error:  # damaged files can raise OSError, ValueError, KeyError, a bare Exception, ...
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"{directory}: the tokenizer files cannot be read ({reason})") from error


class PlainText:
    """Keeps what users and models say from spelling special tokens, which could end a turn or begin another one.

    Such text gets a space: `<|eot_id|>` becomes `< |eot_id|>`, `</s>` becomes `< /s>`. transformers' processors would
    take it for the special token.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        """Finds the special tokens of `tokenizer`."""
        special = [str(token) for token in tokenizer.added_tokens_decoder.values() if token.special]
        special = sorted({text for text in special if len(text) > 1}, key=len, reverse=True)
        self._special = re.compile("|".join(map(re.escape, special))) if special else None

    def changes(self, text: str) -> bool:
        """Returns whether the text spells a special token."""
        return self(text) != text

    def __call__(self, text: str) -> str:
        """Returns the text with a space after the first character of every special token in it."""
        if self._special is None:
            return text
        return self._special.sub(lambda match: f"{match.group()[0]} {match.group()[1:]}", text)
