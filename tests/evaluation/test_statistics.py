"""Intervals against plain loops, textbook values and simulated coverage."""

import math

import numpy as np
import pytest

from icet_jax.evaluation.statistics import (
    group_weights,
    maximum_interval,
    mean_interval,
    paired_interval,
    student_quantile,
)

Z = {1: 12.7062, 2: 4.3027, 3: 3.1824, 4: 2.7764, 9: 2.2622, 10: 2.2281, 30: 2.0423, 100: 1.9840, 1001: 1.96233}


@pytest.mark.parametrize(("degrees", "expected"), Z.items())
def test_student_quantile(degrees, expected):
    assert student_quantile(degrees) == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("degrees", [1, 2, 5, 6, 37])
def test_student_quantile_by_integration(degrees):
    x = np.linspace(-1, 1, 2_000_001) * student_quantile(degrees)
    log_norm = math.lgamma((degrees + 1) / 2) - math.lgamma(degrees / 2) - 0.5 * math.log(degrees * math.pi)
    density = np.exp(log_norm - (degrees + 1) / 2 * np.log1p(x**2 / degrees))
    assert np.trapezoid(density, x) == pytest.approx(0.95, abs=1e-6)


def test_real_values_without_clusters_are_the_textbook_interval():
    x = np.random.default_rng(0).normal(size=11)
    got = mean_interval(x, range(11), share=False)
    half = Z[10] * x.std(ddof=1) / math.sqrt(11)
    np.testing.assert_allclose(got, (x.mean(), x.mean() - half, x.mean() + half), rtol=1e-4)


def brute_variance(values, clusters, weights):
    """The cluster-robust variance with nothing but loops."""
    layers, rows = values.shape
    means, counts = [], []
    for layer in range(layers):
        known = [v for v in values[layer] if not math.isnan(v)]
        means.append(sum(known) / len(known))
        counts.append(len(known))
    total, prompts = 0.0, set()
    for prompt in set(clusters):
        influence = 0.0
        for layer in range(layers):
            for row in range(rows):
                if clusters[row] == prompt and weights[layer] and not math.isnan(values[layer][row]):
                    influence += weights[layer] * (values[layer][row] - means[layer]) / counts[layer]
                    prompts.add(prompt)
        total += influence**2
    mean = sum(weight * m for weight, m in zip(weights, means, strict=True))
    return mean, total * len(prompts) / (len(prompts) - 1), len(prompts)


@pytest.mark.parametrize("seed", range(5))
def test_layers_clusters_and_missing_values_against_loops(seed):
    rng = np.random.default_rng(seed)
    values = rng.normal(size=(4, 30))
    values[rng.random(values.shape) < 0.2] = np.nan
    clusters = [f"prompt {k}" for k in rng.integers(0, 7, 30)]
    weights = np.array([0.5, 0.25, 0.25, 0.0])
    mean, variance, prompts = brute_variance(values, clusters, weights)
    half = student_quantile(prompts - 1) * math.sqrt(variance)
    got = mean_interval(values, clusters, share=False, weights=weights)
    np.testing.assert_allclose(got, (mean, mean - half, mean + half), rtol=1e-10)


