"""Records in `run.json` which software, hardware and command produced a run.

    {"schema": 1, "starts": [{"date": ..., "command": ..., "version": ..., "commit": ..., "python": ..., "jax": ...,
                              "platform": ..., "device": ..., "processes": ...}, ...]}

There is one entry per start: a run that was interrupted and continued has several.
"""

import json
import platform
import shlex
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path

import icet_jax
from icet_jax.errors import UserError
from icet_jax.files import JsonObject, parse_json, read_text, write_text_atomic
from icet_jax.runs.run_dir import describe_devices

NAME = "run.json"
SCHEMA = 1
_GIT_SECONDS = 10


def record_start(workdir: Path) -> None:
    """Adds an entry for this process to run.json.

    Raises:
      UserError: run.json is damaged.
    """
    path = workdir / NAME
    starts = [*_read_starts(path), _describe_process()]
    write_text_atomic(path, json.dumps({"schema": SCHEMA, "starts": starts}, indent=1) + "\n")


def _read_starts(path: Path) -> list[JsonObject]:
    """Returns the entries of run.json; [] if there is no such file."""
    if not path.is_file():
        return []
    try:
        starts = parse_json(read_text(path))["starts"]
        if not isinstance(starts, list) or not all(isinstance(start, dict) for start in starts):
            raise ValueError("'starts' is not a list of objects")
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UserError(f"{path}: not the record of a run ({error}); remove the file") from error
    return starts


def _describe_process() -> JsonObject:
    """Returns date, command, versions and devices of this process."""
    import jax

    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": _command(),
        "version": icet_jax.__version__,
        "commit": _commit(),
        "python": platform.python_version(),
        "jax": jax.__version__,
        "platform": platform.platform(terse=True),
        "device": describe_devices(),
        "processes": jax.process_count(),
    }


def _command() -> str:
    """Returns the command line of this process as a user would type it."""
    program = Path(sys.argv[0])
    if program == Path(icet_jax.__file__).with_name("main.py"):
        return shlex.join(["python", "-m", "icet_jax.main", *sys.argv[1:]])
    start = [program.name] if program.name == "icet-jax" else ["python", str(program)]
    return shlex.join([*start, *sys.argv[1:]])


def _commit() -> str | None:
    """Returns the commit of the package's own repository, with a "+" if tracked files differ from it.

    Returns None if the package is installed without its repository, or git cannot tell.
    """
    root = Path(icet_jax.__file__).parents[1]
    if not (root / ".git").exists():
        return None
    command = ["git", "-C", str(root), "describe", "--always", "--exclude=*", "--dirty=+"]
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=_GIT_SECONDS, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return result.stdout.strip() or None
