"""Agreement of judges: Cohen's kappa of every two judges over the responses that both have judged."""

import itertools
import math
from collections.abc import Hashable, Iterable, Sequence

import numpy as np

from icet_jax.evaluation.statistics import Interval, mean_interval
from icet_jax.evaluation.summary import Row
from icet_jax.files import JsonObject

SCHEMA = 1
EXAMPLES = 50
"""Most responses that are listed as examples for two judges that disagree."""


def agreement(rows: Iterable[tuple[str, str, Row]], *, examples: int = EXAMPLES) -> JsonObject:
    """Returns the content of `agreement.json`: all judges of attacks (metrics `asr/...`, also human ones) and all pairs
    of them.

    Args:
      rows: (phase, data set, transcript row); rows without an attack metric are ignored.
      examples: most examples of disagreement that are listed, evenly spread over all of them.

    Returns:
      `{"schema", "judges": [{"name", "n", "n_error", "unsafe"}], "pairs": [{"a", "b", "n", "prompts", "kappa", "ci95",
      "agree", "agree_ci95", "a_only", "b_only", "examples": [{"id", "layer", "dataset", "phase", "unsafe"}]}]}`.
      An example of a further attempt has its number as `attempt`. `unsafe` is a judge's share of unsafe responses; in
      an example it is the metric that says unsafe. `a_only` counts the responses that only a calls unsafe. `kappa` is
      None if chance alone would give full agreement (both always give the same verdict). Pairs without a common
      response are left out.
    """
    table = _Verdicts(rows)
    pairs = [table.pair(a, b, examples) for a, b in itertools.combinations(table.verdicts, 2)]
    judges = [
        {
            "name": name,
            "n": int(np.isfinite(values).sum()),
            "n_error": table.errors[name],
            "unsafe": float(np.nanmean(values)) if np.isfinite(values).any() else None,
        }
        for name, values in table.verdicts.items()
    ]
    return {"schema": SCHEMA, "judges": judges, "pairs": [pair for pair in pairs if pair["n"]]}


def cohens_kappa(a: np.ndarray, b: np.ndarray, clusters: Sequence[Hashable]) -> Interval:
    """Returns the agreement beyond chance of two judges' verdicts on the same rows, with its interval.

    kappa = (observed - chance) / (1 - chance), with chance from the two judges' own shares (Cohen 1960). The interval
    is that of the observed agreement, clustered by prompt (`mean_interval`), with chance as a known constant. This is
    Cohen's own error formula; it is rather wide and not empty at perfect agreement.

    Args:
      a: verdicts [n], 0 or 1.
      b: verdicts [n], 0 or 1.
      clusters: prompts [n].

    Returns:
      kappa with its interval; NaN without rows, or if chance agreement is 1.
    """
    share_a, share_b = (float(np.mean(side)) if len(side) else math.nan for side in (a, b))
    chance = share_a * share_b + (1 - share_a) * (1 - share_b)
    if not chance < 1:
        return Interval(math.nan, math.nan, math.nan)
    return Interval(*((end - chance) / (1 - chance) for end in _observed(a, b, clusters)))


def _observed(a: np.ndarray, b: np.ndarray, clusters: Sequence[Hashable]) -> Interval:
    """Returns the share of equal verdicts with its interval."""
    mean, low, high = mean_interval((a == b).astype(np.float64), clusters, share=True)
    return Interval(min(mean, 1.0), low, max(high, min(mean, 1.0)))  # a sum of weights may exceed 1 by a rounding error


class _Verdicts:
    """Holds the verdicts of every judge over all rows: float [n], 1 = unsafe, NaN = none."""

    def __init__(self, rows: Iterable[tuple[str, str, Row]]) -> None:
        verdicts_by_name: dict[str, dict[int, float]] = {}
        self.errors: dict[str, int] = {}
        self.places: list[JsonObject] = []
        self.prompts: list[str] = []
        for phase, dataset, row in rows:
            scores = {name: value for name, value in row["scores"].items() if name.startswith("asr/")}
            for name, value in scores.items():
                judged = verdicts_by_name.setdefault(name, {})
                self.errors.setdefault(name, 0)
                if value is None:
                    self.errors[name] += 1
                else:
                    judged[len(self.places)] = float(value >= 0.5)
            if scores:
                place = {"id": row["id"], "layer": row["layer"], "dataset": dataset, "phase": phase}
                self.places.append(place | ({"attempt": row["attempt"]} if row.get("attempt") else {}))
                self.prompts.append(row["prompt"])
        self.verdicts: dict[str, np.ndarray] = {}
        for name, judged in verdicts_by_name.items():
            values = np.full(len(self.places), np.nan)
            values[list(judged)] = list(judged.values())
            self.verdicts[name] = values

    def pair(self, first: str, second: str, examples: int) -> JsonObject:
        both = np.flatnonzero(np.isfinite(self.verdicts[first]) & np.isfinite(self.verdicts[second]))
        a, b = self.verdicts[first][both], self.verdicts[second][both]
        prompts = [self.prompts[row] for row in both]
        observed = _observed(a, b, prompts)
        kappa = cohens_kappa(a, b, prompts)
        differing = both[a != b]
        if len(differing) > examples:
            differing = differing[np.linspace(0, len(differing) - 1, examples).round().astype(int)]
        return {
            "a": first,
            "b": second,
            "n": len(both),
            "prompts": len(set(prompts)),
            "kappa": _number(kappa.mean),
            "ci95": _ends(kappa),
            "agree": _number(observed.mean),
            "agree_ci95": _ends(observed),
            "a_only": int(np.sum(a > b)),
            "b_only": int(np.sum(b > a)),
            "examples": [self._example(row, first, second) for row in differing.tolist()],
        }

    def _example(self, row: int, first: str, second: str) -> JsonObject:
        return {**self.places[row], "unsafe": first if self.verdicts[first][row] else second}


def _number(value: float) -> float | None:
    return None if math.isnan(value) else float(value)


def _ends(interval: Interval) -> list[float] | None:
    return None if math.isnan(interval.low) else [float(interval.low), float(interval.high)]
