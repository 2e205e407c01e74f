"""Runs a script and its stages one after another, without the stages that an earlier process has completed."""

import argparse
import hashlib
import json
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from icet_jax.errors import StopRun, UserError
from icet_jax.files import JsonObject, parse_json, write_text_atomic
from icet_jax.parallel.compilations import keep_programs
from icet_jax.runs.run_lock import locked
from icet_jax.training.signals import handle_signals

_FOLDER = "stages"  # of the markers


class Stages:
    """Runs the stages of a build in a working directory.

    A completed stage leaves a marker, stages/NAME.json: its inputs and settings, a fingerprint of them and of the
    stages before it, its seconds and its results. A stage whose marker has the same fingerprint is not run again.

    Attributes:
      results: {stage: its results}.
      seconds: {stage: seconds that it took}.
    """

    def __init__(self, workdir: Path) -> None:
        """Remembers the working directory, `workdir`."""
        self._workdir, self._fingerprint = workdir, ""
        self.results: dict[str, JsonObject] = {}
        self.seconds: dict[str, float] = {}

    def run(self, name: str, inputs: JsonObject, outputs: list[Path], work: Callable[[], JsonObject]) -> JsonObject:
        """Returns the results of a stage, which is run unless its marker and outputs are there.

        Args:
          name: name of the stage.
          inputs: what it depends on beside the earlier stages: settings, and hashes of files.
          outputs: files and folders that it writes.
          work: does the stage, or what an interrupted process has left of it; returns the results.

        Raises:
          UserError: the stage was done, or begun, with other inputs.
        """
        content = json.dumps({"before": self._fingerprint, "inputs": inputs}, sort_keys=True)
        self._fingerprint = hashlib.sha256(content.encode()).hexdigest()
        path = self._workdir / _FOLDER / f"{name}.json"
        marker = _read_marker(path)
        if marker is not None and marker["fingerprint"] != self._fingerprint:
            raise UserError(self._changed(name, inputs, marker["inputs"], [path, *outputs]))
        spent = 0.0 if marker is None else marker["seconds"]
        if marker is None or not marker["complete"] or not all(output.exists() for output in outputs):
            print(f"real_vlm: {name}", file=sys.stderr)
            start = {"fingerprint": self._fingerprint, "inputs": inputs, "seconds": spent, "complete": False}
            _write(path, start)
            begin, marker = time.monotonic(), start
            try:
                marker = {**start, "complete": True, "results": work()}
            finally:
                spent = round(spent + time.monotonic() - begin, 1)
                _write(path, {**marker, "seconds": spent})
            print(f"real_vlm: {name}: {spent:.0f} s", file=sys.stderr)
        self.results[name], self.seconds[name] = marker["results"], spent
        return self.results[name]

    def _changed(self, name: str, inputs: JsonObject, before: JsonObject, files: list[Path]) -> str:
        """Returns the text of the error about inputs that differ from those that a stage was begun with."""
        changed = [key for key in {**before, **inputs} if before.get(key) != inputs.get(key)]
        what = ", ".join(f"{key} is {inputs.get(key)}, not {before.get(key)}" for key in changed)
        names = " ".join(str(file.relative_to(self._workdir)) for file in files)
        return (
            f"--workdir={self._workdir}: its stage '{name}' was made with other inputs "
            f"({what or 'those of an earlier stage'}); choose another --workdir, or remove there what that stage and "
            f"the later ones have made: {names} ..."
        )


def _read_marker(path: Path) -> JsonObject | None:
    """Returns the content of a marker; None if there is none.

    Raises:
      UserError: it is damaged.
    """
    if not path.is_file():
        return None
    try:
        return dict(parse_json(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{path}: cannot be read ({error}); remove it, and the stage is done again") from error


def _write(path: Path, marker: JsonObject) -> None:
    """Writes a marker."""
    write_text_atomic(path, json.dumps(marker, indent=1) + "\n")


def run_script(
    what: str, folder: str, options_of: Callable[[], argparse.Namespace], work: Callable[[argparse.Namespace], Any]
) -> int:
    """Does the work of a script, prints one line that says how it ended, and returns the exit code.

    Args:
      what: name of what the work makes.
      folder: the folder in the working directory that it is written to.
      options_of: reads the command line, whose option --workdir is locked for the time of the work.
      work: does the work.
    """
    begin = time.monotonic()
    try:
        options = options_of()
        keep_programs(None)
        with handle_signals(), locked(options.workdir):
            work(options)
    except UserError as error:
        print(f"real_vlm: {error}", file=sys.stderr)
        return error.exit_code
    except StopRun as stop:
        print(f"real_vlm: {stop.line}", file=sys.stderr)
        return int(str(stop.code))
    print(f"{what}: {options.workdir / folder} ({(time.monotonic() - begin) / 60:.0f} minutes)")
    return 0


def fresh_folder(folder: Path) -> Path:
    """Returns an empty folder; what an interrupted process has left there is removed."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder
