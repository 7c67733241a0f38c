from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from p0circuit import stats as intervals
from p0circuit.stats import RESAMPLES, bootstrap, ratio_interval


def test_the_interval_of_a_mean_agrees_with_the_normal_approximation():
    samples = np.random.default_rng(0).normal(3.0, 2.0, 400)
    interval = bootstrap(samples)
    half = 1.96 * samples.std() / 20
    assert interval.value == pytest.approx(samples.mean())
    assert interval.low == pytest.approx(samples.mean() - half, abs=0.03)
    assert interval.high == pytest.approx(samples.mean() + half, abs=0.03)
    assert interval.n == 400


def by_a_loop(samples: np.ndarray, statistic: Callable[[np.ndarray], float]) -> tuple[float, float]:
    """The slow twin: samples are drawn one by one, and the statistic is made of those drawn."""
    rng, n = np.random.default_rng(9), len(samples)
    drawn = [statistic(samples[rng.integers(0, n, n)]) for _ in range(RESAMPLES)]
    low, high = np.quantile(drawn, [0.025, 0.975])
    return float(low), float(high)


def test_the_product_and_the_plain_loop_draw_the_same_distribution():
    rng = np.random.default_rng(4)
    samples, pairs = rng.exponential(size=200), rng.exponential(size=(200, 2)) + 0.5
    for interval, low_and_high in (
        (bootstrap(samples), by_a_loop(samples, np.mean)),
        (bootstrap(pairs), by_a_loop(pairs, np.mean)),
        (ratio_interval(*pairs.T), by_a_loop(pairs, lambda drawn: drawn[:, 0].sum() / drawn[:, 1].sum())),
        (bootstrap(pairs, lambda means: means.max(1)), by_a_loop(pairs, lambda drawn: drawn.mean(0).max())),
    ):
        assert (interval.low, interval.high) == pytest.approx(low_and_high, abs=0.02)
    assert ratio_interval(*pairs.T).value == pytest.approx(pairs[:, 0].sum() / pairs[:, 1].sum())


def test_many_quantities_are_resampled_in_parts(monkeypatch: pytest.MonkeyPatch):
    samples = np.random.default_rng(5).normal(size=(30, 4, 5))
    whole = bootstrap(samples, lambda means: means.max((1, 2)))
    monkeypatch.setattr(intervals, "_MAX_VALUES", 999)
    parts = bootstrap(samples, lambda means: means.max((1, 2)))
    assert whole.to_json() == pytest.approx(parts.to_json(), abs=1e-12)


def test_95_percent_intervals_cover_the_truth_about_95_times_of_100():
    rng = np.random.default_rng(2)
    intervals = [bootstrap(rng.normal(0, 1, 100), seed=seed) for seed in range(200)]
    covered = sum(interval.low <= 0 <= interval.high for interval in intervals)
    assert 180 <= covered <= 199


def test_ratios_are_paired():
    base = np.random.default_rng(3).uniform(1, 9, 100)
    interval = ratio_interval(0.5 * base, base)
    # Unpaired resampling would give a wide interval here.
    assert (interval.low, interval.value, interval.high) == pytest.approx((0.5, 0.5, 0.5))


@pytest.mark.parametrize("samples", [[], [np.nan, 1.0]])
def test_no_samples_and_no_numbers_are_refused(samples):
    with pytest.raises(ValueError, match="sample"):
        bootstrap(np.array(samples))
