"""95 % bootstrap intervals over samples (or over seeds, where a claim is about training)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

import numpy as np

RESAMPLES = 2000
LEVEL = 0.95


@dataclass(frozen=True)
class Interval:
    """A measured value with its 95 % interval and the number of samples behind it."""

    value: float
    low: float
    high: float
    n: int

    def to_json(self) -> dict[str, float | int]:
        return asdict(self)

    def __str__(self) -> str:
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"


def bootstrap(samples: np.ndarray, statistic: Callable[[np.ndarray], float] = np.mean, seed: int = 0) -> Interval:
    """The percentile interval of a statistic of `samples`, resampled along the first axis.

    Raises:
        ValueError: there are no samples, or the statistic of them is not a number.
    """
    samples = np.asarray(samples, dtype=np.float64)
    n = len(samples)
    if n == 0:
        raise ValueError("an interval needs at least one sample, got none")
    value = float(statistic(samples))
    if not math.isfinite(value):
        raise ValueError(
            f"the statistic of the {n} samples is {value}: check the samples for values that are not finite"
        )
    rng = np.random.default_rng(seed)
    if (statistic is np.mean and samples.ndim == 1) or statistic is ratio_of_means:
        # The mean of a resample is a weighted mean with multinomial weights: one product instead of a loop.
        means = rng.multinomial(n, np.full(n, 1 / n), RESAMPLES) @ samples / n
        with np.errstate(divide="ignore", invalid="ignore"):
            drawn = means if statistic is np.mean else means[:, 0] / means[:, 1]
    else:
        drawn = np.array([statistic(samples[rng.integers(0, n, n)]) for _ in range(RESAMPLES)])
    low, high = np.nanquantile(drawn, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Interval(value, float(low), float(high), n)


def over_seeds(values: Sequence[float] | np.ndarray) -> Interval:
    """The mean over training runs with Student's interval: three runs are too few to resample.

    Raises:
        ValueError: there are fewer than two runs.
    """
    from scipy.stats import t

    n = len(values)
    if n < 2:
        raise ValueError(f"an interval over seeds needs at least two runs, got {n}: {list(values)}")
    mean, half = float(np.mean(values)), float(t.ppf((1 + LEVEL) / 2, n - 1) * np.std(values, ddof=1) / math.sqrt(n))
    return Interval(mean, mean - half, mean + half, n)


def ratio_of_means(samples: np.ndarray) -> float:
    """A statistic of paired samples [n, 2]: the mean of the first column over the mean of the second."""
    numerator, denominator = samples.mean(0)
    return float(numerator / denominator) if denominator else math.nan


def ratio_interval(numerator: np.ndarray, denominator: np.ndarray, seed: int = 0) -> Interval:
    """The interval of mean(numerator) / mean(denominator), the samples being paired.

    Raises:
        ValueError: the denominator's mean is 0.
    """
    return bootstrap(np.stack([numerator, denominator], axis=1), ratio_of_means, seed)
