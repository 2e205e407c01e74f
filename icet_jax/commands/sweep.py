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
from icet_jax.runs.pairs import check_training_sets, write_sweep_pairs
from icet_jax.runs.run_dir import Costs


def run(config: ConfigDict, workdir: Path, options: argparse.Namespace) -> int:
    """Measures sweeps and utility of `config.model.checkpoint` and writes the report.

    If an earlier process stopped in `workdir`, the work continues from what that process saved.

    Raises:
      UserError: some input is bad.
    """
    require(config, "model.checkpoint", "sweep.datasets")
    common.for_each_seed(config, workdir, measure)
    return 0


def measure(config: ConfigDict, workdir: Path) -> None:
    """Measures one run and writes its report; `workdir` must be its run directory (`common.claimed`)."""
    inputs = common.load_inputs(config, workdir)
    check_training_sets(config, inputs.vlm)
    costs = Costs(workdir)
    measurements = Measurements(config, workdir, inputs)
    with costs.stage("sweep_before") as cost:
        cost["tokens"] = measurements.sweeps("before", inputs.vlm)
    with costs.stage("utility") as cost:
        cost["tokens"] = measurements.utility("before", inputs.vlm)
    with costs.stage("geometry"):
        measurements.geometry(inputs.vlm)
        measurements.encoder_cost(inputs.vlm)
    write_sweep_pairs(config, workdir, inputs.vlm, inputs.tests)
    if not is_writer():
        return
    write_agreement(workdir)
    page = report.build(workdir, reveal_unsafe=config.sweep.reveal_unsafe)
    print(f"report: {page}", file=sys.stderr)
