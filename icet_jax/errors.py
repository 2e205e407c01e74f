"""How a run ends early: the one exception a user is meant to see, and the exit codes."""

import contextlib
import errno
import os
import re
from collections.abc import Iterator

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
    """Bad input: one line that names the file, field or row, what was wrong, and how to fix it.

    The command line (`icet_jax.main`) prints the line alone and exits with `exit_code`.
    """

    def __init__(self, line: str, *, exit_code: int = WRONG_INPUT) -> None:
        """`line` may quote what a file holds: it is put through `one_line`."""
        super().__init__(one_line(line))
        self.exit_code = exit_code


class Stopped(SystemExit):
    """The run was told to stop, and the same command goes on. Signals raise it anywhere, so it is no `Exception`."""

    def __init__(self, line: str) -> None:
        """`line` is what the command line prints."""
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


_DURING = "while "
_JAX_ERRORS = ("JaxRuntimeError", "XlaRuntimeError")
_DEVICE_FULL = re.compile(r"RESOURCE_EXHAUSTED|out of memory|OUT_OF_MEMORY", re.IGNORECASE)
_TOO_LARGE = re.compile(r"out of bounds for|too large|overflow", re.IGNORECASE)
_ASKED = re.compile(r"allocat(?:e|ing) ([\d.]+) ?(bytes|[KMGT]i?B?)\b")
_USED = re.compile(r"Used ([\d.]+[KMGT]i?B?) of ([\d.]+[KMGT]i?B?)")
_LESS = (  # (part of a phase's name, what takes less memory there)
    ("loading", "a smaller config.model.dtype, or config.mesh.fsdp over more devices"),
    ("rollout", "a smaller config.data.batch_size, lppo.max_new_tokens or data.max_prompt_tokens"),
    ("judging", "a smaller batch_size of the judges (config.scorers.NAME.batch_size)"),
    ("update", "a larger config.lppo.accumulation, or a smaller lppo.max_new_tokens or data.max_prompt_tokens"),
    ("prepare", "a larger config.lppo.accumulation, or a smaller lppo.max_new_tokens or data.max_prompt_tokens"),
    ("reward model", "a larger config.rm.accumulation, or a smaller rm.max_tokens"),
    ("sweep", "a smaller config.sweep.batch_size (rows and slots at once) or sweep.max_new_tokens"),
    ("utility", "a smaller config.sweep.batch_size (rows and slots at once) or sweep.max_new_tokens"),
)
_LESS_ANYWHERE = (
    "a smaller batch_size or max_new_tokens (config.data, .lppo, .sweep), a larger config.lppo.accumulation"
)


@contextlib.contextmanager
def during(phase: str) -> Iterator[None]:
    """Notes the phase in an error that leaves the block, for `out_of_memory`; phases may lie in each other."""
    try:
        yield
    except Exception as error:
        error.add_note(f"{_DURING}{phase}")
        raise


def out_of_memory(error: BaseException) -> UserError | None:
    """The line for an error that says that a device's or the host's memory does not suffice; None for any other.

    It names the phase (`during`), what was asked for where that is known, and the fields that lower it. Errors of jax
    are known by their names and messages.
    """
    text = str(error)
    if isinstance(error, MemoryError) or isinstance(error, OSError) and error.errno == errno.ENOMEM:
        what = "the host has not enough memory"
    elif type(error).__name__ in _JAX_ERRORS and _DEVICE_FULL.search(text):
        what = "a device has not enough memory"
    elif isinstance(error, OverflowError) and _TOO_LARGE.search(text):
        what = f"an array would be larger than any can be ({text})"
    else:
        return None
    phases = [note.removeprefix(_DURING) for note in getattr(error, "__notes__", ()) if note.startswith(_DURING)]
    less = next((less for phase in phases for part, less in _LESS if part in phase), _LESS_ANYWHERE)
    where = "".join(f"{phase}: " for phase in reversed(phases))
    mesh = "" if "config.mesh" in less else ", or config.mesh over more devices"
    return UserError(
        f"{where}{what}{_amount(text)}; give {less}{mesh}. What is finished stays: the same command goes on where "
        "there is more memory, also with another config.mesh; other fields need a new --workdir if the run has begun"
    )


def _amount(text: str) -> str:
    """What an error of memory says it needed."""
    used, asked = _USED.search(text), _ASKED.search(text)
    if used:
        return f" (needs {used[1]} of {used[2]})"
    if not asked:
        return ""
    size = f"{float(asked[1]) / 2**30:.3g} GiB" if asked[2] == "bytes" else f"{asked[1]} {asked[2]}"
    return f" (asked for {size} at once)"
