"""Whether the files of an export are the model that was measured: some rows answered again by what they hold."""

import functools
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from icet_jax.errors import UserError
from icet_jax.evaluation.recheck import spread_pairs
from icet_jax.files import write_text_atomic
from icet_jax.parallel.distributed import on_first
from icet_jax.report.loading import EXPORT_CHECK, read_json
from icet_jax.runs import common, model_card
from icet_jax.runs.measure import Measurements
from icet_jax.vlm import VLM

SCHEMA = 1
ROWS = 32


def check_export(config: ConfigDict, workdir: Path, vlm: VLM, measurements: Measurements, folder: Path) -> None:
    """Answers 32 rows of the sweeps with the model in `folder`, and compares the answers with those measured after.

    Writes export_check.json and the model card again. A check that was passed is not repeated. All processes call it.

    Args:
      config: of the run.
      workdir: its run directory.
      vlm: what was measured. Its weights are deleted, so that there is room for those of the files.
      measurements: the sweeps after training.
      folder: of the export; where `config.export.form` is "adapter", that of the adapter.

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
    pairs = spread_pairs(measurements.sizes(), ROWS, config.seed)
    differing = [
        {"dataset": name, "row": row, "exit": layer}
        for name, wanted in pairs.items()
        for row, layer in measurements.differing(name, exported, wanted)
    ]
    on_first(functools.partial(_write, config, workdir, folder, sum(map(len, pairs.values())), differing))


def allowed(count: int, dtype: str, platform: str) -> int:
    """How many of `count` answers may differ.

    The weights and the programs are those of the sweep; which rows run together, and so how they are padded, is not.
    That can turn a token where two are equally likely but for rounding: products in bfloat16, or in the fewer bits that
    accelerators give to float32, do so in a few long answers of a hundred, those in float32 on the CPU practically
    never. A damaged tensor or another checkpoint changes most answers.
    """
    return count // (ROWS if (dtype, platform) == ("float32", "cpu") else 8)


def _form(config: ConfigDict) -> str:
    """The form that is checked: of "both" the whole model, which is what is measured."""
    return "adapter" if config.export.form == "adapter" else "full"


def _write(config: ConfigDict, workdir: Path, folder: Path, count: int, differing: Sequence[dict[str, Any]]) -> None:
    """Writes the result and says it where answers differ; raises `UserError` where there are too many of them."""
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
    says = f"{folder}: loaded from its files, the model gives other answers to {len(differing)} of {count} rows"
    if content["passed"]:
        print(
            f"WARNING: {says} than the model that was measured, which rounding can explain (up to {limit}); "
            f"{EXPORT_CHECK} names them",
            file=sys.stderr,
        )
        return
    raise UserError(
        f"{says} than the model that was measured (rounding explains {limit}; {EXPORT_CHECK} names them): the files "
        "are damaged or of another checkpoint; remove the folder and repeat the command, which exports and checks again"
    )
