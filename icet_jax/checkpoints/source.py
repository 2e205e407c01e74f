"""Where a checkpoint's files are, and which tokens they say end and pad a response."""

import json
import os
import re
from pathlib import Path
from typing import Any

from icet_jax.errors import UserError

# Weights are read from safetensors alone; everything else a checkpoint carries is small.
_FILES = ("*.json", "*.safetensors", "*.txt", "*.model", "*.jinja")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")


def local_directory(path_or_id: str | os.PathLike[str]) -> Path:
    """The directory of a checkpoint: a local one as it is, a hub id's files from the cache or the network.

    Raises:
      UserError: there is no such directory, and it cannot be fetched from the hub either.
    """
    path = Path(path_or_id).expanduser()
    if path.is_dir():
        return path
    name = os.fspath(path_or_id)
    if path.exists():
        raise UserError(f"{name}: a file; give the checkpoint's directory, the one with config.json")
    if not _HUB_ID.fullmatch(name):
        raise UserError(f"{name}: no such directory; give a checkpoint's directory or its id on the Hugging Face hub")
    import huggingface_hub

    try:
        return Path(huggingface_hub.snapshot_download(name, allow_patterns=list(_FILES)))
    except Exception as error:  # the hub's client raises its own, requests', httpx' and the system's errors
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(
            f"{name}: no such directory, and not to be had from the Hugging Face hub either "
            f"({type(error).__name__}: {reason[:200]}); download it where there is a network and give its directory"
        ) from error


def generation_tokens(directory: str | Path, config: dict[str, Any]) -> tuple[tuple[int, ...], int]:
    """(eos_ids, pad_id) from generation_config.json, else from config.json (HF's order), else LLaMA's EOS, 2.

    Where no pad is named it is the first EOS.

    Args:
      directory: of the checkpoint.
      config: its config.json.

    Raises:
      UserError: generation_config.json is not readable, or a token id is not one.
    """
    path = Path(directory) / "generation_config.json"
    try:
        generation = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: not readable JSON ({error}); download it again") from error
    sources = [source for source in (generation, config, config.get("text_config")) if isinstance(source, dict)]
    eos = _first(sources, "eos_token_id", 2)
    eos_ids = tuple(eos) if isinstance(eos, list) and eos else (eos,)
    pad_id = _first(sources, "pad_token_id", eos_ids[0])
    for name, token in [*(("eos_token_id", token) for token in eos_ids), ("pad_token_id", pad_id)]:
        if isinstance(token, bool) or not isinstance(token, int) or token < 0:
            raise UserError(f"{path}: {name} is {token!r}, which is not a token id")
    return eos_ids, pad_id


def _first(sources: list[dict[str, Any]], name: str, default: Any) -> Any:
    return next((source[name] for source in sources if source.get(name) is not None), default)
