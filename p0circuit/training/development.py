"""What a development along training is made of: the moment when something has formed, and the stages it goes through.

Pure functions on series, one value per checkpoint.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Float, Shaped

STAGE_COLUMNS = ("sink_rate_from_layer_2", "norm_ratio", "concentration_observed")
"""What stages are found from, beside the excess score of the sink heads."""


def formation_index(excess: Float[np.ndarray, " checkpoint"], least: float) -> int | None:
    """The first index from which `excess` stays above half its final value; None if that is not above `least`."""
    if not len(excess) or not excess[-1] > least:
        return None
    below = np.flatnonzero(excess <= excess[-1] / 2)
    return int(below[-1]) + 1 if len(below) else 0


def change_points(values: Float[np.ndarray, "checkpoint quantity"], most: int = 4) -> list[int]:
    """Where the mean of a multivariate series changes: the segmentation with the lowest information criterion.

    Quantities count alike, each divided by its standard deviation. A change point costs one place and a mean for each
    quantity, twice over: the place is the best of many, which the plain criterion does not count. No segment is
    shorter than two checkpoints.
    """
    import ruptures

    n, quantities = values.shape
    spread = values.std(0)
    scaled = (values - values.mean(0)) / np.where(spread > 0, spread, 1)
    found: dict[float, list[int]] = {}
    for count in range(max(0, min(most, n // 2 - 1)) + 1):
        inner = ruptures.Dynp(model="l2", min_size=2, jump=1).fit(scaled).predict(count)[:-1] if count else []
        bounds = [0, *inner, n]
        parts = [scaled[start:end] for start, end in itertools.pairwise(bounds)]
        residual = sum(float(((part - part.mean(0)) ** 2).sum()) for part in parts)
        free = 2 * count * (quantities + 1)
        # Rounding keeps a perfect fit from being infinitely good.
        criterion = n * quantities * math.log(max(residual / (n * quantities), 1e-6)) + free * math.log(n * quantities)
        found[criterion] = inner
    return found[min(found)]


def stages(
    steps: Shaped[np.ndarray, " checkpoint"], followed: Mapping[str, Float[np.ndarray, " checkpoint"]]
) -> list[dict[str, Any]]:
    """The stages between change points: from and to which step, and the mean of each quantity (NaN counts as 0)."""
    values = np.nan_to_num(np.column_stack(list(followed.values())))
    bounds = [0, *change_points(values), len(values)]
    return [
        {
            "from_step": int(steps[start]),
            "to_step": int(steps[end - 1]),
            **dict(zip(followed, map(float, values[start:end].mean(0)), strict=True)),
        }
        for start, end in itertools.pairwise(bounds)
    ]
