"""How a sink develops along training: concentration in the first blocks, emergence, and stages.

Pure functions; the trace of a finished run and the monitor of a run in progress share these definitions. Emergence and
stages are computed from series with one value per checkpoint.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping

import numpy as np
from jaxtyping import Float, Shaped
from torch import Tensor

EARLY_BLOCKS = 2
"""Number of blocks that the paper holds responsible for recognition and amplification."""
MIN_GAIN = 1.1
"""Factor that P0's norm has to grow by for a concentration to be defined."""
MIN_RATE = 1e-3
"""Sink rate below which no sink counts as present."""
STAGE_COLUMNS = ("sink_rate_from_layer_2", "norm_ratio", "concentration_observed")
"""Quantities whose change points separate stages, next to the excess score of the sink heads."""

Stage = dict[str, int | float | None]
"""One stage: from_step, to_step and the mean of each quantity, None where it is not defined."""


def observed_concentration(norms: Float[Tensor, "sample depth"], early: int = EARLY_BLOCKS) -> float | None:
    """Return the share of P0's log-norm gain that the first blocks write.

    The gain is from the embedding (depth 0) to the largest norm along the layers, in means over samples.

    Args:
        norms: norm of the residual stream at P0 before block 0 and after each block.
        early: number of first blocks.

    Returns:
        The share, negative where those blocks reduce the norm; None where the norm grows by less than a tenth.
    """
    logs = norms.double().log().mean(0)
    gain = float(logs.max() - logs[0])
    return None if gain < math.log(MIN_GAIN) else float(logs[early] - logs[0]) / gain


def lost_share(rate: float, rate_left: Callable[[], float]) -> float | None:
    """Return the share of a sink rate that is lost under an intervention.

    Args:
        rate: the sink rate without the intervention.
        rate_left: measures the sink rate under it; not called where there is no sink.

    Returns:
        The share, negative where the rate grows; None where fewer than one head in a thousand is a sink.
    """
    return None if rate < MIN_RATE else 1 - rate_left() / rate


def formation_index(excess: Float[np.ndarray, " checkpoint"], threshold: float) -> int | None:
    """Return the first checkpoint from which the excess score stays above half its final value.

    Args:
        excess: excess score of the sink heads at each checkpoint.
        threshold: the final value has to be above this for a sink to be present at the end.

    Returns:
        Index of the checkpoint; None if there is no sink at the end.
    """
    if not len(excess) or not excess[-1] > threshold:
        return None
    below = np.flatnonzero(excess <= excess[-1] / 2)
    return int(below[-1]) + 1 if len(below) else 0


def change_points(values: Float[np.ndarray, "checkpoint quantity"], most: int = 4) -> list[int]:
    """Return where the mean of a multivariate series changes.

    Of all segmentations into segments of at least two checkpoints the one with the lowest Bayesian information
    criterion is taken. Each quantity is divided by its standard deviation, so all have the same weight. A change point
    costs one parameter for its position and one mean per quantity, counted twice: the position is the best of many,
    which the plain criterion does not account for.

    Args:
        values: the series.
        most: largest number of change points.

    Returns:
        Indices of the first checkpoint of every segment but the first.
    """
    import ruptures

    n, quantities = values.shape
    spread = values.std(0)
    scaled = (values - values.mean(0)) / np.where(spread > 0, spread, 1)
    by_criterion: dict[float, list[int]] = {}
    for count in range(max(0, min(most, n // 2 - 1)) + 1):
        inner = ruptures.Dynp(model="l2", min_size=2, jump=1).fit(scaled).predict(count)[:-1] if count else []
        bounds = [0, *inner, n]
        parts = [scaled[start:end] for start, end in itertools.pairwise(bounds)]
        residual = sum(float(((part - part.mean(0)) ** 2).sum()) for part in parts)
        free = 2 * count * (quantities + 1)
        # Rounding keeps a perfect fit from being infinitely good.
        criterion = n * quantities * math.log(max(residual / (n * quantities), 1e-6)) + free * math.log(n * quantities)
        by_criterion[criterion] = inner
    return by_criterion[min(by_criterion)]


def stages(
    steps: Shaped[np.ndarray, " checkpoint"], series: Mapping[str, Float[np.ndarray, " checkpoint"]]
) -> list[Stage]:
    """Divide a run into stages at the change points of several quantities.

    Change points are those of the series with 0 where a quantity is not defined (no norm gained, no sink to lose).

    Args:
        steps: training step of each checkpoint.
        series: value of each quantity at each checkpoint, NaN where it is not defined.

    Returns:
        One entry per stage: first and last step, and the mean of each quantity over the checkpoints at which it is
        defined.
    """
    bounds = [0, *change_points(np.nan_to_num(np.column_stack(list(series.values())))), len(steps)]
    return [
        {
            "from_step": int(steps[start]),
            "to_step": int(steps[end - 1]),
            **{name: _defined_mean(values[start:end]) for name, values in series.items()},
        }
        for start, end in itertools.pairwise(bounds)
    ]


def _defined_mean(values: Float[np.ndarray, " checkpoint"]) -> float | None:
    defined = values[~np.isnan(values)]
    return float(defined.mean()) if len(defined) else None
