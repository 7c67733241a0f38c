"""C16: what the training methods of the paper's second version do to the sink, seed by seed.

1. TNLM (no loss on the prediction made at P0) and Force-sink (P0 keeps k channels, all others the rest, before every
   norm) beside the same recipe without them: same corpus, tokens, seeds, and BOS at every row's beginning.
2. By pairs of the same seed: share of tokens until the sink has formed, and final excess score of the sink heads. A
   run's sink heads are its own, few or many: the sink rate stands beside their score.
3. Beside it the outlier (norm ratio of P0), since a sink need not have one, and the loss at equal tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd

from p0circuit.experiments.base import NotApplicable
from p0circuit.experiments.claim import Claim, Criterion
from p0circuit.experiments.training.runs_experiment import FIGURE_VARIANTS, RunsExperiment, training_curves_of
from p0circuit.figures.training import method_comparison
from p0circuit.results import Result
from p0circuit.stats import Interval, over_seeds
from p0circuit.training.runs import Run, of_variant, seeds_in_common

METHODS = {"tnlm": "TNLM", "force-sink": "Force-sink"}


class Methods(RunsExperiment):
    """TNLM and Force-sink against the baseline, over seeds."""

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
        metrics: dict[str, Interval] = {}
        for variant in METHODS:
            pairs = _pairs(runs, variant, reference)
            for name, value in _MEASURED.items():
                differences = [value(run) - value(baseline) for run, baseline in pairs]
                metrics[f"{variant.replace('-', '_')}_{name}_difference"] = over_seeds(differences)
        table = pd.DataFrame(
            [
                {"run": run.name, "variant": run.variant, "seed": run.seed, "first": run.first}
                | {name: value(run) for name, value in _MEASURED.items()}
                for run in runs
            ]
        )
        return Result(
            self.id,
            self.title,
            metrics,
            {"runs": table},
            {
                "methods": method_comparison(
                    training_curves_of(runs),
                    pd.DataFrame(table[table["variant"].isin(FIGURE_VARIANTS)]),
                    "Training methods: when the sink forms, and whether it needs an outlier",
                )
            },
        )


def _pairs(runs: Sequence[Run], variant: str, reference: str) -> list[tuple[Run, ...]]:
    """The runs of a method and of its baseline by seed.

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


_MEASURED = {
    "formation_share": lambda run: run.formation_share,
    "excess": lambda run: float(run["excess"][-1]),
    "sink_rate": lambda run: float(run["sink_rate"][-1]),
    "norm_ratio": lambda run: float(run["largest_norm_ratio"][-1]),
    "loss": lambda run: float(run["loss"][-1]),
}
"""What is compared: of a run, one number each."""
