"""The run directory: which config it belongs to, what the run cost, and whether it has results."""

import contextlib
import json
import os
import time
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from icet_jax.config import OPEN_FIELDS, default, flatten
from icet_jax.errors import UserError, during, write_error
from icet_jax.files import JsonObject, parse_json, read_text, write_text_atomic

SCHEMA = 1
_ANY = ("compilation_cache", "mesh.data", "mesh.fsdp", "mesh.tensor")  # fields that change results by rounding at most
_SHOWN_FIELDS = 4


def claim(workdir: Path, config: ConfigDict) -> None:
    """Makes `workdir` the run directory of `config`, or checks that it already is.

    A run that stopped before it measured anything (for example because of a mistyped field) gives up its folder to any
    config.

    Raises:
      UserError: the folder cannot be written to, or holds a run of another config (differing fields are named).
    """
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        probe = workdir / f".probe-{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise write_error(f"--workdir={workdir}", error) from error
    path = workdir / "config.json"
    current = json.loads(json.dumps(flatten(config)))
    if not path.exists():
        write_text_atomic(path, json.dumps(config.to_dict(), indent=2) + "\n")
        return
    stored = json.loads(json.dumps(flatten(read_config(path))))
    stored["scorers"] = _without_removed(stored)
    differing = [name for name in sorted({*current, *stored} - {*_ANY}) if current.get(name) != stored.get(name)]
    if differing and not has_begun(workdir):
        write_text_atomic(path, json.dumps(config.to_dict(), indent=2) + "\n")
    elif differing:
        shown = ", ".join(
            f"{name} ({stored.get(name)!r} there, {current.get(name)!r} now)" for name in differing[:_SHOWN_FIELDS]
        )
        more = f" and {len(differing) - _SHOWN_FIELDS} more" if len(differing) > _SHOWN_FIELDS else ""
        raise UserError(f"--workdir={workdir} holds a run of another config: {shown}{more}; choose another folder")


def _without_removed(values: JsonObject) -> Any:
    """Returns a stored config's scorers without unused definitions of a kind that no longer exists."""
    scorers = values.get("scorers")
    if not isinstance(scorers, dict):
        return scorers
    used = [values.get(name) for name in ("reward.model", "sweep.scorers", "sweep.utility_scorers")]
    used += [definition for definition in scorers.values() if isinstance(definition, dict) and "members" in definition]
    words = json.dumps(used)
    return {
        name: definition
        for name, definition in scorers.items()
        if json.dumps(name) in words or not isinstance(definition, dict) or definition.get("kind") != "perspective"
    }


def has_begun(workdir: Path) -> bool:
    """Returns whether a run has left any result in `workdir`, or in the folder of one of its seeds."""
    results = ("transcripts", "sweeps", "metrics.jsonl", "checkpoints")
    return any((workdir / name).exists() for name in results) or any(map(has_begun, workdir.glob("seed_*")))


def read_config(path: Path) -> ConfigDict:
    """Returns a run's config.json; fields that did not exist when it was written have their defaults.

    Raises:
      UserError: it cannot be read.
    """
    try:
        values = parse_json(read_text(path))
        if not isinstance(values, dict):
            raise ValueError("not an object")
        return ConfigDict(_with_defaults(values, default().to_dict()))
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(f"{path}: not a run's config ({error}); choose another --workdir") from error


def _with_defaults(values: JsonObject, defaults: JsonObject, section: str = "") -> JsonObject:
    """Returns `values` completed from `defaults`; fields whose keys the user chooses are not changed."""
    filled = dict(values)
    for name, value in defaults.items():
        if name not in filled:
            filled[name] = value
        elif isinstance(value, dict) and f"{section}{name}" not in OPEN_FIELDS:
            filled[name] = _with_defaults(filled[name], value, f"{section}{name}.")
    return filled


class Costs:
    """Records `cost.json`: seconds and compilations of every phase, summed over restarts.

    The time of a killed process since its last finished phase is not included.
    """

    def __init__(self, workdir: Path):
        self._path = workdir / "cost.json"
        self._phases: dict[str, JsonObject] = {}
        if self._path.exists():
            self._phases = _stored_phases(self._path)

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[JsonObject]:
        """Times the block, also when it fails; further numbers ("tokens") may be added to the dict that it yields."""
        from icet_jax.parallel.compilations import CompilationCounter

        extra: dict[str, Any] = {}
        start = time.perf_counter()
        with CompilationCounter() as compilations:
            try:
                with during(name.replace("_", " ")):
                    yield extra
            finally:
                entry = self._phases.setdefault(name, {"name": name, "seconds": 0.0})
                numbers = {
                    "seconds": time.perf_counter() - start,
                    "compilations": compilations.count,
                    "compile_seconds": compilations.seconds,
                    **extra,
                }
                for key, value in numbers.items():
                    entry[key] = entry.get(key, 0) + value
                if entry.get("tokens"):
                    entry["tokens_per_second"] = entry["tokens"] / entry["seconds"]
                self._write()

    def _write(self) -> None:
        phases = list(self._phases.values())
        content = {
            "schema": SCHEMA,
            "phases": phases,
            "total_seconds": sum(phase["seconds"] for phase in phases),
            "device": _device(),
            "versions": {name: metadata.version(name) for name in ("jax", "jaxlib", "flax", "optax", "numpy")},
            "peak_bytes": _peak_bytes(),
        }
        write_text_atomic(self._path, json.dumps(content, indent=1) + "\n")


def _stored_phases(path: Path) -> dict[str, JsonObject]:
    """Returns the phases of an earlier `cost.json` by name.

    Raises:
      UserError: the file is damaged.
    """
    try:
        phases = parse_json(read_text(path))["phases"]
        by_name = {str(phase["name"]): phase for phase in phases}
        numbers = [value for phase in phases for name, value in phase.items() if name != "name"]
        if any(type(value) not in (int, float) for value in numbers) or any("seconds" not in phase for phase in phases):
            raise ValueError("a phase without its numbers")
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(f"{path}: not what a run has cost ({error}); remove it") from error
    return by_name


def _device() -> str:
    import jax

    devices = jax.devices()
    if devices[0].platform == "cpu":
        return f"cpu, {len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()} cores"
    return f"{len(devices)} x {devices[0].device_kind}"


def _peak_bytes() -> int | None:
    """Returns the peak memory of the device that used most; None if the platform does not report it."""
    import jax

    peaks = [(device.memory_stats() or {}).get("peak_bytes_in_use") for device in jax.local_devices()]
    return max((peak for peak in peaks if peak is not None), default=None)
