"""`--mode=align`: measure every exit, train, measure again, export, report; `train` is the training alone."""

import argparse
import sys
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from icet_jax import report
from icet_jax.algorithms.reward_by_kind import RewardByKind
from icet_jax.commands.export import as_exported, check_form, write_exports
from icet_jax.config import check_exits, require
from icet_jax.config.names import ALGORITHMS
from icet_jax.errors import UserError
from icet_jax.parallel.distributed import is_writer
from icet_jax.runs import common, fingerprints
from icet_jax.runs.agreement import write_agreement
from icet_jax.runs.export_check import check_export
from icet_jax.runs.measure import Measurements
from icet_jax.runs.run_dir import Costs
from icet_jax.runs.scorers import ScorerLoader
from icet_jax.runs.sources import TRAIN
from icet_jax.runs.too_long import fitting_rows
from icet_jax.training.loop import Trainer
from icet_jax.vlm import VLM


def run(config: ConfigDict, workdir: Path, options: argparse.Namespace) -> int:
    """The whole loop, once or once per seed; goes on wherever an earlier process in `workdir` stopped.

    Raises:
      UserError: bad input of any kind, before anything is done where it can be known; a loss that is not finite.
    """
    _require_training(config)
    require(config, "sweep.datasets")
    check_form(config)
    common.for_each_seed(config, workdir, align)
    return 0


def align(config: ConfigDict, workdir: Path) -> None:
    """One run in `workdir`, which `config` has claimed.

    What is measured after training is what the export holds, and 32 of its rows are answered again by the files.
    """
    setting = common.load_setting(config, workdir, training=True)
    trainer = Trainer(config, workdir, setting.vlm, setting.train, _reward(config, workdir, setting.vlm.mesh))
    costs = Costs(workdir)
    measurements = Measurements(config, workdir, setting)

    measurements.reuse_before_of_other_seeds()
    with costs.phase("sweep_before") as cost:
        cost["tokens"] = measurements.sweeps("before", setting.vlm)
    with costs.phase("utility") as cost:
        cost["tokens"] = measurements.utility("before", setting.vlm)
    with costs.phase("geometry"):
        measurements.geometry(setting.vlm)

    with costs.phase("train"):
        state = trainer.run()

    trainable, scale = state.trainable, trainer.algorithm.settings.lora_scale
    del state  # the optimizer's moments need not be in memory beside the sweeps

    after = setting.vlm
    if not measurements.is_complete("after"):
        with costs.phase("merge"):
            after = as_exported(config, setting.vlm, trainable, scale)
    with costs.phase("sweep_after") as cost:
        cost["tokens"] = measurements.sweeps("after", after)
    with costs.phase("utility") as cost:
        cost["tokens"] = measurements.utility("after", after)
    measurements.differences()

    with costs.phase("export"):
        folders = write_exports(config, setting.vlm, trainable, scale, workdir, workdir / "hf", again=False)
    with costs.phase("export_check"):
        check_export(config, workdir, after, measurements, folders[0])
    if not is_writer():
        return
    write_agreement(workdir)
    page = report.build(workdir, reveal_unsafe=config.sweep.reveal_unsafe)
    print("".join(f"model: {folder}\n" for folder in folders) + f"report: {page}", file=sys.stderr)


def train(config: ConfigDict, workdir: str | Path) -> VLM:
    """The training that `config` describes, without sweeps, export and report, for scripts and notebooks.

    Goes on from the last complete checkpoint in `workdir`, as `--mode=align` does there with the same config; a folder
    that this began can be finished by that.

    Args:
      config: from `icet_jax.load_config`.
      workdir: run directory: config.json, fingerprints.json, metrics.jsonl and checkpoints.

    Returns:
      The model after the last iteration (or that of the best checkpoint, where `config.checkpoint.best` names a
      metric). What it learnt are its adapters (`VLM.lora`), or after full fine-tuning its weights.

    Raises:
      UserError: bad input of any kind, another run that writes into `workdir`, or training that is not stable.
    """
    workdir = Path(workdir)
    _require_training(config)
    if config.seeds:
        raise UserError("config.seeds: one run per seed is what --mode=align does; here give config.seed alone")
    with common.claimed(workdir, config):
        rows, _ = common.train_rows(config, workdir)
        fingerprints.check_rows(workdir, {TRAIN: rows})
        vlm = common.load_model(config, workdir)
        check_exits(config, vlm.num_exits)
        rows, _ = fitting_rows(config, vlm.processor, vlm.max_positions, config.data.train, TRAIN, rows, training=True)
        trainer = Trainer(config, workdir, vlm, rows, _reward(config, workdir, vlm.mesh))
        return trainer.policy(trainer.run())


def _require_training(config: ConfigDict) -> None:
    require(config, "model.checkpoint", "data.train")
    if _asks_reward_model(config):
        require(config, "reward.model")


def _asks_reward_model(config: ConfigDict) -> bool:
    """Whether the algorithm is rewarded and draws rows that the reward model is to grade."""
    drawn = [kind for kind, share in config.data.mixture.items() if share > 0]
    return ALGORITHMS[config.algorithm].rewarded and any(
        config.reward.by_kind[kind] == "reward_model" for kind in drawn
    )


def _reward(config: ConfigDict, workdir: Path, mesh: Any) -> RewardByKind:
    """Loads the reward model if it is needed."""
    if not _asks_reward_model(config):
        return RewardByKind(config.reward.by_kind.to_dict(), None)
    model = ScorerLoader(config, workdir, mesh)(config.reward.model)
    if model.metric != "tr":
        raise UserError(f"config.reward.model={config.reward.model}: is a judge ({model.metric}), not a reward model")
    return RewardByKind(config.reward.by_kind.to_dict(), model)
