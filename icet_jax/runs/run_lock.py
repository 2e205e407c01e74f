"""One writer per run directory: `run.lock`, an advisory lock of the operating system that ends with its process.

It is a POSIX record lock. Network file systems that have locks know it (NFS version 4, Lustre mounted with `flock`),
child processes do not inherit it, and a killed process leaves none behind. The file itself only names the holder.
"""

import contextlib
import errno
import fcntl
import os
import socket
import sys
from collections.abc import Iterator
from pathlib import Path

from icet_jax.errors import UserError, write_error

NAME = "run.lock"
_HELD_ELSEWHERE = (errno.EACCES, errno.EAGAIN)
_SHOWN_BYTES = 300  # of a lock file
# A record lock belongs to the process, which may therefore lock a file twice, and loses the lock when it closes any
# descriptor of the file: what this process holds is looked up here before the file is opened.
_held: set[Path] = set()


@contextlib.contextmanager
def locked(workdir: Path, advice: str = "choose another --workdir") -> Iterator[None]:
    """Keeps every other process from writing into `workdir` until the block ends.

    On a file system without locks it says so on stderr and goes on without one.

    Args:
      workdir: the run directory; made if it is not there.
      advice: what the refusal tells a user to do instead of waiting.

    Raises:
      UserError: another run is writing there (the line names its process and host), or the folder cannot be written to.
    """
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        path = workdir.resolve() / NAME
        if path in _held:
            raise _refusal(workdir, _holder(os.getpid()), advice)
        descriptor = _take(path, workdir, advice)
    except OSError as error:
        raise write_error(f"--workdir={workdir}", error) from error
    _held.add(path)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            path.unlink()
        os.close(descriptor)
        _held.discard(path)


def _take(path: Path, workdir: Path, advice: str) -> int:
    """Opens and locks the file; returns its descriptor, which holds the lock until it is closed."""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            _lock(descriptor, workdir, advice)
            if _is_file(descriptor, path):
                os.ftruncate(descriptor, 0)
                os.pwrite(descriptor, f"{_holder(os.getpid())}\n".encode(), 0)
                return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)  # its holder removed the file, and another process may have made a new one


def _lock(descriptor: int, workdir: Path, advice: str) -> None:
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in _HELD_ELSEWHERE:
            holder = os.pread(descriptor, _SHOWN_BYTES, 0).decode("utf-8", "replace").strip()
            raise _refusal(workdir, holder, advice) from None
        print(
            f"icet-jax: --workdir={workdir}: its file system has no locks ({error.strerror}); nothing keeps a second "
            "run from writing there",
            file=sys.stderr,
        )


def _is_file(descriptor: int, path: Path) -> bool:
    """Whether `path` still is the file that `descriptor` has open."""
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except FileNotFoundError:
        return False


def _holder(process: int) -> str:
    return f"process {process} on {socket.gethostname()}"


def _refusal(workdir: Path, holder: str, advice: str) -> UserError:
    who = f" ({holder})" if holder else ""
    return UserError(f"--workdir={workdir}: another run{who} is writing there; wait for it or {advice}")
