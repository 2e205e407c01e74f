"""Finds the directory of a checkpoint, locally or on the Hugging Face hub, and its end and padding tokens."""

import os
import re
import time
from pathlib import Path
from typing import Any

from icet_jax.errors import RESUMABLE, WRONG_INPUT, UserError
from icet_jax.files import JsonObject, parse_json, require_regular

# Patterns of all files that a loader reads: safetensors weights at the top of the repository, and small files.
_FILES = (
    "*.json", "*.txt", "*.model", "*.jinja", "model.safetensors", "model-*-of-*.safetensors",
    "adapter_model.safetensors", "value_head.safetensors",
)  # fmt: skip
_IN_FOLDERS = "*/*"
_RETRY_DELAYS = (2.0, 10.0)  # seconds before the second and third download; the hub's client itself retries, too
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")


def local_directory(path_or_id: str | os.PathLike[str], revision: str | None = None) -> Path:
    """Returns the directory of a checkpoint, after downloading its files if a hub id is given and they are not cached.

    An interrupted download continues where it stopped. HF_HUB_OFFLINE and HF_HOME are respected. An access token is
    read from HF_TOKEN alone.

    Args:
      path_or_id: a directory, or the id of a repository on the Hugging Face hub.
      revision: branch, tag or commit of the repository; None is the default branch.

    Raises:
      UserError: there is no such directory and the files cannot be downloaded (the message says why), or one of the
        files is not a regular file.
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
    """Downloads a repository's files, with retries, and returns their directory in the hub's cache."""
    import huggingface_hub

    token = os.environ.get("HF_TOKEN") or False  # False: ignores a token that an earlier login left on this machine
    for delay in (*_RETRY_DELAYS, None):
        try:
            return Path(
                huggingface_hub.snapshot_download(
                    name, revision=revision, allow_patterns=list(_FILES), ignore_patterns=[_IN_FOLDERS], token=token
                )
            )
        except Exception as error:  # the hub's client raises its own, requests', httpx' and the system's errors
            is_temporary = _is_temporary(error)
            if not is_temporary or delay is None:
                code = RESUMABLE if is_temporary else WRONG_INPUT
                raise UserError(f"{name}: {_explain(error, name, revision, token)}", exit_code=code) from None
            time.sleep(delay)
    raise AssertionError("unreachable")


def _is_temporary(error: Exception) -> bool:
    """Returns whether a retry may succeed, because the network or the hub failed."""
    from huggingface_hub import constants, errors

    permanent = (errors.GatedRepoError, errors.RevisionNotFoundError, errors.RepositoryNotFoundError)
    if constants.HF_HUB_OFFLINE or isinstance(error, permanent):
        return False
    return isinstance(error, OSError) or type(error).__module__.split(".")[0] in ("httpx", "requests")


def _explain(error: Exception, name: str, revision: str | None, token: str | bool) -> str:
    """Returns why a download failed and how to fix that; the text never contains the access token."""
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
        f"no such directory, and the download from the Hugging Face hub{at} failed ({type(error).__name__}: "
        f"{message[:200]}); download it where there is a network and give its directory"
    )


def generation_tokens(
    directory: str | Path, config: JsonObject, vocab_size: int | None = None
) -> tuple[tuple[int, ...], int]:  # fmt: skip
    """Returns (ids of the tokens that end a response, id of the padding token).

    Each of the two is read from generation_config.json or, if that file lacks it, from config.json, as in transformers.
    The default end token is 2, as in LLaMA; the default padding token is the first end token.

    Args:
      directory: directory of the checkpoint.
      config: the parsed config.json of the checkpoint.
      vocab_size: number of tokens of the model, to check the end tokens; None if unknown.

    Raises:
      UserError: generation_config.json is not readable, a token id is invalid, or the model has no such EOS.
    """
    path = Path(directory) / "generation_config.json"
    try:
        generation = parse_json(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: not readable JSON ({error}); download it again") from error
    config_path = Path(directory) / "config.json"
    text_config = config.get("text_config")
    sources = [(f"{path}: ", generation), (f"{config_path}: ", config), (f"{config_path}: text_config.", text_config)]
    valid = [(where, source) for where, source in sources if isinstance(source, dict)]
    eos_where, eos = _first(valid, "eos_token_id", 2)
    eos_ids = tuple(eos) if isinstance(eos, list) and eos else (eos,)
    pad_where, pad_id = _first(valid, "pad_token_id", eos_ids[0])
    eos_tokens = [(f"{eos_where}eos_token_id", token) for token in eos_ids]
    for name, token in [*eos_tokens, (f"{pad_where}pad_token_id", pad_id)]:
        if isinstance(token, bool) or not isinstance(token, int) or token < 0:
            raise UserError(f"{name} is {token!r}, which is not a token id")
    for token in eos_ids:
        if vocab_size is not None and token >= vocab_size:
            raise UserError(
                f"{eos_where}eos_token_id is {token}, but the model's tokens are 0..{vocab_size - 1}: no answer would "
                "end; take the file from the same checkpoint as the weights"
            )
    return eos_ids, pad_id


def _first(sources: list[tuple[str, JsonObject]], name: str, default: Any) -> tuple[str, Any]:
    """Returns name and value of the first source that has the field `name`, or ("", default).

    Args:
      sources: (name for error messages, fields) pairs; a field that is None counts as absent.
      name: field to look for.
      default: value if all sources lack it.
    """
    return next(((where, source[name]) for where, source in sources if source.get(name) is not None), ("", default))
