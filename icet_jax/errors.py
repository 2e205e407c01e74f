"""How a run ends early: the one exception a user is meant to see, and the exit codes."""

import errno
import os

WRONG_INPUT = 2
RESUMABLE = 75  # EX_TEMPFAIL of sysexits.h
"""Exit code of a run that ended in order for a cause outside of it: the same command goes on where it stopped."""

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.ESTALE)


def one_line(text: str) -> str:
    """`text` as one line of visible characters: line ends are spaces, what steers a terminal is written as an escape.

    Names and values that a file gave are quoted in errors and reports; none may break the line, colour or reorder it.
    """
    if text.isprintable():
        return text
    shown = " ".join(text.splitlines())
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode("ascii") for char in shown)


class UserError(Exception):
    """Bad input: one line that names the file, field or row, what was wrong, and the mend.

    The front door (`icet_jax.main`) prints the line alone and exits with `exit_code`.
    """

    def __init__(self, line: str, *, exit_code: int = WRONG_INPUT) -> None:
        """`line` may quote what a file holds: it is put through `one_line`."""
        super().__init__(one_line(line))
        self.exit_code = exit_code


class Stopped(SystemExit):
    """The run was told to stop, and the same command goes on. Signals raise it anywhere, so it is no `Exception`."""

    def __init__(self, line: str) -> None:
        """`line` is what the front door prints."""
        super().__init__(RESUMABLE)
        self.line = line


def write_error(path: object, error: Exception) -> UserError:
    """The line for a file that could not be written; `RESUMABLE` where its disk is full or gone.

    Libraries that write through C++ raise no `OSError`: the system's reason then stands in their message.
    """
    number, reason = getattr(error, "errno", None), getattr(error, "strerror", None)
    if number is None:
        number = next((code for code in _FULL if os.strerror(code) in str(error)), None)
        reason = None if number is None else os.strerror(number)
    code = RESUMABLE if number in _FULL else WRONG_INPUT
    mend = "free space and start again" if code == RESUMABLE else "choose another place"
    return UserError(f"{path}: cannot be written to ({reason or error}); {mend}", exit_code=code)


def full_disk(error: BaseException) -> UserError | None:
    """The line for an error that says that a disk is full, wherever it was met; None for any other."""
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return write_error(error.filename or "a file of the run", error)
    return None
