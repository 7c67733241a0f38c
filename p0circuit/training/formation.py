"""What a development along training is made of: concentration, the moment when the sink has formed, and stages.

Pure functions, one definition for the trace of a finished run and for the monitor of one under way. Formation and
stages are of series, one value per checkpoint.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from jaxtyping import Float, Shaped
from torch import Tensor

from p0circuit.sink import CIRCUIT_BLOCKS

EARLY_BLOCKS = len(CIRCUIT_BLOCKS)
"""Number of blocks that recognise and amplify P0, according to the paper."""
LEAST_GAIN = 1.1
"""Where P0's norm does not grow by this factor, there is no gain to share out."""
LEAST_RATE = 1e-3
"""Where the sink rate is below this, there is no sink to lose."""
STAGE_COLUMNS = ("sink_rate_from_layer_2", "norm_ratio", "concentration_observed")
"""What stages are found from, beside the excess score of the sink heads."""


def observed_concentration(norms: Float[Tensor, "sample depth"], early: int = EARLY_BLOCKS) -> float | None:
    """The share of P0's log-norm gain that the `early` blocks write; None where its norm does not grow by a tenth.

    The gain is from the embedding (depth 0) to the largest norm along the layers, in means over samples; the share is
    negative where those blocks take away.
    """
    logs = norms.double().log().mean(0)
    gain = float(logs.max() - logs[0])
    return None if gain < math.log(LEAST_GAIN) else float(logs[early] - logs[0]) / gain


def lost_share(rate: float, left: Callable[[], float]) -> float | None:
    """The share of a sink rate that an intervention takes away; `left` measures the rate under it.

    None, and nothing is measured, where fewer than one head in a thousand is a sink. Negative where the rate grows.
    """
    return None if rate < LEAST_RATE else 1 - left() / rate


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
    """The stages between change points: from and to which step, and the mean of each quantity.

    The mean is over the checkpoints at which the quantity is defined, None where it is at none of them. Change points
    are those of series in which what is not defined is 0: no norm gained, no sink lost.
    """
    bounds = [0, *change_points(np.nan_to_num(np.column_stack(list(followed.values())))), len(steps)]
    return [
        {
            "from_step": int(steps[start]),
            "to_step": int(steps[end - 1]),
            **{name: _defined_mean(values[start:end]) for name, values in followed.items()},
        }
        for start, end in itertools.pairwise(bounds)
    ]


def _defined_mean(values: Float[np.ndarray, " checkpoint"]) -> float | None:
    defined = values[~np.isnan(values)]
    return float(defined.mean()) if len(defined) else None
