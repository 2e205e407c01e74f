"""Reads a run directory for the report. One sweep must exist, all other files may be missing; each file is checked."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from icet_jax.errors import UserError
from icet_jax.files import JsonObject, parse_json, read_text

PHASES = ("before", "after")
PARTS = ("formats", "transferred")
"""Fields of a sweep file that contain metrics of parts of the data set, such as the rows of each attack format."""
EXPORT_CHECK = "export_check.json"
_MOST_EXITS = 4096  # limits the size of the page, which has a column or row for each exit


@dataclass(frozen=True)
class Run:
    """Holds the content of a run directory; `icet_jax.report.schema` describes the files.

    Attributes:
      path: the directory.
      tables: {(side, data set): checked `Sweep`}. The side is "before", "after" or "difference". The data set is
        "sweep/NAME" or "utility/NAME", so that sweeps and utility may measure sets of the same name.
      history: rows of `metrics.jsonl`.
      config, data, geometry, encoder, cost, organism, agreement, export_check, fingerprints: content of the JSON files
        of these names; empty if the file does not exist.
      starts: the entries of `run.json`, one per start of the run.
    """

    path: Path
    tables: dict[tuple[str, str], JsonObject]
    history: list[JsonObject] = field(default_factory=list)
    config: JsonObject = field(default_factory=dict)
    data: JsonObject = field(default_factory=dict)
    geometry: JsonObject = field(default_factory=dict)
    encoder: JsonObject = field(default_factory=dict)
    cost: JsonObject = field(default_factory=dict)
    organism: JsonObject = field(default_factory=dict)
    agreement: JsonObject = field(default_factory=dict)
    export_check: JsonObject = field(default_factory=dict)
    fingerprints: JsonObject = field(default_factory=dict)
    starts: list[JsonObject] = field(default_factory=list)


def load_runs(run_dir: Path) -> tuple[Run, ...]:
    """Reads the run in `run_dir`, or one run per folder `seed_K/` in it, in the order of K.

    Raises:
      UserError: there is no such directory, it contains no sweep, or a file is broken.
    """
    if not run_dir.is_dir():
        raise UserError(f"{run_dir}: no such run directory; give the --workdir of a run")
    seeds = [path for path in run_dir.glob("seed_*") if path.is_dir() and path.name[5:].isdigit()]
    runs = [load_run(path) for path in sorted(seeds, key=lambda path: int(path.name[5:]))]
    runs = [run for run in runs if run.tables] or [load_run(run_dir)]
    if not runs[0].tables:
        raise UserError(f"{run_dir / 'sweeps'}: holds no before*.json or after*.json; run --mode=sweep first")
    return tuple(runs)


def load_run(path: Path) -> Run:
    """Reads one run directory; the field of `Run` for a file that is missing is empty.

    Raises:
      UserError: a file is broken.
    """
    tables: dict[tuple[str, str], JsonObject] = {}
    for file in sorted((path / "sweeps").glob("*.json")):
        side, _, dataset = file.stem.partition(".")
        if side in (*PHASES, "difference"):
            table = _check_table(file, read_json(file))
            tables[side, f"sweep/{dataset or table.get('dataset') or 'prompts'}"] = table
    utility = read_json(path / "utility.json")
    for side in (*PHASES, "difference"):
        for dataset, table in _as_dict(utility.get(side)).items():
            tables[side, f"utility/{dataset}"] = _check_table(path / "utility.json", table)
    geometry = read_json(path / "geometry.json")
    if geometry and not isinstance(geometry.get("layers"), list):
        raise UserError(f"{path / 'geometry.json'}: field 'layers' is missing; measure the geometry again")
    return Run(
        path=path,
        tables=tables,
        history=read_jsonl(path / "metrics.jsonl"),
        config=read_json(path / "config.json"),
        data=read_json(path / "data.json"),
        geometry=geometry,
        encoder=read_json(path / "encoder.json"),
        cost=read_json(path / "cost.json"),
        organism=read_json(path / "organism.json"),
        agreement=read_json(path / "agreement.json"),
        export_check=_check_counts(path / EXPORT_CHECK, read_json(path / EXPORT_CHECK)),
        fingerprints=read_json(path / "fingerprints.json"),
        starts=_objects(read_json(path / "run.json").get("starts")),
    )


def read_json(path: Path) -> JsonObject:
    """Returns the JSON object in a file, {} if there is no such file; NaN and infinities become None.

    Raises:
      UserError: the file cannot be read or is not one JSON object.
    """
    if not path.exists():
        return {}
    try:
        data = parse_json(read_text(path), parse_constant=lambda _: None)
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: is not readable JSON ({error}); make it again or remove it") from error
    if not isinstance(data, dict):
        raise UserError(f"{path}: holds a {type(data).__name__}, not an object; make it again or remove it")
    return data


def read_jsonl(path: Path) -> list[JsonObject]:
    """Returns the objects of a JSON-lines file; [] if there is no file.

    A broken last line, which a killed process can leave, is ignored.

    Raises:
      UserError: the file cannot be read, or another line is broken; the message has the number of the line.
    """
    if not path.exists():
        return []
    try:
        lines = read_text(path, "replace").split("\n")
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); make it again or remove it") from error
    rows = []
    for index, line in enumerate(lines):
        if not line.strip():
            continue
        try:
            row = parse_json(line, parse_constant=lambda _: None)
        except ValueError as error:
            if index == len(lines) - 1:
                break
            raise UserError(f"{path}: line {index + 1} is not JSON ({error}); remove the line") from error
        if isinstance(row, dict):
            rows.append(row)
    return rows


def _check_table(path: Path, table: Any) -> JsonObject:
    """Returns `table`, the content of a sweep file; raises a `UserError` if it lacks what the report reads."""
    if not isinstance(table, dict) or not _is_layers(table.get("layers")):
        raise UserError(f"{path}: field 'layers' must be a list of {{'layer', 'n', 'metrics'}}; make the file again")
    for name in ("num_exits", "default_exit"):
        if table.get(name) is not None and not _is_exit(table[name]):
            raise UserError(f"{path}: field '{name}' must be a number from 1 to {_MOST_EXITS}; make the file again")
    if not all(_is_layers(layers) for layers in _as_dict(table.get("policies")).values()):
        raise UserError(f"{path}: field 'policies' must map each policy to such a list; make the file again")
    for name in PARTS:
        for part in _as_dict(table.get(name)).values():
            if not isinstance(part, dict) or not _is_layers(part.get("layers")):
                raise UserError(
                    f"{path}: field '{name}' must map each of its names to {{'layers'}}; make the file again"
                )
    return table


def _check_counts(path: Path, check: JsonObject) -> JsonObject:
    """Returns `check`, the content of export_check.json, unchanged; raises a `UserError` if a count is missing."""
    if check and not (type(check.get("n")) is int and type(check.get("n_equal")) is int):
        raise UserError(f"{path}: fields 'n' and 'n_equal' must be whole numbers; remove the file and run align again")
    return check


def _is_layers(layers: Any) -> bool:
    """Returns whether `layers` is a list with an exit and its metrics in each entry."""
    return isinstance(layers, list) and all(
        isinstance(layer, dict) and _is_exit(layer.get("layer")) and isinstance(layer.get("metrics"), dict)
        for layer in layers
    )


def _is_exit(value: Any) -> bool:
    return type(value) is int and 1 <= value <= _MOST_EXITS


def _objects(value: Any) -> list[JsonObject]:
    """Returns the objects in a list; [] if `value` is no list."""
    return [entry for entry in value if isinstance(entry, dict)] if isinstance(value, list) else []


def _as_dict(value: Any) -> JsonObject:
    return value if isinstance(value, dict) else {}
