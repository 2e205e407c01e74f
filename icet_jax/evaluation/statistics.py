"""Means with 95% intervals, clustered by prompt; paired differences; and means over the paper's groups of exits.

Rows that share a prompt are not independent (10 prompts x 10 images are not 100 independent responses), so all
intervals treat the rows of a prompt as one cluster. A mean over rows, exits or groups is a weighted sum of
observations. Its variance is the cluster-robust ("sandwich") one: for each of G prompts the influences of its
observations are summed, and the squares of these sums are added and multiplied by G / (G - 1). The quantile is
Student's with G - 1 degrees of freedom.

The interval of a share is Wilson's, which is never empty, with p (1 - p) / variance as the effective number of rows.
That number is at least the effective number of prompts (as if all rows of a prompt agreed) and at most the effective
number of rows (as if all rows were independent). If all rows are equal, the data cannot show how much the rows of a
prompt agree, and the lower limit is used. Differences of shares are treated in the same way, with the added pairs of
Bonett and Price (2012).
"""

import math
from collections.abc import Hashable, Sequence
from typing import NamedTuple

import numpy as np

from icet_jax.exit_groups import exit_groups

_RESAMPLES = 1000
_TOLERANCE = 1e-9  # shares that differ by less count as equal


class Interval(NamedTuple):
    """Holds a mean and the lower and upper end of its 95% interval.

    The mean is NaN if there are no observations, and both ends are NaN if there are fewer than two prompts.
    """

    mean: float
    low: float
    high: float


def mean_interval(
    values: np.ndarray, clusters: Sequence[Hashable], *, share: bool, weights: np.ndarray | None = None
) -> Interval:
    """Returns the weighted mean over E exits of each exit's mean over rows, with its 95% interval.

    Args:
      values: float [E, n] (or [n]) of n rows at E exits; NaN (not measured, or an error) is ignored.
      clusters: prompt of each row, [n]; rows of one prompt are not independent.
      share: whether the values lie within 0..1 (0 or 1, or partial credit). The interval is then computed as that of a
        share and lies within 0..1 as well (see the module's docstring).
      weights: weight of each exit, [E], with sum 1; equal weights if None.
    """
    table = _Table(np.atleast_2d(values), clusters, weights)
    if not table.is_complete:
        return Interval(math.nan, math.nan, math.nan)
    if table.prompts < 2:
        return Interval(table.mean, math.nan, math.nan)
    quantile = student_quantile(table.prompts - 1)
    if not share:
        half = quantile * math.sqrt(table.variance)
        return Interval(table.mean, table.mean - half, table.mean + half)
    rows = table.effective_rows(table.mean * (1 - table.mean))
    squared = quantile**2 / rows
    centre = (table.mean + squared / 2) / (1 + squared)
    half = math.sqrt(squared * table.mean * (1 - table.mean) + squared**2 / 4) / (1 + squared)
    return Interval(table.mean, max(0.0, centre - half), min(1.0, centre + half))


def paired_interval(
    before: np.ndarray,
    after: np.ndarray,
    clusters: Sequence[Hashable],
    *,
    share: bool,
    weights: np.ndarray | None = None,
) -> Interval:
    """Returns the mean of `after - before` over the rows that were measured on both sides, with its interval.

    Args:
      before: values of the rows before; for them and for the other arguments see `mean_interval`.
      after: values of the same rows after.
    """
    change = np.atleast_2d(np.asarray(after, np.float64) - np.asarray(before, np.float64))
    if not share:
        return mean_interval(change, clusters, share=False, weights=weights)
    table = _Table(change, clusters, weights)
    if not table.is_complete:
        return Interval(math.nan, math.nan, math.nan)
    if table.prompts < 2:
        return Interval(table.mean, math.nan, math.nan)
    up, down = (float(table.mean_of(np.clip(sign * np.nan_to_num(change), 0, 1))) for sign in (1, -1))
    rows = table.effective_rows(up + down - table.mean**2)
    up, down = (rows * up + 1) / (rows + 2), (rows * down + 1) / (rows + 2)
    centre = up - down
    half = student_quantile(table.prompts - 1) * math.sqrt((up + down - centre**2) / (rows + 2))
    return Interval(table.mean, max(-1.0, min(centre - half, table.mean)), min(1.0, max(centre + half, table.mean)))


