"""Finds a checkpoint's files, and the tokens that end and pad a response according to them."""

import os
import re
import time
from pathlib import Path
from typing import Any

from icet_jax.errors import RESUMABLE, WRONG_INPUT, UserError
from icet_jax.files import JsonObject, parse_json, require_regular

# All files that a loader reads: safetensors weights at the top of the repository, and small files next to them.
_FILES = (
    "*.json", "*.txt", "*.model", "*.jinja", "model.safetensors", "model-*-of-*.safetensors",
    "adapter_model.safetensors", "value_head.safetensors",
)  # fmt: skip
_IN_FOLDERS = "*/*"
_WAITS = (2.0, 10.0)  # seconds before each further attempt, after the hub client's own retries
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")


def local_directory(path_or_id: str | os.PathLike[str], revision: str | None = None) -> Path:
    """Returns the directory of a checkpoint: a local one, or that of a hub id's files from the cache or the network.

    An interrupted download continues where it stopped. HF_HUB_OFFLINE and HF_HOME are respected; a token is read only
    from HF_TOKEN.

    Args:
      path_or_id: a directory, or the id of a repository on the Hugging Face hub.
      revision: branch, tag or commit of the repository; None is the default branch.

    Raises:
      UserError: there is no such directory and it cannot be downloaded from the hub (the message says why), or one of
        its files is not a regular file.
    """
    path = Path(path_or_id).expanduser()
    name = os.fspath(path_or_id)
    if path.is_dir():
        if revision is not None:
            raise UserError(f"{name}: a local directory has no revision ({revision}); leave the revision unset")
        for pattern in _FILES:
            for file in path.glob(pattern):
                require_regular(file)
        return path
    if path.exists():
        raise UserError(f"{name}: a file; give the checkpoint's directory, the one with config.json")
    if not _HUB_ID.fullmatch(name):
        raise UserError(f"{name}: no such directory; give a checkpoint's directory or its id on the Hugging Face hub")
    directory = _download(name, revision)
    if not any(directory.glob("*.safetensors")):
        at = "" if revision is None else f" --revision {revision}"
        raise UserError(
            f"{name}: has no safetensors weights on the hub; if it has pickled ones, convert them: "
            f"python scripts/convert_pickle.py {name}{at} --out DIR, and give DIR"
        )
    return directory


def _download(name: str, revision: str | None) -> Path:
    import huggingface_hub

    token = os.environ.get("HF_TOKEN") or False  # False: ignores a token that an earlier login left on this machine
    for wait in (*_WAITS, None):
        try:
            return Path(
                huggingface_hub.snapshot_download(
                    name, revision=revision, allow_patterns=list(_FILES), ignore_patterns=[_IN_FOLDERS], token=token
                )
            )
        except Exception as error:  # the hub's client raises its own, requests', httpx' and the system's errors
            is_temporary = _may_pass(error)
            if not is_temporary or wait is None:
                code = RESUMABLE if is_temporary else WRONG_INPUT
                raise UserError(f"{name}: {_reason(error, name, revision, token)}", exit_code=code) from None
            time.sleep(wait)
    raise AssertionError("unreachable")


def _may_pass(error: Exception) -> bool:
    """Returns whether the network or the hub failed, so that a retry may succeed."""
    from huggingface_hub import constants, errors

    final = (errors.GatedRepoError, errors.RevisionNotFoundError, errors.RepositoryNotFoundError)
    if constants.HF_HUB_OFFLINE or isinstance(error, final):
        return False
    return isinstance(error, OSError) or type(error).__module__.split(".")[0] in ("httpx", "requests")


def _reason(error: Exception, name: str, revision: str | None, token: str | bool) -> str:
    """Returns what happened and how to fix it, without parts of the request, which contains the token."""
    from huggingface_hub import constants, errors

    if isinstance(error, errors.GatedRepoError):
        return f"is gated: accept its terms at https://huggingface.co/{name} and set HF_TOKEN"
    if isinstance(error, errors.RevisionNotFoundError):
        return f"has no revision {revision} on the Hugging Face hub; give one of its branches, tags or commits"
    if isinstance(error, errors.RepositoryNotFoundError):
        return (
            "no such directory, and no such repository on the Hugging Face hub (of a private one, set HF_TOKEN); "
            "check the name"
        )
    at = "" if revision is None else f" at revision {revision}"
    if constants.HF_HUB_OFFLINE:
        return (
            f"no such directory, and not in the local cache{at} while HF_HUB_OFFLINE is set; "
            "download it where there is a network and give its directory"
        )
    message = " ".join(str(error).split())
    if token:
        message = message.replace(str(token), "HF_TOKEN")
    return (
        f"no such directory, and not to be had from the Hugging Face hub{at} either ({type(error).__name__}: "
        f"{message[:200]}); download it where there is a network and give its directory"
    )


def generation_tokens(
    directory: str | Path, config: JsonObject, vocab_size: int | None = None
) -> tuple[tuple[int, ...], int]:  # fmt: skip
    """Returns (eos_ids, pad_id) from generation_config.json, else config.json (HF's order), else LLaMA's EOS, 2.

    If no pad token is named, it is the first EOS.

    Args:
      directory: directory of the checkpoint.
      config: its config.json.
      vocab_size: number of tokens of the model, to check every EOS; None if unknown.

    Raises:
      UserError: generation_config.json is not readable, a token id is invalid, or the model has no such EOS.
    """
    path = Path(directory) / "generation_config.json"
    try:
        generation = parse_json(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: not readable JSON ({error}); download it again") from error
    whole = Path(directory) / "config.json"
    sources = [(f"{path}: ", generation), (f"{whole}: ", config), (f"{whole}: text_config.", config.get("text_config"))]
    known = [(where, source) for where, source in sources if isinstance(source, dict)]
    place, eos = _first(known, "eos_token_id", 2)
    eos_ids = tuple(eos) if isinstance(eos, list) and eos else (eos,)
    pad_place, pad_id = _first(known, "pad_token_id", eos_ids[0])
    for name, token in [*((f"{place}eos_token_id", token) for token in eos_ids), (f"{pad_place}pad_token_id", pad_id)]:
        if isinstance(token, bool) or not isinstance(token, int) or token < 0:
            raise UserError(f"{name} is {token!r}, which is not a token id")
    for token in eos_ids:
        if vocab_size is not None and token >= vocab_size:
            raise UserError(
                f"{place}eos_token_id is {token}, but the model's tokens are 0..{vocab_size - 1}: no answer would end; "
                "take the file from the same checkpoint as the weights"
            )
    return eos_ids, pad_id


def _first(sources: list[tuple[str, JsonObject]], name: str, default: Any) -> tuple[str, Any]:
    """Returns the value of `name` in the first source that has one, and where that is (for error messages)."""
    return next(((where, source[name]) for where, source in sources if source.get(name) is not None), ("", default))
