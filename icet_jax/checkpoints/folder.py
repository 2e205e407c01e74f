"""Exported folders, which are complete or absent and replace only earlier exports."""

import contextlib
import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

import jax
import numpy as np

from icet_jax.checkpoints.safetensors_io import dtype_name, write_safetensors
from icet_jax.checkpoints.streaming import to_host
from icet_jax.errors import UserError, write_error
from icet_jax.files import JsonObject, replace_dir_atomic

VALUE_HEAD = "value_head.safetensors"
"""File of the value head next to a model or an adapter; transformers and PEFT do not read it."""
ADAPTER = "adapter"
"""Sub-folder of an exported model for its PEFT adapter."""


def check_target(out_dir: Path, source: Path | None, mark: str) -> None:
    """Raises a `UserError` unless `out_dir` is new, empty, or an earlier export.

    Args:
      out_dir: the target.
      source: directory of the exported model, or None.
      mark: a file that every earlier export has.
    """
    if source is not None and out_dir.resolve() == source.resolve():
        raise UserError(f"{out_dir}: is the model's own source; export to another directory")
    if out_dir.exists() and not out_dir.is_dir():
        raise UserError(f"{out_dir}: is a file; give a directory")
    if out_dir.is_dir() and {path.name for path in out_dir.iterdir()} - {ADAPTER} and not (out_dir / mark).is_file():
        raise UserError(f"{out_dir}: holds something else than an exported model; give a new directory")


@contextlib.contextmanager
def beside(out_dir: Path) -> Iterator[Path]:
    """Yields a temporary folder that replaces `out_dir` if the block succeeds and is removed otherwise.

    Its name is fixed, so that the next export removes what a killed one left.

    Raises:
      UserError: the folder cannot be written.
    """
    folder = out_dir.with_name(f".{out_dir.name}.partial")
    try:
        out_dir.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        yield folder
        replace_dir_atomic(folder, out_dir)
    except OSError as error:
        raise write_error(out_dir, error) from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def write_json(path: Path, values: JsonObject) -> None:
    """Writes an indented JSON file into an unfinished folder."""
    path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def head_on_host(head: Mapping[str, jax.Array] | None) -> dict[str, np.ndarray] | None:
    """Returns a value head as numpy arrays; with several processes all of them call it."""
    return None if head is None else {name: to_host(array, None) for name, array in sorted(head.items())}


def write_beside_weights(folder: Path, head: dict[str, np.ndarray] | None, texts: Mapping[str, str]) -> None:
    """Writes the value head and text files such as a model card into an unfinished folder."""
    if head is not None:
        specs = {name: (dtype_name(array.dtype), array.shape) for name, array in head.items()}
        write_safetensors(folder / VALUE_HEAD, specs, lambda name: head[name])
    for name, text in texts.items():
        (folder / name).write_text(text, encoding="utf-8")
