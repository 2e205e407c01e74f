"""Writes the folders of exports completely or not at all, and replaces nothing but earlier exports."""

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
"""File name of the value head, next to a model or an adapter; transformers and PEFT do not read it."""
ADAPTER = "adapter"
"""Sub-folder of an exported model for its PEFT adapter."""


def check_target(out_dir: Path, source: Path | None, marker: str) -> None:
    """Raises a `UserError` unless `out_dir` is new, empty, or an earlier export.

    Args:
      out_dir: the directory to write.
      source: directory that the model was loaded from, or None.
      marker: name of a file by which an earlier export is recognised.
    """
    if source is not None and out_dir.resolve() == source.resolve():
        raise UserError(f"{out_dir}: the model was loaded from this directory; export to another one")
    if out_dir.exists() and not out_dir.is_dir():
        raise UserError(f"{out_dir}: is a file; give a directory")
    if out_dir.is_dir() and {path.name for path in out_dir.iterdir()} - {ADAPTER} and not (out_dir / marker).is_file():
        raise UserError(f"{out_dir}: contains something other than an exported model; give a new directory")


@contextlib.contextmanager
def unfinished_folder(out_dir: Path) -> Iterator[Path]:
    """Yields a temporary folder, which becomes `out_dir` if the block succeeds and is removed otherwise.

    The folder's name depends on `out_dir` alone. A folder that a killed process left is therefore found and removed by
    the next export to the same place.

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
    """Writes `values` as indented JSON to a file in an `unfinished_folder`."""
    path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def head_on_host(head: Mapping[str, jax.Array] | None) -> dict[str, np.ndarray] | None:
    """Returns a value head's arrays as numpy arrays by name, None for None; all processes of a run must call it."""
    return None if head is None else {name: to_host(array, None) for name, array in sorted(head.items())}


def write_beside_weights(folder: Path, head: dict[str, np.ndarray] | None, texts: Mapping[str, str]) -> None:
    """Writes the value head (if any) and text files ({name: content}), such as a model card, to `folder`."""
    if head is not None:
        specs = {name: (dtype_name(array.dtype), array.shape) for name, array in head.items()}
        write_safetensors(folder / VALUE_HEAD, specs, lambda name: head[name])
    for name, text in texts.items():
        (folder / name).write_text(text, encoding="utf-8")