def wilson(p, n, z):
    centre = (p + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z / (1 + z**2 / n) * math.sqrt(p * (1 - p) / n + z**2 / (4 * n**2))
    return max(0, centre - half), min(1, centre + half)


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_a_share_of_nothing_or_everything_has_a_wilson_interval(value):
    got = mean_interval(np.full(256, value), range(256), share=True)
    np.testing.assert_allclose(got[1:], wilson(value, 256, student_quantile(255)), atol=1e-12)
    assert got.high - got.low == pytest.approx(0.0149, abs=1e-3)


def test_a_share_with_few_prompts_counts_prompts_at_the_ends():
    clusters = np.repeat(range(10), 10).tolist()
    got = mean_interval(np.zeros(100), clusters, share=True)
    np.testing.assert_allclose(got, (0, *wilson(0.0, 10, Z[9])), atol=1e-4)


def test_a_share_whose_rows_agree_within_a_prompt_counts_prompts():
    per_prompt = np.array([1, 1, 0, 1, 0, 0, 1, 0])
    repeated = mean_interval(np.repeat(per_prompt, 5), np.repeat(range(8), 5).tolist(), share=True)
    single = mean_interval(per_prompt, range(8), share=True)
    np.testing.assert_allclose(repeated, single, rtol=1e-12)


def test_too_little_data_has_no_interval():
    assert np.isnan(mean_interval(np.array([np.nan, np.nan]), [0, 1], share=True)).all()
    assert np.isnan(mean_interval(np.zeros(0), [], share=False)).all()
    one = mean_interval(np.array([1.0, 0.0]), ["same", "same"], share=True)
    assert one.mean == 0.5 and math.isnan(one.low) and math.isnan(one.high)
    with pytest.raises(ValueError, match="clusters"):
        mean_interval(np.zeros(3), [0, 1], share=True)


@pytest.mark.parametrize(("rate", "spread"), [(0.03, 0.0), (0.3, 0.0), (0.3, 0.15), (0.9, 0.08)])
def test_share_intervals_cover(rate, spread):
    """20 prompts x 5 images, success rates that differ by prompt: the truth is inside about 95% of the time."""
    rng = np.random.default_rng(1)
    clusters = np.repeat(range(20), 5).tolist()
    hits = 0
    for _ in range(400):
        rates = np.clip(rate + spread * rng.choice([-1, 1], 20), 0, 1) if spread else np.full(20, rate)
        got = mean_interval((rng.random(100) < np.repeat(rates, 5)).astype(float), clusters, share=True)
        hits += got.low <= rate <= got.high
    assert hits / 400 >= 0.93


@pytest.mark.parametrize(
    ("rates", "alone"),
    [(np.full(24, 0.5), 0.7), (np.array([0.6, *[0.05] * 23]), 1.0)],
    ids=["all alike", "one far above"],
)
def test_the_interval_of_the_worst_layer_covers_the_highest_rate(rates, alone):
    """60 prompts at 24 layers: the interval of the layer that was chosen for its mean misses the truth too often."""
    rng = np.random.default_rng(2)
    hits, hits_alone = 0, 0
    for _ in range(100):
        values = (rng.random((24, 60)) < rates[:, None]).astype(float)
        layer, got = maximum_interval(values, range(60))
        assert layer == values.sum(axis=1).argmax() and got.mean == pytest.approx(values[layer].mean())
        single = mean_interval(values[layer], range(60), share=True)
        assert got.low <= single.low and got.high >= single.high
        hits += got.low <= rates.max() <= got.high
        hits_alone += single.low <= rates.max() <= single.high
    assert hits / 100 >= 0.92 and hits_alone / 100 <= alone


def test_rows_of_one_prompt_and_missing_layers_of_a_maximum():
    rng = np.random.default_rng(3)
    agreeing = np.repeat((rng.random((8, 12)) < 0.5).astype(float), 5, axis=1)
    clustered = maximum_interval(agreeing, np.repeat(range(12), 5).tolist())[1]
    alone = maximum_interval(agreeing, range(60))[1]
    assert clustered.high - clustered.low > 1.5 * (alone.high - alone.low)
    gaps = np.vstack([np.full(60, np.nan), agreeing])
    gaps = np.hstack([gaps, np.full((9, 3), np.nan)])  # prompts that a judge could not judge anywhere
    clusters = [*np.repeat(range(12), 5).tolist(), 97, 98, 99]
    layer, got = maximum_interval(gaps, clusters)
    assert layer == agreeing.sum(axis=1).argmax() + 1 and got == pytest.approx(clustered)


def test_a_maximum_of_answers_that_are_all_alike_has_an_interval():
    layer, got = maximum_interval(np.ones((3, 4)), range(4))
    assert (layer, got.mean, got.high) == (0, 1.0, 1.0) and got.low == pytest.approx(0.283, abs=1e-3)
    assert math.isnan(maximum_interval(np.ones((3, 2)), ["same", "same"])[1].low)


@pytest.mark.parametrize("share", [0.2, 0.4, 0.6, 0.8])
def test_a_maximum_of_equal_shares_of_several_attempts_has_an_interval(share):
    """Every prompt has the same share of unsafe attempts: the bootstrap then shows nothing but rounding errors."""
    for rows in range(2, 30):
        layer, got = maximum_interval(np.full((3, rows), share), range(rows))
        assert layer == 0 and got.mean == pytest.approx(share) and got.low < share < got.high


def test_pairing_narrows_real_differences():
    rng = np.random.default_rng(0)
    before = rng.normal(size=50)
    after = before + 0.1 + 0.01 * rng.normal(size=50)
    got = paired_interval(before, after, range(50), share=False)
    np.testing.assert_allclose(got, mean_interval(after - before, range(50), share=False))
    assert 0.09 < got.low < got.high < 0.11


def bonett_price(up, down, n, z):
    up, down = (up + 1) / (n + 2), (down + 1) / (n + 2)
    half = z * math.sqrt((up + down - (up - down) ** 2) / (n + 2))
    return max(-1, up - down - half), min(1, up - down + half)


@pytest.mark.parametrize(("up", "down", "n"), [(0, 0, 256), (256, 0, 256), (0, 40, 100)])
def test_differences_of_shares_are_never_empty(up, down, n):
    before, after = np.zeros(n), np.zeros(n)
    after[:up] = 1
    before[up : up + down] = 1
    got = paired_interval(before, after, range(n), share=True)
    low, high = bonett_price(up, down, n, student_quantile(n - 1))
    np.testing.assert_allclose(got, ((up - down) / n, low, high), atol=3e-3)
    assert got.low <= got.mean <= got.high and got.low < got.high


def test_parts_of_full_credit_have_intervals_that_stay_inside():
    """VQA accuracies are 0, 0.3, 0.6, 0.9 or 1: nothing wider than whole successes of the same mean, never empty."""
    rng = np.random.default_rng(3)
    values = rng.choice([0, 0.3, 0.6, 0.9, 1.0], 40)
    whole = (rng.random(40) < values).astype(float)
    got = mean_interval(values, range(40), share=True)
    whole_interval = mean_interval(np.sort(whole), range(40), share=True)
    assert 0 <= got.low < values.mean() < got.high <= 1
    assert got.high - got.low == pytest.approx(whole_interval.high - whole_interval.low, rel=0.3)
    flat = mean_interval(np.full(20, 0.9), range(20), share=True)
    assert flat.low < 0.9 < flat.high
    before = np.array([0.9, np.nan, 0.3, 0.0])
    change = paired_interval(before, np.array([0.3, 1.0, 0.3, 1.0]), range(4), share=True)
    assert change.mean == pytest.approx((-0.6 + 0 + 1) / 3) and -1 <= change.low < change.mean < change.high <= 1


def test_rows_missing_on_either_side_are_left_out():
    before = np.array([1.0, np.nan, 0.0, 1.0])
    after = np.array([0.0, 1.0, np.nan, 0.0])
    got = paired_interval(before, after, range(4), share=True)
    assert got.mean == -1.0
    assert math.isnan(paired_interval(before, np.full(4, np.nan), range(4), share=True).mean)


def test_paired_coverage():
    rng = np.random.default_rng(2)
    hits = 0
    for _ in range(400):
        before = rng.random(60) < 0.6
        after = before & (rng.random(60) < 0.3)
        got = paired_interval(before.astype(float), after.astype(float), range(60), share=True)
        hits += got.low <= -0.42 <= got.high
    assert hits / 400 >= 0.93


def test_group_weights_are_the_papers():
    weights = group_weights(range(1, 25), 24)
    assert list(weights) == ["early", "middle", "late", "average"]
    assert np.flatnonzero(weights["middle"]).tolist() == list(range(8, 16))
    values = np.arange(24.0)
    parts = [values[:8].mean(), values[8:16].mean(), values[16:].mean()]
    np.testing.assert_allclose([weights[name] @ values for name in weights], [*parts, np.mean(parts)])
    uneven = group_weights(range(1, 9), 8)
    assert [int((uneven[name] > 0).sum()) for name in ("early", "middle", "late")] == [3, 3, 2]
    assert uneven["average"][-1] == pytest.approx(1 / 6)


def test_groups_that_were_not_measured_whole_are_left_out():
    assert list(group_weights([1, 2, 3, 7], 8)) == ["early"]
    assert group_weights([4], 8) == {}
    assert list(group_weights([1, 2], 2)) == ["early", "middle", "average"]
