"""Finds the files that come with the package: `configs/` and `examples/`."""

import os
from pathlib import Path

import icet_jax

_PACKAGE = Path(icet_jax.__file__).parent
FOLDERS = (_PACKAGE.parent, _PACKAGE)
"""Folders that may contain `configs/` and `examples/`: the repository, and the installed package."""


def find(path: str | Path) -> Path | None:
    """Returns the file at the relative `path` in the working directory or in `FOLDERS`; None if there is no such file.

    An absolute path is returned unchanged if it is a file.
    """
    for folder in (Path.cwd(), *FOLDERS):
        if os.path.isfile(folder / path):  # unlike `Path.is_file`, false for names that no file can have
            return folder / path
    return None


def example(path: str | Path) -> str | Path:
    """Returns `path`, or the package's own copy if "examples/..." does not exist in the working directory."""
    is_example = Path(path).parts[:1] == ("examples",) and not os.path.exists(path)
    return (find(path) or path) if is_example else path
