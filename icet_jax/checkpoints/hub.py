"""From a name on the command line to a directory."""

import re
from pathlib import Path

from icet_jax.errors import UserError

_REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+")
_FILES = ("*.json", "*.safetensors", "*.model", "*.txt", "*.jinja")


def local_directory(name: str | Path) -> Path:
    """The local directory of a checkpoint: `name` itself, or a Hugging Face repository downloaded to its cache.

    Pickled weights are never downloaded.

    Raises:
      UserError: neither a directory nor a repository that can be reached.
    """
    path = Path(name)
    if path.is_dir():
        return path
    if not _REPOSITORY.fullmatch(str(name)):
        raise UserError(f"{name}: no such directory; give a model directory or a Hugging Face id (owner/name)")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(str(name), allow_patterns=list(_FILES)))
    except Exception as error:  # the hub's own errors, and those of three HTTP libraries
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(
            f"{name}: neither a local directory nor a Hugging Face repository that can be reached ({reason})"
        ) from error
