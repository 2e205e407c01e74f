"""Writes `agreement.json` of a run directory: how far its judges agree on the responses of its finished sweeps."""

import json
from pathlib import Path

from icet_jax.errors import UserError
from icet_jax.evaluation.agreement import agreement
from icet_jax.evaluation.summary import Row
from icet_jax.files import JsonObject, write_text_atomic
from icet_jax.report.loading import PHASES, read_jsonl


def write_agreement(workdir: Path) -> JsonObject:
    """Computes how far the judges of a run agree, from its transcripts; writes and returns `workdir`/agreement.json.

    An existing file is replaced.

    Raises:
      UserError: a transcript is broken, or the file cannot be written.
    """
    rows = ((side, dataset, row) for side, dataset, path in finished_sweeps(workdir) for row in read_transcript(path))
    table = agreement(rows)
    write_text_atomic(workdir / "agreement.json", json.dumps(table, indent=1, allow_nan=False) + "\n")
    return table


def finished_sweeps(workdir: Path) -> list[tuple[str, str, Path]]:
    """Returns (side, data set, transcript file) of every complete sweep of the run in `workdir`.

    The side is "before" or "after" training.
    """
    sweeps = []
    for side in PHASES:
        for path in sorted((workdir / "sweeps").glob(f"{side}.*.json")):
            transcript = workdir / "transcripts" / f"{path.stem}.jsonl"
            if transcript.is_file():
                sweeps.append((side, path.stem.partition(".")[2], transcript))
    return sweeps


def read_transcript(path: Path) -> list[Row]:
    """Returns the rows of a transcript file, one per answer.

    Raises:
      UserError: a line is broken, or lacks a field that every response has.
    """
    rows = read_jsonl(path)
    required = {"id", "layer", "prompt", "response", "kind", "scores"}
    for number, row in enumerate(rows, start=1):
        if not required <= row.keys():
            raise UserError(f"{path}: row {number} lacks {min(required - row.keys())}; measure the sweep again")
    return rows
