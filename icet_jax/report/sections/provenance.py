"""Where a report comes from: dates, software, hardware, command, checkpoint, data sets and seeds."""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from icet_jax.files import JsonObject
from icet_jax.report.blocks import Block, Text, code, details, joined, remark, table, text
from icet_jax.report.study import Study
from icet_jax.report.text import without_folders

_DIGITS = 12


def of_study(study: Study) -> list[Block]:
    """Returns a collapsed table, whose title names date, version, hardware and seeds; [] for runs without run.json."""
    starts = study.first_run.starts
    if not starts:
        return []
    first, last = starts[0], starts[-1]
    rows: list[list[Text]] = [
        [text("Started"), joined([text(str(start.get("date", "–"))) for start in starts])],
        [text("Software"), text(_software(last))],
        [text("Hardware"), text(_hardware(last))],
        [text("Command"), text(code(without_folders(str(first.get("command", "–")))))],
        [text("Seeds"), text(_seeds(study))],
        *([text(name), value] for name, value in _checkpoints(study).items()),
        *([text(name), value] for name, value in _data_sets(study).items()),
    ]
    facts = [str(first.get("date", ""))[:10], _package(last), _hardware(last), f"seed {_seeds(study)}"]
    title = f"Provenance: {' · '.join(filter(None, facts))}"
    return details(title, table("Where these numbers come from", ["What", "Value"], rows))


def _package(start: JsonObject) -> str:
    """Returns version and commit of the package; "+" after the commit stands for uncommitted changes."""
    commit = start.get("commit")
    return f"icet_jax {start.get('version', '–')}" + (f", commit {commit}" if commit else "")


def _software(start: JsonObject) -> str:
    return f"{_package(start)}, Python {start.get('python', '–')}, jax {start.get('jax', '–')}"


def _hardware(start: JsonObject) -> str:
    """Returns "8 x TPU v5e, 2 processes, Linux-..."."""
    processes = start.get("processes", 1)
    shared = f", {processes} processes" if processes != 1 else ""
    return f"{start.get('device', '–')}{shared}, {start.get('platform', '–')}"


def _seeds(study: Study) -> str:
    return ", ".join(str(run.config.get("seed", "–")) for run in study.runs)


def _checkpoints(study: Study) -> dict[str, Text]:
    """Returns {"Checkpoint" or "Adapter": its name, revision and fingerprint}."""
    model = study.first_run.config.get("model", {})
    hashes = study.first_run.fingerprints.get("checkpoints", {})
    sources = {"Checkpoint": ("checkpoint", "model"), "Adapter": ("adapter", "adapter")}
    described = {}
    for title, (name, kind) in sources.items():
        source = model.get(name)
        if source:
            revision = f", revision {model['revision']}" if kind == "model" and model.get("revision") else ""
            name_and_revision = f"{without_folders(str(source))}{revision}"
            described[title] = text(name_and_revision, *_fingerprint(hashes.get(kind)))
    return described


def _data_sets(study: Study) -> dict[str, Text]:
    """Returns {name of a set: its number of rows and its fingerprint}, the training set included."""
    counts = study.first_run.data.get("rows", {})
    hashes = study.first_run.fingerprints.get("rows", {})
    return {
        f"Rows, {name}": text(f"{sum(by_kind.values())}", *_fingerprint(hashes.get(name)))
        for name, by_kind in counts.items()
        if isinstance(by_kind, dict)
    }


def _fingerprint(hashes: Any) -> list[Any]:
    """Returns a remark with one hash over all hashes of a set or checkpoint; [] if they were not recorded."""
    if not isinstance(hashes, Mapping) or not hashes:
        return []
    digest = hashlib.sha256(json.dumps(dict(sorted(hashes.items()))).encode()).hexdigest()[:_DIGITS]
    return [" ", remark(f"fingerprint {digest}")]
