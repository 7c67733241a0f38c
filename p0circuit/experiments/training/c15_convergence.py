"""C15: does the circuit predict the loss that is still to be gained, beyond what the step predicts?

1. Remaining loss: the held-out loss at a checkpoint minus that at the end of the run.
2. Prediction from the step alone: the mean remaining loss of the other seeds of the same variant at the same
   checkpoint. No other function of the step, in this recipe, does better on average.
3. Prediction from step and circuit: a term is added that is linear in the deviation of the circuit (sink rate from
   layer 2 on, log of the norm ratio) from its mean over those other seeds. The two slopes are fitted on the other seeds
   of all variants. Every seed is held out once and predicted. Both quantities are known during training; the excess
   score is not, since it is that of the heads that are sinks at the end of the run.
4. A run's error is its mean absolute error over checkpoints. Runs of one seed are trained on the same batches, whatever
   their variant. The claim is therefore judged by Student's interval of the difference over seeds, each the mean of its
   runs. The bootstrap interval over runs, which treats them as independent, is reported too.
5. Also reported: the correlation of the deviations within each seed, with Student's interval over seeds, and whether
   the circuit's deviations precede those of the loss or follow them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from jaxtyping import Float

from p0circuit.experiments.base import NotApplicable
from p0circuit.experiments.claim import Claim, Criterion
from p0circuit.experiments.training.runs_experiment import RunsExperiment, runs_with_sink
from p0circuit.figures.training import prediction_errors
from p0circuit.results import Result
from p0circuit.stats import bootstrap, over_seeds
from p0circuit.training.runs import Run, of_variant

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SEEDS = 3
"""Seeds needed: two to fit on and one to hold out."""
LAGS = range(-3, 4)
"""Checkpoints by which the loss may follow the circuit."""
PREDICTIONS = ("step_alone", "step_and_circuit", "shuffled_circuit")
"""Columns of the errors of the predictions; the last is the control."""


class Convergence(RunsExperiment):
    """Whether the circuit predicts convergence, tested on held-out seeds."""

    id = "convergence"
    title = "The circuit as a signal of convergence"
    claim = Claim(
        id="C15",
        title="Convergence signal",
        source="arXiv 2603.06591, on the training trace",
        statement="The state of the circuit tells how far a training run is from convergence.",
        measure="The mean absolute error, in nats, of the remaining loss predicted for a held-out seed from step and "
        "circuit, minus that from the step alone; mean over held-out runs, with Student's interval over seeds.",
        criteria=(Criterion("error_difference", "<", 0, at="high"),),
        control="the circuit of another checkpoint, drawn at random, in place of the run's own",
    )

    def measure(self, runs: Sequence[Run], reference: str) -> Result:
        """Compare the errors of both predictions; the base class documents arguments and errors."""
        runs_with_sink(runs, reference, SEEDS)
        variants = [name for name in dict.fromkeys(run.variant for run in runs) if _can_be_held_out(runs, name)]
        judged = [run for run in runs if run.variant in variants]
        _check_steps(judged)
        table = held_out_errors(judged)
        by_run = pd.DataFrame(table.groupby("run")[list(PREDICTIONS)].mean())
        by_seed = pd.DataFrame(table.groupby("seed")[list(PREDICTIONS)].mean())
        circuit, loss = deviations(judged)
        seeds = np.array([run.seed for run in judged])
        pairs = np.stack([circuit[:, :, 0], loss], axis=2)
        correlation = over_seeds([_correlation(pairs[seeds == seed]) for seed in np.unique(seeds)])
        return Result(
            self.id,
            self.title,
            {
                "error_difference": over_seeds(_difference(by_seed, "step_and_circuit")),
                "error_difference_over_runs": bootstrap(_difference(by_run, "step_and_circuit")),
                "error_difference_shuffled": over_seeds(_difference(by_seed, "shuffled_circuit")),
                "error_step_alone": over_seeds(by_seed["step_alone"].to_numpy()),
                "error_step_and_circuit": over_seeds(by_seed["step_and_circuit"].to_numpy()),
                "partial_correlation": correlation,
            },
            {"held-out": table, "lags": lead_and_lag(circuit[:, :, 0], loss)},
            notes=[
                f"variants with a sink in {SEEDS} seeds: {', '.join(variants)}",
                f"correlation of the sink rate with the remaining loss at the same step, both as deviations from the "
                f"mean over seeds: {correlation}",
            ],
            drawing={"deviations": pd.DataFrame({"circuit": circuit[:, :, 0].ravel(), "loss": loss.ravel()})},
        )

    def draw(self, result: Result) -> dict[str, Figure]:
        """Draw the errors of both predictions and the data that the second one is fitted to."""
        if "deviations" not in result.drawing:
            return {}
        errors = pd.DataFrame(result.tables["held-out"].groupby("run")[list(PREDICTIONS[:2])].mean())
        difference = result.metrics["error_difference"]
        title = (
            f"What the circuit adds to the step, on held-out seeds: the error changes by {difference} nats (95 % "
            f"interval over {difference.n} seeds)"
        )
        return {"predictions": prediction_errors(errors, result.drawing["deviations"], title)}


def held_out_errors(runs: Sequence[Run], seed: int = 0) -> pd.DataFrame:
    """Predict the remaining loss of every run while its seed is held out.

    Args:
        runs: runs with the same checkpoints.
        seed: seed of the shuffled control.

    Returns:
        One row for each run and checkpoint but the last: the remaining loss and the absolute error of each prediction.
    """
    rng = np.random.default_rng(seed)
    lines = []
    for held_out in sorted({run.seed for run in runs}):
        others = [run for run in runs if run.seed != held_out]
        slopes = _slopes(*deviations(others))
        for run in (run for run in runs if run.seed == held_out):
            same = of_variant(others, run.variant)
            expected = np.mean([remaining(other) for other in same], axis=0)
            deviation = features(run) - np.mean([features(other) for other in same], axis=0)
            predictions = {
                "step_alone": expected,
                "step_and_circuit": expected + deviation @ slopes,
                "shuffled_circuit": expected + rng.permutation(deviation) @ slopes,
            }
            for i, value in enumerate(remaining(run)):
                checkpoint = {"run": run.name, "seed": run.seed, "step": run["step"][i], "remaining": value}
                lines.append(
                    checkpoint | {name: abs(float(predicted[i] - value)) for name, predicted in predictions.items()}
                )
    return pd.DataFrame(lines)


def remaining(run: Run) -> Float[np.ndarray, " checkpoint"]:
    """Return the loss still to be gained, in nats per token, at every checkpoint but the last, where it is 0."""
    return (run["loss"] - run["loss"][-1])[:-1]


def features(run: Run) -> Float[np.ndarray, "checkpoint 2"]:
    """Return the circuit at the same checkpoints: sink rate from layer 2 on, and log of the norm ratio."""
    return np.column_stack([run["sink_rate_from_layer_2"], np.log(run["norm_ratio"])])[:-1]


def deviations(
    runs: Sequence[Run],
) -> tuple[Float[np.ndarray, "run checkpoint 2"], Float[np.ndarray, "run checkpoint"]]:
    """Return the deviation of each run from the mean of its variant at the same checkpoint.

    Args:
        runs: runs with the same checkpoints.

    Returns:
        Deviations of the circuit and of the remaining loss.
    """
    circuit, loss = [], []
    for run in runs:
        same = of_variant(runs, run.variant)
        circuit.append(features(run) - np.mean([features(other) for other in same], axis=0))
        loss.append(remaining(run) - np.mean([remaining(other) for other in same], axis=0))
    return np.stack(circuit), np.stack(loss)


def lead_and_lag(
    circuit: Float[np.ndarray, "run checkpoint"], loss: Float[np.ndarray, "run checkpoint"]
) -> pd.DataFrame:
    """Return the correlation of the circuit's deviation with that of the loss some checkpoints later.

    Args:
        circuit: deviations of the circuit.
        loss: deviations of the remaining loss.

    Returns:
        Columns lag (in checkpoints, negative where the loss comes first) and correlation.
    """
    lines = []
    for lag in LAGS:
        cut = slice(max(0, -lag), circuit.shape[1] - max(0, lag))
        shifted = np.roll(loss, -lag, axis=1)[:, cut]
        lines.append({"lag": lag, "correlation": _correlation(np.stack([circuit[:, cut], shifted], axis=2))})
    return pd.DataFrame(lines)


def _can_be_held_out(runs: Sequence[Run], variant: str) -> bool:
    """Whether a variant has enough seeds, all with a sink."""
    of_this = of_variant(runs, variant)
    return len(of_this) >= SEEDS and all(run.formation is not None for run in of_this)


def _check_steps(runs: Sequence[Run]) -> None:
    """Make sure that the runs were measured at the same steps.

    Raises:
        NotApplicable: they were not.
    """
    measured: dict[str, list[str]] = {}
    for run in runs:
        measured.setdefault(", ".join(f"{step:g}" for step in run["step"]), []).append(run.name)
    if len(measured) > 1:
        steps = "; ".join(f"{', '.join(names)}: {text}" for text, names in measured.items())
        raise NotApplicable(f"remaining losses compare at equal steps, and these runs have different ones: {steps}")


def _difference(errors: pd.DataFrame, prediction: str) -> Float[np.ndarray, " line"]:
    """By how much the error of a prediction is larger than that of the step alone."""
    return (errors[prediction] - errors["step_alone"]).to_numpy()


def _slopes(
    circuit: Float[np.ndarray, "run checkpoint 2"], loss: Float[np.ndarray, "run checkpoint"]
) -> Float[np.ndarray, " 2"]:
    return np.linalg.lstsq(circuit.reshape(-1, circuit.shape[-1]), loss.ravel(), rcond=None)[0]


def _correlation(pairs: Float[np.ndarray, "run checkpoint 2"]) -> float:
    first, second = pairs.reshape(-1, 2).T
    return 0.0 if np.ptp(first) == 0 or np.ptp(second) == 0 else float(np.corrcoef(first, second)[0, 1])
