"""`--mode=sweep` measures every exit of a model without training, and reports."""

import argparse
import sys
from pathlib import Path

from ml_collections import ConfigDict

from icet_jax import report
from icet_jax.config import require
from icet_jax.parallel.distributed import is_writer
from icet_jax.runs import common
from icet_jax.runs.agreement import write_agreement
from icet_jax.runs.measure import Measurements
from icet_jax.runs.run_dir import Costs


def run(config: ConfigDict, workdir: Path, options: argparse.Namespace) -> int:
    """Measures sweeps and utility of `config.model.checkpoint`, continuing where an earlier process in `workdir`
    stopped.

    Raises:
      UserError: some input is bad.
    """
    require(config, "model.checkpoint", "sweep.datasets")
    common.for_each_seed(config, workdir, measure)
    return 0


def measure(config: ConfigDict, workdir: Path) -> None:
    """Performs one run in `workdir`, which `config` has claimed."""
    setting = common.load_setting(config, workdir)
    costs = Costs(workdir)
    measurements = Measurements(config, workdir, setting)
    with costs.phase("sweep_before") as cost:
        cost["tokens"] = measurements.sweeps("before", setting.vlm)
    with costs.phase("utility") as cost:
        cost["tokens"] = measurements.utility("before", setting.vlm)
    with costs.phase("geometry"):
        measurements.geometry(setting.vlm)
    if not is_writer():
        return
    write_agreement(workdir)
    page = report.build(workdir, reveal_unsafe=config.sweep.reveal_unsafe)
    print(f"report: {page}", file=sys.stderr)
