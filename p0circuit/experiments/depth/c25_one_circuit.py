"""One circuit or several? If one mechanism makes the sink, P0 has the same direction wherever heads read it.

1. The directions of the first and the last stage (`stages.py`), each the mean of unit vectors over samples, and their
   cosine, with an interval over samples. A model with one stage has one direction.
2. Beside it, the strongest writer of each stage stands in C21's table.

Source: ours; Peng et al., arXiv 2603.06591, describe one mechanism.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Float

from p0circuit.experiments.base import Experiment, NotApplicable
from p0circuit.experiments.claim import Claim, Criterion
from p0circuit.experiments.depth.locator import DepthConfig
from p0circuit.experiments.depth.stages import Stage, find_stages
from p0circuit.experiments.sink_under_study import studied_sink
from p0circuit.hooked_model import HookedModel
from p0circuit.prompts import PromptSet
from p0circuit.recording.quantities import NORM_RATIO, residual_at
from p0circuit.recording.record import record
from p0circuit.results import Result
from p0circuit.stats import Interval, bootstrap

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    pass


class OneCircuit(Experiment[DepthConfig]):
    """The directions of the stages, compared."""

    id = "one-circuit"
    title = "One circuit or several"
    config_type = DepthConfig
    claim = Claim(
        id="C25",
        title="One circuit",
        source="Peng et al., arXiv 2603.06591",
        statement="One mechanism makes the sink: P0 has one direction in all layers whose heads read it.",
        measure="Cosine between P0's mean directions in the first and in the last stage.",
        criteria=(Criterion("cosine_of_first_and_last_stage", ">=", 0.9, "low"),),
        control="Untrained weights, shuffled neurons and a model without read-out.",
    )

    def passes(self, model: HookedModel, prompts: PromptSet) -> float:
        """Declare no passes: everything is in the clean recording."""
        return 0.0  # all of it is in the clean recording

    def measure(self, model: HookedModel, prompts: PromptSet) -> Result:
        """Raises NotApplicable where there is no sink or no stage."""
        import pandas as pd

        sink = studied_sink(model, prompts)
        recording = record(model, sink.prompts, [residual_at(), NORM_RATIO])
        streams = recording[residual_at()].double().numpy()
        stages = find_stages(streams, recording[NORM_RATIO].double().mean(0).numpy(), sink.heads)
        if not stages:
            raise NotApplicable("P0 has one direction at no depth that a sink head reads: there is no stage")
        n = len(streams)
        cosine = cosine_of(streams, stages[0], stages[-1]) if len(stages) > 1 else Interval(1.0, 1.0, 1.0, n)
        metrics = {
            "cosine_of_first_and_last_stage": cosine,
            "stages": Interval(len(stages), len(stages), len(stages), n),
        }
        lines = [
            {"stage": number, "other": second, "cosine": float(stage.direction @ other.direction)}
            for number, stage in enumerate(stages, 1)
            for second, other in enumerate(stages, 1)
        ]
        notes = [sink.note, *(f"stage {number}: {stage.blocks}" for number, stage in enumerate(stages, 1))]
        if len(stages) == 1:
            notes.append("there is one stage, so its direction is that of all")
        table = pd.DataFrame(lines)
        return Result(self.id, self.title, metrics, {"cosines": table}, notes=notes)

    def draw(self, result: Result) -> dict[str, Figure]:
        """Draw the cosines between the directions of all stages."""
        from p0circuit.figures.maps import heat_maps

        square = result.tables["cosines"].pivot(index="stage", columns="other", values="cosine").to_numpy()
        title = f"{result.model_title}: cosine between the stages' directions (n = {result.metrics['stages'].n})"
        return {"cosines": heat_maps({"stages": square}, title, "cosine", x_label="stage")}


def cosine_of(streams: Float[np.ndarray, "sample depth d_model"], first: Stage, last: Stage) -> Interval:
    """The cosine between the mean directions at two stages' peaks, both drawn again with the samples."""
    peaks = [
        max(range(stage.first, stage.last + 1), key=lambda depth: float((streams[:, depth] @ stage.direction).mean()))
        for stage in (first, last)
    ]
    units = [streams[:, peak] / np.linalg.norm(streams[:, peak], axis=-1, keepdims=True) for peak in peaks]

    def cosine(means: Float[np.ndarray, "draw 2 d_model"]) -> Float[np.ndarray, " draw"]:
        one, other = means[:, 0], means[:, 1]
        return (one * other).sum(-1) / np.linalg.norm(one, axis=-1) / np.linalg.norm(other, axis=-1)

    return bootstrap(np.stack(units, axis=1), cosine)