def maximum_interval(values: np.ndarray, clusters: Sequence[Hashable]) -> tuple[int, Interval]:
    """Returns the exit with the highest share, and a 95% interval of the highest true share of all exits.

    The highest of many estimates is biased upwards, because the same responses chose the exit. The lower end is
    therefore the highest share minus the 97.5% quantile of the largest error among the exits that may be the worst.
    These errors come from a bootstrap over prompts. An exit may be the worst unless its share is below the highest by
    more than twice that quantile over all exits (the adaptive selection of Chernozhukov, Lee and Rosen 2013). The upper
    end is the highest upper end of any exit's interval. The interval is never narrower than that of the exit alone,
    because the bootstrap shows no errors if all responses are equal.

    Args:
      values: 0 or 1, float [E, n]; NaN is ignored, and so is an exit without observations.
      clusters: prompt of each row, [n].

    Returns:
      (index in `values` of the exit with the highest share, the first one if several are equal; interval, whose mean is
      that exit's share).

    Raises:
      ValueError: `values` has no observation.
    """
    observed = np.isfinite(values).any(axis=0)
    values = np.asarray(values, np.float64)[:, observed]
    clusters = [cluster for cluster, is_observed in zip(clusters, observed, strict=True) if is_observed]
    single = [mean_interval(layer, clusters, share=True) for layer in values]
    means = np.array([interval.mean for interval in single])
    worst = int(np.argmax(means >= np.nanmax(means) - _TOLERANCE))
    measured = np.flatnonzero(np.isfinite(means))
    highs = [single[layer].high for layer in measured]
    if math.isnan(single[worst].low):
        return worst, single[worst]
    errors = _bootstrap_errors(values[measured], clusters, means[measured])
    margin = max(0.0, 2 * float(np.quantile(errors.max(axis=1), 0.975)))
    may_be_worst = means[measured] >= means[worst] - margin - _TOLERANCE
    mean = single[worst].mean
    low = mean - float(np.quantile(errors[:, may_be_worst].max(axis=1), 0.975))
    return worst, Interval(mean, max(0.0, min(low, single[worst].low)), float(np.nanmax(highs)))


