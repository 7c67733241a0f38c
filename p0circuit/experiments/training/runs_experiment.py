"""What the experiments about training share: finished runs in, a `Result` out. No model is loaded."""

from __future__ import annotations

import hashlib
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar

from p0circuit.experiments.base import NotApplicable
from p0circuit.experiments.claim import Claim
from p0circuit.figures.training import TrainingCurve
from p0circuit.results import Result
from p0circuit.training.runs import Run, of_variant

if TYPE_CHECKING:
    from matplotlib.figure import Figure

REFERENCE = "bos"
"""The variant that claims about training are judged on: every row begins with BOS, as in the paper's own training."""
FIGURE_VARIANTS = (REFERENCE, "tnlm", "force-sink", "moe", "baseline", "p0-nano")
"""The variants in the figures; tables have all runs."""


class RunsExperiment(ABC):
    """A measurement over training runs.

    A subclass sets `id`, `title` and `claim`, and defines `measure` and `draw`.

    Attributes:
        id: name of the experiment on the command line, in file names and in claims.json.
        title: heading in the report.
        claim: the claim it tests.

    Example:
        result = Early().run(as_trained(shipped_runs()))
        print(result.metrics["latest_formation_share"], result.judgement)
    """

    id: ClassVar[str]
    title: ClassVar[str]
    claim: ClassVar[Claim]

    @abstractmethod
    def measure(self, runs: Sequence[Run], reference: str) -> Result:
        """Measure: fill the metrics, tables and notes of a result. `run` adds judgement, provenance and figures.

        Args:
            runs: all runs.
            reference: the variant whose runs the claim is judged on.

        Raises:
            NotApplicable: the claim cannot be judged on these runs.
        """

    def draw(self, result: Result) -> dict[str, Figure]:
        """Draw the figures of a result.

        Args:
            result: a result of this experiment, from `measure`; one that was read from disk lacks the curves.

        Returns:
            Figures by name; the names are part of the file names.
        """
        return {}

    def run(self, runs: Sequence[Run], reference: str = REFERENCE, figures: bool = True) -> Result:
        """Measure, judge the claim, record the provenance, and draw the figures.

        Args:
            runs: the runs, each once, as `training.runs.as_trained` returns them.
            reference: the variant whose runs the claim is judged on.
            figures: whether to draw.

        Raises:
            NotApplicable: the claim cannot be judged on these runs.
        """
        started = time.monotonic()
        result = self.measure(runs, reference)
        result.claim, result.judgement = self.claim.to_json(), self.claim.judge(result.metrics)
        digest = hashlib.sha256()
        for run in runs:
            digest.update(run.table.to_csv().encode())
        result.provenance |= {
            "runs": [f"{run.name} ({run.first})" for run in runs],
            "reference": reference,
            "fingerprint": digest.hexdigest(),
            "seconds": round(time.monotonic() - started, 2),
        }
        if figures:
            result.figures = {**result.figures, **self.draw(result)}
        return result


def runs_with_sink(runs: Sequence[Run], variant: str, least: int = 2) -> list[Run]:
    """Return the runs of a variant that end with a sink.

    Args:
        runs: all runs.
        variant: name of the variant.
        least: number of such runs that are needed.

    Raises:
        NotApplicable: there are fewer.
    """
    of_this = of_variant(runs, variant)
    with_sink = [run for run in of_this if run.formation is not None]
    if len(with_sink) < least:
        raise NotApplicable(
            f"{len(with_sink)} of {len(of_this)} runs of {variant!r} end with a sink; this needs {least}"
        )
    return with_sink


def training_curves_of(runs: Sequence[Run], variants: Sequence[str] = FIGURE_VARIANTS) -> list[TrainingCurve]:
    """Return the runs of some variants as curves, with their share of the tokens as a column.

    Args:
        runs: all runs.
        variants: names of the variants, in the order of the legend.
    """
    return [
        TrainingCurve(run.name, run.variant, run.table.assign(share=run.share), run.formation)
        for variant in variants
        for run in of_variant(runs, variant)
    ]
