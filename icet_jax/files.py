"""Reads and writes files. A written file is complete or absent: it gets its name only when all of it is on disk."""

import errno
import json
import os
import shutil
import stat
import tempfile
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from icet_jax.errors import UserError, write_error

JsonObject = dict[str, Any]
"""An object of a JSON file: text keys, and values of any JSON type."""

_CHECKSUM = ', "crc32": '
_writes = True
_WAITS = (0.2, 1.0)  # seconds before each new attempt to write to a full disk, which others may be clearing


def write_nothing() -> None:
    """Makes the functions of this module write nothing in this process, because only a run's first process writes."""
    global _writes
    _writes = False


_IRREGULAR = {
    stat.S_IFIFO: "a named pipe", stat.S_IFSOCK: "a socket", stat.S_IFCHR: "a device", stat.S_IFBLK: "a device",
}  # fmt: skip


def require_regular(path: str | os.PathLike[str], name: str | None = None) -> None:
    """Raises an error for a path that could be read for ever: a named pipe, a socket or a device.

    A link to a file is accepted. A missing file or a folder is accepted too, because opening it gives a clear error.

    Args:
      path: path that is about to be opened.
      name: name of the file in the error; the path if None.

    Raises:
      UserError: the path is a named pipe, a socket or a device.
    """
    try:
        kind = _IRREGULAR.get(stat.S_IFMT(os.stat(path).st_mode))
    except (OSError, ValueError):
        return
    if kind is not None:
        raise UserError(f"{name or path}: is {kind}, not a regular file; write what it gives to a file, and name that")


_LFS_POINTER = b"version https://git-lfs.github.com/spec/"


def is_lfs_pointer(path: str | os.PathLike[str]) -> bool:
    """Returns whether a file is the small text that Git LFS puts in place of a file that has not been fetched."""
    try:
        with open(path, "rb") as file:
            return file.read(len(_LFS_POINTER)) == _LFS_POINTER
    except OSError:
        return False


LFS_ADVICE = "is a Git LFS pointer, not the file itself; fetch the file with `git lfs pull`"
"""Text of an error about a Git LFS pointer, after the name of the file."""


def read_bytes(path: Path) -> bytes:
    """Returns the bytes of a file; raises a UserError for a named pipe, a socket or a device."""
    require_regular(path)
    return path.read_bytes()


def read_text(path: Path, errors: str = "strict") -> str:
    """Returns the UTF-8 text of a file; `errors` is that of `open`. Raises as `read_bytes` does."""
    require_regular(path)
    return path.read_text(encoding="utf-8", errors=errors)


def parse_json(text: str | bytes, **options: Any) -> Any:
    """Returns the value that `json.loads` finds in a text, but raises ValueError whatever is wrong with the text.

    Raises:
      ValueError: the text is not JSON, not UTF-8, or nested more deeply than Python can parse.
    """
    try:
        return json.loads(text, **options)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def seal(row: JsonObject) -> str:
    """Returns a JSON object as one line of text that ends with its checksum, for `unseal`."""
    text = json.dumps(row, allow_nan=False)
    return f"{text[:-1]}{_CHECKSUM}{zlib.crc32(text.encode())}}}"


def unseal(line: str) -> JsonObject:
    """Returns the object in a line that `seal` has written, without its checksum.

    Raises:
      ValueError: the line was not written by `seal`, or has changed since.
    """
    text, separator, checksum = line.rpartition(_CHECKSUM)
    text += "}"
    if not separator or checksum != f"{zlib.crc32(text.encode('utf-8', 'surrogatepass'))}}}":
        raise ValueError("no checksum, or a wrong one")
    row = parse_json(text)
    if not isinstance(row, dict):
        raise ValueError("no object")
    return row


def write_bytes_atomic(path: str | Path, data: bytes) -> None:
    """Writes `data` to `path`; after an interruption the file has either its previous content or all of `data`.

    Raises:
      UserError: the folder cannot be written to or the disk is full.
    """
    if _writes:
        _retry_on_full_disk(lambda: _replace(Path(path), data), path)


def append_text(path: str | Path, text: str) -> None:
    """Adds UTF-8 text to the end of a file. If that fails, nothing is added; a killed process may have added a part.

    Raises:
      UserError: the file cannot be written or the disk is full.
    """
    if _writes:
        _retry_on_full_disk(lambda: _append(Path(path), text.encode("utf-8")), path)


def _retry_on_full_disk(write: Callable[[], None], path: str | Path) -> None:
    """Calls `write`, again after each of `_WAITS` while the disk is full; raises a UserError if it keeps failing."""
    for wait in (*_WAITS, None):
        try:
            return write()
        except OSError as error:
            if wait is None or error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise write_error(path, error) from error
        time.sleep(wait)


def _replace(path: Path, data: bytes) -> None:
    """Writes a temporary file in the same folder and renames it to `path`."""
    temporary: Path | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        temporary = Path(name)
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.chmod(0o644)
        temporary.replace(path)
    except BaseException:
        if temporary is not None:
            temporary.unlink(missing_ok=True)
        raise


def _append(path: Path, data: bytes) -> None:
    """Adds bytes to the end of a file, and removes them again if not all could be written."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab", buffering=0) as file:
        end = file.tell()
        try:
            while data:
                data = data[file.write(data) :]
        except OSError:
            file.truncate(end)
            raise


def write_text_atomic(path: str | Path, text: str) -> None:
    """Writes UTF-8 text to `path`, see `write_bytes_atomic`."""
    write_bytes_atomic(path, text.encode("utf-8"))


def replace_dir_atomic(temporary: str | Path, final: str | Path) -> None:
    """Renames the folder `temporary` to `final`, replacing an older folder of that name.

    The older folder is renamed first and removed last, so that a crash leaves a complete folder under one of the names.
    """
    temporary, final = Path(temporary), Path(final)
    old = final.with_name(f".{final.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if final.exists():
        final.replace(old)
    temporary.replace(final)
    shutil.rmtree(old, ignore_errors=True)
