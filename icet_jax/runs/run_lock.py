"""Lets only one process at a time write into a run directory, by a lock on its file `run.lock`.

The lock is an advisory POSIX record lock. The operating system removes it when its process ends, even if the process is
killed; child processes do not inherit it. Network file systems with locks support it (NFS version 4, Lustre mounted
with `flock`). The content of the file only names the process that has the lock, for messages.
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
_LOCKED_BY_OTHERS = (errno.EACCES, errno.EAGAIN)
_SHOWN_BYTES = 300  # most bytes of a lock file that an error shows
# A record lock belongs to the process: the process could lock a file twice, and it loses the lock when it closes any
# descriptor of the file. A file that this process has locked must therefore not be opened again.
_locks_of_this_process: set[Path] = set()


@contextlib.contextmanager
def locked(workdir: Path, advice: str = "choose another --workdir") -> Iterator[None]:
    """Keeps every other process from writing into `workdir` until the block ends.

    On a file system without locks it prints a warning and continues without a lock.

    Args:
      workdir: the run directory, which is created if necessary.
      advice: what the error tells the user to do instead of waiting.

    Raises:
      UserError: another run is writing there (the message names its process and host), or the folder cannot be written
        to.
    """
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        path = workdir.resolve() / NAME
        if path in _locks_of_this_process:
            raise _refusal(workdir, _this_process(), advice)
        descriptor = _acquire(path, workdir, advice)
    except OSError as error:
        raise write_error(f"--workdir={workdir}", error) from error
    _locks_of_this_process.add(path)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            path.unlink()
        os.close(descriptor)
        _locks_of_this_process.discard(path)


def _acquire(path: Path, workdir: Path, advice: str) -> int:
    """Opens and locks the file `path`; returns its descriptor, which keeps the lock until it is closed."""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            _lock(descriptor, workdir, advice)
            if _is_open_file(descriptor, path):
                os.ftruncate(descriptor, 0)
                os.pwrite(descriptor, f"{_this_process()}\n".encode(), 0)
                return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)  # the process that had the lock removed the file; another may have created a new one


def _lock(descriptor: int, workdir: Path, advice: str) -> None:
    """Locks an open file; raises a `UserError` if another process has locked it, and warns if locks do not exist."""
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in _LOCKED_BY_OTHERS:
            holder = os.pread(descriptor, _SHOWN_BYTES, 0).decode("utf-8", "replace").strip()
            raise _refusal(workdir, holder, advice) from None
        print(
            f"icet-jax: --workdir={workdir}: its file system has no locks ({error.strerror}); nothing keeps a second "
            "run from writing there",
            file=sys.stderr,
        )


def _is_open_file(descriptor: int, path: Path) -> bool:
    """Returns whether `path` is still the file that `descriptor` has open."""
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except FileNotFoundError:
        return False


def _this_process() -> str:
    return f"process {os.getpid()} on {socket.gethostname()}"


def _refusal(workdir: Path, holder: str, advice: str) -> UserError:
    """Returns the error that another run, in the process `holder` (may be ""), is writing into `workdir`."""
    who = f" ({holder})" if holder else ""
    return UserError(f"--workdir={workdir}: another run{who} is writing there; wait for it or {advice}")
