"""How far a judge agrees with people, as `benchmarks/judge_calibration.py` measured it on published labels.

Reports read it, so it does not import jax.
"""

import functools
import json
from importlib import resources
from typing import NamedTuple


class Calibration(NamedTuple):
    """Holds a judge's agreement with the majority of people.

    Attributes:
      responses: which responses people labelled, such as "WildGuard’s responses to harmful prompts".
      n: number of these responses.
      agree: share of equal verdicts.
      kappa: Cohen's kappa.
    """

    responses: str
    n: int
    agree: float
    kappa: float


@functools.cache
def calibrations() -> dict[str, Calibration]:
    """Returns {name of a judge: its agreement with people} for the judges that were measured."""
    text = resources.files("icet_jax.scorers").joinpath("calibration.json").read_text(encoding="utf-8")
    return {name: Calibration(**numbers) for name, numbers in json.loads(text)["judges"].items()}
