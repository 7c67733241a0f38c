"""95 % intervals: bootstrap intervals over samples, and Student intervals over training runs."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

import numpy as np
from jaxtyping import Float, Shaped

RESAMPLES = 2000
"""Number of resamples of a bootstrap interval."""
LEVEL = 0.95
"""Level of every interval."""
# Largest number of values held at once for the means of resamples: 64 MiB.
_MAX_VALUES = 2**23

Statistic = Callable[[Float[np.ndarray, "resample *quantity"]], Float[np.ndarray, " resample"] | np.floating]
"""A function of the means of all quantities over the samples of each resample, giving one number per resample."""


@dataclass(frozen=True)
class Interval:
    """A measured value with its 95 % interval.

    Attributes:
        value: the measured value.
        low: lower end of the interval.
        high: upper end of the interval.
        n: number of samples (or of training runs).
    """

    value: float
    low: float
    high: float
    n: int

    def to_json(self) -> dict[str, float | int]:
        """Return the four fields by name."""
        return asdict(self)

    def __str__(self) -> str:
        """Return the value and its interval with three decimals."""
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"


def mean_of_all(means: Float[np.ndarray, "resample *quantity"]) -> Float[np.ndarray, " resample"]:
    """Average all quantities: the statistic of `bootstrap` if none is given.

    Args:
        means: means of the quantities over the samples of each resample.
    """
    return means.reshape(len(means), -1).mean(1)


def ratio_of_means(means: Float[np.ndarray, "resample 2"]) -> Float[np.ndarray, " resample"]:
    """Divide the mean of the first quantity by that of the second.

    Args:
        means: means of the two quantities over the samples of each resample.
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        return means[:, 0] / means[:, 1]


def bootstrap(
    samples: Shaped[np.ndarray, "sample *quantity"], statistic: Statistic = mean_of_all, seed: int = 0
) -> Interval:
    """Compute the percentile bootstrap interval of a statistic of means over samples.

    Args:
        samples: the measured quantities of each sample.
        statistic: function of the means over samples; by default their mean.
        seed: seed of the resampling.

    Returns:
        The statistic of all samples, with its 95 % interval.

    Raises:
        ValueError: there are no samples, or their statistic is not a number.

    Example:
        scores = p0circuit.record(model, prompts, p0circuit.SINK_SCORE)
        bootstrap(scores.mean((1, 2)).numpy())  # mean sink score of all heads, over prompts
    """
    samples = np.asarray(samples, dtype=np.float64)
    n = len(samples)
    if n == 0:
        raise ValueError("an interval needs at least one sample, got none")
    value = np.asarray(statistic(samples.mean(0, keepdims=True))).item()
    if not math.isfinite(value):
        raise ValueError(
            f"the statistic of the {n} samples is {value}: check the samples for values that are not finite"
        )
    flat, weights = samples.reshape(n, -1), _resamples(n, seed)
    parts = np.array_split(weights, -(-RESAMPLES * flat.shape[1] // _MAX_VALUES))
    values = np.concatenate([statistic((part @ flat).reshape(-1, *samples.shape[1:])) for part in parts])
    low, high = np.nanquantile(values, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Interval(value, float(low), float(high), n)


@functools.lru_cache(maxsize=4)
def _resamples(n: int, seed: int) -> Float[np.ndarray, "resample sample"]:
    """The weight of each sample in each resample, so that the means of all resamples are one matrix product.

    Cached, because an experiment computes hundreds of intervals over the same number of samples.
    """
    return np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), RESAMPLES) / n


def over_seeds(values: Sequence[float] | np.ndarray) -> Interval:
    """Compute the mean over training runs with Student's interval: three runs are too few for resampling.

    Args:
        values: one value per run.

    Raises:
        ValueError: there are fewer than two runs.
    """
    from scipy.stats import t

    n = len(values)
    if n < 2:
        raise ValueError(f"an interval over seeds needs at least two runs, got {n}: {list(values)}")
    mean, half = float(np.mean(values)), float(t.ppf((1 + LEVEL) / 2, n - 1) * np.std(values, ddof=1) / math.sqrt(n))
    return Interval(mean, mean - half, mean + half, n)


def ratio_interval(numerator: np.ndarray, denominator: np.ndarray, seed: int = 0) -> Interval:
    """Compute mean(numerator) / mean(denominator) over paired samples, with its bootstrap interval.

    Args:
        numerator: one value per sample.
        denominator: one value per sample, in the same order.
        seed: seed of the resampling.

    Raises:
        ValueError: the mean of the denominator is 0.
    """
    return bootstrap(np.stack([numerator, denominator], axis=1), ratio_of_means, seed)
