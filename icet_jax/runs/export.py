"""`--mode=export`: what a run has trained, as a checkpoint in the Hugging Face layout."""

import argparse
import sys
from pathlib import Path

from ml_collections import ConfigDict

from icet_jax import api
from icet_jax.checkpoints.hf_export import save_llava
from icet_jax.checkpoints.run_state import RunState
from icet_jax.errors import UserError
from icet_jax.lppo.forward import with_policy
from icet_jax.lppo.settings import from_config
from icet_jax.lppo.state import TrainState
from icet_jax.runs import run_dir
from icet_jax.runs.sources import checkpoint_directory
from icet_jax.runs.training import newest_state


def run(config: ConfigDict, workdir: Path | None, options: argparse.Namespace) -> int:
    """Writes the newest complete checkpoint of the run in `workdir`, for every seed of a run over several.

    Args:
      config: the run's own config.json stands above it.
      workdir: the run directory.
      options: `out`, where to; `workdir`/hf by default (of a run over several seeds: `out`/seed_K, workdir/seed_K/hf).

    Raises:
      UserError: no run directory, nothing trained yet, or the target cannot be written.
    """
    if workdir is None:
        raise UserError("--mode=export needs --workdir, the run whose model is wanted")
    if not (workdir / "config.json").is_file():
        raise UserError(f"--workdir={workdir}: no run (config.json) is there; give the folder of a run")
    config = run_dir.read_config(workdir / "config.json")
    seeds = [int(seed) for seed in config.seeds]
    runs = [workdir / f"seed_{seed}" for seed in seeds] or [workdir]
    for folder in runs:
        out = folder / "hf"
        if options.out is not None:
            out = options.out / folder.name if seeds else options.out
        export(config, folder, out)
    return 0


def export(config: ConfigDict, workdir: Path, out: Path) -> None:
    """Restores the newest checkpoint of one run and writes its model to `out`.

    Raises:
      UserError: see `run`.
    """
    if not (workdir / "checkpoints").is_dir():
        raise UserError(f"{workdir}: has no checkpoints to export; run --mode=align first")
    vlm = api.load(
        checkpoint_directory(config.model.checkpoint, workdir),
        dtype=config.model.dtype,
        param_dtype=None if config.lora.rank else "float32",
    )
    settings = from_config(config, eos_ids=vlm.eos_ids, suppress_ids=vlm.suppress_ids, pad_id=vlm.pad_id)
    checkpoints = RunState(workdir / "checkpoints", keep=config.checkpoint.keep)
    try:
        if not checkpoints.steps:
            raise UserError(f"{workdir}: has no complete checkpoint yet; let --mode=align go on")
        state = newest_state(config, vlm, settings, checkpoints)
    finally:
        checkpoints.close()
    write_model(vlm, state, settings.lora_scale, out)
    print(
        f"{out}: the model after iteration {int(state.iteration)} of {config[config.algorithm].iterations}",
        file=sys.stderr,
    )


def write_model(vlm: api.VLM, state: TrainState, lora_scale: float | None, out: Path) -> Path:
    """Writes the policy (adapters merged) and, beside it, the value head; returns `out`.

    Args:
      vlm: the model before training.
      state: of the training.
      lora_scale: alpha / rank; None after full fine-tuning.
      out: a new directory, or an earlier export.

    Raises:
      UserError: it cannot be written.
    """
    params, lora = with_policy(vlm.params, state.trainable, lora_scale)
    head = state.trainable["value_head"]
    return save_llava(out, vlm.config, params, source_dir=vlm.directory, lora=lora, value_head=head)
