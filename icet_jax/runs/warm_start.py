"""The warm start of a run: its first policy is the last one of another training (`config.warm_start`).

The other training is that of an earlier run, or that of an algorithm which the run trains first, in WORKDIR/warm_start:

    config.json, metrics.jsonl, checkpoints/, device.json    as in every run directory
    fingerprints.json                                        a copy of the run's own

Only the policy is taken over, with the projector if both trainings train it. Optimizer, value head and exit schedule
begin anew, the reference is the model before all training, and both trainings take the same batches. The first training
has no sweep, export or report.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from ml_collections import ConfigDict

from icet_jax.algorithms.reward_by_kind import RewardByKind
from icet_jax.checkpoints.run_state import saved_steps
from icet_jax.config import did_you_mean, flatten, trained_parts, warm_start_config
from icet_jax.config.checks import check_warm_start_parts
from icet_jax.config.names import ALGORITHMS
from icet_jax.data.records import Example
from icet_jax.errors import UserError
from icet_jax.files import parse_json, read_text
from icet_jax.parallel.distributed import agree, on_first
from icet_jax.report.method import sum_over_iterations
from icet_jax.runs import common, fingerprints
from icet_jax.runs.pairs import training_rows
from icet_jax.runs.run_dir import WARM_START, Costs, read_config
from icet_jax.training.loop import FirstPolicy, Trainer, last_policy
from icet_jax.typing import PyTree
from icet_jax.vlm import VLM

_ADAPTER_FIELDS = ("lora.rank", "lora.alpha", "lora.targets")


class WarmStart:
    """Gives a run its first policy, and trains that policy if `config.warm_start` names an algorithm."""

    def __init__(self, config: ConfigDict, workdir: Path) -> None:
        """Checks `config.warm_start` before anything is loaded.

        Args:
          config: config of the run.
          workdir: run directory. If it has a checkpoint of the run, nothing is checked, trained or read any more.

        Raises:
          UserError: it is neither an algorithm nor a run directory, or a run that has other adapters or has not ended.
        """
        self._config, self._workdir = config, workdir
        self._is_pending = bool(config.warm_start) and not agree(saved_steps(workdir / "checkpoints"))
        self._first_config = warm_start_config(config)
        self._first_trainer: Trainer | None = None
        if self._is_pending and self._first_config is None:
            _check_earlier_run(config)

    def prepare(self, vlm: VLM, rows: Sequence[Example], reward: RewardByKind, costs: Costs) -> None:
        """Prepares the first training, so that errors in its rows are found before any sweep.

        Args:
          vlm: the model before training.
          rows: the training rows.
          reward: scores responses.
          costs: gets the stage `harvest` if the first algorithm learns from pairs; they are in the run's own `pairs/`.

        Raises:
          UserError: see `Trainer` and `training_rows`; or the earlier run trained another model.
        """
        if not self._is_pending:
            return
        first = self._first_config
        if first is not None:
            examples = training_rows(first, self._workdir, vlm, rows, costs)
            self._first_trainer = Trainer(first, self._workdir / WARM_START, vlm, examples, reward)
            return
        differences = fingerprints.model_differences(self._workdir, Path(self._config.warm_start))
        for name, what in differences.items():
            field = "model.checkpoint" if name == "model" else "model.adapter"
            raise UserError(
                f"config.warm_start={self._config.warm_start}: that run's config.{field} has other files ({what} "
                "here); a warm start needs the same model"
            )

    def train(self, costs: Costs) -> None:
        """Does the first training, or what is left of it, as the stage `warm_start`.

        Raises:
          UserError: see `Trainer.run`.
          StopRun: a signal asked the run to stop; the same command goes on with this training.
        """
        trainer, config, folder = self._first_trainer, self._first_config, self._workdir / WARM_START
        if trainer is None or config is None:
            return
        with costs.stage("warm_start") as cost, common.claimed(folder, config):
            on_first(lambda: fingerprints.copy_to(self._workdir, folder))
            trainer.run()
            recorded = costs.recorded("warm_start")
            cost.update({name: total - recorded.get(name, 0) for name, total in _spent(folder).items()})
        self._first_trainer = None

    def first_policy(self, vlm: VLM) -> FirstPolicy | None:
        """Returns the function that reads the first policy; None without a warm start.

        Args:
          vlm: the model before training.
        """
        if not self._config.warm_start:
            return None

        def read() -> dict[str, PyTree]:
            config, folder = self._first_config, self._workdir / WARM_START
            if config is None:
                folder = Path(self._config.warm_start)
                config = read_config(folder / "config.json")
            title = ALGORITHMS[config.algorithm].title
            print(f"{self._config.algorithm}: starts from the policy of {title} in {folder}", file=sys.stderr)
            return last_policy(config, folder, vlm)

        return read


def _check_earlier_run(config: ConfigDict) -> None:
    """Raises a `UserError` unless `config.warm_start` is a run directory whose policy this run can start from."""
    where, folder = f"config.warm_start={config.warm_start}", Path(config.warm_start)
    if not (folder / "config.json").is_file():
        raise UserError(
            f"{where}: neither an algorithm ({', '.join(ALGORITHMS)}) nor the directory of a run (with config.json)"
            f"{did_you_mean(config.warm_start, ALGORITHMS)}"
        )
    earlier = read_config(folder / "config.json")
    if earlier.seeds:
        raise UserError(
            f"{where}: has one run per seed; give one of them, such as {folder / f'seed_{earlier.seeds[0]}'}"
        )
    check_warm_start_parts(earlier, config)
    theirs, ours = flatten(earlier), flatten(config)
    is_adapted = "policy" in trained_parts(earlier) and (config.lora.rank or earlier.lora.rank)
    for name in _ADAPTER_FIELDS if is_adapted else ():
        if theirs[name] != ours[name]:
            raise UserError(
                f"{where}: config.{name} is {theirs[name]!r} there and {ours[name]!r} here; a warm start needs the "
                "same adapters"
            )
    completed, last = max(saved_steps(folder / "checkpoints"), default=0), earlier[earlier.algorithm].iterations
    if completed < last:
        raise UserError(f"{where}: its training has not ended (iteration {completed} of {last}); start it again first")


def _spent(folder: Path) -> dict[str, float]:
    """Returns the numbers of sampled tokens and of operations of a training, {"tokens": ..., "flops": ...}."""

    def add() -> dict[str, float]:
        path = folder / "metrics.jsonl"
        rows = [parse_json(line) for line in read_text(path).splitlines()] if path.exists() else []
        return {name: sum_over_iterations(rows, f"perf/{name}") or 0.0 for name in ("tokens", "flops")}

    return on_first(add)
