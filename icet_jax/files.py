"""Writing files so that a reader never meets half of one (write beside, then rename), and parsing what others wrote."""

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

_SEAL = ', "crc32": '
_writes = True
_WAITS = (0.2, 1.0)  # s before a full disk is tried again; others may be clearing it


def write_nothing() -> None:
    """From now on `write_bytes_atomic` does nothing in this process: of several processes, the first one writes."""
    global _writes
    _writes = False


_KINDS = {
    stat.S_IFIFO: "a named pipe", stat.S_IFSOCK: "a socket", stat.S_IFCHR: "a device", stat.S_IFBLK: "a device",
}  # fmt: skip


def require_regular(path: str | os.PathLike[str], name: str | None = None) -> None:
    """Refuses what is no file and may be read for ever: a named pipe, a socket, a device. A link may lead to a file.

    A path that leads nowhere, or to a folder, passes: opening it says so.

    Args:
      path: of what is about to be opened.
      name: what an error calls it; a path names itself.

    Raises:
      UserError: it is one of these.
    """
    try:
        kind = _KINDS.get(stat.S_IFMT(os.stat(path).st_mode))
    except (OSError, ValueError):
        return
    if kind is not None:
        raise UserError(f"{name or path}: is {kind}, not a regular file; write what it gives to a file, and name that")


_LFS_POINTER = b"version https://git-lfs.github.com/spec/"


def is_lfs_pointer(path: str | os.PathLike[str]) -> bool:
    """Whether a file is the small text that Git LFS leaves in place of a file which has not been fetched."""
    try:
        with open(path, "rb") as file:
            return file.read(len(_LFS_POINTER)) == _LFS_POINTER
    except OSError:
        return False


LFS_ADVICE = "is a Git LFS pointer, not the file itself; fetch the file with `git lfs pull`"


def read_bytes(path: Path) -> bytes:
    """The bytes of a file that `require_regular` lets pass."""
    require_regular(path)
    return path.read_bytes()


def read_text(path: Path, errors: str = "strict") -> str:
    """The UTF-8 text of a file that `require_regular` lets pass."""
    require_regular(path)
    return path.read_text(encoding="utf-8", errors=errors)


def parse_json(text: str | bytes, **options: Any) -> Any:
    """`json.loads` with one kind of error for whatever is wrong with a text that came from outside.

    Raises:
      ValueError: it is not JSON, not UTF-8, or nested more deeply than Python can follow.
    """
    try:
        return json.loads(text, **options)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def seal(row: dict[str, Any]) -> str:
    """A JSON object as one line that `unseal` takes back only if no byte of it has changed."""
    text = json.dumps(row, allow_nan=False)
    return f"{text[:-1]}{_SEAL}{zlib.crc32(text.encode())}}}"


def unseal(line: str) -> dict[str, Any]:
    """The object of a line that `seal` made, without its line end.

    Raises:
      ValueError: something has changed it.
    """
    text, found, stored = line.rpartition(_SEAL)
    text += "}"
    if not found or stored != f"{zlib.crc32(text.encode('utf-8', 'surrogatepass'))}}}":
        raise ValueError("no checksum, or a wrong one")
    row = parse_json(text)
    if not isinstance(row, dict):
        raise ValueError("no object")
    return row


def write_bytes_atomic(path: str | Path, data: bytes) -> None:
    """Writes `data` to `path`; `path` holds either its old content or all of the new.

    Raises:
      UserError: the folder cannot be written to or the disk is full.
    """
    if _writes:
        _with_patience(lambda: _replace(Path(path), data), path)


def append_text(path: str | Path, text: str) -> None:
    """Adds UTF-8 text to the end of a file, all of it or nothing; a kill may leave the beginning of it.

    Raises:
      UserError: the file cannot be written or the disk is full.
    """
    if _writes:
        _with_patience(lambda: _append(Path(path), text.encode("utf-8")), path)


def _with_patience(write: Callable[[], None], path: str | Path) -> None:
    """Calls `write`, and again if the disk was full."""
    for wait in (*_WAITS, None):
        try:
            return write()
        except OSError as error:
            if wait is None or error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise write_error(path, error) from error
        time.sleep(wait)


def _replace(path: Path, data: bytes) -> None:
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
    """`write_bytes_atomic` of UTF-8 text."""
    write_bytes_atomic(path, text.encode("utf-8"))


def replace_dir_atomic(temporary: str | Path, final: str | Path) -> None:
    """Moves a finished folder into place, replacing an older one of the same name.

    The older folder is moved aside first and removed last: a crash leaves one complete folder under either name.
    """
    temporary, final = Path(temporary), Path(final)
    old = final.with_name(f".{final.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if final.exists():
        final.replace(old)
    temporary.replace(final)
    shutil.rmtree(old, ignore_errors=True)
