"""`--mode=align` measures every exit, trains, measures again, exports and reports; `train` only trains."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from jax.sharding import Mesh
from ml_collections import ConfigDict

from icet_jax import report
from icet_jax.algorithms.reward_by_kind import RewardByKind
from icet_jax.commands.export import as_exported, check_form, write_exports
from icet_jax.config import check_exits, require, warm_start_config
from icet_jax.config.names import ALGORITHMS
from icet_jax.data.records import Example
from icet_jax.errors import UserError
from icet_jax.parallel.distributed import is_writer
from icet_jax.runs import common, fingerprints
from icet_jax.runs.agreement import write_agreement
from icet_jax.runs.export_check import check_export
from icet_jax.runs.measure import Measurements
from icet_jax.runs.pairs import training_rows
from icet_jax.runs.run_dir import Costs
from icet_jax.runs.scorers import ScorerLoader
from icet_jax.runs.sources import TRAIN
from icet_jax.runs.too_long import fitting_rows
from icet_jax.runs.warm_start import WarmStart
from icet_jax.training.loop import Trainer
from icet_jax.vlm import VLM


def run(config: ConfigDict, workdir: Path, options: argparse.Namespace) -> int:
    """Measures, trains, measures again, exports and reports, once or once per seed of `config.seeds`.

    If an earlier process stopped in `workdir`, the work continues from what that process saved.

    Raises:
      UserError: some input is bad (checked before any work starts where possible), or a loss is not finite.
    """
    _require_fields(config)
    require(config, "sweep.datasets")
    check_form(config)
    common.for_each_seed(config, workdir, align)
    return 0


def align(config: ConfigDict, workdir: Path) -> None:
    """Does one run from the first sweep to the report; `workdir` must be its run directory (`common.claimed`).

    The sweep after training measures exactly the weights that the export contains. As a check, the responses of 32 rows
    are generated again by the model loaded from the exported files.
    """
    warm_start = WarmStart(config, workdir)
    inputs = common.load_inputs(config, workdir, training=True)
    costs = Costs(workdir)
    trainer = _prepare_training(config, workdir, inputs.vlm, inputs.train, warm_start, costs)
    measurements = Measurements(config, workdir, inputs)

    measurements.reuse_before_of_other_seeds()
    with costs.stage("sweep_before") as cost:
        cost["tokens"] = measurements.sweeps("before", inputs.vlm)
    with costs.stage("utility") as cost:
        cost["tokens"] = measurements.utility("before", inputs.vlm)
    with costs.stage("geometry"):
        measurements.geometry(inputs.vlm)
        measurements.encoder_cost(inputs.vlm)

    warm_start.train(costs)
    with costs.stage("train"):
        state = trainer.run()

    trainable, scale = state.trainable, trainer.algorithm.settings.lora_scale
    del state  # frees the optimizer's moments before the sweeps

    after = inputs.vlm
    if not measurements.is_complete("after"):
        with costs.stage("merge"):
            after = as_exported(config, inputs.vlm, trainable, scale)
    with costs.stage("sweep_after") as cost:
        cost["tokens"] = measurements.sweeps("after", after)
    with costs.stage("utility") as cost:
        cost["tokens"] = measurements.utility("after", after)
    measurements.differences()

    with costs.stage("export"):
        folders = write_exports(config, inputs.vlm, trainable, scale, workdir, workdir / "hf", again=False)
    with costs.stage("export_check"):
        check_export(config, workdir, after, measurements, folders[0])
    if not is_writer():
        return
    write_agreement(workdir)
    page = report.build(workdir, reveal_unsafe=config.sweep.reveal_unsafe)
    print("".join(f"model: {folder}\n" for folder in folders) + f"report: {page}", file=sys.stderr)


def train(config: ConfigDict, workdir: str | Path) -> VLM:
    """Trains as `config` says, without sweeps, export and report; for scripts and notebooks.

    Training continues from the last complete checkpoint in `workdir`, as `--mode=align` does with the same config, and
    `--mode=align` can finish a folder that this function started.

    Args:
      config: result of `icet_jax.load_config`.
      workdir: run directory for config.json, fingerprints.json, metrics.jsonl and checkpoints.

    Returns:
      The model after the last iteration (or that of the best checkpoint, if `config.checkpoint.best` names a metric).
      What it learned is in its adapters (`VLM.lora`), or after full fine-tuning in its weights.

    Raises:
      UserError: some input is bad, another run writes into `workdir`, or training is unstable.
    """
    workdir = Path(workdir)
    _require_fields(config)
    if config.seeds:
        raise UserError("config.seeds: one run per seed is what --mode=align does; here give config.seed alone")
    with common.claimed(workdir, config):
        warm_start, costs = WarmStart(config, workdir), Costs(workdir)
        rows, _ = common.train_rows(config, workdir)
        fingerprints.check_rows(workdir, {TRAIN: rows})
        vlm = common.load_model(config, workdir)
        check_exits(config, vlm.num_exits)
        rows, _ = fitting_rows(config, vlm.processor, vlm.max_positions, config.data.train, TRAIN, rows, training=True)
        trainer = _prepare_training(config, workdir, vlm, rows, warm_start, costs)
        warm_start.train(costs)
        return trainer.policy(trainer.run())


def _prepare_training(
    config: ConfigDict, workdir: Path, vlm: VLM, rows: Sequence[Example], warm_start: WarmStart, costs: Costs
) -> Trainer:  # fmt: skip
    """Returns the trainer of a run, and prepares that of its warm start; `rows` are the training rows that fit."""
    reward = _reward(config, workdir, vlm.mesh)
    warm_start.prepare(vlm, rows, reward, costs)
    examples = training_rows(config, workdir, vlm, rows, costs)
    return Trainer(config, workdir, vlm, examples, reward, warm_start.first_policy(vlm))


def _require_fields(config: ConfigDict) -> None:
    """Raises a `UserError` if a field that training needs is unset."""
    require(config, "model.checkpoint", "data.train")
    if _needs_reward_model(config):
        require(config, "reward.model")


def _needs_reward_model(config: ConfigDict) -> bool:
    """Returns whether training needs the reward model.

    It does if the algorithm, or that of the warm start, maximises rewards and some kind of row in its batches gets them
    from the reward model.
    """
    first = warm_start_config(config)
    if first is not None and _needs_reward_model(first):
        return True
    kinds = [kind for kind, share in config.data.mixture.items() if share > 0]
    return ALGORITHMS[config.algorithm].rewarded and any(
        config.reward.by_kind[kind] == "reward_model" for kind in kinds
    )


def _reward(config: ConfigDict, workdir: Path, mesh: Mesh | None) -> RewardByKind:
    """Returns the reward function for responses to each kind of row; the reward model is loaded if it is needed."""
    if not _needs_reward_model(config):
        return RewardByKind(config.reward.by_kind.to_dict(), None)
    model = ScorerLoader(config, workdir, mesh)(config.reward.model)
    if model.metric != "tr":
        raise UserError(f"config.reward.model={config.reward.model}: is a judge ({model.metric}), not a reward model")
    return RewardByKind(config.reward.by_kind.to_dict(), model)
