"""C14: does the circuit concentrate in blocks 0-1 as training goes on?

1. Observed: the share of P0's log-norm gain that blocks 0-1 write. Causal: the share of `Sink[2:]` that is lost when
   P0's residual after block 1 is replaced by that of the shifted run, in which the same token is not first.
2. Trend: Spearman's correlation of the causal share with the tokens seen, over the checkpoints from formation on, in
   the mean over seeds; p from permutations of the checkpoints within each run, one-sided.
3. Stages: change points of the whole development, as `Trace.stages` finds them.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import replace

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

PERMUTATIONS = 10_000


class Concentration(RunsExperiment):
    """How much of the sink hangs on the first two blocks, along training."""

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
        judged = runs_with_sink(runs, reference)
        developments = [concentration_after_formation(run) for run in judged]
        told = [values for values in developments if len(values) >= 3]
        if len(told) < 2:
            raise NotApplicable(
                f"{len(told)} runs of {reference!r} have three checkpoints from formation on; a trend needs two of them"
            )
        trend, p = permuted_trend(told)
        final = [float(values[-1]) for values in developments if len(values)]
        observed = [float(run["concentration_observed"][-1]) for run in judged]
        return Result(
            self.id,
            self.title,
            {
                "causal_spearman": over_seeds([spearman(values) for values in told]),
                "causal_spearman_p": Interval(p, p, p, sum(map(len, told))),
                "causal_final": over_seeds(final),
                "observed_spearman": over_seeds(
                    [spearman(run["concentration_observed"][run.formation :]) for run in judged]
                ),
                "observed_final": over_seeds(observed),
            },
            {"concentration": pd.DataFrame([line for run in runs for line in _lines(run)]), "stages": _stages(runs)},
            {
                "training_curves": training_curves(
                    {
                        "Causal (from formation on)": ("formed_causal", "share of Sink[2:] lost"),
                        "Observed": ("concentration_observed", "share of P0's log-norm gain"),
                        "Sink rate from layer 2 on": ("sink_rate_from_layer_2", "share of heads"),
                    },
                    [replace(line, table=_from_formation(line)) for line in training_curves_of(runs)],
                    "What blocks 0-1 carry, along training (circles: the sink has formed)",
                )
            },
            notes=[f"mean rank correlation {trend:.3f}, p = {p:.4f} over {len(told)} seeds"],
        )


def concentration_after_formation(run: Run) -> Float[np.ndarray, " checkpoint"]:
    """The causal concentration at the checkpoints from formation on, where it is defined."""
    values = run["concentration_causal"][run.formation :]
    return values[~np.isnan(values)]


def _from_formation(line: TrainingCurve) -> pd.DataFrame:
    """With the causal share where there is a sink to lose: before, it is a ratio of two handfuls of heads."""
    there = np.arange(len(line.table)) >= (len(line.table) if line.formation is None else line.formation)
    return line.table.assign(formed_causal=line.table["concentration_causal"].where(there))


def spearman(values: Float[np.ndarray, " checkpoint"]) -> float:
    """The rank correlation of a series with its order; 0 for one that does not vary."""
    ranks = pd.Series(values).rank().to_numpy()
    return 0.0 if np.ptp(ranks) == 0 else float(np.corrcoef(ranks, np.arange(len(ranks)))[0, 1])


def permuted_trend(series: Sequence[np.ndarray], seed: int = 0) -> tuple[float, float]:
    """The mean rank correlation with order over several series, and its one-sided p from permutations within each.

    Series are one-dimensional, of any length. All permutations where there are at most `PERMUTATIONS` of them, as many
    random ones otherwise.
    """
    observed = float(np.mean([spearman(values) for values in series]))
    if math.prod(math.factorial(len(values)) for values in series) <= PERMUTATIONS:
        by_series = [[spearman(np.array(order)) for order in itertools.permutations(values)] for values in series]
        drawn = np.array([np.mean(parts) for parts in itertools.product(*by_series)])
        return observed, float(np.mean(drawn >= observed - 1e-12))
    rng = np.random.default_rng(seed)
    drawn = np.array([np.mean([spearman(rng.permutation(values)) for values in series]) for _ in range(PERMUTATIONS)])
    # The observed order is one of them: a p of 0 cannot be.
    return observed, float((1 + np.sum(drawn >= observed - 1e-12)) / (1 + PERMUTATIONS))


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
