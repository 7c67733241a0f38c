"""C14: does the circuit concentrate in blocks 0-1 as training goes on?

1. Observed: the share of P0's log-norm gain that blocks 0-1 write. Causal: the share of `Sink[2:]` that is lost when
   P0's residual after block 1 is replaced by that of the shifted run, in which the same token is not first.
2. Trend: Spearman's correlation of the causal share with the tokens, over the checkpoints from emergence on, in the
   mean over seeds; one-sided p from permutations of the checkpoints within each run.
3. Stages: change points of several quantities, as in `Trace.stages`.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from jaxtyping import Float

from p0circuit.experiments.base import NotApplicable
from p0circuit.experiments.claim import Claim, Criterion
from p0circuit.experiments.training.runs_experiment import RunsExperiment, runs_with_sink, training_curves_of
from p0circuit.figures.training import TrainingCurve, training_curves
from p0circuit.results import Result
from p0circuit.stats import Interval, over_seeds
from p0circuit.training.formation import STAGE_COLUMNS, stages
from p0circuit.training.runs import Run

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PERMUTATIONS = 10_000
"""Largest number of permutations; more possible orders than this are sampled."""


class Concentration(RunsExperiment):
    """How much of the sink depends on the first two blocks, along training."""

    id = "concentration"
    title = "The circuit concentrates in the first two blocks"
    claim = Claim(
        id="C14",
        title="Concentration",
        source="arXiv 2603.06591, on the training trace",
        statement="Once it is there the circuit becomes concentrated in the first two blocks.",
        measure="The share of the sink rate from layer 2 on that is lost when P0's residual after block 1 is that of "
        "the shifted run: its rank correlation with tokens from formation on (mean over seeds, permutation test), and "
        "its value at the end.",
        criteria=(
            Criterion("causal_spearman", ">", 0),
            Criterion("causal_spearman_p", "<", 0.05),
            Criterion("causal_final", ">=", 0.8),
        ),
        control="the checkpoints in random order (the permutation test); runs on plain text",
    )

    def measure(self, runs: Sequence[Run], reference: str) -> Result:
        """Compute trend and final value of the concentration; the base class documents arguments and errors."""
        judged = runs_with_sink(runs, reference)
        shares = [concentration_after_formation(run) for run in judged]
        long_enough = [values for values in shares if len(values) >= 3]
        if len(long_enough) < 2:
            raise NotApplicable(
                f"{len(long_enough)} runs of {reference!r} have three checkpoints from emergence on; a trend needs two "
                "of them"
            )
        trend, p = permuted_trend(long_enough)
        final = [float(values[-1]) for values in shares if len(values)]
        observed = [float(run["concentration_observed"][-1]) for run in judged]
        return Result(
            self.id,
            self.title,
            {
                "causal_spearman": over_seeds([spearman(values) for values in long_enough]),
                "causal_spearman_p": Interval(p, p, p, sum(map(len, long_enough))),
                "causal_final": over_seeds(final),
                "observed_spearman": over_seeds(
                    [spearman(run["concentration_observed"][run.formation :]) for run in judged]
                ),
                "observed_final": over_seeds(observed),
            },
            {"concentration": pd.DataFrame([line for run in runs for line in _lines(run)]), "stages": _stages(runs)},
            notes=[f"mean rank correlation {trend:.3f}, p = {p:.4f} over {len(long_enough)} seeds"],
            drawing={"curves": [replace(curve, table=_from_formation(curve)) for curve in training_curves_of(runs)]},
        )

    def draw(self, result: Result) -> dict[str, Figure]:
        """Draw causal and observed concentration and the sink rate over the tokens."""
        if "curves" not in result.drawing:
            return {}
        panels = {
            "Causal (once the sink has emerged)": ("causal_from_formation", "share of Sink[2:] lost"),
            "Observed": ("concentration_observed", "share of P0's log-norm gain"),
            "Sink rate from layer 2 on": ("sink_rate_from_layer_2", "share of heads"),
        }
        title = (
            "How much of the sink depends on blocks 0-1, along training (mean and range over n seeds; circles: the "
            "sink of a run has emerged)"
        )
        return {"training_curves": training_curves(panels, result.drawing["curves"], title)}


def concentration_after_formation(run: Run) -> Float[np.ndarray, " checkpoint"]:
    """Return the causal concentration at the checkpoints from emergence on, where it is defined.

    Args:
        run: a run that ends with a sink.
    """
    values = run["concentration_causal"][run.formation :]
    return values[~np.isnan(values)]


def _from_formation(curve: TrainingCurve) -> pd.DataFrame:
    """The table with the causal share from emergence on; before, it is a ratio of two small numbers of heads."""
    start = len(curve.table) if curve.formation is None else curve.formation
    emerged = np.arange(len(curve.table)) >= start
    return curve.table.assign(causal_from_formation=curve.table["concentration_causal"].where(emerged))


def spearman(values: Float[np.ndarray, " checkpoint"]) -> float:
    """Return the rank correlation of a series with its order; 0 for a constant series."""
    ranks = pd.Series(values).rank().to_numpy()
    return 0.0 if np.ptp(ranks) == 0 else float(np.corrcoef(ranks, np.arange(len(ranks)))[0, 1])


def permuted_trend(series: Sequence[np.ndarray], seed: int = 0) -> tuple[float, float]:
    """Return the mean rank correlation with order over several series, and its p from permutations within each.

    Args:
        series: one-dimensional series of any length.
        seed: seed of the random permutations.

    Returns:
        The mean correlation and its one-sided p. All permutations are counted if there are at most `PERMUTATIONS`, and
        as many random ones are drawn otherwise.
    """
    observed = float(np.mean([spearman(values) for values in series]))
    if math.prod(math.factorial(len(values)) for values in series) <= PERMUTATIONS:
        by_series = [[spearman(np.array(order)) for order in itertools.permutations(values)] for values in series]
        permuted = np.array([np.mean(parts) for parts in itertools.product(*by_series)])
        return observed, float(np.mean(permuted >= observed - 1e-12))
    rng = np.random.default_rng(seed)
    permuted = np.array(
        [np.mean([spearman(rng.permutation(values)) for values in series]) for _ in range(PERMUTATIONS)]
    )
    # The observed order is one of all orders, so p cannot be 0.
    return observed, float((1 + np.sum(permuted >= observed - 1e-12)) / (1 + PERMUTATIONS))


def _lines(run: Run) -> list[dict[str, object]]:
    columns = ("step", "tokens", "concentration_causal", "concentration_observed", "sink_rate_from_layer_2")
    formed_at = len(run.table) if run.formation is None else run.formation
    return [
        {"run": run.name, **{name: run[name][i] for name in columns}, "formed": i >= formed_at}
        for i in range(len(run.table))
    ]


def _stages(runs: Sequence[Run]) -> pd.DataFrame:
    return pd.DataFrame(
        [
            {"run": run.name, "stage": number, **stage}
            for run in runs
            for number, stage in enumerate(
                stages(run["step"], {name: run[name] for name in ("excess", *STAGE_COLUMNS)}), 1
            )
        ]
    )
