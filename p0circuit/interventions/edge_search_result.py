"""The result of an edge search: estimates for all edges, exact effects of the strongest, and their difference."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from p0circuit.interventions.edge_effects import Edge, PathEffects
from p0circuit.interventions.effects import largest_first
from p0circuit.interventions.nodes import InterventionError

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True, eq=False)
class EdgeSearch:
    """Estimates for all edges, and the exact effects of those that could reach the threshold.

    Attributes:
        threshold: smallest size of an effect that is searched for, in units of the metric.
        edges: all edges with an effect to be estimated, in the order of `means`.
        means: estimated mean change of the metric: the mean of the two estimates.
        by_row: the same for each row; None if most edges were estimated on a few rows only.
        exact: exact effects of the verified edges, those of the random sample included.
        sampled: edges of the random sample. The estimate of every other verified edge could reach the threshold.
        unverified: edges whose estimate could reach the threshold, beyond the limit on exact runs.
        without_effect: number of edges that end in Q at P0, or after the last sink heads: their effect is 0 in any
            model.
        variants: number of variants that were run, by stage: rows of one token and exact runs.
    """

    threshold: float
    edges: tuple[Edge, ...]
    means: Float[Tensor, " edge"]
    by_row: Float[Tensor, "edge batch"] | None
    exact: PathEffects
    sampled: frozenset[Edge]
    unverified: tuple[Edge, ...]
    without_effect: int
    variants: Mapping[str, int] = field(default_factory=dict)

    @functools.cached_property
    def _number(self) -> dict[Edge, int]:
        return {edge: number for number, edge in enumerate(self.edges)}

    @property
    def strong_edges(self) -> list[Edge]:
        """Edges whose exact effect reaches the threshold."""
        means = self.exact.effect.double().mean(1)
        return [edge for edge, mean in zip(self.exact.edges, means, strict=True) if abs(float(mean)) >= self.threshold]

    @property
    def screened_out(self) -> int:
        """Number of edges left out for their estimates, those of the random sample included."""
        return len(self.edges) - (len(self.exact.edges) - len(self.sampled)) - len(self.unverified)

    @property
    def largest_screened_out(self) -> float:
        """Largest size of an estimate among the edges that were left out."""
        passed = {*self.exact.edges} - self.sampled | {*self.unverified}
        left = [float(mean) for edge, mean in zip(self.edges, self.means.abs(), strict=True) if edge not in passed]
        return max(left, default=0.0)

    def errors(self, sampled: bool) -> Float[np.ndarray, " edge"]:
        """Compute the mean estimate minus the mean exact effect of verified edges.

        Args:
            sampled: whether for the random sample; otherwise for the other verified edges.
        """
        means = self.exact.effect.double().mean(1)
        return np.array(
            [
                float(self.means[self._number[edge]] - mean)
                for edge, mean in zip(self.exact.edges, means, strict=True)
                if (edge in self.sampled) == sampled
            ]
        )

    def sizes(self, receivers: Sequence[str]) -> Float[np.ndarray, " row"]:
        """Sum the sizes of the effects of all edges into some receivers: exact ones if verified, else estimates.

        Args:
            receivers: names of the receivers.

        Raises:
            InterventionError: the estimates are not of all rows.
        """
        if self.by_row is None:
            raise InterventionError(
                "most edges were estimated on a few rows, and single rows cannot be added up; search with "
                "screening_rows=None"
            )
        wanted = {*receivers}
        best = self.by_row.clone()
        for edge, effect in zip(self.exact.edges, self.exact.effect, strict=True):
            best[self._number[edge]] = effect
        into = torch.tensor([receiver in wanted for _, receiver in self.edges])
        return best[into].abs().sum(0).double().numpy()

    def summary(self) -> list[str]:
        """State what was estimated, what was verified, and the error of the estimates, for the notes of a result."""
        lines = [
            f"{len(self.edges) + self.without_effect} edges: {self.without_effect} have no effect (Q at P0, or above "
            "the sink heads), "
            f"{self.screened_out} were screened out (largest estimate {self.largest_screened_out:.4f}), "
            f"{len(self.exact.edges) - len(self.sampled)} were patched exactly",
        ]
        for sampled, name in ((False, "edges that passed the screen"), (True, "edges drawn from those screened out")):
            if len(errors := abs(self.errors(sampled))):
                lines.append(
                    f"error of the estimates on {len(errors)} {name}: mean {errors.mean():.4f}, largest "
                    f"{errors.max():.4f}, beside a threshold of {self.threshold:.4f}"
                )
        if self.unverified:
            largest = max(abs(float(self.means[self._number[edge]])) for edge in self.unverified)
            lines.append(
                f"{len(self.unverified)} edges passed the screen and were beyond the limit on exact runs (largest "
                f"estimate {largest:.4f})"
            )
        return lines

    def to_dataframe(self) -> pd.DataFrame:
        """Tabulate the verified edges, the largest effect first.

        Returns:
            Data frame with the columns sender, receiver, effect, low, high, n and estimate.
        """
        table = self.exact.to_dataframe()
        pairs = zip(table["sender"], table["receiver"], strict=True)
        return table.assign(estimate=[float(self.means[self._number[pair]]) for pair in pairs])

    def estimates_table(self, least: float) -> pd.DataFrame:
        """Tabulate the estimates of edges, the largest first.

        Args:
            least: smallest size of a mean estimate.

        Returns:
            Data frame with the columns sender, receiver and estimate.
        """
        import pandas as pd

        rows = [(*edge, float(mean)) for edge, mean in zip(self.edges, self.means, strict=True) if abs(mean) >= least]
        table = pd.DataFrame(rows, columns=["sender", "receiver", "estimate"])
        return largest_first(table, "estimate")
