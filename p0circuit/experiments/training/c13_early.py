"""C13: is the circuit there early in training?

1. The sink heads of a run's last checkpoint are followed back. Formation: the first checkpoint from which their excess
   score stays above half its final value; a run without a sink at its end has formed none within its tokens.
2. In shares of the run's tokens, beside two other things that form: the best induction head, by the same rule, and the
   loss, whose fall is half done.
3. Checkpoints are log-spaced: the true moment lies between the one found and the one before it.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd

from p0circuit.experiments.claim import Claim, Criterion
from p0circuit.experiments.training.runs_experiment import RunsExperiment, runs_with_sink, training_curves_of
from p0circuit.figures.training import training_curves
from p0circuit.results import Result
from p0circuit.stats import Interval, over_seeds
from p0circuit.training.formation import formation_index
from p0circuit.training.runs import Run, of_variant


class Early(RunsExperiment):
    """When the sink forms, in shares of a run's tokens."""

    id = "early"
    title = "The circuit appears early in training"
    claim = Claim(
        id="C13",
        title="Early",
        source="arXiv 2603.06591, on the training trace",
        statement="The P0 sink circuit appears early in training.",
        measure="The share of the run's tokens at the first checkpoint from which the excess score of the final sink "
        "heads stays above half its final value, by seed: the latest of them, and the mean over seeds.",
        criteria=(Criterion("latest_formation_share", "<=", 0.2),),
        control="runs on plain text, in which nothing encourages a sink",
    )

    def measure(self, runs: Sequence[Run], reference: str) -> Result:
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
            {
                "training_curves": training_curves(
                    {
                        "Sink heads": ("excess", "excess score"),
                        "Best induction head": ("induction_score", "attention to the repeat"),
                        "Held-out loss": ("loss", "nats per token"),
                    },
                    training_curves_of(runs),
                    "When the sink forms (circles: above half its final value from here on)",
                )
            },
            notes=[f"no sink at the end of {', '.join(without)}"] if without else [],
        )


def _line(run: Run) -> dict[str, object]:
    loss = run["loss"]
    fall = (loss[0] - loss) / (loss[0] - loss[-1])
    # A head that copies is above what any head does untrained, by chance.
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
