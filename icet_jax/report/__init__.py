"""Figures and the self-contained HTML report of a run directory.

from icet_jax import report
report.build("runs/organism")            # writes report.html and figures/*.png, returns the page's path
"""

from pathlib import Path


def build(run_dir: str | Path, *, reveal_unsafe: bool = False) -> Path:
    """Writes `report.html` and `figures/*.png` into `run_dir` from the files described in `icet_jax.report.schema`.

    Args:
      run_dir: a run directory, or one whose `seed_K/` folders are run directories (the report then aggregates them).
      reveal_unsafe: shows responses that a judge called unsafe. Otherwise their text is nowhere in the page.

    Returns:
      The path of `report.html`.

    Raises:
      UserError: no sweep is there to report on, or a file is not what its name says.
    """
    from icet_jax.report.page import build_report

    return build_report(Path(run_dir), reveal_unsafe=reveal_unsafe)
