"""The tokenizer of a checkpoint directory: transformers', from local files alone."""

import os
from pathlib import Path
from typing import Any

from icet_jax.errors import UserError

# Any of these makes a directory one that has a tokenizer.
_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")


def has_tokenizer(directory: str | Path) -> bool:
    """Whether a directory carries tokenizer files."""
    return any((Path(directory) / name).is_file() for name in _FILES)


def load_tokenizer(directory: str | Path) -> Any:
    """`AutoTokenizer` over a directory's own files.

    Raises:
      UserError: it has no tokenizer files, or they cannot be read.
    """
    directory = Path(directory)
    if not has_tokenizer(directory):
        raise UserError(
            f"{directory}: no tokenizer files (tokenizer.json); copy them from the checkpoint's source, "
            "or work on token ids"
        )
    # Without torch, transformers warns that it cannot run models; nobody asked it to.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(directory, local_files_only=True)
    except Exception as error:  # damaged files surface as any of OSError, ValueError, KeyError, Exception
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"{directory}: the tokenizer files cannot be read ({reason})") from error
