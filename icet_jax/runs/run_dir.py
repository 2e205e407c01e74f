"""Manages a run directory: which config it belongs to, whether it has results, and what the run cost."""

import contextlib
import json
import os
import time
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

from ml_collections import ConfigDict

from icet_jax.config import OPEN_FIELDS, default, flatten
from icet_jax.errors import UserError, during, write_error
from icet_jax.files import JsonObject, parse_json, read_text, write_text_atomic

SCHEMA = 1
PAIRS = "pairs"
"""Folder of exit pairs, see `icet_jax.runs.pairs`."""
WARM_START = "warm_start"
"""Run directory of the algorithm that a run trains first, see `icet_jax.runs.warm_start`."""
# Fields that may differ between two starts of a run, because they affect the results only by rounding, or not at all.
_CHANGEABLE = ("compilation_cache", "mesh.data", "mesh.fsdp", "mesh.tensor")
_SHOWN_FIELDS = 4  # most differing fields that an error names


def claim(workdir: Path, config: ConfigDict) -> None:
    """Makes `workdir` the run directory of `config`, or checks that it already is.

    The config of a folder without any results is replaced. So a run that stopped at once, for example because of a
    mistyped field, does not need another folder when it is started again.

    Raises:
      UserError: the folder cannot be written to, or has results of a run with another config (differing fields are
        named).
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
    stored["scorers"] = _supported_scorers(stored)
    differing = [name for name in sorted({*current, *stored} - {*_CHANGEABLE}) if current.get(name) != stored.get(name)]
    if differing and not has_begun(workdir):
        write_text_atomic(path, json.dumps(config.to_dict(), indent=2) + "\n")
    elif differing:
        shown = ", ".join(
            f"{name} ({stored.get(name)!r} there, {current.get(name)!r} now)" for name in differing[:_SHOWN_FIELDS]
        )
        more = f" and {len(differing) - _SHOWN_FIELDS} more" if len(differing) > _SHOWN_FIELDS else ""
        raise UserError(f"--workdir={workdir} holds a run of another config: {shown}{more}; choose another folder")


def _supported_scorers(values: JsonObject) -> object:
    """Returns the field `scorers` of a stored config without unused definitions of the removed kind "perspective"."""
    scorers = values.get("scorers")
    if not isinstance(scorers, dict):
        return scorers
    used = [values.get(name) for name in ("reward.model", "sweep.scorers", "sweep.utility_scorers")]
    used += [definition for definition in scorers.values() if isinstance(definition, dict) and "members" in definition]
    used_names = json.dumps(used)
    return {
        name: definition
        for name, definition in scorers.items()
        if json.dumps(name) in used_names or not isinstance(definition, dict) or definition.get("kind") != "perspective"
    }


def has_begun(workdir: Path) -> bool:
    """Returns whether a run has left any result in `workdir`, or in a run directory inside it."""
    results = ("transcripts", "sweeps", "metrics.jsonl", "checkpoints", PAIRS)
    inner = (*workdir.glob("seed_*"), *workdir.glob(WARM_START))
    return any((workdir / name).exists() for name in results) or any(map(has_begun, inner))


def read_config(path: Path) -> ConfigDict:
    """Returns the config in a run's config.json, with defaults for fields that did not exist when it was written.

    Raises:
      UserError: the file cannot be read.
    """
    try:
        values = parse_json(read_text(path))
        if not isinstance(values, dict):
            raise ValueError("not an object")
        return ConfigDict(_with_defaults(values, default().to_dict()))
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(f"{path}: not a run's config ({error}); choose another --workdir") from error


def _with_defaults(values: JsonObject, defaults: JsonObject, section: str = "") -> JsonObject:
    """Returns a config's fields, with the default values of those that are absent.

    `section` is "" for the whole config or "NAME." for that section. Fields whose keys the user chooses are unchanged.
    Lists become tuples, as they were before they were written as JSON.
    """
    filled = dict(values)
    for name, value in defaults.items():
        if name not in filled:
            filled[name] = value
        elif isinstance(value, dict) and f"{section}{name}" not in OPEN_FIELDS:
            filled[name] = _with_defaults(filled[name], value, f"{section}{name}.")
        elif isinstance(filled[name], list):
            filled[name] = tuple(filled[name])
    return filled


class Costs:
    """Records `cost.json`: seconds and compilations of every stage of a run, summed over all its starts.

    Time that a process spent on a stage during which it was killed is not included.
    """

    def __init__(self, workdir: Path):
        """Reads the cost of earlier starts from `workdir`/cost.json, if it exists.

        Raises:
          UserError: the file is damaged.
        """
        self._path = workdir / "cost.json"
        self._stages: dict[str, JsonObject] = {}
        if self._path.exists():
            self._stages = _stored_stages(self._path)

    def recorded(self, name: str) -> JsonObject:
        """Returns the quantities of the stage `name`, summed over all starts so far; empty if it has not ended yet."""
        return dict(self._stages.get(name, {}))

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[JsonObject]:
        """Times the block as the stage `name`, and writes cost.json when the block ends or raises an error.

        Yields a dict to which the block may add other quantities, such as "tokens", which are summed over starts too.
        """
        from icet_jax.parallel.compilations import CompilationCounter

        extra: JsonObject = {}
        start = time.perf_counter()
        with CompilationCounter() as compilations:
            try:
                with during(name.replace("_", " ")):
                    yield extra
            finally:
                entry = self._stages.setdefault(name, {"name": name, "seconds": 0.0})
                quantities = {
                    "seconds": time.perf_counter() - start,
                    "compilations": compilations.count,
                    "compile_seconds": compilations.seconds,
                    **extra,
                }
                for key, value in quantities.items():
                    entry[key] = entry.get(key, 0) + value
                if entry.get("tokens"):
                    entry["tokens_per_second"] = entry["tokens"] / entry["seconds"]
                self._write()

    def _write(self) -> None:
        stages = list(self._stages.values())
        content = {
            "schema": SCHEMA,
            "phases": stages,
            "total_seconds": sum(stage["seconds"] for stage in stages),
            "device": describe_devices(),
            "versions": {name: metadata.version(name) for name in ("jax", "jaxlib", "flax", "optax", "numpy")},
            "peak_bytes": _peak_bytes(),
        }
        write_text_atomic(self._path, json.dumps(content, indent=1) + "\n")


def _stored_stages(path: Path) -> dict[str, JsonObject]:
    """Returns the stages of an earlier `cost.json` by name.

    Raises:
      UserError: the file is damaged.
    """
    try:
        stages = parse_json(read_text(path))["phases"]
        by_name = {str(stage["name"]): stage for stage in stages}
        values = [value for stage in stages for key, value in stage.items() if key != "name"]
        if any(type(value) not in (int, float) for value in values) or any("seconds" not in stage for stage in stages):
            raise ValueError("a stage without its seconds, or a value that is not a number")
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(f"{path}: not what a run has cost ({error}); remove it") from error
    return by_name


def describe_devices() -> str:
    """Returns the run's devices in words, such as "8 x TPU v5e" or "cpu, 2 cores"."""
    import jax

    devices = jax.devices()
    if devices[0].platform == "cpu":
        return f"cpu, {len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()} cores"
    return f"{len(devices)} x {devices[0].device_kind}"


def _peak_bytes() -> int | None:
    """Returns the largest peak memory of this process's devices in bytes; None if the platform does not report it."""
    import jax

    peaks = [(device.memory_stats() or {}).get("peak_bytes_in_use") for device in jax.local_devices()]
    return max((peak for peak in peaks if peak is not None), default=None)
