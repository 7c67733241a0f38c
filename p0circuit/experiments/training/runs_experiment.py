"""What the experiments about training share: finished runs in, a `Result` out. No model is loaded."""

from __future__ import annotations

import hashlib
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar

from p0circuit.experiments.base import NotApplicable
from p0circuit.experiments.claim import Claim
from p0circuit.figures.training import TrainingCurve
from p0circuit.results import Result
from p0circuit.training.runs import Run, of_variant

REFERENCE = "bos"
"""The variant that claims about training are judged on: every row begins with BOS, as in the paper's own training."""
FIGURE_VARIANTS = (REFERENCE, "tnlm", "force-sink", "moe", "baseline", "p0-nano")
"""What figures show; tables have all runs."""


class RunsExperiment(ABC):
    """A measurement over training runs; a subclass sets `id`, `title` and `claim`, and writes `measure`."""

    id: ClassVar[str]
    title: ClassVar[str]
    claim: ClassVar[Claim]

    @abstractmethod
    def measure(self, runs: Sequence[Run], reference: str) -> Result:
        """The measurement itself, judged on the runs of the variant `reference`; `run` adds verdict and provenance.

        Raises:
            NotApplicable: these runs cannot tell.
        """

    def run(self, runs: Sequence[Run], reference: str = REFERENCE) -> Result:
        """Measure, and judge the claim; `runs` as `training.runs.as_trained` gives them.

        Raises:
            NotApplicable: these runs cannot tell.
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
        return result


def runs_with_sink(runs: Sequence[Run], variant: str, least: int = 2) -> list[Run]:
    """The runs of a variant that ended with a sink.

    Raises:
        NotApplicable: fewer than `least` did.
    """
    found = [run for run in of_variant(runs, variant) if run.formation is not None]
    if len(found) < least:
        raise NotApplicable(
            f"{len(found)} of {len(of_variant(runs, variant))} runs of {variant!r} end with a sink; this needs {least}"
        )
    return found


def training_curves_of(runs: Sequence[Run]) -> list[TrainingCurve]:
    """The runs that figures show, as their lines."""
    chosen = [run for variant in FIGURE_VARIANTS for run in of_variant(runs, variant)]
    return [TrainingCurve(run.name, run.variant, run.table, run.formation) for run in chosen]
