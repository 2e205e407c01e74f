"""Checks that the files of an export contain the measured model, by generating some responses again from the files."""

import functools
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import jax
from ml_collections import ConfigDict

from icet_jax.errors import UserError
from icet_jax.evaluation.recheck import sample_pairs
from icet_jax.files import JsonObject, write_text_atomic
from icet_jax.parallel.distributed import on_first
from icet_jax.report.loading import EXPORT_CHECK, read_json
from icet_jax.runs import common, model_card
from icet_jax.runs.measure import Measurements
from icet_jax.vlm import VLM

SCHEMA = 1
ROWS = 32  # answers that are generated again


def check_export(config: ConfigDict, workdir: Path, vlm: VLM, measurements: Measurements, folder: Path) -> None:
    """Generates `ROWS` answers with the model loaded from `folder`, and compares them with the sweep's after training.

    It writes export_check.json and, if the check passes, writes the model card again with the result. A check that has
    passed is not repeated. All processes must call this function.

    Args:
      config: config of the run.
      workdir: run directory.
      vlm: the measured model. Its weights are deleted to free memory for those of the files.
      measurements: the sweeps after training.
      folder: folder of the export to check; the adapter's folder if `config.export.form` is "adapter".

    Raises:
      UserError: more answers differ than rounding explains (see `allowed`), or the files cannot be loaded.
    """
    path = workdir / EXPORT_CHECK
    if on_first(lambda: read_json(path).get("passed") is True):
        return
    for leaf in jax.tree.leaves(vlm.params):
        if not leaf.is_deleted():
            leaf.delete()
    exported = common.load_exported(config, vlm, folder, is_adapter=_form(config) == "adapter")
    pairs = sample_pairs(measurements.sizes(), ROWS, config.seed)
    differing = [
        {"dataset": name, "row": row, "exit": layer}
        for name, requested in pairs.items()
        for row, layer in measurements.differing(name, exported, requested)
    ]
    on_first(functools.partial(_write, config, workdir, folder, sum(map(len, pairs.values())), differing))


def allowed(count: int, dtype: str, platform: str) -> int:
    """Returns how many of `count` answers of the exported model may differ from the sweep's because of rounding.

    The limit is one in 8 answers, or one in `ROWS` for float32 on the CPU.

    Weights and programs are those of the sweep, but the rows are batched differently, so their padding differs. That
    changes rounding, which can decide between two almost equally likely tokens. With matrix products in bfloat16, or in
    the reduced precision that accelerators use for float32, a few of a hundred long answers differ; in float32 on the
    CPU practically none. A damaged tensor or another checkpoint changes most answers.
    """
    return count // (ROWS if (dtype, platform) == ("float32", "cpu") else 8)


def _form(config: ConfigDict) -> str:
    """Returns which form of the export is checked: for "both" it is "full", which is what the sweeps measure."""
    return "adapter" if config.export.form == "adapter" else "full"


def _write(config: ConfigDict, workdir: Path, folder: Path, count: int, differing: Sequence[JsonObject]) -> None:
    """Writes the result of a check, and warns if some of the `count` answers differ.

    `differing` lists the rows and exits whose answer differs from the sweep's.

    Raises:
      UserError: more answers differ than `allowed`.
    """
    limit = allowed(count, config.model.dtype, jax.default_backend())
    content = {
        "schema": SCHEMA,
        "folder": str(folder.relative_to(workdir)),
        "form": _form(config),
        "n": count,
        "n_equal": count - len(differing),
        "allowed": limit,
        "passed": len(differing) <= limit,
        "different": list(differing),
    }
    if content["passed"]:
        model_card.write_model_card(folder, workdir, form=_form(config), check=content)
    write_text_atomic(workdir / EXPORT_CHECK, json.dumps(content, indent=1) + "\n")
    if not differing:
        return
    finding = f"{folder}: loaded from its files, the model gives other answers to {len(differing)} of {count} rows"
    if content["passed"]:
        print(
            f"WARNING: {finding} than the model that was measured, which rounding can explain (up to {limit}); "
            f"{EXPORT_CHECK} names them",
            file=sys.stderr,
        )
        return
    raise UserError(
        f"{finding} than the model that was measured (rounding explains {limit}; {EXPORT_CHECK} names them): the files "
        "are damaged or of another checkpoint; remove the folder and repeat the command, which exports and checks again"
    )
