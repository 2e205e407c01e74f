"""`--mode=compare runs/a runs/b ... --out DIR` draws several runs' curves over relative depth in one report."""

import argparse
import sys
from pathlib import Path

from ml_collections import ConfigDict

from icet_jax import report
from icet_jax.errors import UserError


def run(config: ConfigDict, workdir: Path | None, options: argparse.Namespace) -> int:
    """Writes DIR/compare.html and DIR/figures from the files of the runs alone; returns 0.

    Args:
      config: unused.
      workdir: unused.
      options: `runs`, the run directories, and `out`, the folder DIR.

    Raises:
      UserError: --out is missing, there are fewer than two runs, or the runs cannot be compared.
    """
    if options.out is None:
        raise UserError(
            "--mode=compare needs --out, the folder to write to; type: --mode=compare runs/a runs/b --out DIR"
        )
    try:
        options.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"--out={options.out}: cannot be written to ({error.strerror}); choose another folder"
        ) from error
    page = report.compare_runs(options.runs, options.out)
    print(f"comparison: {page}", file=sys.stderr)
    return 0
