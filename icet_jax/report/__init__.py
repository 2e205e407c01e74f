"""Writes figures and the self-contained HTML report of a run directory, from the files of finished runs.

Both need no other files:

    from icet_jax import report
    report.build("runs/organism")            # writes report.html and figures/*.png, returns the page's path
    report.compare_runs(["runs/a", "runs/b"], "runs/both")     # compare.html and figures/*.png
"""

from collections.abc import Sequence
from pathlib import Path


def build(run_dir: str | Path, *, reveal_unsafe: bool = False) -> Path:
    """Writes `report.html` and `figures/*.png` into `run_dir` from the files described in `icet_jax.report.schema`.

    Args:
      run_dir: a run directory, or one whose `seed_K/` folders are run directories (the report then aggregates them).
      reveal_unsafe: shows responses that a judge called unsafe. Otherwise their text is nowhere in the page.

    Returns:
      The path of `report.html`.

    Raises:
      UserError: the directory has no sweep, or a file is broken or lacks a required field.
    """
    from icet_jax.report.page import build_report

    return build_report(Path(run_dir), reveal_unsafe=reveal_unsafe)


def headline(run_dir: str | Path) -> str:
    """Returns the headline of a run's report: one sentence on the result, followed by its caveats as further sentences.

    Raises:
      UserError: see `build`.
    """
    from icet_jax.report.loading import load_runs
    from icet_jax.report.study import Study
    from icet_jax.report.verdict import make_headline

    summary = make_headline(Study(load_runs(Path(run_dir))))
    return " ".join((summary.sentence, *summary.caveats))


def compare_runs(run_dirs: Sequence[str | Path], out: str | Path) -> Path:
    """Writes `compare.html` and `figures/*.png` into `out`, which show the curves of several runs.

    The curves are over relative depth: the number of an exit divided by the number of exits.

    Args:
      run_dirs: two to eight run directories, of any families; each may hold several seeds.
      out: the folder to write to, which is created if it does not exist.

    Returns:
      The path of `compare.html`.

    Raises:
      UserError: a run has no sweep or a broken file, or no two runs measured the same metric on the same data set.
    """
    from icet_jax.report.page import build_comparison

    return build_comparison([Path(path) for path in run_dirs], Path(out))
