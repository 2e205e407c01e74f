"""Reading a run directory: every file optional but one sweep, every file checked before it is shown."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from icet_jax.errors import UserError
from icet_jax.files import parse_json, read_text

PHASES = ("before", "after")
PARTS = ("formats", "transferred")
"""Fields of a sweep that hold tables of a part of its rows."""
EXPORT_CHECK = "export_check.json"
_MOST_EXITS = 4096  # the page has a column, a tick or a row for each


@dataclass(frozen=True)
class Run:
    """What a run directory holds, in the forms of `icet_jax.report.schema`.

    Attributes:
      path: the directory.
      tables: (phase, data set) -> a checked `Sweep`; phase is "before", "after" or "difference". A data set is
        "sweep/NAME" or "utility/NAME", so that both may measure a set of the same name.
      history: `metrics.jsonl`, one dict per step.
      config, data, geometry, cost, organism, agreement, export_check: the files of that name; empty where there is
        none.
    """

    path: Path
    tables: dict[tuple[str, str], dict[str, Any]]
    history: list[dict[str, Any]] = field(default_factory=list)
    config: dict[str, Any] = field(default_factory=dict)
    data: dict[str, Any] = field(default_factory=dict)
    geometry: dict[str, Any] = field(default_factory=dict)
    cost: dict[str, Any] = field(default_factory=dict)
    organism: dict[str, Any] = field(default_factory=dict)
    agreement: dict[str, Any] = field(default_factory=dict)
    export_check: dict[str, Any] = field(default_factory=dict)


def load_runs(run_dir: Path) -> tuple[Run, ...]:
    """The run in `run_dir`, or one per `seed_K/` folder there (in the order of K).

    Raises:
      UserError: no such directory, no sweep in it, or a broken file.
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
    """Reads one run directory; a missing file is an empty part. Raises UserError for a broken one."""
    tables: dict[tuple[str, str], dict[str, Any]] = {}
    for file in sorted((path / "sweeps").glob("*.json")):
        phase, _, dataset = file.stem.partition(".")
        if phase in (*PHASES, "difference"):
            table = _checked_table(file, read_json(file))
            tables[phase, f"sweep/{dataset or table.get('dataset') or 'prompts'}"] = table
    utility = read_json(path / "utility.json")
    for phase in (*PHASES, "difference"):
        for dataset, table in _as_dict(utility.get(phase)).items():
            tables[phase, f"utility/{dataset}"] = _checked_table(path / "utility.json", table)
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
        cost=read_json(path / "cost.json"),
        organism=read_json(path / "organism.json"),
        agreement=read_json(path / "agreement.json"),
        export_check=_checked_counts(path / EXPORT_CHECK, read_json(path / EXPORT_CHECK)),
    )


def read_json(path: Path) -> dict[str, Any]:
    """The object in `path`, `{}` where there is no such file; NaN and infinities become None.

    Raises:
      UserError: the file is unreadable or holds something else than one JSON object.
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


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """The objects of a JSON-lines file, `[]` where there is none.

    A broken last line is left out (a killed run ends in one); any other broken line is a UserError with its number.
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


def _checked_table(path: Path, table: Any) -> dict[str, Any]:
    """Raises UserError unless `table` has layers of the documented form, its policies too."""
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


def _checked_counts(path: Path, check: dict[str, Any]) -> dict[str, Any]:
    """Raises UserError unless `check` is empty or has its counts."""
    if check and not (type(check.get("n")) is int and type(check.get("n_equal")) is int):
        raise UserError(f"{path}: fields 'n' and 'n_equal' must be whole numbers; remove the file and run align again")
    return check


def _is_layers(layers: Any) -> bool:
    return isinstance(layers, list) and all(
        isinstance(layer, dict) and _is_exit(layer.get("layer")) and isinstance(layer.get("metrics"), dict)
        for layer in layers
    )


def _is_exit(value: Any) -> bool:
    return type(value) is int and 1 <= value <= _MOST_EXITS


def _as_dict(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}
