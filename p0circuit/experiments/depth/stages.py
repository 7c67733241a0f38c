"""Stages: runs of layers in which P0 has one direction.

A *depth* i is a place in the residual stream: 0 is the embedding, i is after block i - 1. Depths i and i + 1 belong to
one stage where, fixed before anything was measured with it:

1. P0 has one direction at both: the mean cosine of the samples' streams to their mean direction is at least 0.95;
2. it is the same direction: the cosine of the two mean directions is at least 0.9;
3. the norm does not jump: the norm ratios (P0's norm over the median of the other positions) differ by less than 4
   times.

A run of depths counts as a stage if sink heads read it: the heads of layer i read depth i. Runs that no sink head reads
are left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

CONSISTENCY, NEIGHBOURS, JUMP = 0.95, 0.9, 4.0
"""Smallest consistency, smallest cosine between neighbouring depths, and smallest jump of the norm ratio that cuts."""


@dataclass(frozen=True, eq=False)
class Stage:
    """A run of depths in which P0 has one direction.

    Attributes:
        first: the first depth.
        last: the last depth.
        direction: the mean direction at the depth where the norm ratio is largest, of norm 1.
        consistency: the mean cosine of the samples' streams to it there.
        norm_ratio: the largest norm ratio.
        heads: the sink heads that read the stage.
    """

    first: int
    last: int
    direction: Float[np.ndarray, " d_model"]
    consistency: float
    norm_ratio: float
    heads: tuple[tuple[int, int], ...]

    @property
    def blocks(self) -> str:
        """Where the stage is, for people."""
        start = "the embedding" if self.first == 0 else f"block {self.first - 1}"
        return f"after {start}" if self.first == self.last else f"after {start} to block {self.last - 1}"


def unit_directions(streams: Float[np.ndarray, "sample depth d_model"]) -> Float[np.ndarray, "depth d_model"]:
    """The mean direction at every depth: the mean of unit vectors, of norm 1."""
    units = streams / np.linalg.norm(streams, axis=-1, keepdims=True)
    mean = units.mean(0)
    return mean / np.linalg.norm(mean, axis=-1, keepdims=True)


def consistencies(streams: Float[np.ndarray, "sample depth d_model"]) -> Float[np.ndarray, " depth"]:
    """The mean cosine of the samples' streams to the mean direction, at every depth."""
    units = streams / np.linalg.norm(streams, axis=-1, keepdims=True)
    return np.einsum("sld,ld->l", units, unit_directions(streams)) / len(streams)


def find_stages(
    streams: Float[np.ndarray, "sample depth d_model"],
    norm_ratios: Float[np.ndarray, " depth"],
    heads: Sequence[tuple[int, int]],
) -> list[Stage]:
    """Find the stages from P0's stream at all depths.

    Args:
        streams: P0's stream, of every sample.
        norm_ratios: the mean norm ratio at every depth.
        heads: the sink heads, as (layer, head).

    Returns:
        The stages, in order; none overlaps another.
    """
    directions, consistency = unit_directions(streams), consistencies(streams)
    stages: list[Stage] = []
    for first, last in _runs(directions, consistency, norm_ratios):
        readers = tuple(head for head in heads if first <= head[0] <= last)
        if readers:
            peak = first + int(np.argmax(norm_ratios[first : last + 1]))
            stages.append(
                Stage(first, last, directions[peak], float(consistency[peak]), float(norm_ratios[peak]), readers)
            )
    return stages


def _runs(
    directions: Float[np.ndarray, "depth d_model"],
    consistency: Float[np.ndarray, " depth"],
    norm_ratios: Float[np.ndarray, " depth"],
) -> list[tuple[int, int]]:
    """First and last depth of every run, also of those that nobody reads."""
    runs: list[tuple[int, int]] = []
    for depth in range(len(directions)):
        if consistency[depth] < CONSISTENCY:
            continue
        if runs and runs[-1][1] == depth - 1:
            cosine = float(directions[depth - 1] @ directions[depth])
            ratio = float(norm_ratios[depth] / norm_ratios[depth - 1])
            if cosine >= NEIGHBOURS and 1 / JUMP < ratio < JUMP:
                runs[-1] = runs[-1][0], depth
                continue
        runs.append((depth, depth))
    return runs
