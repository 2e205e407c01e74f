"""Finds the files that come with the package: `configs/` and `examples/`."""

import os
from pathlib import Path

import icet_jax

_PACKAGE = Path(icet_jax.__file__).parent
FOLDERS = (_PACKAGE.parent, _PACKAGE)
"""Where they are: in the repository, or in the installed package."""


def find(path: str | Path) -> Path | None:
    """Returns where `path` is a file: in the working directory, else where the package's files are; None: nowhere."""
    for folder in (Path.cwd(), *FOLDERS):
        if os.path.isfile(folder / path):  # unlike `Path.is_file`, false for names that no file can have
            return folder / path
    return None


def example(path: str | Path) -> str | Path:
    """Returns `path`, or the package's copy of a file such as "examples/scene.png" that is not where it should be."""
    is_example = Path(path).parts[:1] == ("examples",) and not os.path.exists(path)
    return (find(path) or path) if is_example else path
