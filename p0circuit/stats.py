"""95 % bootstrap intervals over samples (or over seeds, where a claim is about training)."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

import numpy as np
from jaxtyping import Float, Shaped

RESAMPLES = 2000
LEVEL = 0.95
# Numbers in the means of resamples that exist at once: 64 MiB.
_AT_ONCE = 2**23

Statistic = Callable[[Float[np.ndarray, "draw *quantity"]], Float[np.ndarray, " draw"] | np.floating]
"""A number for each draw, from the means of all quantities over the samples that were drawn."""


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


def mean_of_all(means: Float[np.ndarray, "draw *quantity"]) -> Float[np.ndarray, " draw"]:
    return means.reshape(len(means), -1).mean(1)


def ratio_of_means(means: Float[np.ndarray, "draw 2"]) -> Float[np.ndarray, " draw"]:
    """The mean of the first quantity over that of the second."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return means[:, 0] / means[:, 1]


def bootstrap(
    samples: Shaped[np.ndarray, "sample *quantity"], statistic: Statistic = mean_of_all, seed: int = 0
) -> Interval:
    """The percentile interval of a statistic of means over samples, which are drawn again with replacement.

    Raises:
        ValueError: there are no samples, or the statistic of them is not a number.
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
    parts = np.array_split(weights, -(-RESAMPLES * flat.shape[1] // _AT_ONCE))
    drawn = np.concatenate([statistic((part @ flat).reshape(-1, *samples.shape[1:])) for part in parts])
    low, high = np.nanquantile(drawn, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Interval(value, float(low), float(high), n)


@functools.lru_cache(maxsize=4)
def _resamples(n: int, seed: int) -> Float[np.ndarray, "draw sample"]:
    """The weight of each sample in each resample, so that their means are one product.

    Kept, because an experiment has hundreds of intervals over the same number of samples.
    """
    return np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), RESAMPLES) / n


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


def ratio_interval(numerator: np.ndarray, denominator: np.ndarray, seed: int = 0) -> Interval:
    """The interval of mean(numerator) / mean(denominator), the samples being paired.

    Raises:
        ValueError: the denominator's mean is 0.
    """
    return bootstrap(np.stack([numerator, denominator], axis=1), ratio_of_means, seed)