def _bootstrap_errors(values: np.ndarray, clusters: Sequence[Hashable], means: np.ndarray) -> np.ndarray:
    """Returns the means of 1000 resamples minus the observed means, [1000, E].

    A resample draws as many prompts as the data have, at random with replacement. The random numbers are always the
    same, so that a resumed sweep gets the same result.
    """
    codes = _cluster_numbers(clusters)
    prompts = int(codes.max()) + 1
    is_used = np.isfinite(values)
    sums, counts = (
        np.stack([np.bincount(codes, weights=layer, minlength=prompts) for layer in table], axis=1)
        for table in (np.where(is_used, values, 0.0), is_used.astype(np.float64))
    )
    generator = np.random.default_rng(0)
    errors = []
    chunk = max(1, 2**20 // prompts)  # resamples at a time, to limit memory
    for start in range(0, _RESAMPLES, chunk):
        size = min(chunk, _RESAMPLES - start)
        sampled = generator.integers(prompts, size=(size, prompts)) + prompts * np.arange(size)[:, None]
        times = np.bincount(sampled.ravel(), minlength=size * prompts).reshape(size, prompts).astype(np.float64)
        rows = times @ counts
        # If none of the sampled prompts was measured at an exit, its error is unknown and set to 0.
        errors.append(np.where(rows > 0, times @ sums / np.maximum(rows, 1.0) - means, 0.0))
    return np.concatenate(errors)


def group_weights(exits: Sequence[int], num_exits: int) -> dict[str, np.ndarray]:
    """Returns {name of a group of exits: weights [E] of `exits` in the mean over the group}.

    The names are "early", "middle" and "late", and "average" for the mean of these three. A group is left out unless
    all of its exits were measured, and so is "average" unless all groups were, because a mean over some of the exits
    would be another quantity.
    """
    exits = list(exits)
    members = exit_groups(num_exits)
    weights = {
        name: np.isin(exits, layers) / len(layers) for name, layers in members.items() if set(layers) <= set(exits)
    }
    if len(weights) == len(members):
        weights["average"] = np.mean(list(weights.values()), axis=0)
    return weights


def student_quantile(degrees: int) -> float:
    """Returns the two-sided 95% quantile of Student's t: 12.71 for 1 degree of freedom, 1.96 for many."""
    from scipy.special import stdtrit  # importing it takes as long as importing flax

    return float(stdtrit(degrees, 0.975))


class _Table:
    """Computes the weighted mean of observations [E, n] and its variance, clustered by prompt.

    The weight of an observation is (weight of its exit) / (number of observations at its exit).

    Attributes:
      is_complete: whether every exit with a weight has an observation. If not, the other attributes are not set.
      mean: the weighted mean.
      prompts: number of prompts with an observation.
      variance: cluster-robust variance of the mean.
    """

    def __init__(self, values: np.ndarray, clusters: Sequence[Hashable], weights: np.ndarray | None) -> None:
        """Computes the attributes; for the arguments see `mean_interval`."""
        values = np.asarray(values, np.float64)
        layers, rows = values.shape
        if len(clusters) != rows:
            raise ValueError(f"{rows} rows need as many clusters, not {len(clusters)}")
        weights = np.full(layers, 1 / layers) if weights is None else np.asarray(weights, np.float64)
        used = np.isfinite(values) & (weights[:, None] != 0)
        counts = used.sum(axis=1)
        self.is_complete = bool(rows) and bool(np.all(counts[weights != 0] > 0))
        if not self.is_complete:
            return
        self._share = used * weights[:, None] / np.maximum(counts, 1)[:, None]
        filled = np.where(used, values, 0.0)
        self.mean = float(self.mean_of(filled))
        layer_means = filled.sum(axis=1) / np.maximum(counts, 1)
        codes = np.unique(_cluster_numbers(clusters), return_inverse=True)[1]
        present = used.any(axis=0)
        self.prompts = int(np.unique(codes[present]).size)
        influence = self._by_prompt(codes, self._share * (filled - layer_means[:, None]))
        self.variance = self.prompts / max(self.prompts - 1, 1) * float(np.sum(influence**2))
        self._effective_prompts = 1 / float(np.sum(self._by_prompt(codes, self._share) ** 2))
        self._effective_rows = 1 / float(np.sum(self._share**2))

    def mean_of(self, values: np.ndarray) -> float:
        """Returns the mean, with the same weights, of other values [E, n] of the same observations."""
        return float(np.sum(self._share * values))

    def effective_rows(self, row_variance: float) -> float:
        """Returns how many independent rows of variance `row_variance` would have a mean with the variance `variance`.

        The result is limited to the range from the effective number of prompts to the effective number of rows.
        """
        if row_variance <= 1e-12:
            return self._effective_prompts
        ratio = row_variance / self.variance if self.variance > 0 else math.inf
        return min(max(ratio, self._effective_prompts), self._effective_rows)

    def _by_prompt(self, codes: np.ndarray, values: np.ndarray) -> np.ndarray:
        """Returns the sum of values [E, n] over the rows of each prompt."""
        return np.bincount(codes, weights=values.sum(axis=0))


def _cluster_numbers(clusters: Sequence[Hashable]) -> np.ndarray:
    """Returns the index of each row's cluster; clusters count from 0, in the order of their first rows."""
    numbers: dict[Hashable, int] = {}
    return np.array([numbers.setdefault(cluster, len(numbers)) for cluster in clusters], int)
