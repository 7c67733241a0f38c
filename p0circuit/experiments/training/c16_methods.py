"""C16: what do the training methods of the paper's second version do to the sink, seed by seed?

1. TNLM (no loss on the prediction made at P0) and Force-sink (before every norm P0 keeps k channels and all other
   positions keep the rest) are compared with the same recipe without them: same corpus, tokens and seeds, and BOS at
   the beginning of every row.
2. Runs are compared in pairs of the same seed: the share of the tokens at which the sink emerges, and the final excess
   score of the sink heads. Every run has its own sink heads, so the sink rate is reported too.
3. Also reported: the norm ratio of P0, since a sink need not come with an outlier, and the loss at equal tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import pandas as pd

from p0circuit.experiments.base import NotApplicable
from p0circuit.experiments.claim import Claim, Criterion
from p0circuit.experiments.training.runs_experiment import RunsExperiment, training_curves_of
from p0circuit.figures.training import method_comparison
from p0circuit.results import Result
from p0circuit.stats import Interval, over_seeds
from p0circuit.training.runs import Run, of_variant, seeds_in_common

if TYPE_CHECKING:
    from matplotlib.figure import Figure

METHODS = {"tnlm": "TNLM", "force-sink": "Force-sink"}
"""The methods: name of the variant, and name in figures."""


class Methods(RunsExperiment):
    """TNLM and Force-sink compared with the baseline, over seeds."""

    id = "methods"
    title = "TNLM and Force-sink against the baseline"
    claim = Claim(
        id="C16",
        title="Training methods",
        source="arXiv 2603.06591 v2, on TNLM and Force-sink",
        statement="TNLM and Force-sink make the sink form earlier and end higher than the same training without them.",
        measure="Differences to the baseline by pairs of the same seed, with Student's interval over seeds: share of "
        "tokens until formation (1 where none forms), and final excess score of the sink heads.",
        criteria=tuple(
            criterion
            for name in ("tnlm", "force_sink")
            for criterion in (
                Criterion(f"{name}_formation_share_difference", "<", 0, at="high"),
                Criterion(f"{name}_excess_difference", ">", 0, at="low"),
            )
        ),
        control="the other seeds: the interval is over them",
    )

    def measure(self, runs: Sequence[Run], reference: str) -> Result:
        """Compare both methods with the baseline; the base class documents arguments and errors."""
        metrics: dict[str, Interval] = {}
        for variant in METHODS:
            pairs = _pairs(runs, variant, reference)
            for name, value in _QUANTITIES.items():
                differences = [value(run) - value(baseline) for run, baseline in pairs]
                metrics[_metric(variant, name)] = over_seeds(differences)
        table = pd.DataFrame(
            [
                {"run": run.name, "variant": run.variant, "seed": run.seed, "first": run.first}
                | {name: value(run) for name, value in _QUANTITIES.items()}
                for run in runs
            ]
        )
        return Result(
            self.id,
            self.title,
            metrics,
            {"runs": table},
            drawing={"curves": training_curves_of(runs, (reference, *METHODS))},
        )

    def draw(self, result: Result) -> dict[str, Figure]:
        """Draw sink and loss along training, the final sink and norm ratio, and the differences to the baseline."""
        if "curves" not in result.drawing:
            return {}
        curves = result.drawing["curves"]
        table = result.tables["runs"]
        final = pd.DataFrame(table[table["variant"].isin({curve.group for curve in curves})])
        differences = {
            f"{method},\n{label}": result.metrics[_metric(variant, name)]
            for variant, method in METHODS.items()
            for name, label in (("formation_share", "share of tokens"), ("excess", "excess score"))
        }
        title = (
            "Training methods: when the sink emerges, and whether it needs an outlier (mean and range over n seeds; "
            "circles: the sink of a run has emerged; differences with 95 % intervals over "
            f"{min(interval.n for interval in differences.values())} seeds)"
        )
        return {"methods": method_comparison(curves, final, differences, title)}


def _metric(variant: str, quantity: str) -> str:
    return f"{variant.replace('-', '_')}_{quantity}_difference"


def _pairs(runs: Sequence[Run], variant: str, reference: str) -> list[tuple[Run, ...]]:
    """The runs of a method and of its baseline, in pairs of the same seed.

    Raises:
        NotApplicable: there are fewer than two, or they differ in more than the method.
    """
    pairs = seeds_in_common(of_variant(runs, variant), of_variant(runs, reference))
    if len(pairs) < 2:
        raise NotApplicable(f"{variant!r} and {reference!r} have {len(pairs)} seeds in common; an interval needs two")
    for run, baseline in pairs:
        if run.first != baseline.first:
            raise NotApplicable(
                f"rows of {run.name} begin with {run.first} and those of {baseline.name} with {baseline.first}: they "
                "differ in more than the method"
            )
    return pairs


_QUANTITIES: dict[str, Callable[[Run], float]] = {
    "formation_share": lambda run: run.formation_share,
    "excess": lambda run: float(run["excess"][-1]),
    "sink_rate": lambda run: float(run["sink_rate"][-1]),
    "norm_ratio": lambda run: float(run["largest_norm_ratio"][-1]),
    "loss": lambda run: float(run["loss"][-1]),
}
"""The quantities that are compared, one number per run."""
