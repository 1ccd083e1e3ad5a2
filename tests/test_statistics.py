"""Intervals and means against exact statistics."""

import math
from itertools import product

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from bnn_utils.statistics import aggregate, bounded_interval, intervals, mean_interval, median_interval


@pytest.mark.parametrize("n", [2, 3, 20, 200])
@pytest.mark.parametrize("confidence", [0.5, 0.95, 0.99])
def test_interval_is_students(n, confidence):
    values = np.random.default_rng(n).normal(5, 2, n)
    mean, half = mean_interval(values, confidence)
    low, high = stats.t.interval(confidence, n - 1, loc=np.mean(values), scale=stats.sem(values))
    assert (mean - half, mean + half) == pytest.approx((low, high), rel=1e-12)


def test_interval_of_a_worked_example():
    # 2, 4, 6: mean 4, standard deviation 2, t(0.975; 2 degrees of freedom) = 4.302653, so 4.302653 * 2 / sqrt(3)
    assert mean_interval([2, 4, 6]) == pytest.approx((4, 4.968275), abs=1e-5)


def test_interval_of_too_few_or_unusual_values():
    mean, half = mean_interval([3.5])
    assert mean == 3.5
    assert math.isnan(half)
    assert all(math.isnan(x) for x in mean_interval([]))
    assert all(math.isnan(x) for x in mean_interval([1.0, math.nan, 2.0]))
    mean, half = mean_interval([1.0, math.inf])
    assert mean == math.inf
    assert math.isnan(half)
    assert mean_interval([0.25, 0.25, 0.25]) == (0.25, 0.0)


def test_interval_covers_the_mean_as_often_as_it_says():
    draws, n = 3000, 5
    samples = np.random.default_rng(0).normal(10, 3, (draws, n))
    covered = sum(abs(mean - 10) <= half for mean, half in map(mean_interval, samples))
    assert stats.binom.ppf(5e-7, draws, 0.95) <= covered <= stats.binom.isf(5e-7, draws, 0.95)


def test_aggregate_by_hand():
    rng = np.random.default_rng(1)
    rows = [
        dict(network=network, dataset="noise", storage="float32", repair=repair, probability=p, trial=trial, seed=trial)
        | dict(flips=int(rng.integers(100)), loss=rng.exponential(), accuracy=rng.random())
        for network, repair, p, trial in product(["a", "b"], ["none", "clip"], [1e-3, 1e-2], range(4))
    ]
    table = pd.DataFrame(rows)
    broken = (table["network"] == "a") & (table["repair"] == "clip") & (table["probability"] == 1e-3)
    table.loc[broken & (table["trial"] == 1), "loss"] = math.inf
    table.loc[broken & (table["trial"] == 2), "loss"] = math.nan

    keys = ["network", "dataset", "storage", "repair", "probability"]
    means = aggregate(table).set_index(keys)
    groups = table.groupby(keys)
    assert len(means) == groups.ngroups == 8
    for key, group in groups:
        row = means.loc[key]
        assert row["trials"] == 4
        assert row["flips"] == group["flips"].mean()
        factor = stats.t.ppf(0.975, 3) / 2  # sqrt(4 trials)
        assert row["accuracy"] == pytest.approx(group["accuracy"].mean())
        assert row["accuracy_half"] == pytest.approx(factor * group["accuracy"].std())
        if key == ("a", "noise", "float32", "clip", 1e-3):
            assert row["not_finite"] == 2
            assert not math.isfinite(row["loss"])
        else:
            assert row["not_finite"] == 0
            assert row["loss"] == pytest.approx(group["loss"].mean())
            assert row["loss_half"] == pytest.approx(factor * group["loss"].std())


def test_median_interval_uses_the_ranks_that_the_binomial_distribution_gives():
    for n in (9, 20, 31):
        values = np.random.default_rng(n).permutation(np.arange(n) ** 3.0)
        rank = max(k for k in range(n // 2) if stats.binom.cdf(k, n, 0.5) <= 0.025)  # so many may lie outside
        median, low, high = median_interval(values)
        assert (median, low, high) == (np.median(values), rank**3, (n - 1 - rank) ** 3)


def test_median_interval_takes_nan_for_infinity_and_needs_trials():
    assert median_interval([1, 2, np.nan, 3, np.nan, np.inf])[0] == np.inf
    median, low, high = median_interval([1.0, 5.0])
    assert median == 3 and np.isnan(low) and np.isnan(high)


def test_median_interval_covers_the_median_of_skewed_values():
    rng = np.random.default_rng(0)
    found = [median_interval(np.exp(3 * rng.normal(size=21)))[1:] for _ in range(400)]
    covered = sum(low <= 1 <= high for low, high in found)  # the median of exp(3 z) is 1
    exact = 1 - 2 * stats.binom.cdf(5, 21, 0.5)
    assert stats.binom.ppf(1e-6, 400, exact) <= covered <= stats.binom.isf(1e-6, 400, exact)


def test_intervals():
    table = pd.DataFrame({"a": ["y", "y", "x", "x", "x"], "b": [1, 1, 2, 2, 2], "value": [1.0, 3, 2, 4, 9]})
    rows = intervals(table, ["a", "b"], "value")
    assert rows[["a", "b", "trials"]].to_numpy().tolist() == [["y", 1, 2], ["x", 2, 3]]
    assert rows["value"].tolist() == [2, 5]
    halves = [stats.sem(values) * stats.t.ppf(0.975, len(values) - 1) for values in ([1, 3], [2, 4, 9])]
    assert rows["value_half"].tolist() == pytest.approx(halves)


def test_bounded_interval():
    values = np.array([0.2, 0.9, 0.8, 0.85])
    more = np.array([0.2, 0.9, 0.8, 0.85, 0, 1])
    low, high = stats.t.interval(0.9, 5, more.mean(), stats.sem(more))
    centre, half = bounded_interval(values, 0.9)
    np.testing.assert_allclose((centre - half, centre + half), (low, high))
    assert np.isnan(bounded_interval([])).all()
    for n in (100, 1000):  # of n trials that are all alike
        assert 1.38 / n < bounded_interval(np.full(n, 0.5))[1] < 1.42 / n
