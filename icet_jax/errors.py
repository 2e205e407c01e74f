"""How a command ends early: the exception whose message a user sees, and the exit codes."""

import contextlib
import errno
import os
import re
from collections.abc import Iterator

WRONG_INPUT = 2
RESUMABLE = 75  # EX_TEMPFAIL of sysexits.h
"""Exit code of a run that ended for an external cause, after saving its state: the same command continues it."""

_DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.ESTALE)


def one_line(text: str) -> str:
    """Returns `text` as one line of visible characters.

    Line ends become spaces, and other invisible characters are written as escapes. A name or value from a file that is
    quoted in an error or a report can therefore not break the line, colour it or change its order.
    """
    if text.isprintable():
        return text
    joined_lines = " ".join(text.splitlines())
    return "".join(
        char if char.isprintable() else char.encode("unicode_escape").decode("ascii") for char in joined_lines
    )


class UserError(Exception):
    """Bad input: one line that names the file, field or row, what was wrong, and how to fix it.

    The command line (`icet_jax.main`) prints the line without a traceback and exits with `exit_code`.
    """

    def __init__(self, line: str, *, exit_code: int = WRONG_INPUT) -> None:
        """Stores `one_line(line)`, so that `line` may quote the content of a file."""
        super().__init__(one_line(line))
        self.exit_code = exit_code


class StopRun(SystemExit):
    """Ends a run that was asked to stop and that the same command continues.

    A signal may raise it anywhere. It does not derive from `Exception`, so that `except Exception` does not catch it.

    Attributes:
      line: what the command line prints.
    """

    def __init__(self, line: str) -> None:
        super().__init__(RESUMABLE)
        self.line = line


def write_error(path: object, error: Exception) -> UserError:
    """Returns the error to raise for a file that could not be written.

    Its exit code is `RESUMABLE` if the disk is full or failing. `error` may come from a library in C++, which mentions
    the system's error in its message instead of raising an `OSError`.
    """
    number, reason = getattr(error, "errno", None), getattr(error, "strerror", None)
    if number is None:
        number = next((code for code in _DISK_ERRORS if os.strerror(code) in str(error)), None)
        reason = None if number is None else os.strerror(number)
    code = RESUMABLE if number in _DISK_ERRORS else WRONG_INPUT
    advice = "free space and start again" if code == RESUMABLE else "choose another place"
    return UserError(f"{path}: cannot be written to ({reason or error}); {advice}", exit_code=code)


def full_disk(error: BaseException) -> UserError | None:
    """Returns the error to print instead if `error` says that a disk is full, otherwise None."""
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return write_error(error.filename or "a file of the run", error)
    return None


_DURING = "while "
_JAX_ERRORS = ("JaxRuntimeError", "XlaRuntimeError")
_DEVICE_FULL = re.compile(r"RESOURCE_EXHAUSTED|out of memory|OUT_OF_MEMORY", re.IGNORECASE)
_TOO_LARGE = re.compile(r"out of bounds for|too large|overflow", re.IGNORECASE)
_REQUESTED = re.compile(r"allocat(?:e|ing) ([\d.]+) ?(bytes|[KMGT]i?B?)\b")
_USED = re.compile(r"Used ([\d.]+[KMGT]i?B?) of ([\d.]+[KMGT]i?B?)")
_ADVICE = (  # (part of a phase's name, changes to the config that reduce this phase's memory)
    ("loading", "a smaller config.model.dtype, or config.mesh.fsdp over more devices"),
    ("rollout", "a smaller config.data.batch_size, lppo.max_new_tokens or data.max_prompt_tokens"),
    ("judging", "a smaller batch_size of the judges (config.scorers.NAME.batch_size)"),
    ("update", "a larger config.lppo.accumulation, or a smaller lppo.max_new_tokens or data.max_prompt_tokens"),
    ("prepare", "a larger config.lppo.accumulation, or a smaller lppo.max_new_tokens or data.max_prompt_tokens"),
    ("reward model", "a larger config.rm.accumulation, or a smaller rm.max_tokens"),
    ("harvest", "a smaller config.sweep.batch_size (rows and slots at once) or lppo.max_new_tokens"),
    ("sweep", "a smaller config.sweep.batch_size (rows and slots at once) or sweep.max_new_tokens"),
    ("utility", "a smaller config.sweep.batch_size (rows and slots at once) or sweep.max_new_tokens"),
)
_GENERAL_ADVICE = (
    "a smaller batch_size or max_new_tokens (config.data, .lppo, .sweep), a larger config.lppo.accumulation"
)


@contextlib.contextmanager
def during(phase: str) -> Iterator[None]:
    """Adds the name of a phase to any exception that leaves the `with` block, so that `out_of_memory` can name it.

    Blocks may be nested.
    """
    try:
        yield
    except Exception as error:
        error.add_note(f"{_DURING}{phase}")
        raise


def out_of_memory(error: BaseException) -> UserError | None:
    """Returns the error to print instead if `error` says that memory of a device or the host is too small, else None.

    Its line names the phase (see `during`), the requested amount if `error` contains it, and the config fields that
    reduce the amount. Errors of jax are recognised by their names and messages.
    """
    text = str(error)
    if isinstance(error, MemoryError) or isinstance(error, OSError) and error.errno == errno.ENOMEM:
        problem = "the host has not enough memory"
    elif type(error).__name__ in _JAX_ERRORS and _DEVICE_FULL.search(text):
        problem = "a device has not enough memory"
    elif isinstance(error, OverflowError) and _TOO_LARGE.search(text):
        problem = f"an array would be larger than any can be ({text})"
    else:
        return None
    phases = [note.removeprefix(_DURING) for note in getattr(error, "__notes__", ()) if note.startswith(_DURING)]
    advice = next((advice for phase in phases for part, advice in _ADVICE if part in phase), _GENERAL_ADVICE)
    where = "".join(f"{phase}: " for phase in reversed(phases))
    mesh = "" if "config.mesh" in advice else ", or config.mesh over more devices"
    return UserError(
        f"{where}{problem}{_amount(text)}; give {advice}{mesh}. What is finished stays: the same command goes on where "
        "there is more memory, also with another config.mesh; other fields need a new --workdir if the run has begun"
    )


def _amount(text: str) -> str:
    """Returns the amount of memory that an error message mentions, in brackets; "" if it mentions none."""
    used, requested = _USED.search(text), _REQUESTED.search(text)
    if used:
        return f" (needs {used[1]} of {used[2]})"
    if not requested:
        return ""
    size = f"{float(requested[1]) / 2**30:.3g} GiB" if requested[2] == "bytes" else f"{requested[1]} {requested[2]}"
    return f" (asked for {size} at once)"
