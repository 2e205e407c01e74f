"""Means with 95% intervals, clustered by prompt; paired differences; and the paper's groups of layers.

Rows that share a prompt are not independent (10 prompts x 10 images are not 100 independent responses), so every
interval is built from prompts. A mean over rows, layers or groups is a weighted sum of observations. Its variance is
the sum over prompts of the squared sum of their influences (the cluster-robust "sandwich" with the factor G / (G - 1)
for G prompts), and its quantile is Student's with G - 1 degrees of freedom.

Shares get an interval that is never empty: Wilson's, with p (1 - p) / variance as the effective number of rows. That
number is limited from below by the effective number of prompts (all rows of a prompt agree) and from above by that of
rows (no two rows are related). If every row is 0, or every row is 1, the data cannot show how much the rows of a prompt
agree, and the lower limit is used. Differences of shares are treated in the same way with Bonett and Price's (2012)
added pairs.
"""

import math
from collections.abc import Hashable, Sequence
from typing import NamedTuple

import numpy as np
from scipy.special import stdtrit

from icet_jax.exit_groups import exit_groups

_RESAMPLES = 1000
_ROUNDING = 1e-9  # shares that differ by less count as equal


class Interval(NamedTuple):
    """Holds a mean and the ends of its 95% interval; NaN without observations (mean) or with fewer than two prompts
    (ends)."""

    mean: float
    low: float
    high: float


def mean_interval(
    values: np.ndarray, clusters: Sequence[Hashable], *, share: bool, weights: np.ndarray | None = None
) -> Interval:
    """Returns the weighted mean of the layers' means with its interval.

    Args:
      values: float [E, n] (or [n]) of n rows at E layers; NaN (not measured, or an error) is ignored.
      clusters: what makes rows dependent, their prompts, [n].
      share: whether the values are 0 or 1 (see the top of this module), or fractions of a success between them, for
        which the interval is no narrower than necessary; it stays within 0..1.
      weights: [E], with sum 1; equal if None.
    """
    table = _Table(np.atleast_2d(values), clusters, weights)
    if not table.complete:
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
    """Returns the mean of `after - before` over the rows measured in both; arguments as in `mean_interval`."""
    change = np.atleast_2d(np.asarray(after, np.float64) - np.asarray(before, np.float64))
    if not share:
        return mean_interval(change, clusters, share=False, weights=weights)
    table = _Table(change, clusters, weights)
    if not table.complete:
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
    """Returns the layer with the highest share (the first of equal ones), and a 95% interval of the highest true share.

    The highest of many estimates is biased upwards, because the same responses choose the layer. The lower end is
    therefore that share minus the 97.5% quantile of the largest error among the layers that may be the worst. A
    bootstrap over prompts gives these errors; a layer may be the worst unless its share is lower than the highest by
    more than twice that quantile over all layers (the adaptive selection of Chernozhukov, Lee and Rosen 2013). The
    upper end is the highest upper end of the single layers. The interval is never narrower than that of the layer
    alone, because the bootstrap shows no errors if all responses are alike.

    Args:
      values: 0 or 1, float [E, n]; NaN is ignored, and so is a layer without observations.
      clusters: what makes rows dependent, their prompts, [n].

    Raises:
      ValueError: there is no observation at all.
    """
    observed = np.isfinite(values).any(axis=0)
    values = np.asarray(values, np.float64)[:, observed]
    clusters = [cluster for cluster, is_observed in zip(clusters, observed, strict=True) if is_observed]
    single = [mean_interval(layer, clusters, share=True) for layer in values]
    means = np.array([interval.mean for interval in single])
    worst = int(np.argmax(means >= np.nanmax(means) - _ROUNDING))
    measured = np.flatnonzero(np.isfinite(means))
    highs = [single[layer].high for layer in measured]
    if math.isnan(single[worst].low):
        return worst, single[worst]
    errors = _bootstrap_errors(values[measured], clusters, means[measured])
    slack = 2 * float(np.quantile(errors.max(axis=1), 0.975))
    near = means[measured] >= means[worst] - slack
    mean = single[worst].mean
    low = mean - float(np.quantile(errors[:, near].max(axis=1), 0.975))
    return worst, Interval(mean, max(0.0, min(low, single[worst].low)), float(np.nanmax(highs)))


