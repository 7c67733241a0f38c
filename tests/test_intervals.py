from __future__ import annotations

import numpy as np
import pytest

from p0circuit.intervals import bootstrap, ratio_interval


def test_the_interval_of_a_mean_agrees_with_the_normal_approximation():
    samples = np.random.default_rng(0).normal(3.0, 2.0, 400)
    interval = bootstrap(samples)
    half = 1.96 * samples.std() / 20
    assert interval.value == pytest.approx(samples.mean())
    assert interval.low == pytest.approx(samples.mean() - half, abs=0.03)
    assert interval.high == pytest.approx(samples.mean() + half, abs=0.03)
    assert interval.n == 400


def test_the_fast_mean_and_the_plain_loop_draw_the_same_distribution():
    samples = np.random.default_rng(1).exponential(size=200)
    fast, slow = bootstrap(samples), bootstrap(samples, lambda values: float(values.mean()))
    assert fast.low == pytest.approx(slow.low, abs=0.02)
    assert fast.high == pytest.approx(slow.high, abs=0.02)


def test_the_fast_ratio_and_the_plain_loop_draw_the_same_distribution():
    pairs = np.random.default_rng(4).exponential(size=(200, 2)) + 0.5
    fast, slow = (
        ratio_interval(*pairs.T),
        bootstrap(pairs, lambda values: float(values[:, 0].sum() / values[:, 1].sum())),
    )
    assert fast.value == pytest.approx(slow.value)
    assert (fast.low, fast.high) == pytest.approx((slow.low, slow.high), abs=0.02)


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
