"""Measures how far judges agree: Cohen's kappa of every two judges, over the responses on which both gave a verdict."""

import itertools
import math
from collections.abc import Hashable, Iterable, Sequence

import numpy as np

from icet_jax.evaluation.statistics import Interval, mean_interval
from icet_jax.evaluation.summary import Row
from icet_jax.files import JsonObject

SCHEMA = 1
EXAMPLES = 50
"""Largest number of responses that are listed as examples for two judges that disagree."""


def agreement(rows: Iterable[tuple[str, str, Row]], *, examples: int = EXAMPLES) -> JsonObject:
    """Returns the content of `agreement.json`: an entry for every judge and for every two judges.

    A judge is identified by its metric `asr/...`. Human labels count as one judge.

    Args:
      rows: ("before" or "after" training, data set, transcript row); rows without a metric `asr/...` are ignored.
      examples: largest number of responses listed for two judges that disagree, evenly spaced among all of them.

    Returns:
      `{"schema", "judges": [{"name", "n", "n_error", "unsafe"}], "pairs": [{"a", "b", "n", "prompts", "kappa", "ci95",
      "agree", "agree_ci95", "a_only", "b_only", "examples": [{"id", "layer", "dataset", "phase", "unsafe"}]}]}`.
      A judge's `unsafe` is the share of responses that it calls unsafe; an example's `unsafe` is the metric of the
      judge that calls it unsafe. An example from a later attempt than the first also has `attempt`, the attempt's
      number. `a_only` counts the responses that only a calls unsafe. `kappa` is None if both judges always give the
      same verdict. Two judges without a common response are left out.
    """
    table = _Verdicts(rows)
    pairs = [table.compare(a, b, examples) for a, b in itertools.combinations(table.verdicts, 2)]
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
    """Returns Cohen's kappa of two judges' verdicts on the same rows: their agreement beyond chance.

    kappa = (observed - chance) / (1 - chance), where chance is the agreement of independent judges with the same shares
    of unsafe verdicts (Cohen 1960). The interval is computed from the interval of the observed agreement, clustered by
    prompt (`mean_interval`), and treats chance as a constant, as Cohen's error formula does. It is rather wide, and has
    a positive width even at perfect agreement.

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
    return Interval(*((share - chance) / (1 - chance) for share in _observed_agreement(a, b, clusters)))


def _observed_agreement(a: np.ndarray, b: np.ndarray, clusters: Sequence[Hashable]) -> Interval:
    """Returns the share of rows to which both judges gave the same verdict, with its interval."""
    mean, low, high = mean_interval((a == b).astype(np.float64), clusters, share=True)
    return Interval(min(mean, 1.0), low, max(high, min(mean, 1.0)))  # a sum of weights may exceed 1 by a rounding error


class _Verdicts:
    """Holds the verdicts of all judges on n responses.

    Attributes:
      verdicts: {judge's metric: float [n]}, 1 for unsafe, 0 for safe, NaN if the judge gave no verdict.
      errors: {judge's metric: number of responses on which it failed}.
      responses: id, exit, data set and side of each response.
      prompts: prompt of each response.
    """

    def __init__(self, rows: Iterable[tuple[str, str, Row]]) -> None:
        """Collects the verdicts in `rows`, which are as in `agreement`."""
        verdicts_by_name: dict[str, dict[int, float]] = {}
        self.errors: dict[str, int] = {}
        self.responses: list[JsonObject] = []
        self.prompts: list[str] = []
        for phase, dataset, row in rows:
            scores = {name: value for name, value in row["scores"].items() if name.startswith("asr/")}
            for name, value in scores.items():
                verdicts = verdicts_by_name.setdefault(name, {})
                self.errors.setdefault(name, 0)
                if value is None:
                    self.errors[name] += 1
                else:
                    verdicts[len(self.responses)] = float(value >= 0.5)
            if scores:
                response = {"id": row["id"], "layer": row["layer"], "dataset": dataset, "phase": phase}
                self.responses.append(response | ({"attempt": row["attempt"]} if row.get("attempt") else {}))
                self.prompts.append(row["prompt"])
        self.verdicts: dict[str, np.ndarray] = {}
        for name, verdicts in verdicts_by_name.items():
            values = np.full(len(self.responses), np.nan)
            values[list(verdicts)] = list(verdicts.values())
            self.verdicts[name] = values

    def compare(self, first: str, second: str, examples: int) -> JsonObject:
        """Returns the entry of two judges in `agreement.json`, with at most `examples` differing responses."""
        judged_by_both = np.flatnonzero(np.isfinite(self.verdicts[first]) & np.isfinite(self.verdicts[second]))
        a, b = self.verdicts[first][judged_by_both], self.verdicts[second][judged_by_both]
        prompts = [self.prompts[row] for row in judged_by_both]
        observed = _observed_agreement(a, b, prompts)
        kappa = cohens_kappa(a, b, prompts)
        differing = judged_by_both[a != b]
        if len(differing) > examples:
            differing = differing[np.linspace(0, len(differing) - 1, examples).round().astype(int)]
        return {
            "a": first,
            "b": second,
            "n": len(judged_by_both),
            "prompts": len(set(prompts)),
            "kappa": _number_or_none(kappa.mean),
            "ci95": _ends_or_none(kappa),
            "agree": _number_or_none(observed.mean),
            "agree_ci95": _ends_or_none(observed),
            "a_only": int(np.sum(a > b)),
            "b_only": int(np.sum(b > a)),
            "examples": [self._example(row, first, second) for row in differing.tolist()],
        }

    def _example(self, row: int, first: str, second: str) -> JsonObject:
        return {**self.responses[row], "unsafe": first if self.verdicts[first][row] else second}


def _number_or_none(value: float) -> float | None:
    return None if math.isnan(value) else float(value)


def _ends_or_none(interval: Interval) -> list[float] | None:
    return None if math.isnan(interval.low) else [float(interval.low), float(interval.high)]