def _bootstrap_errors(values: np.ndarray, clusters: Sequence[Hashable], means: np.ndarray) -> np.ndarray:
    """Returns resampled minus observed means, [1000, E]; each resample draws as many prompts as there are, with
    replacement.

    The draws are the same for the same prompts, so that a resumed sweep writes the same numbers.
    """
    codes = _codes(clusters)
    prompts = int(codes.max()) + 1
    is_used = np.isfinite(values)
    sums, counts = (
        np.stack([np.bincount(codes, weights=layer, minlength=prompts) for layer in table], axis=1)
        for table in (np.where(is_used, values, 0.0), is_used.astype(np.float64))
    )
    generator = np.random.default_rng(0)
    errors = []
    chunk = max(1, 2**20 // prompts)  # bounds the memory
    for start in range(0, _RESAMPLES, chunk):
        size = min(chunk, _RESAMPLES - start)
        places = generator.integers(prompts, size=(size, prompts)) + prompts * np.arange(size)[:, None]
        drawn = np.bincount(places.ravel(), minlength=size * prompts).reshape(size, prompts).astype(np.float64)
        rows = drawn @ counts
        # If none of the drawn prompts has a layer, its error is unknown and set to 0.
        errors.append(np.where(rows > 0, drawn @ sums / np.maximum(rows, 1.0) - means, 0.0))
    return np.concatenate(errors)


def group_weights(exits: Sequence[int], num_exits: int) -> dict[str, np.ndarray]:
    """Returns weights [E] over `exits` of the paper's group means ("early", "middle", "late") and of their mean,
    "average".

    A group is included only if all of its layers were measured, and "average" only if all groups were, because a mean
    over some of the layers would be another number under the same name.
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
    return float(stdtrit(degrees, 0.975))


class _Table:
    """Represents observations [E, n] as a weighted sum; each weighs (weight of its layer) / (rows of its layer)."""

    def __init__(self, values: np.ndarray, clusters: Sequence[Hashable], weights: np.ndarray | None) -> None:
        values = np.asarray(values, np.float64)
        layers, rows = values.shape
        if len(clusters) != rows:
            raise ValueError(f"{rows} rows need as many clusters, not {len(clusters)}")
        weights = np.full(layers, 1 / layers) if weights is None else np.asarray(weights, np.float64)
        used = np.isfinite(values) & (weights[:, None] != 0)
        counts = used.sum(axis=1)
        self.complete = bool(rows) and bool(np.all(counts[weights != 0] > 0))
        if not self.complete:
            return
        self._share = used * weights[:, None] / np.maximum(counts, 1)[:, None]
        filled = np.where(used, values, 0.0)
        self.mean = float(self.mean_of(filled))
        layer_means = filled.sum(axis=1) / np.maximum(counts, 1)
        codes = np.unique(_codes(clusters), return_inverse=True)[1]
        present = used.any(axis=0)
        self.prompts = int(np.unique(codes[present]).size)
        influence = self._by_prompt(codes, self._share * (filled - layer_means[:, None]))
        self.variance = self.prompts / max(self.prompts - 1, 1) * float(np.sum(influence**2))
        self._fewest = 1 / float(np.sum(self._by_prompt(codes, self._share) ** 2))
        self._most = 1 / float(np.sum(self._share**2))

    def mean_of(self, values: np.ndarray) -> float:
        """Returns the same weighted mean of other values [E, n] of the same observations."""
        return float(np.sum(self._share * values))

    def effective_rows(self, row_variance: float) -> float:
        """Returns how many unrelated rows of variance `row_variance` would give the mean its variance, within
        limits."""
        if row_variance <= 1e-12:
            return self._fewest
        ratio = row_variance / self.variance if self.variance > 0 else math.inf
        return min(max(ratio, self._fewest), self._most)

    def _by_prompt(self, codes: np.ndarray, values: np.ndarray) -> np.ndarray:
        return np.bincount(codes, weights=values.sum(axis=0))


def _codes(clusters: Sequence[Hashable]) -> np.ndarray:
    numbers: dict[Hashable, int] = {}
    return np.array([numbers.setdefault(cluster, len(numbers)) for cluster in clusters], int)
