"""C13: does the circuit emerge early in training?

1. The sink heads of a run's last checkpoint are measured at all earlier checkpoints. The sink emerges at the first
   checkpoint from which their excess score stays above half its final value. In a run without a sink at its end no sink
   has emerged within its tokens.
2. This moment is given as a share of the run's tokens. It is compared with two other moments: when the best induction
   head emerges, by the same rule, and when half of the fall of the loss is done.
3. Checkpoints are log-spaced. The true moment lies between the checkpoint found by the rule and the one before it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from p0circuit.experiments.claim import Claim, Criterion
from p0circuit.experiments.training.runs_experiment import RunsExperiment, runs_with_sink, training_curves_of
from p0circuit.figures.training import training_curves
from p0circuit.results import Result
from p0circuit.stats import Interval, over_seeds
from p0circuit.training.formation import formation_index
from p0circuit.training.runs import Run, of_variant

if TYPE_CHECKING:
    from matplotlib.figure import Figure

EARLY_SHARE = 0.2
"""Share of a run's tokens within which a sink counts as early."""


class Early(RunsExperiment):
    """When the sink emerges, as a share of a run's tokens."""

    id = "early"
    title = "The circuit appears early in training"
    claim = Claim(
        id="C13",
        title="Early",
        source="arXiv 2603.06591, on the training trace",
        statement="The P0 sink circuit appears early in training.",
        measure="The share of the run's tokens at the first checkpoint from which the excess score of the final sink "
        "heads stays above half its final value, by seed: the latest of them, and the mean over seeds.",
        criteria=(Criterion("latest_formation_share", "<=", EARLY_SHARE),),
        control="runs on plain text, in which nothing encourages a sink",
    )

    def measure(self, runs: Sequence[Run], reference: str) -> Result:
        """Compute when the sink emerges in every run; the base class documents arguments and errors."""
        judged = of_variant(runs, reference)
        runs_with_sink(runs, reference)
        shares = [run.formation_share for run in judged]
        latest = max(shares)
        table = pd.DataFrame([_line(run) for run in runs])
        without = [run.name for run in runs if run.formation is None]
        induction = table.loc[table["variant"] == reference, "induction_share"].tolist()
        return Result(
            self.id,
            self.title,
            {
                "latest_formation_share": Interval(latest, latest, latest, len(judged)),
                "formation_share": over_seeds(shares),
                "induction_share": over_seeds(induction),
            },
            {"formation": table},
            notes=[f"no sink at the end of {', '.join(without)}"] if without else [],
            drawing={"curves": training_curves_of(runs)},
        )

    def draw(self, result: Result) -> dict[str, Figure]:
        """Draw sink, induction and loss over the share of the tokens, with the claim's limit."""
        if "curves" not in result.drawing:
            return {}
        panels = {
            "Sink heads": ("excess", "excess score"),
            "Best induction head": ("induction_score", "attention to the repeat"),
            "Held-out loss": ("loss", "nats per token"),
        }
        title = (
            "When the sink emerges (mean and range over n seeds; circles: a run's sink has emerged; vertical line: the "
            f"claim's limit, {100 * EARLY_SHARE:.0f} % of the tokens)"
        )
        return {"training_curves": training_curves(panels, result.drawing["curves"], title, "share", EARLY_SHARE)}


def _line(run: Run) -> dict[str, object]:
    loss = run["loss"]
    fall = (loss[0] - loss) / (loss[0] - loss[-1])
    # An induction head has to score above what the best untrained head reaches by chance.
    induction = formation_index(run["induction_score"], 2 * float(run["induction_score"][0]))
    return {
        "run": run.name,
        "variant": run.variant,
        "seed": run.seed,
        "first": run.first,
        "formation_step": np.nan if run.formation is None else run["step"][run.formation],
        "formation_share": run.formation_share,
        "not_before_share": run.share[run.formation - 1] if run.formation else np.nan,
        "induction_share": 1.0 if induction is None else run.share[induction],
        "half_of_loss_share": run.share[int(np.argmax(fall >= 0.5))],
        "final_excess": run["excess"][-1],
    }
