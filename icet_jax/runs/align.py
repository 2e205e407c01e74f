"""`--mode=align`: measure every exit, train, measure again, export, report."""

import argparse
import sys
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from icet_jax import report
from icet_jax.config import require
from icet_jax.errors import UserError
from icet_jax.lppo.forward import with_policy
from icet_jax.parallel.distributed import is_writer
from icet_jax.runs import common
from icet_jax.runs.agreement import write_agreement
from icet_jax.runs.export import check_form, write_exports
from icet_jax.runs.measure import Measurements, Policy
from icet_jax.runs.reward import RewardByKind
from icet_jax.runs.run_dir import Costs
from icet_jax.runs.scorers import ScorerLoader
from icet_jax.runs.training import Trainer


def run(config: ConfigDict, workdir: Path, options: argparse.Namespace) -> int:
    """The whole loop, once or once per seed; goes on wherever an earlier process in `workdir` stopped.

    Raises:
      UserError: bad input of any kind, before anything is done where it can be known; a loss that is not finite.
    """
    require(config, "model.checkpoint", "data.train", "sweep.datasets")
    check_form(config)
    if _asks_reward_model(config):
        require(config, "reward.model")
    common.for_each_seed(config, workdir, align)
    return 0


def align(config: ConfigDict, workdir: Path) -> None:
    """One run in `workdir`, which `config` has claimed."""
    setting = common.load_setting(config, workdir, training=True)
    trainer = Trainer(config, workdir, setting.vlm, setting.train, _reward(config, workdir, setting.vlm.mesh))
    costs = Costs(workdir)
    measurements = Measurements(config, workdir, setting)
    name = common.model_name(config)

    before = Policy(setting.vlm, None, name)
    measurements.reuse_before_of_other_seeds()
    with costs.phase("sweep_before") as cost:
        cost["tokens"] = measurements.sweeps("before", before)
    with costs.phase("utility") as cost:
        cost["tokens"] = measurements.utility("before", before)
    with costs.phase("geometry"):
        measurements.geometry(setting.vlm)

    with costs.phase("train"):
        state = trainer.run()

    lora_scale = trainer.algorithm.settings.lora_scale
    params, lora = with_policy(setting.vlm.params, state.trainable, lora_scale)
    after = Policy(setting.vlm if lora is not None else common.with_params(setting.vlm, params), lora, name)
    with costs.phase("sweep_after") as cost:
        cost["tokens"] = measurements.sweeps("after", after)
    with costs.phase("utility") as cost:
        cost["tokens"] = measurements.utility("after", after)
    measurements.differences()

    with costs.phase("export"):
        folders = write_exports(config, setting.vlm, state, lora_scale, workdir, workdir / "hf", again=False)
    if not is_writer():
        return
    write_agreement(workdir)
    page = report.build(workdir, reveal_unsafe=config.sweep.reveal_unsafe)
    print("".join(f"model: {folder}\n" for folder in folders) + f"report: {page}", file=sys.stderr)


def _asks_reward_model(config: ConfigDict) -> bool:
    """Whether L-PPO draws rows that the reward model is to grade."""
    drawn = [kind for kind, share in config.data.mixture.items() if share > 0]
    return config.algorithm == "lppo" and any(config.reward.by_kind[kind] == "reward_model" for kind in drawn)


def _reward(config: ConfigDict, workdir: Path, mesh: Any) -> RewardByKind:
    """Loads the reward model if it is needed."""
    if not _asks_reward_model(config):
        return RewardByKind(config.reward.by_kind.to_dict(), None)
    model = ScorerLoader(config, workdir, mesh)(config.reward.model)
    if model.metric != "tr":
        raise UserError(f"config.reward.model={config.reward.model}: is a judge ({model.metric}), not a reward model")
    return RewardByKind(config.reward.by_kind.to_dict(), model)
