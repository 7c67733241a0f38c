"""C15: does the circuit say anything about the loss that is still to be gained, beyond what the step says?

1. Remaining loss: the held-out loss at a checkpoint minus that at the end of the run.
2. Step alone: the mean remaining loss of the other seeds of the same variant at the same checkpoint. Nothing that is a
   function of the step, in this recipe, can do better on average.
3. Step and circuit: what is added is linear in how far the circuit (sink rate from layer 2 on, log of the norm ratio)
   is from its mean over those other seeds; the two slopes are fitted on the other seeds of all variants. The held-out
   seed is predicted; every seed is held out once. Both quantities are known when one would predict: the excess score
   is not, since it is of the heads that are sinks at the end of the run.
4. A run's error is its mean absolute error over checkpoints. Runs of one seed see the same batches, whatever their
   variant: what is judged is Student's interval of the difference over seeds, each the mean of its runs. The bootstrap
   interval over runs, which takes them for independent, stands beside it.
5. Beside it: the correlation of the deviations, within each seed, with Student's interval over seeds; and whether the
   circuit's come before those of the loss or after.
"""

from __future__ import annotations

from collections.abc import Sequence

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

SEEDS = 3
"""With two others to learn from, a seed can be held out."""
LAGS = range(-3, 4)
PREDICTIONS = ("step_alone", "step_and_circuit", "shuffled_circuit")


class Convergence(RunsExperiment):
    """The circuit as a signal of convergence, put to the test on held-out seeds."""

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
            {
                "predictions": prediction_errors(
                    pd.DataFrame(by_run[list(PREDICTIONS[:2])]),
                    pd.DataFrame({"circuit": circuit[:, :, 0].ravel(), "loss": loss.ravel()}),
                    "What the circuit adds to the step, on held-out seeds",
                )
            },
            notes=[
                f"variants with a sink in {SEEDS} seeds: {', '.join(variants)}",
                f"having more of a sink than the other seeds at a step and more loss still to be gained: correlation "
                f"{correlation}",
            ],
        )


def held_out_errors(runs: Sequence[Run], seed: int = 0) -> pd.DataFrame:
    """Absolute errors of the remaining loss, a line for each run, held out, and checkpoint but the last."""
    rng = np.random.default_rng(seed)
    lines = []
    for held_out in sorted({run.seed for run in runs}):
        others = [run for run in runs if run.seed != held_out]
        slopes = _slopes(*deviations(others))
        for run in (run for run in runs if run.seed == held_out):
            same = of_variant(others, run.variant)
            expected = np.mean([remaining(other) for other in same], axis=0)
            moved = features(run) - np.mean([features(other) for other in same], axis=0)
            errors = {
                "step_alone": expected,
                "step_and_circuit": expected + moved @ slopes,
                "shuffled_circuit": expected + rng.permutation(moved) @ slopes,
            }
            for i, value in enumerate(remaining(run)):
                told = {name: abs(float(predicted[i] - value)) for name, predicted in errors.items()}
                about = {"run": run.name, "seed": run.seed, "step": run["step"][i]}
                lines.append({**about, "remaining": value, **told})
    return pd.DataFrame(lines)


def remaining(run: Run) -> Float[np.ndarray, " checkpoint"]:
    """The loss still to be gained, in nats per token, at every checkpoint but the last, where it is 0 by definition."""
    return (run["loss"] - run["loss"][-1])[:-1]


def features(run: Run) -> Float[np.ndarray, "checkpoint 2"]:
    """The circuit at the same checkpoints: sink rate from layer 2 on and log of the norm ratio."""
    return np.column_stack([run["sink_rate_from_layer_2"], np.log(run["norm_ratio"])])[:-1]


def deviations(
    runs: Sequence[Run],
) -> tuple[Float[np.ndarray, "run checkpoint 2"], Float[np.ndarray, "run checkpoint"]]:
    """How far each run is from its variant's mean at the same checkpoint: in its circuit, and in remaining loss."""
    circuit, loss = [], []
    for run in runs:
        same = of_variant(runs, run.variant)
        circuit.append(features(run) - np.mean([features(other) for other in same], axis=0))
        loss.append(remaining(run) - np.mean([remaining(other) for other in same], axis=0))
    return np.stack(circuit), np.stack(loss)


def lead_and_lag(
    circuit: Float[np.ndarray, "run checkpoint"], loss: Float[np.ndarray, "run checkpoint"]
) -> pd.DataFrame:
    """The correlation of the circuit's deviation with the loss's so many checkpoints later (earlier, if negative)."""
    lines = []
    for lag in LAGS:
        cut = slice(max(0, -lag), circuit.shape[1] - max(0, lag))
        moved = np.roll(loss, -lag, axis=1)[:, cut]
        lines.append({"lag": lag, "correlation": _correlation(np.stack([circuit[:, cut], moved], axis=2))})
    return pd.DataFrame(lines)


def _can_be_held_out(runs: Sequence[Run], variant: str) -> bool:
    """Whether a variant has enough seeds, all with a sink."""
    found = of_variant(runs, variant)
    return len(found) >= SEEDS and all(run.formation is not None for run in found)


def _check_steps(runs: Sequence[Run]) -> None:
    """Make sure that the runs were measured at the same steps.

    Raises:
        NotApplicable: they were not.
    """
    measured: dict[str, list[str]] = {}
    for run in runs:
        measured.setdefault(", ".join(f"{step:g}" for step in run["step"]), []).append(run.name)
    if len(measured) > 1:
        told = "; ".join(f"{', '.join(names)}: {steps}" for steps, names in measured.items())
        raise NotApplicable(f"remaining losses compare at equal steps, and these runs have different ones: {told}")


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
